//! Load from one pod does not affect its neighbours.
pub(crate) mod handshakes;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use lab::traffic::craft;
use lab::{Cluster, Gateway, Host, Kind, PodSpec, wait_until};
use socket2::{Domain, Protocol, Socket, Type};
use testbed::runner::Test;
use testbed::streams::StopOnDrop;

use crate::bridges::BRIDGE;
use crate::neighbour::{are_unharmed, at_rate, in_bursts};
use testbed::{
    DEADLINE, SOON, TestCluster, allow_all, allow_ingress, connected, deny_egress, deny_ingress,
    echoes, metric,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    denied_syn_flood_does_not_stop_other_pods,
    only_the_pod_over_its_bound_is_limited,
    node_and_pod_limits_are_counted_separately,
    packets_to_unknown_addresses_affect_nobody,
    spoofed_unowned_addresses_on_bridge_affect_nobody,
    flood_to_unowned_addresses_delays_only_itself,
];

/// How many SYNs must have reached the gate before they count as a flood.
const FLOOD: usize = 20_000;
/// Connections of the neighbour that must succeed meanwhile.
const CONNECTS: usize = 200;
/// Longer than a round trip during the flood.
const BRIEF: Duration = Duration::from_millis(50);
/// SYNs of the flood that wait for the gate at most. A daemon that gets little of a busy machine's time, and
/// was built without optimisation, takes fewer than the 10,000 a second that the rules let through.
const WAITING: u64 = 1024;

fn denied_syn_flood_does_not_stop_other_pods() {
    let policies = [deny_egress("d"), allow_ingress("b"), allow_ingress("c")];
    let bed = TestCluster::enforced(&[], &policies);
    let (a, d, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/d"), bed.lab.node(0));
    let (stop, sent) = (AtomicBool::new(false), AtomicUsize::new(0));
    let victim = bed.lab.pod("x/b");
    thread::scope(|scope| {
        scope.spawn(|| flood(&d, &victim, &node, &stop, &sent));
        // Also when an assertion fails: the flood must end for the scope to end.
        let _stopped = StopOnDrop(&stop);
        let (mut connects, mut changes) = (0, 0);
        while sent.load(Ordering::Relaxed) < FLOOD || connects < CONNECTS {
            // What holds for these connections stays, though policies come and go.
            let other = [deny_ingress("d"), deny_ingress("a")][changes % 2].clone();
            bed.write_policies(&[&policies[..], &[other]].concat());
            changes += 1;
            let denied = d.connect(victim.addr_v4(81), BRIEF).unwrap();
            assert!(!denied.is_connected(), "change {changes}: {denied}");
            for way in bed.ways(80) {
                let outcome = a.connect(way.to, DEADLINE).unwrap();
                assert!(
                    outcome.is_connected(),
                    "{}, {sent:?} sent: {outcome}",
                    way.what
                );
                connects += 1;
            }
        }
    });
    let denied = metric(
        &node,
        "portreeve_policy_verdicts_total{verdict=\"deny\",direction=\"egress\"}",
    );
    assert!(
        usize::try_from(denied).unwrap() >= FLOOD / 10,
        "only {denied} of {sent:?} SYNs met the gate"
    );
    // It has left nothing behind.
    bed.wait_for_no_connection();
}

/// Sends SYNs with ever new ports and sequence numbers, as fast as one thread can and the gate of `node`
/// takes them.
pub(crate) fn flood(from: &Host, to: &Host, node: &Host, stop: &AtomicBool, sent: &AtomicUsize) {
    let raw = || Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP)).unwrap();
    let socket = from.run(raw).unwrap();
    let target = SocketAddr::from((IpAddr::V4(to.ipv4()), 0)).into();
    for number in 0u32.. {
        if number.is_multiple_of(256) {
            let on = || stop.load(Ordering::Relaxed) || waiting(node) <= WAITING;
            wait_until(DEADLINE, "the gate to take a part of the flood", on).unwrap();
        }
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let (from, to) = ((from.ipv4().into(), port(number)), (to.ipv4().into(), 80));
        let segment = syn(from, to, spread(number));
        // A full interface queue is not an error here.
        if socket.send_to(&segment, &target).is_ok() {
            sent.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Packets that wait in the queues of a node: the third column.
fn waiting(node: &Host) -> u64 {
    let read = || fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue").unwrap();
    let queues = node.run(read).unwrap();
    let waiting = queues
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2));
    waiting.map(|waiting| waiting.parse::<u64>().unwrap()).sum()
}

