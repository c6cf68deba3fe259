//! SYN cookies (RFC 4987, 3.6): for the last packet of such a handshake there is no socket yet, only our listener.
use lab::runner::Test;
use lab::traffic::craft::{self, SYN};
use lab::traffic::greeting;
use lab::{Dial, wait_until};

use crate::support::{Bed, DEADLINE, allow_all, echoes, greeted, small};

pub(crate) const TESTS: &[Test] = &lab::tests![
    connections_work_with_syn_cookies,
    a_full_backlog_leaves_others_their_connections,
];

/// `net.ipv4.tcp_syncookies` is of both families (ip-sysctl); 2 sends nothing but cookies.
fn connections_work_with_syn_cookies() {
    let bed = Bed::enforced(&[], &[allow_all()]);
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

/// A flood of SYNs without a third packet, to a pod that policy allows.
fn a_full_backlog_leaves_others_their_connections() {
    let mut bed = Bed::bare(small());
    bed.write_policies(&[allow_all()]);
    for node in bed.lab.nodes() {
        // The daemon's listeners have no longer backlogs than this.
        let sysctls = [("core/somaxconn", "8"), ("ipv4/tcp_syncookies", "1")];
        node.netns().set_sysctls(&sysctls).unwrap();
    }
    // One queue is one listener.
    for node in 0..2 {
        bed.install(node, &["--queues", "1"]);
        bed.start(node, &["--queues", "1"]);
    }
    let [a, b, d] = ["x/a", "x/b", "x/d"].map(|name| bed.lab.pod(name));
    let node = bed.lab.node(0);
    for to in b.addrs(80) {
        greeted(&a, to);
        greeted(&d, to);
    }
    // It never hears the SYN-ACKs, so it never resets them.
    d.nft("table inet deaf { chain in { type filter hook prerouting priority -300; tcp dport 20000-29999 drop; }; }")
        .unwrap();
    let way = d.injector().unwrap();
    for (from, to) in d.addrs(0).into_iter().zip(b.addrs(80)) {
        let sent = cookies_sent(&node);
        for port in 20_000..20_100 {
            let syn = craft::tcp((from.ip(), port).into(), to, SYN, 1, &[]);
            way.send(&syn).unwrap();
        }
        wait_until(DEADLINE, "the backlog to be full", || {
            cookies_sent(&node) > sent + 20
        })
        .unwrap();
        let before = cookies(&node);
        let dials: Vec<_> = (0..20).map(|_| Dial::new(&a, to)).collect();
        for outcome in lab::traffic::connect_all(&dials, DEADLINE).unwrap() {
            let stream = outcome.into_stream().unwrap();
            greeting(&stream, DEADLINE).unwrap();
            echoes(&stream, "through the flood");
        }
        assert!(cookies(&node) > before, "{to}: none began by a cookie");
    }
}

/// The number of valid cookies that a node received.
fn cookies(node: &lab::Host) -> u64 {
    tcp_ext(node, "SyncookiesRecv")
}

fn cookies_sent(node: &lab::Host) -> u64 {
    tcp_ext(node, "SyncookiesSent")
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
