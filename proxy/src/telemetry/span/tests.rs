//! Records and the spans that they become, read back from the bytes.
use std::time::{Duration, Instant};

use super::*;
use crate::decision::Way;
use crate::records::testing::{CLIENT, SERVER, decision};
use crate::records::{Outcome, Subject};
use crate::telemetry::Trail;
use crate::telemetry::wire::{Value, fields};

/// A span as a collector reads it.
struct Span {
    name: String,
    start: u64,
    attributes: Vec<(String, String)>,
    /// Time, name and side.
    events: Vec<(u64, String, String)>,
    status: Option<(String, u64)>,
    flags: u64,
}

fn subject(trail: Option<&Trail>) -> Subject {
    Subject {
        client: (CLIENT, 40_000).into(),
        server: (SERVER, 80).into(),
        protocol: Protocol::Tcp,
        way: Way::Spliced,
        sent: 3,
        received: 5,
        opened: UNIX_EPOCH + Duration::from_secs(1000),
        attempt: 7,
        seen: trail.map(Trail::seen),
    }
}

fn record(fate: Fate, trail: Option<&Trail>) -> Record {
    let subject = subject(trail);
    Record {
        ended: subject.opened + Duration::from_secs(2),
        subject,
        fate,
        decision: decision("node-1", true),
    }
}

fn request(records: Vec<Record>, count: u64) -> Vec<u8> {
    let folded = records.into_iter().map(|record| Folded {
        since: record.subject.opened,
        record: Arc::new(record),
        count,
    });
    let resource = BTreeMap::from([("service.name".to_owned(), "portreeve".to_owned())]);
    Spanner::new("node-1".into(), resource).request(&folded.collect::<Vec<_>>())
}

fn spanned(fate: Fate, trail: Option<&Trail>, count: u64) -> Span {
    let request = request(vec![record(fate, trail)], count);
    let spans = all(within(&request, 1), 2)[0];
    read(within(spans, 2))
}

/// Every value of a field that holds bytes.
fn all(message: &[u8], field: u64) -> Vec<&[u8]> {
    fields(message)
        .filter_map(|it| match it {
            (number, Value::Bytes(bytes)) if number == field => Some(bytes),
            _ => None,
        })
        .collect()
}

fn within(message: &[u8], field: u64) -> &[u8] {
    all(message, field)[0]
}

fn text(message: &[u8], field: u64) -> String {
    String::from_utf8(within(message, field).to_vec()).unwrap()
}

fn number(message: &[u8], field: u64) -> u64 {
    let found = fields(message).find_map(|it| match it {
        (its, Value::Number(number)) if its == field => Some(number),
        _ => None,
    });
    found.unwrap()
}

fn attributes(message: &[u8], field: u64) -> Vec<(String, String)> {
    all(message, field)
        .into_iter()
        .map(|pair| {
            let value = within(pair, 2);
            let shown = match fields(value).next().unwrap() {
                (1, _) => text(value, 1),
                (3, _) => number(value, 3).to_string(),
                (5, Value::Bytes(array)) => {
                    let words = all(array, 1).into_iter().map(|word| text(word, 1));
                    words.collect::<Vec<_>>().join(",")
                }
                other => panic!("{other:?}"),
            };
            (text(pair, 1), shown)
        })
        .collect()
}

fn read(span: &[u8]) -> Span {
    let event = |event: &&[u8]| {
        let side = attributes(event, 3).pop().map(|(_, side)| side);
        (number(event, 1), text(event, 2), side.unwrap_or_default())
    };
    let status = all(span, 15);
    Span {
        name: text(span, 5),
        start: number(span, 7),
        attributes: attributes(span, 9),
        events: all(span, 11).iter().map(event).collect(),
        status: status.first().map(|it| (text(it, 2), number(it, 3))),
        flags: number(span, 16),
    }
}

fn attribute<'a>(span: &'a Span, key: &str) -> Option<&'a str> {
    let found = span.attributes.iter().find(|(known, _)| known == key)?;
    Some(&found.1)
}

#[test]
fn a_denial_is_an_error_with_its_reason_and_how_often_it_was() {
    let span = spanned(Fate::Denied, None, 12);
    assert_eq!(span.name, "deny");
    let reason = record(Fate::Denied, None).reason();
    assert_eq!(span.status, Some((reason, STATUS_CODE_ERROR)));
    for (key, value) in [
        ("verdict", "deny"),
        ("count", "12"),
        ("policies", "x/deny"),
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
        assert_eq!(attribute(&span, key), Some(value), "{key}");
    }
}

#[test]
fn an_allowed_connection_is_no_error_and_tells_what_happened_when() {
    let trail = Trail::new(Instant::now(), None);
    for moment in [
        Moment::Connected,
        Moment::Received,
        Moment::Sent,
        Moment::ServerEnded,
    ] {
        trail.note(moment);
    }
    let span = spanned(Fate::Allowed(Outcome::Closed), Some(&trail), 1);
    assert_eq!(span.status, None);
    assert_eq!(span.flags, 0x101, "sampled, and its parent is not remote");
    assert_eq!(attribute(&span, "count"), None);
    assert_eq!(attribute(&span, "bytes.sent"), Some("3"));
    let told = span.events.iter().map(|(_, name, side)| (&**name, &**side));
    let expected = [
        ("held", ""),
        ("upstream connected", ""),
        ("first byte", "server"),
        ("first byte", "client"),
        ("half-closed", "server"),
    ];
    assert_eq!(told.collect::<Vec<_>>(), expected);
    assert!(span.events.iter().is_sorted_by_key(|(time, ..)| *time));
    assert!(span.events.iter().all(|(time, ..)| *time >= span.start));
    assert_eq!(span.start, 1_000_000_000_000);
}

#[test]
fn every_key_of_the_trace_file_is_in_the_span() {
    let severed = || Fate::Severed { replaced: None };
    let span = spanned(severed(), None, 1);
    let json = record(severed(), None).json("n");
    for key in json.as_object().unwrap().keys() {
        // A span has times of its own.
        let expected = !matches!(key.as_str(), "start_time" | "end_time");
        assert_eq!(attribute(&span, key).is_some(), expected, "{key}");
    }
}

#[test]
fn a_request_says_who_sends_and_has_a_span_with_an_id_of_its_own_for_each() {
    let records = (0..20).map(|_| record(Fate::Denied, None)).collect();
    let request = request(records, 1);
    let sent = within(&request, 1);
    let name = ("service.name".to_owned(), "portreeve".to_owned());
    assert_eq!(attributes(within(sent, 1), 1), [name]);
    let scope = within(sent, 2);
    assert_eq!(text(within(scope, 1), 1), "portreeve");
    let spans = all(scope, 2);
    let ids: std::collections::BTreeSet<_> = spans.iter().map(|span| within(span, 2)).collect();
    assert_eq!((spans.len(), ids.len()), (20, 20));
    assert!(ids.iter().all(|id| id.len() == 8));
}
