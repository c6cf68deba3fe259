//! No packet that a fully isolated pod can send arrives anywhere, and no packet that
//! can be sent to one arrives there.
//!
//! Packets are put on the wire past the sender's IP stack and captured on the receiver's link. A
//! leak is reported by its name.
use std::fs;
use std::time::Duration;

use lab::traffic::{Injector, Way, craft};
use lab::{Capture, Host, Packet, RpFilter, wait_until};
use testbed::runner::Test;

use crate::strange::{Case, Neighbourhood, cases};
use testbed::{DEADLINE, TestCluster, deny_egress, deny_ingress, small};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    isolated_pod_sends_no_packet_of_any_kind,
    isolated_pod_receives_no_packet_of_any_kind,
];

/// Its arrival shows that all earlier packets were processed.
const SENTINEL: u16 = 9999;

fn isolated_pod_sends_no_packet_of_any_kind() {
    let bed = bed(deny_egress("a"));
    let (a, d) = (bed.lab.pod("x/a"), bed.lab.pod("x/d"));
    let targets = [bed.lab.pod("x/b"), bed.lab.pod("x/c"), bed.lab.outside()];
    for target in targets {
        assert_nothing_arrives(&bed, &a, &target, &d);
    }
}

fn isolated_pod_receives_no_packet_of_any_kind() {
    let bed = bed(deny_ingress("b"));
    let (b, node) = (bed.lab.pod("x/b"), bed.lab.node(0));
    let outside = bed.lab.outside();
    // A sender must know its neighbour.
    ping(&outside, &bed.lab.node(1));
    for source in [bed.lab.pod("x/d"), bed.lab.pod("x/c"), outside] {
        assert_nothing_arrives(&bed, &source, &b, &node);
    }
}

/// Packets from unknown addresses are dropped soon, without help from a reverse path filter.
fn bed(policy: serde_json::Value) -> TestCluster {
    let mut bed = TestCluster::bare(small().rp_filter(RpFilter::Off));
    bed.write_policies(&[policy]);
    bed.enforce(&["--hold", "50ms"]);
    bed
}

#[track_caller]
fn assert_nothing_arrives(bed: &TestCluster, source: &Host, target: &Host, friend: &Host) {
    let surroundings = |family: usize| Neighbourhood {
        from: source.addresses()[family],
        to: target.addresses()[family],
        friend: friend.addresses()[family],
        own_node: bed.lab.node(0).addresses()[family],
        pods: ["x/b", "x/d", "x/c"].map(|pod| bed.lab.pod(pod).addresses()[family]),
        nodes: [0, 1].map(|node| bed.lab.node(node).addresses()[family]),
        service: bed.lab.service("x/c").addrs(80)[family].ip(),
    };
    let all: Vec<Case> = [0, 1].map(surroundings).iter().flat_map(cases).collect();
    let capture = target.capture().unwrap();
    let injector = source.injector().unwrap();
    for (number, case) in (1..).zip(&all) {
        inject(&injector, case, number);
    }
    settle(bed, friend, target, &capture);

    // The next router asks for its neighbour.
    let expected =
        |it: &Packet| it.destination.port() == SENTINEL || (it.protocol == 58 && it.number == 0);
    let leaks: Vec<_> = capture
        .packets()
        .into_iter()
        .filter(|packet| packet.way == Way::In && !expected(packet))
        .map(|packet| {
            let case = all.get((packet.number as usize).wrapping_sub(1));
            let what = case.map_or("what nobody sent", |case| case.what.as_str());
            format!("{what}: {} to {}", packet.source, packet.destination)
        })
        .collect();
    assert!(
        leaks.is_empty(),
        "{} of {} packets of {} arrived at {}:\n  {}",
        leaks.len(),
        all.len(),
        source.name(),
        target.name(),
        leaks.join("\n  ")
    );
}

fn inject(injector: &Injector, case: &Case, number: u32) {
    for packet in &case.packets {
        let sent = match case.ethertype {
            None => injector.send(&craft::numbered(packet.clone(), number)),
            Some(kind) => injector.send_frame(kind, packet),
        };
        sent.unwrap_or_else(|error| panic!("{}: {error}", case.what));
    }
}

/// Waits until all that was sent has been judged and, if it passes, has arrived.
fn settle(bed: &TestCluster, friend: &Host, target: &Host, capture: &Capture) {
    for round in 0..2 {
        for to in target.addrs(SENTINEL) {
            friend.ask_udp(to, b"all?", Duration::ZERO).unwrap();
        }
        let such = |packet: &Packet| packet.destination.port() == SENTINEL;
        capture
            .wait_for(DEADLINE, "the sentinels", 2 * (round + 1), such)
            .unwrap();
        wait_until(DEADLINE, "the queues to be empty", || {
            bed.lab.nodes().all(|node| waiting(&node) == 0)
        })
        .unwrap();
    }
}

/// Packets in the queues of a node: the third column of `nfnetlink_queue`.
fn waiting(node: &Host) -> u64 {
    let read = || fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue");
    let table = node.run(read).unwrap().unwrap();
    let column = |line: &str| line.split_whitespace().nth(2)?.parse::<u64>().ok();
    table.lines().filter_map(column).sum()
}

fn ping(from: &Host, to: &Host) {
    for to in to.addrs(9) {
        from.ask_udp(to, b"hello", Duration::from_millis(200))
            .unwrap();
    }
}
