//! Many UDP flows of one pod, and their effect on its neighbours and on the daemon's memory.
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use kernel::netlink::{self, Attributes, Header};
use lab::{Cluster, Host, PodSpec, wait_until};
use nix::sys::socket::{MsgFlags, NetlinkAddr, SockProtocol, sendto};
use serde_json::{Value, json};
use testbed::runner::Test;

use testbed::{DEADLINE, TestCluster, metric, policy};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    udp_flood_delays_no_policy_change,
    flows_of_a_flooding_pod_are_all_severed,
    memory_is_freed_after_a_udp_flood,
];

/// Flows of the flooding pod.
const FLOOD: u32 = 190_000;
/// Fewer, which a debug build can sever within seconds.
const LARGE: u32 = 50_000;
/// A pod's share of the list.
const SHARE: u64 = 4096;
/// A change is in force long before, also in a debug build on a busy machine.
const IN_FORCE_WITHIN: Duration = Duration::from_secs(1);
/// The mark of flows that the kernel carries, with the default mask.
const CARRIED: u32 = 0x800;

/// One node: x/a floods, x/d sends to x/b.
fn bed() -> TestCluster {
    let pod = |name: &str| PodSpec::new("x", name).label("pod", name);
    let pods = ["a", "b", "d"].map(pod);
    let bed = TestCluster::bare(Cluster::builder().nodes(1).pods(pods));
    bed.lab.pod("x/b").serve_udp(&[53]).unwrap();
    bed
}

/// Under egress policy, which allows everything but `except`.
fn egress(pod: &str, except: Option<&str>) -> Value {
    let to = match except {
        Some(except) => json!([{ "ipBlock": { "cidr": "0.0.0.0/0", "except": [except] } }]),
        None => json!([]),
    };
    let spec = json!({ "podSelector": { "matchLabels": { "pod": pod } }, "policyTypes": ["Egress"], "egress": [{ "to": to }] });
    policy(&format!("egress-{pod}"), &spec)
}

/// Adds `count` carried flows from an address to addresses outside to conntrack on the node.
fn flood(node: &Host, from: Ipv4Addr, count: u32) {
    let send_all = || {
        let socket = netlink::asking(SockProtocol::NetlinkNetFilter).unwrap();
        let kernel = NetlinkAddr::new(0, 0);
        for batch in (0..count).collect::<Vec<_>>().chunks(200) {
            let mut out = Vec::new();
            batch
                .iter()
                .for_each(|number| entry(&mut out, from, *number));
            sendto(socket.as_raw_fd(), &out, &kernel, MsgFlags::empty()).unwrap();
        }
    };
    node.run(send_all).unwrap();
    let there = node.run(|| fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count"));
    let there: u32 = there.unwrap().unwrap().trim().parse().unwrap();
    assert!(there >= count, "{there} entries");
}

/// `IPCTNL_MSG_CT_NEW` of a flow of UDP that was answered (linux/netfilter/nfnetlink_conntrack.h).
fn entry(out: &mut Vec<u8>, from: Ipv4Addr, number: u32) {
    let server = Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 18, 0, 0)) + number / 50_000);
    let port = u16::try_from(1024 + number % 50_000).unwrap();
    let tuple = |m: &mut Attributes<'_>, source: Ipv4Addr, ports: [u16; 2], target: Ipv4Addr| {
        m.nested(1, |ip| {
            ip.bytes(1, &source.octets());
            ip.bytes(2, &target.octets());
        });
        m.nested(2, |transport| {
            transport.bytes(1, &[17]);
            transport.bytes(2, &ports[0].to_be_bytes());
            transport.bytes(3, &ports[1].to_be_bytes());
        });
    };
    let header = Header {
        kind: 0x100,
        flags: netlink::REQUEST | netlink::CREATE,
        family: 2,
        ..Header::default()
    };
    netlink::write(out, header, |m| {
        m.nested(1, |it| tuple(it, from, [port, 9], server));
        m.nested(2, |it| tuple(it, server, [9, port], from));
        // Seen reply, assured, confirmed.
        m.bytes(3, &0xe_u32.to_be_bytes());
        m.bytes(7, &600_u32.to_be_bytes());
        m.bytes(8, &CARRIED.to_be_bytes());
    });
}

fn address(host: &Host) -> Ipv4Addr {
    match host.addr_v4(0) {
        SocketAddr::V4(v4) => *v4.ip(),
        SocketAddr::V6(_) => unreachable!("addr_v4 gave an IPv6 address"),
    }
}

