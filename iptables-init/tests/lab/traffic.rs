//! Traffic through the redirect without a daemon, and packets in its queues.
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use lab::traffic::UdpOutcome;
use lab::{Outcome, wait_until};
use testbed::runner::Test;

use crate::support::{Lab, NonIsolated, SOON, init, load, queue, sh};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    fail_closed_drops_isolated_traffic_without_a_daemon,
    fail_open_passes_all_traffic_without_a_daemon,
    non_isolated_pods_keep_access_without_a_daemon,
    held_packets_wait_in_the_configured_queues,
    check_and_reinstall_keep_queued_packets,
    full_source_rate_set_limits_by_destination,
];

const DEADLINE: Duration = Duration::from_secs(5);

fn fail_closed_drops_isolated_traffic_without_a_daemon() {
    let lab = Lab::new("install --fail closed --tcp spliced", NonIsolated::Nobody);
    for (tcp, udp) in lab.a_to_b() {
        assert!(matches!(tcp, Outcome::TimedOut), "{tcp:?}");
        assert!(matches!(udp, UdpOutcome::TimedOut), "{udp:?}");
    }
    let counter = sh(
        lab.node.netns(),
        "nft list counter inet portreeve no_daemon",
    );
    assert!(!counter.contains("packets 0"), "{counter}");
}

fn fail_open_passes_all_traffic_without_a_daemon() {
    let lab = Lab::new("install --fail open", NonIsolated::Nobody);
    for (tcp, udp) in lab.a_to_b() {
        assert!(matches!(tcp, Outcome::Connected { .. }), "{tcp:?}");
        assert!(matches!(udp, UdpOutcome::Answered { .. }), "{udp:?}");
    }
}

fn non_isolated_pods_keep_access_without_a_daemon() {
    let lab = Lab::new("install --fail closed", NonIsolated::Both);
    for (tcp, udp) in lab.a_to_b() {
        assert!(matches!(tcp, Outcome::Connected { .. }), "{tcp:?}");
        assert!(matches!(udp, UdpOutcome::Answered { .. }), "{udp:?}");
    }
}

fn held_packets_wait_in_the_configured_queues() {
    let lab = Lab::new("install --queue 31 --queues 2", NonIsolated::Nobody);
    let node = lab.node.netns();
    let _queues: Vec<OwnedFd> = [31, 32]
        .map(|number| node.run(|| queue(number)).unwrap())
        .into();
    for address in lab.b.addresses() {
        let waiting = lab.waiting();
        let outcome = lab
            .a
            .ask_udp(SocketAddr::new(address, 90), b"?", SOON)
            .unwrap();
        assert!(matches!(outcome, UdpOutcome::TimedOut), "{outcome:?}");
        wait_until(DEADLINE, "a packet to wait in queue 31 or 32", || {
            lab.waiting() > waiting
        })
        .unwrap();
    }
}

fn check_and_reinstall_keep_queued_packets() {
    let flags = "--queue 31 --queues 2";
    let lab = Lab::new(&format!("install {flags}"), NonIsolated::Nobody);
    let node = lab.node.netns();
    let _queues = [31, 32].map(|number| node.run(|| queue(number)).unwrap());
    for address in lab.b.addresses() {
        let _unanswered = lab.a.ask_udp(SocketAddr::new(address, 90), b"?", SOON);
    }
    wait_until(DEADLINE, "both datagrams to wait", || lab.waiting() == 2).unwrap();
    for call in ["check", "install", "print"] {
        init(node, &format!("{call} {flags}")).ok();
        assert_eq!(lab.waiting(), 2, "after `{call}`");
    }
}

/// The bound is 10,000 packets a second; here the destination has used up its own.
fn full_source_rate_set_limits_by_destination() {
    let lab = Lab::new("install --queue 31 --queues 2", NonIsolated::Nobody);
    let node = lab.node.netns();
    let _queues = [31, 32].map(|number| node.run(|| queue(number)).unwrap());
    let sources: Vec<String> = (0..=u16::MAX)
        .map(|n| {
            let [high, low] = n.to_be_bytes();
            format!("198.18.{high}.{low} timeout 1h")
        })
        .collect();
    for some in sources.chunks(4096) {
        load(
            node,
            &format!(
                "add element inet portreeve source_rate4 {{ {} }}",
                some.join(", ")
            ),
        );
    }
    let b = lab.b.ipv4();
    let spent = format!("{b} limit rate over 1/day burst 1 packets timeout 1h");
    load(
        node,
        &format!("add element inet portreeve destination_rate4 {{ {spent} }}"),
    );
    for _ in 0..3 {
        let _unanswered = lab.a.ask_udp(SocketAddr::new(b.into(), 90), b"?", SOON);
    }
    let flood = || sh(node, "nft list counter inet portreeve rate_limited");
    assert!(flood().contains("packets 2 "), "{}", flood());
    // The other family has room.
    let v6 = SocketAddr::new(lab.b.ipv6().into(), 90);
    let _unanswered = lab.a.ask_udp(v6, b"?", SOON);
    wait_until(DEADLINE, "both datagrams to wait", || lab.waiting() == 2).unwrap();
}
