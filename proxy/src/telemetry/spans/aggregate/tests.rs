//! Many denials, few reports.
use std::net::SocketAddr;
use std::time::UNIX_EPOCH;

use super::*;
use crate::telemetry::decision::DataPath;
use crate::telemetry::record::testing::decision;
use crate::telemetry::record::{Outcome, Subject};

fn record(port: u16, server: u8, fate: Fate) -> Arc<Record> {
    Arc::new(Record {
        subject: Subject {
            client: SocketAddr::from(([10, 0, 0, 1], port)),
            server: SocketAddr::from(([10, 0, 1, server], 80)),
            protocol: Protocol::Tcp,
            path: DataPath::Spliced,
            sent: 0,
            received: 0,
            opened: UNIX_EPOCH + Duration::from_secs(port.into()),
            attempt: 0,
            seen: None,
        },
        fate,
        decision: decision("node-1", true),
        ended: UNIX_EPOCH + Duration::from_secs(port.into()),
    })
}

fn denied(port: u16) -> Arc<Record> {
    record(port, 2, Fate::Denied)
}

fn counts(due: impl IntoIterator<Item = Aggregated>) -> Vec<u64> {
    due.into_iter().map(|aggregated| aggregated.count).collect()
}

#[test]
fn repeated_denials_become_one_counted_span() {
    let (mut aggregator, now) = (Aggregator::default(), Instant::now());
    assert_eq!(counts(aggregator.add(denied(1), now)), [1]);
    for port in 2..=200 {
        assert_eq!(
            counts(aggregator.add(denied(port), now)),
            [0; 0],
            "port {port}"
        );
    }
    assert_eq!(
        counts(aggregator.due(now + WINDOW / 2)),
        [0; 0],
        "its window goes on"
    );
    let due = aggregator.due(now + WINDOW);
    assert_eq!(due.len(), 1);
    assert_eq!(due[0].count, 199);
    assert_eq!(
        due[0].since,
        UNIX_EPOCH + Duration::from_secs(2),
        "since the first repeat"
    );
    assert_eq!(
        due[0].record.subject.client.port(),
        200,
        "as the last one was"
    );
}

#[test]
fn ongoing_denials_give_one_span_per_window() {
    let (mut aggregator, now) = (Aggregator::default(), Instant::now());
    let at = |windows| now + WINDOW * windows;
    assert_eq!(counts(aggregator.add(denied(1), at(0))), [1]);
    assert_eq!(counts(aggregator.add(denied(2), at(0))), [0; 0]);
    assert_eq!(counts(aggregator.due(at(1))), [1]);
    assert_eq!(
        counts(aggregator.add(denied(3), at(1))),
        [0; 0],
        "a new window runs"
    );
    assert_eq!(counts(aggregator.due(at(2))), [1]);
    assert_eq!(
        counts(aggregator.due(at(3))),
        [0; 0],
        "nothing came: forgotten"
    );
    assert_eq!(aggregator.next_due(), None);
    assert_eq!(counts(aggregator.add(denied(4), at(3))), [1]);
}

#[test]
fn only_denials_of_one_kind_are_aggregated() {
    let (mut aggregator, now) = (Aggregator::default(), Instant::now());
    assert_eq!(counts(aggregator.add(denied(1), now)), [1]);
    assert_eq!(
        counts(aggregator.add(record(1, 3, Fate::Denied), now)),
        [1],
        "another server"
    );
    for _ in 0..2 {
        let closed = record(1, 2, Fate::Allowed(Outcome::Closed));
        assert_eq!(
            counts(aggregator.add(closed, now)),
            [1],
            "allowed ones are each sent"
        );
    }
}

#[test]
fn evicted_denials_are_exported() {
    let (mut aggregator, now) = (Aggregator::default(), Instant::now());
    let scan = |n: usize| {
        let [high, low] = u16::try_from(n).unwrap().to_be_bytes();
        let mut record = Arc::into_inner(denied(1)).unwrap();
        record.subject.server = SocketAddr::from(([10, 1, high, low], 80));
        Arc::new(record)
    };
    assert_eq!(counts(aggregator.add(denied(1), now)), [1]);
    assert_eq!(counts(aggregator.add(denied(2), now)), [0; 0]);
    for n in 0..ROOM - 1 {
        assert_eq!(counts(aggregator.add(scan(n), now)), [1]);
    }
    assert_eq!(
        counts(aggregator.add(scan(ROOM), now)),
        [1, 1],
        "the first one's repeat, and its own"
    );
    for n in ROOM + 1..3 * ROOM {
        assert_eq!(counts(aggregator.add(scan(n), now)), [1]);
    }
    assert!(aggregator.0.rest().count() <= ROOM);
}

#[test]
fn all_denials_are_exported_at_the_end() {
    let (mut aggregator, now) = (Aggregator::default(), Instant::now());
    assert_eq!(
        (1..=5)
            .flat_map(|port| counts(aggregator.add(denied(port), now)))
            .sum::<u64>(),
        1
    );
    assert_eq!(counts(aggregator.rest()), [4]);
}