/// A SYN without options (RFC 9293, 3.1), with its checksum.
fn syn(from: (IpAddr, u16), to: (IpAddr, u16), sequence: u32) -> [u8; 20] {
    let mut segment = [0; 20];
    segment[0..2].copy_from_slice(&from.1.to_be_bytes());
    segment[2..4].copy_from_slice(&to.1.to_be_bytes());
    segment[4..8].copy_from_slice(&sequence.to_be_bytes());
    segment[12..16].copy_from_slice(&[0x50, 0b10, 0xff, 0xff]);
    let octets = |address| match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    // The pseudo header: addresses, protocol 6, length 20.
    let header = [octets(from.0), octets(to.0), vec![0, 6, 0, 20]].concat();
    let words = header.chunks(2).chain(segment.chunks(2));
    let sum: u32 = words
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    segment[16..18].copy_from_slice(&(!u16::try_from(folded).unwrap()).to_be_bytes());
    segment
}

const SOURCE_LIMIT: &str = "portreeve_dropped_packets_total{reason=\"source_limit\"}";
const NODE_LIMIT: &str = "portreeve_dropped_packets_total{reason=\"node_limit\"}";

fn only_the_pod_over_its_bound_is_limited() {
    let bed = TestCluster::enforced(&["--max-connections-per-source", "5"], &[allow_all()]);
    let (a, d, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/d"), bed.lab.node(0));
    let to = bed.lab.pod("x/b").addr_v4(80);
    let mut held: Vec<_> = (0..5).map(|_| connected(&a, to)).collect();
    assert_eq!(a.connect(to, SOON).unwrap().kind(), Kind::TimedOut);
    assert!(metric(&node, SOURCE_LIMIT) >= 1);
    assert_eq!(metric(&node, NODE_LIMIT), 0);
    for _ in 0..5 {
        held.push(connected(&d, to));
    }
    // Its IPv6 address gets it no more.
    let to_v6 = bed.lab.pod("x/b").addr_v6(80);
    assert_eq!(a.connect(to_v6, SOON).unwrap().kind(), Kind::TimedOut);
    held.iter().for_each(|stream| echoes(stream, "undisturbed"));
    // A place that is given back can be taken again.
    drop(held.remove(0));
    held.push(connected(&a, to));
}

fn node_and_pod_limits_are_counted_separately() {
    let bed = TestCluster::enforced(&["--max-connections", "2"], &[allow_all()]);
    let [a, b, d, node] = [
        bed.lab.pod("x/a"),
        bed.lab.pod("x/b"),
        bed.lab.pod("x/d"),
        bed.lab.node(0),
    ];
    let _half = connected(&a, b.addr_v4(80));
    assert_eq!(
        a.connect(b.addr_v4(80), SOON).unwrap().kind(),
        Kind::TimedOut
    );
    assert!(metric(&node, SOURCE_LIMIT) >= 1);
    assert_eq!(metric(&node, NODE_LIMIT), 0);
    let _rest = connected(&d, a.addr_v4(80));
    assert_eq!(
        b.connect(d.addr_v4(80), SOON).unwrap().kind(),
        Kind::TimedOut
    );
    assert!(metric(&node, NODE_LIMIT) >= 1);
}

/// Connections in all; three quarters of a listener's backlog may be half-open.
const FEW: [&str; 2] = ["--max-connections", "400"];
const ALL: usize = 400;
/// SYNs a second: few enough for a daemon without optimisation on half a core, and a half-open connection is the
/// oldest of them after a quarter of a second only.
const SYNS: u32 = 400;
/// SYNs of a burst: three times as many as may wait of one user, should the daemon decide none meanwhile.
const TOO_MANY: u32 = 12_000;
const SYNS_OF_BURSTS: u32 = 15_000;
/// Connects of each neighbour.
const MEASURED: usize = 60;

/// A node with the attacked pod v, and neighbours n, o and p, all under policy and allowed everything.
fn attacked() -> TestCluster {
    attacked_behind(Gateway::LinkLocal)
}

fn attacked_behind(gateway: Gateway) -> TestCluster {
    let pod = |name: &str| PodSpec::new("x", name).node(0).label("pod", name);
    let pods = ["v", "n", "o", "p"].map(pod);
    let mut bed = TestCluster::bare(Cluster::builder().nodes(1).gateway(gateway).pods(pods));
    // The bounds are the proxy's, also for clients and servers outside.
    bed.set_env("PORTREEVE_TCP", "spliced");
    // The flood exceeds this listener's backlog as a large flood exceeds that of a real node.
    let backlog = [("core/somaxconn", "128")];
    bed.lab.node(0).netns().set_sysctls(&backlog).unwrap();
    bed.write_policies(&[allow_all()]);
    let cluster = [
        "--cluster-cidr",
        "10.244.0.0/16",
        "--cluster-cidr",
        "fd00:10:244::/48",
    ];
    bed.enforce(&[&FEW[..], &cluster].concat());
    bed
}

/// Packets that wait for a cluster address that no pod has.
fn packets_to_unknown_addresses_affect_nobody() {
    const MAY_WAIT: u64 = ALL as u64 / 8;
    let bed = attacked();
    let [v, n, o] = ["x/v", "x/n", "x/o"].map(|name| bed.lab.pod(name));
    let node = bed.lab.node(0);
    let (unknown, unknown_v6) = (
        Ipv4Addr::new(10, 244, 77, 7),
        "fd00:10:244:77::7".parse().unwrap(),
    );
    let syns = RawSyns::of(&v);
    let udp = v.run(|| UdpSocket::bind((v.ipv4(), 0)).unwrap()).unwrap();
    let (small, large) = ([0; 32], vec![0; 60_000]);
    let attack = |stop: &AtomicBool| {
        at_rate(SYNS / 2, stop, |number| {
            syns.send((v.ipv4(), port(number)), (unknown, 80), number);
            syns.send_v6((v.ipv6(), port(number)), (unknown_v6, 80), number);
            let _ = udp.send_to(&small, (unknown, port(number)));
            if number.is_multiple_of(8) {
                let _ = udp.send_to(&large, (unknown, port(number) + 1));
            }
        });
    };
    let pairs = [
        (&n, o.addr_v4(80)),
        (&n, o.addr_v6(80)),
        (&o, n.addr_v4(80)),
    ];
    let most = AtomicU64::new(0);
    let is_felt = || {
        most.fetch_max(metric(&node, "portreeve_queued_packets"), Ordering::Relaxed);
        syns.sent() > 2 * ALL
    };
    are_unharmed(&pairs, MEASURED, attack, is_felt);
    let most = most.into_inner();
    // And what has just come.
    assert!((MAY_WAIT..MAY_WAIT + 64).contains(&most), "{most} waited");
    for cause in ["waiting_limit", "too_long"] {
        let refused = metric(
            &node,
            &format!("portreeve_dropped_packets_total{{reason=\"{cause}\"}}"),
        );
        assert!(refused > 0, "{cause}");
    }
}

/// On a bridge any pod can send from addresses that no pod has. Such packets wait, however many addresses there are.
fn spoofed_unowned_addresses_on_bridge_affect_nobody() {
    let bed = attacked_behind(BRIDGE);
    let [v, n, o, p] = ["x/v", "x/n", "x/o", "x/p"].map(|name| bed.lab.pod(name));
    let node = bed.lab.node(0);
    drop(connected(&v, o.addr_v4(80)));
    let (way, sent) = (v.injector().unwrap(), AtomicUsize::new(0));
    let attack = |stop: &AtomicBool| {
        at_rate(SYNS, stop, |number| {
            let from = SocketAddr::from((nobodys(&v, number), port(number)));
            let packet = craft::tcp(from, o.addr_v6(80), craft::SYN, spread(number), &[]);
            sent.fetch_add(way.send(&packet).is_ok().into(), Ordering::Relaxed);
        });
    };
    let pairs = [
        (&n, o.addr_v4(80)),
        (&n, o.addr_v6(80)),
        (&o, p.addr_v4(80)),
        (&bed.lab.outside(), o.addr_v4(80)),
    ];
    are_unharmed(&pairs, MEASURED, attack, || {
        sent.load(Ordering::Relaxed) > ALL
    });
    let refused = metric(
        &node,
        "portreeve_dropped_packets_total{reason=\"waiting_limit\"}",
    );
    assert!(refused > 0, "the bound was not met");
}

/// From outside, with changing sources and destinations: unassigned addresses of the node's pod CIDRs.
fn flood_to_unowned_addresses_delays_only_itself() {
    let bed = attacked();
    let [n, o] = ["x/n", "x/o"].map(|name| bed.lab.pod(name));
    let (outside, node) = (bed.lab.outside(), bed.lab.node(0));
    let syns = RawSyns::of(&outside);
    let attack = |stop: &AtomicBool| {
        in_bursts(TOO_MANY, SYNS_OF_BURSTS, stop, |number| {
            // A network each (RFC 3849).
            let from = Ipv6Addr::from(0x2001_0db8 << 96 | u128::from(number) << 64 | 1);
            let to = (nobodys(&n, number), 80);
            syns.send_v6((from, port(number)), to, number);
        });
    };
    let pairs = [(&n, o.addr_v4(80)), (&o, n.addr_v6(80))];
    are_unharmed(&pairs, MEASURED, attack, || crowded(&node) > 0);
}

/// An address of the network of a pod, another for each number, which no pod has.
fn nobodys(pod: &Host, number: u32) -> Ipv6Addr {
    let network = pod.ipv6().to_bits() & (u128::MAX << 64);
    (network | 0xbeef << 32 | u128::from(spread(number))).into()
}

/// First packets that were dropped because too many of the same user waited.
fn crowded(node: &Host) -> u64 {
    metric(node, "portreeve_dropped_packets_total{reason=\"crowded\"}")
}

fn port(number: u32) -> u16 {
    1024 + u16::try_from(number % 60_000).unwrap()
}

/// Sends SYNs with any source address.
struct RawSyns {
    v4: Socket,
    v6: Socket,
    sent: AtomicUsize,
}

impl RawSyns {
    fn of(host: &Host) -> Self {
        let open = || {
            let v4 = Socket::new(
                Domain::IPV4,
                Type::RAW,
                Some(Protocol::from(libc::IPPROTO_RAW)),
            )
            .unwrap();
            let v6 = Socket::new(
                Domain::IPV6,
                Type::RAW,
                Some(Protocol::from(libc::IPPROTO_RAW)),
            )
            .unwrap();
            let sent = AtomicUsize::new(0);
            Self { v4, v6, sent }
        };
        host.run(open).unwrap()
    }

    fn sent(&self) -> usize {
        self.sent.load(Ordering::Relaxed)
    }

    fn send(&self, from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), number: u32) {
        let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0];
        packet.extend(from.0.octets());
        packet.extend(to.0.octets());
        packet.extend(syn(
            (from.0.into(), from.1),
            (to.0.into(), to.1),
            spread(number),
        ));
        let to = SocketAddr::from((to.0, 0));
        // A full interface queue is not an error here.
        let sent = self.v4.send_to(&packet, &to.into());
        self.sent.fetch_add(sent.is_ok().into(), Ordering::Relaxed);
    }

    fn send_v6(&self, from: (Ipv6Addr, u16), to: (Ipv6Addr, u16), number: u32) {
        let mut packet = vec![0x60, 0, 0, 0, 0, 20, 6, 64];
        packet.extend(from.0.octets());
        packet.extend(to.0.octets());
        packet.extend(syn(
            (from.0.into(), from.1),
            (to.0.into(), to.1),
            spread(number),
        ));
        let sent = self
            .v6
            .send_to(&packet, &SocketAddr::from((to.0, 0)).into());
        self.sent.fetch_add(sent.is_ok().into(), Ordering::Relaxed);
    }
}

/// A sequence number that differs much from the next one.
fn spread(number: u32) -> u32 {
    number.wrapping_mul(2_654_435_761)
}
