//! Floods of SYNs and of handshakes that nobody finishes.
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::AtomicBool;

use lab::traffic::connect_all;
use lab::{Dial, Host, wait_until};
use testbed::runner::Test;
use testbed::{DEADLINE, SOON, TestCluster, allow_ingress, connected, metric};

use crate::neighbour::{are_unharmed, at_rate, in_bursts};

use super::{
    ALL, MEASURED, RawSyns, SOURCE_LIMIT, SYNS, SYNS_OF_BURSTS, TOO_MANY, attacked, crowded, port,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    one_pod_does_not_use_up_its_server,
    spoofed_handshakes_to_one_pod_affect_nobody,
    unfinished_handshakes_of_two_pods_affect_nobody,
    a_client_that_resets_its_handshake_is_forgotten,
    syns_to_silent_addresses_affect_nobody,
    syn_flood_from_one_port_delays_only_itself,
];

const HALF_OPEN: u64 = 96;

/// Sources of forged SYNs (RFC 2544): nobody is there.
const FORGED: &str = "198.18.0.0/16";

fn one_pod_does_not_use_up_its_server() {
    let bed = attacked();
    let [v, n, o, p] = ["x/v", "x/n", "x/o", "x/p"].map(|name| bed.lab.pod(name));
    let (outside, node) = (bed.lab.outside(), bed.lab.node(0));
    let mut held = Vec::new();
    while metric(&node, SOURCE_LIMIT) == 0 {
        let dials: Vec<_> = (0..10).map(|_| Dial::new(&v, o.addr_v4(80))).collect();
        let outcomes = connect_all(&dials, SOON).unwrap();
        held.extend(outcomes.into_iter().filter_map(|it| it.into_stream().ok()));
    }
    assert_eq!(held.len(), ALL / 2);
    for (from, to) in [
        (&n, o.addr_v4(80)),
        (&p, o.addr_v6(80)),
        (&outside, o.addr_v4(80)),
    ] {
        drop(connected(from, to));
    }
}

fn spoofed_handshakes_to_one_pod_affect_nobody() {
    let bed = attacked();
    let [v, n, o, p] = ["x/v", "x/n", "x/o", "x/p"].map(|name| bed.lab.pod(name));
    let (outside, node) = (bed.lab.outside(), bed.lab.node(0));
    let mut ip = bed.lab.fabric().command("ip");
    ip.args(["route", "add", "blackhole", FORGED]);
    assert!(ip.output().unwrap().status.success());
    let silent = bed.lab.blackhole(80)[1].ip();
    let syns = RawSyns::of(&outside);
    let attack = |stop: &AtomicBool| {
        at_rate(SYNS / 2, stop, |number| {
            let [_, _, high, low] = number.to_be_bytes();
            let from = Ipv4Addr::new(198, 18, high, low);
            syns.send((from, port(number)), (v.ipv4(), 80), number);
            let IpAddr::V6(mut from) = silent else {
                unreachable!("IPv6 second")
            };
            from = (from.to_bits() & !0xffff | u128::from(number & 0xffff)).into();
            syns.send_v6((from, port(number)), (v.ipv6(), 80), number);
        });
    };
    let pairs = [
        (&n, o.addr_v4(80)),
        (&n, o.addr_v6(80)),
        (&outside, o.addr_v4(80)),
        // The attacked server has honest clients too.
        (&p, v.addr_v4(80)),
        (&outside, v.addr_v6(80)),
    ];
    are_unharmed(&pairs, MEASURED, attack, || syns.sent() > ALL);
    assert!(gave_way(&node) > HALF_OPEN, "the bound was not met");
    let half_open = metric(&node, "portreeve_connections{stage=\"admitted\"}");
    assert!(half_open <= HALF_OPEN, "{half_open}");
}

