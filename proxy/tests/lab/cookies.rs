//! SYN cookies (RFC 4987, 3.6): for the last packet of such a handshake there is no socket yet, only our listener.
use lab::traffic::greeting;
use testbed::runner::Test;

use testbed::{DEADLINE, TestCluster, allow_all, echoes};

pub(crate) const TESTS: &[Test] = &testbed::tests![connections_work_with_syn_cookies,];

/// `net.ipv4.tcp_syncookies` is of both families (ip-sysctl); 2 sends nothing but cookies.
fn connections_work_with_syn_cookies() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    for node in bed.lab.nodes() {
        let sysctls = [("ipv4/tcp_syncookies", "2")];
        node.netns().set_sysctls(&sysctls).unwrap();
    }
    let (a, node) = (bed.lab.pod("x/a"), bed.lab.node(0));
    for way in bed.ways(80) {
        let before = cookies(&node);
        let streams: Vec<_> = (0..3)
            .map(|_| {
                let stream = a.connect(way.to, DEADLINE).unwrap().into_stream();
                stream.unwrap_or_else(|error| panic!("{}: {error}", way.what))
            })
            .collect();
        for stream in &streams {
            assert_eq!(greeting(stream, DEADLINE).unwrap().server, way.server);
            echoes(stream, "and on");
        }
        assert_eq!(cookies(&node), before + 3, "{}", way.what);
    }
}

/// The number of valid cookies that a node received.
fn cookies(node: &lab::Host) -> u64 {
    tcp_ext(node, "SyncookiesRecv")
}

/// A counter of the kernel's TCP (proc(5), `net/netstat`).
fn tcp_ext(node: &lab::Host, name: &str) -> u64 {
    let read = || std::fs::read_to_string("/proc/thread-self/net/netstat");
    let text = node.run(read).unwrap().unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let mut pairs = names.split(' ').zip(values.split(' '));
    let (_, value) = pairs.find(|(known, _)| *known == name).unwrap();
    value.parse().unwrap()
}
