//! What two nodes make of one connection.
use std::time::{Duration, Instant, UNIX_EPOCH};

use policy::Protocol;

use super::*;
use crate::telemetry::record::testing::{CLIENT, SERVER, decision};
use crate::telemetry::record::{Outcome, Record, Subject};
use crate::telemetry::timeline::{Seen, Timeline};

fn subject(port: u16, seen: Option<Seen>, path: DataPath) -> Subject {
    Subject {
        client: (CLIENT, port).into(),
        server: (SERVER, 80).into(),
        protocol: if path == DataPath::Spliced {
            Protocol::Tcp
        } else {
            Protocol::Udp
        },
        path,
        sent: 0,
        received: 0,
        opened: UNIX_EPOCH + Duration::from_secs(1_000_000_010),
        attempt: 7,
        seen,
    }
}

/// What a relayed connection leaves behind that came with one timestamp and left with another.
fn seen(came: Option<u32>, left: Option<(u16, Option<u32>)>) -> Option<Seen> {
    let timeline = Timeline::new(Instant::now(), came);
    if let Some((port, stamp)) = left {
        timeline.goes_on(port, stamp);
    }
    Some(timeline.seen())
}

fn record(subject: Subject, home: &str, isolated: bool, fate: Fate) -> Record {
    Record {
        ended: subject.opened,
        subject,
        fate,
        decision: decision(home, isolated),
    }
}

fn allowed() -> Fate {
    Fate::Allowed(Outcome::Closed)
}

#[test]
fn second_node_derives_the_trace_and_parent() {
    let first = subject(
        40_000,
        seen(Some(1), Some((16_001, Some(900_000)))),
        DataPath::Spliced,
    );
    // The stamp in the SYN is a little older than the one read after it.
    let second = subject(16_001, seen(Some(899_998), None), DataPath::Spliced);
    let first = Place::of(&record(first, "node-1", true, allowed()), "node-1");
    let second = Place::of(&record(second, "node-1", true, allowed()), "node-2");
    assert_eq!(first.trace, second.trace);
    assert_eq!(second.parent, first.span);
    assert!(first.span.is_some());
    assert_eq!((first.parent, second.span), (None, None));
}

#[test]
fn kernel_flow_is_one_trace_on_both_nodes() {
    let flow = |fate| {
        record(
            subject(40_000, None, DataPath::Kernel),
            "node-1",
            true,
            fate,
        )
    };
    let first = Place::of(&flow(allowed()), "node-1");
    let second = Place::of(&flow(Fate::Denied), "node-2");
    assert_eq!(first.trace, second.trace);
    assert_eq!(second.parent, first.span);
    assert!(first.span.is_some());
}

#[test]
fn span_has_parent_only_if_first_node_decided() {
    let claims = |port, home, isolated, path| {
        let seen = (path == DataPath::Spliced)
            .then(|| seen(Some(1), None))
            .flatten();
        let record = record(subject(port, seen, path), home, isolated, allowed());
        Place::of(&record, "node-2").parent.is_some()
    };
    for (expected, claimed, why) in [
        (
            true,
            claims(16_001, "node-1", true, DataPath::Spliced),
            "its proxy sent it on",
        ),
        (
            false,
            claims(40_000, "node-1", true, DataPath::Spliced),
            "no port of a proxy: no daemon there",
        ),
        (
            false,
            claims(16_001, "node-1", false, DataPath::Spliced),
            "a non-isolated pod that chose the port itself",
        ),
        (
            false,
            claims(16_001, "node-2", true, DataPath::Spliced),
            "a pod of this very node",
        ),
        (
            true,
            claims(40_000, "node-1", true, DataPath::Kernel),
            "the other node let the first packet pass",
        ),
        (
            false,
            claims(40_000, "node-1", false, DataPath::Kernel),
            "no policy asked there",
        ),
    ] {
        assert_eq!(claimed, expected, "{why}");
    }
}

#[test]
fn a_port_used_again_later_is_another_trace() {
    let trace = |stamp| {
        let subject = subject(16_001, seen(Some(stamp), None), DataPath::Spliced);
        Wire::of(&subject).trace_id()
    };
    assert_eq!(trace(0), trace((1 << STAMP_BITS) - 1), "within one window");
    assert_ne!(trace(0), trace(1 << STAMP_BITS), "in the next");
}

#[test]
fn trace_ids_are_stable_across_versions_and_machines() {
    let subject = subject(16_001, seen(Some(1 << 20), None), DataPath::Spliced);
    let wire = Wire::of(&subject);
    assert_eq!(
        wire.trace_id().to_string(),
        "cf611d7c8c9b753db6bfee2cfd43b652"
    );
    assert_eq!(wire.first_span_id().to_string(), "cddcc33966ce5029");
}

#[test]
fn sampling_takes_the_same_traces_everywhere() {
    let traces =
        || (1..=10_000).map(|port| Wire::of(&subject(port, None, DataPath::Kernel)).trace_id());
    let taken = |share| {
        traces()
            .filter(|trace| Sampler::new(share).takes(*trace))
            .count()
    };
    assert_eq!(taken(1.0), 10_000);
    assert_eq!(taken(0.0), 0);
    assert!((900..1100).contains(&taken(0.1)), "{}", taken(0.1));
    assert!(Sampler::new(1.0).takes_all() && !Sampler::new(0.999).takes_all());
    let nested =
        traces().all(|trace| !Sampler::new(0.1).takes(trace) || Sampler::new(0.5).takes(trace));
    assert!(nested, "who takes more takes what others take");
}