fn unfinished_handshakes_of_two_pods_affect_nobody() {
    let bed = attacked();
    let [v, n, o, p] = ["x/v", "x/n", "x/o", "x/p"].map(|name| bed.lab.pod(name));
    let node = bed.lab.node(0);
    // Their kernels would answer with resets.
    for pod in [&v, &p] {
        pod.nft("table inet mute { chain out { type filter hook output priority 0; tcp flags rst drop; }; }")
            .unwrap();
    }
    let from = [(&v, RawSyns::of(&v)), (&p, RawSyns::of(&p))];
    let attack = |stop: &AtomicBool| {
        at_rate(SYNS, stop, |number| {
            let (pod, syns) = &from[number as usize % 2];
            syns.send((pod.ipv4(), port(number)), (o.ipv4(), 81), number);
            syns.send_v6((pod.ipv6(), port(number)), (o.ipv6(), 81), number);
        });
    };
    let pairs = [
        (&n, o.addr_v4(80)),
        (&n, o.addr_v6(80)),
        (&o, n.addr_v4(80)),
    ];
    are_unharmed(&pairs, MEASURED, attack, || {
        from.iter().map(|(_, syns)| syns.sent()).sum::<usize>() > ALL
    });
    let refused = metric(
        &node,
        "portreeve_dropped_packets_total{reason=\"half_open_limit\"}",
    );
    assert!(refused > HALF_OPEN, "the bound was not met");
}

/// As a scan or a health check does: a pod's kernel answers a SYN-ACK for which it has no socket with a reset.
fn a_client_that_resets_its_handshake_is_forgotten() {
    let bed = TestCluster::enforced(&[], &[allow_ingress("b")]);
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"));
    let (heard, syns) = (a.capture().unwrap(), RawSyns::of(&a));
    syns.send((a.ipv4(), 1025), (b.ipv4(), 80), 7);
    syns.send_v6((a.ipv6(), 1025), (b.ipv6(), 80), 7);
    wait_until(DEADLINE, "the server's answers", || {
        b.addrs(80).into_iter().all(|server| {
            heard.count(|packet| packet.flags.is_syn_ack() && packet.source == server) > 0
        })
    })
    .unwrap();
    bed.wait_for_no_connection();
}

fn syns_to_silent_addresses_affect_nobody() {
    let bed = attacked();
    let [v, n, o] = ["x/v", "x/n", "x/o"].map(|name| bed.lab.pod(name));
    let node = bed.lab.node(0);
    let [IpAddr::V4(silent), IpAddr::V6(silent_v6)] = bed.lab.blackhole(80).map(|at| at.ip())
    else {
        unreachable!("IPv4 first")
    };
    let syns = RawSyns::of(&v);
    let attack = |stop: &AtomicBool| {
        at_rate(SYNS, stop, |number| {
            syns.send((v.ipv4(), port(number)), (silent, 80), number);
            syns.send_v6((v.ipv6(), port(number)), (silent_v6, 80), number);
        });
    };
    let pairs = [
        (&n, o.addr_v4(80)),
        (&n, o.addr_v6(80)),
        (&o, n.addr_v4(80)),
    ];
    are_unharmed(&pairs, MEASURED, attack, || syns.sent() > ALL);
    let refused = metric(
        &node,
        "portreeve_dropped_packets_total{reason=\"half_open_limit\"}",
    );
    assert!(refused > HALF_OPEN, "the bound was not met");
}

/// Each SYN from the same port ends the attempt before it and begins a connection to the server: no bound is met but
/// that of a user's waiting packets.
fn syn_flood_from_one_port_delays_only_itself() {
    let bed = attacked();
    let [v, n, o] = ["x/v", "x/n", "x/o"].map(|name| bed.lab.pod(name));
    let node = bed.lab.node(0);
    let syns = RawSyns::of(&v);
    let attack = |stop: &AtomicBool| {
        in_bursts(TOO_MANY, SYNS_OF_BURSTS, stop, |number| {
            syns.send((v.ipv4(), 1024), (o.ipv4(), 81), number);
            syns.send_v6((v.ipv6(), 1024), (o.ipv6(), 81), number);
        });
    };
    let pairs = [(&n, o.addr_v4(80)), (&o, n.addr_v6(80))];
    are_unharmed(&pairs, MEASURED, attack, || crowded(&node) > 0);
}

/// How many half-open connections were ended for another one.
fn gave_way(node: &Host) -> u64 {
    metric(
        node,
        "portreeve_dropped_packets_total{reason=\"half_open_gave_way\"}",
    )
}
