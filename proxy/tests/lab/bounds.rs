//! What one pod does to the daemon is not felt by its neighbours.
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use lab::runner::Test;
use lab::{Host, Kind, wait_until};
use socket2::{Domain, Protocol, Socket, Type};

use crate::support::{
    Bed, DEADLINE, SOON, allow_all, allow_ingress, connected, deny_egress, deny_ingress, echoes,
    metric,
};

pub(crate) const TESTS: &[Test] = &lab::tests![
    a_syn_flood_of_a_denied_pod_amid_changes_does_not_stop_its_neighbour,
    a_pod_over_its_bound_is_refused_and_its_neighbour_is_not,
    the_bound_of_the_node_is_told_apart_from_that_of_a_pod,
];

/// SYNs that must have met the gate for a flood to be one.
const FLOOD: usize = 20_000;
/// Connections of the neighbour that must succeed meanwhile.
const CONNECTS: usize = 200;
/// Longer than a round trip, while the flood has the machine.
const BRIEF: Duration = Duration::from_millis(50);
/// SYNs of the flood that wait for the gate at most. A daemon that gets little of a busy machine's time, and
/// was built without optimisation, takes fewer than the 10,000 a second that the rules let through.
const WAITING: u64 = 1024;

fn a_syn_flood_of_a_denied_pod_amid_changes_does_not_stop_its_neighbour() {
    let policies = [deny_egress("d"), allow_ingress("b"), allow_ingress("c")];
    let bed = Bed::enforced(&[], &policies);
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
        "portreeve_decisions_total{verdict=\"deny\",direction=\"egress\"}",
    );
    assert!(
        usize::try_from(denied).unwrap() >= FLOOD / 10,
        "only {denied} of {sent:?} SYNs met the gate"
    );
    // It has left nothing behind.
    bed.wait_for_no_connection();
}

/// Ends what runs beside a test, however the test ends.
pub(crate) struct StopOnDrop<'a>(pub(crate) &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
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
        let port = 1024 + u16::try_from(number % 60_000).unwrap();
        let segment = syn(
            (from.ipv4(), port),
            (to.ipv4(), 80),
            number.wrapping_mul(2_654_435_761),
        );
        // A full queue of the interface is no fault of the flood.
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
fn syn(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), sequence: u32) -> [u8; 20] {
    let mut segment = [0; 20];
    segment[0..2].copy_from_slice(&from.1.to_be_bytes());
    segment[2..4].copy_from_slice(&to.1.to_be_bytes());
    segment[4..8].copy_from_slice(&sequence.to_be_bytes());
    segment[12..16].copy_from_slice(&[0x50, 0b10, 0xff, 0xff]);
    // The pseudo header: addresses, protocol 6, length 20.
    let header = [from.0.octets(), to.0.octets(), [0, 6, 0, 20]].concat();
    let words = header.chunks(2).chain(segment.chunks(2));
    let sum: u32 = words
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    segment[16..18].copy_from_slice(&(!u16::try_from(folded).unwrap()).to_be_bytes());
    segment
}

const SOURCE_LIMIT: &str = "portreeve_refusals_total{cause=\"source_limit\"}";
const NODE_LIMIT: &str = "portreeve_refusals_total{cause=\"node_limit\"}";

fn a_pod_over_its_bound_is_refused_and_its_neighbour_is_not() {
    let bed = Bed::enforced(&["--max-connections-per-source", "5"], &[allow_all()]);
    let (a, d, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/d"), bed.lab.node(0));
    let to = bed.lab.pod("x/b").addr_v4(80);
    let mut held: Vec<_> = (0..5).map(|_| connected(&a, to)).collect();
    assert_eq!(a.connect(to, SOON).unwrap().kind(), Kind::TimedOut);
    assert!(metric(&node, SOURCE_LIMIT) >= 1);
    assert_eq!(metric(&node, NODE_LIMIT), 0);
    for _ in 0..5 {
        held.push(connected(&d, to));
    }
    // IPv6 is another source address.
    held.push(connected(&a, bed.lab.pod("x/b").addr_v6(80)));
    held.iter().for_each(|stream| echoes(stream, "undisturbed"));
    // A place that is given back can be taken again.
    drop(held.remove(0));
    held.push(connected(&a, to));
}

fn the_bound_of_the_node_is_told_apart_from_that_of_a_pod() {
    let bed = Bed::enforced(
        &[
            "--max-connections",
            "6",
            "--max-connections-per-source",
            "4",
        ],
        &[allow_all()],
    );
    let (a, d, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/d"), bed.lab.node(0));
    let to = bed.lab.pod("x/b").addr_v4(80);
    let _held: Vec<_> = (0..4).map(|_| connected(&a, to)).collect();
    let _others: Vec<_> = (0..2).map(|_| connected(&d, to)).collect();
    assert_eq!(d.connect(to, SOON).unwrap().kind(), Kind::TimedOut);
    assert!(metric(&node, NODE_LIMIT) >= 1);
    assert_eq!(metric(&node, SOURCE_LIMIT), 0);
}