/// Whether a question from this socket is answered.
fn answered(socket: &UdpSocket, to: SocketAddr) -> bool {
    let timeout = Some(Duration::from_millis(300));
    socket.set_read_timeout(timeout).unwrap();
    socket.send_to(b"who?", to).unwrap();
    socket.recv(&mut [0; 512]).is_ok()
}

/// How many of the node's entries still have the mark of kernel flows.
fn carried(node: &Host) -> usize {
    let list = node.run(|| fs::read_to_string("/proc/thread-self/net/nf_conntrack"));
    let list = list.unwrap().unwrap();
    list.lines()
        .filter(|line| line.contains("mark=2048 "))
        .count()
}

fn udp_flood_delays_no_policy_change() {
    let mut bed = bed();
    let node = bed.lab.node(0);
    let [a, b, d] = ["x/a", "x/b", "x/d"].map(|name| bed.lab.pod(name));
    let (allowed, others) = (egress("d", None), egress("a", None));
    bed.write_policies(&[others.clone(), allowed.clone()]);
    bed.install(0, &[]);
    flood(&node, address(&a), FLOOD);
    bed.start(0, &[]);
    wait_until(DEADLINE, "the flood to be known", || {
        metric(&node, "portreeve_kernel_flows") >= SHARE
    })
    .unwrap();
    let to = b.addr_v4(53);
    let denied = egress("d", Some(&format!("{}/32", address(&b))));
    let socket = d.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    for round in 0..3 {
        assert!(answered(&socket, to), "round {round}");
        let since = Instant::now();
        bed.apply(&[others.clone(), denied.clone()]);
        let deny = since.elapsed();
        assert!(!answered(&socket, to), "round {round}: it was not cut");
        let since = Instant::now();
        bed.apply(&[others.clone(), allowed.clone()]);
        let allow = since.elapsed();
        println!("round {round}: a denial in force after {deny:?}, a permission after {allow:?}");
        assert!(deny.max(allow) < IN_FORCE_WITHIN, "{deny:?} {allow:?}");
    }
}

fn flows_of_a_flooding_pod_are_all_severed() {
    let mut bed = bed();
    let node = bed.lab.node(0);
    let a = bed.lab.pod("x/a");
    bed.write_policies(&[egress("a", None)]);
    bed.install(0, &[]);
    flood(&node, address(&a), 16_384);
    bed.start(0, &[]);
    wait_until(DEADLINE, "the flood to be known", || {
        metric(&node, "portreeve_kernel_flows") == SHARE
    })
    .unwrap();
    assert!(carried(&node) > usize::try_from(SHARE).unwrap());
    let since = Instant::now();
    bed.apply(&[egress("a", Some("198.18.0.0/15"))]);
    let in_force = since.elapsed();
    wait_until(DEADLINE, "all of them to be cut", || carried(&node) == 0)
        .unwrap_or_else(|error| panic!("{error}: {} left\n{}", carried(&node), bed.logs()));
    let all = since.elapsed();
    println!("in force after {in_force:?}, all cut after {all:?}");
}

/// The value of `key` in the daemon's `/proc/PID/status`, in bytes.
fn memory(bed: &mut TestCluster, key: &str) -> u64 {
    let id = bed.daemon(0).child.id();
    let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

fn memory_is_freed_after_a_udp_flood() {
    const MIB: u64 = 1 << 20;
    let mut bed = bed();
    let node = bed.lab.node(0);
    let a = bed.lab.pod("x/a");
    bed.write_policies(&[egress("a", None)]);
    bed.enforce(&[]);
    let before = memory(&mut bed, "VmRSS");
    bed.kill(0);
    flood(&node, address(&a), LARGE);
    bed.start(0, &[]);
    wait_until(DEADLINE, "the flood to be known", || {
        metric(&node, "portreeve_kernel_flows") >= SHARE
    })
    .unwrap();
    let flooded = memory(&mut bed, "VmHWM");
    // All cut, which also ends them for the list.
    bed.apply(&[egress("a", Some("198.18.0.0/15"))]);
    wait_until(DEADLINE, "the last flow to be gone", || {
        metric(&node, "portreeve_kernel_flows") == 0 && carried(&node) == 0
    })
    .unwrap();
    let highest = memory(&mut bed, "VmHWM");
    wait_until(DEADLINE, "memory to come back", || {
        memory(&mut bed, "VmRSS") < before + 8 * MIB
    })
    .unwrap_or_else(|error| panic!("{error}: {} MiB", memory(&mut bed, "VmRSS") / MIB));
    println!(
        "MiB: {} before, {} with the flood, at most {}, {} after",
        before / MIB,
        flooded / MIB,
        highest / MIB,
        memory(&mut bed, "VmRSS") / MIB
    );
    assert!(highest < before + 24 * MIB, "{} MiB at most", highest / MIB);
}
