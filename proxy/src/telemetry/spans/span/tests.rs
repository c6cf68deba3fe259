//! Records and the spans that they become.
use std::time::{Duration, Instant, UNIX_EPOCH};

use super::*;
use crate::telemetry::decision::DataPath;
use crate::telemetry::record::testing::{CLIENT, SERVER, decision};
use crate::telemetry::record::{Outcome, Subject};
use crate::telemetry::timeline::Timeline;

fn spanned(fate: Fate, timeline: Option<&Timeline>, count: u64) -> SpanData {
    let opened = UNIX_EPOCH + Duration::from_secs(1000);
    let record = Record {
        subject: Subject {
            client: (CLIENT, 40_000).into(),
            server: (SERVER, 80).into(),
            protocol: Protocol::Tcp,
            path: DataPath::Spliced,
            sent: 3,
            received: 5,
            opened,
            attempt: 7,
            seen: timeline.map(Timeline::seen),
        },
        fate,
        decision: decision("node-1", true),
        ended: opened + Duration::from_secs(2),
    };
    let aggregated = Aggregated {
        record: Arc::new(record),
        since: opened,
        count,
    };
    Spanner::new("node-1".into()).span(&aggregated)
}

fn attribute(span: &SpanData, key: &str) -> Option<String> {
    let found = span.attributes.iter().find(|it| it.key.as_str() == key)?;
    Some(found.value.to_string())
}

#[test]
fn denial_span_has_error_reason_and_count() {
    let span = spanned(Fate::Denied, None, 12);
    assert_eq!(span.name, "deny");
    assert!(matches!(&span.status, Status::Error { description } if !description.is_empty()));
    for (key, value) in [
        ("verdict", "deny"),
        ("count", "12"),
        ("error.type", "denied"),
        ("protocol", "TCP"),
        ("network.transport", "tcp"),
        ("network.type", "ipv4"),
        ("source.address", "10.0.1.2"),
        ("source.port", "40000"),
        ("source.k8s.namespace.name", "x"),
        ("source.k8s.pod.name", "a"),
        ("source.k8s.pod.uid", "uid-a"),
        ("destination.k8s.pod.uid", "uid-c"),
        ("k8s.node.name", "node-1"),
        ("path", "spliced"),
    ] {
        assert_eq!(attribute(&span, key).as_deref(), Some(value), "{key}");
    }
}

#[test]
fn allowed_connection_span_has_events_without_error() {
    let timeline = Timeline::new(Instant::now(), None);
    for moment in [
        Milestone::Connected,
        Milestone::Received,
        Milestone::Sent,
        Milestone::ServerEnded,
    ] {
        timeline.note(moment);
    }
    let span = spanned(Fate::Allowed(Outcome::Closed), Some(&timeline), 1);
    assert_eq!(span.status, Status::Unset);
    assert_eq!(attribute(&span, "count"), None);
    assert_eq!(attribute(&span, "bytes.sent").as_deref(), Some("3"));
    let attributes: Vec<_> = span
        .events
        .iter()
        .map(|event| {
            let side = event.attributes.first().map(|it| it.value.to_string());
            (event.name.to_string(), side.unwrap_or_default())
        })
        .collect();
    let expected = [
        ("held", ""),
        ("upstream connected", ""),
        ("first byte", "server"),
        ("first byte", "client"),
        ("half-closed", "server"),
    ];
    assert_eq!(
        attributes,
        expected.map(|(name, side)| (name.to_owned(), side.to_owned()))
    );
    assert!(span.events.iter().is_sorted_by_key(|event| event.timestamp));
    assert!(
        span.events
            .iter()
            .all(|event| event.timestamp >= span.start_time)
    );
}

#[test]
fn span_has_every_key_of_trace_file() {
    let span = spanned(Fate::Severed { replaced: None }, None, 1);
    let record = Record {
        ended: UNIX_EPOCH,
        fate: Fate::Severed { replaced: None },
        decision: decision("node-1", true),
        subject: Subject {
            client: (CLIENT, 1).into(),
            server: (SERVER, 2).into(),
            protocol: Protocol::Tcp,
            path: DataPath::Spliced,
            sent: 0,
            received: 0,
            opened: UNIX_EPOCH,
            attempt: 0,
            seen: None,
        },
    };
    let json = record.json("n");
    for key in json.as_object().unwrap().keys() {
        // A span has times of its own.
        let expected = !matches!(key.as_str(), "start_time" | "end_time");
        assert_eq!(attribute(&span, key).is_some(), expected, "{key}");
    }
}
