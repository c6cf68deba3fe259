//! Records as OTLP's spans: a record's keys, the conventions' names, what happened when.
//!
//! Written straight into the request (opentelemetry/proto/collector/trace/v1/trace_service.proto and what it
//! includes): a node makes thousands a second, and the values of each are needed once.
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use opentelemetry::trace::SpanId;
use opentelemetry_semantic_conventions::attribute::{ERROR_TYPE, NETWORK_TRANSPORT, NETWORK_TYPE};
use policy::Protocol;

use super::fold::Folded;
use super::place::Place;
use super::trail::Moment;
use super::wire::Message;
use crate::records::{Fate, Field, Record};

const SPAN_KIND_INTERNAL: u64 = 1;
const STATUS_CODE_ERROR: u64 = 2;
/// Of a span's flags: sampled; whether its parent is remote is known; it is.
const FLAGS: [u32; 3] = [1, 0x100, 0x200];
/// Bytes of a span, about.
const SPAN: usize = 1536;

/// Makes the spans of one node.
pub(super) struct Spanner {
    node: Arc<str>,
    /// Who sends.
    resource: BTreeMap<String, String>,
    /// Makes ids that nobody else derives, of numbers.
    ids: RandomState,
    next: u64,
}

impl Spanner {
    /// For the spans of `node`, which `resource` sends.
    pub(super) fn new(node: Arc<str>, resource: BTreeMap<String, String>) -> Self {
        Self {
            node,
            resource,
            ids: RandomState::new(),
            next: 0,
        }
    }

    /// An `ExportTraceServiceRequest` with a span for each.
    pub(super) fn request(&mut self, batch: &[Folded]) -> Vec<u8> {
        let mut request = Vec::with_capacity(SPAN * (batch.len() + 1));
        Message::onto(&mut request).message(1, |spans| {
            spans.message(1, |resource| {
                for (name, value) in &self.resource {
                    attribute(resource, 1, name, Field::Text(value));
                }
            });
            spans.message(2, |spans| {
                spans.message(1, |scope| {
                    scope.bytes(1, b"portreeve");
                    scope.bytes(2, env!("CARGO_PKG_VERSION").as_bytes());
                });
                for folded in batch {
                    spans.message(2, |span| self.span(span, folded));
                }
            });
        });
        request
    }

    /// A `Span`: one connection, or many that were denied alike.
    fn span(&mut self, span: &mut Message<'_>, folded: &Folded) {
        let record = &*folded.record;
        let place = Place::of(record, &self.node);
        let id = place.span.unwrap_or_else(|| self.new_id());
        span.bytes(1, &place.trace.to_bytes());
        span.bytes(2, &id.to_bytes());
        if let Some(parent) = place.parent {
            span.bytes(4, &parent.to_bytes());
        }
        span.bytes(5, record.fate.verdict().as_bytes());
        span.varint(6, SPAN_KIND_INTERNAL);
        span.fixed64(7, nanoseconds(folded.since));
        span.fixed64(8, nanoseconds(record.ended));
        self.attributes(span, record, folded.count);
        events(span, record);
        if !matches!(record.fate, Fate::Allowed(_)) {
            span.message(15, |status| {
                status.bytes(2, record.reason().as_bytes());
                status.varint(3, STATUS_CODE_ERROR);
            });
        }
        let [sampled, known, remote] = FLAGS;
        let parent = if place.parent.is_some() { remote } else { 0 };
        span.fixed32(16, sampled | known | parent);
    }

    fn attributes(&self, span: &mut Message<'_>, record: &Record, count: u64) {
        let mut put = |key: &str, value: Field<'_>| attribute(span, 9, key, value);
        record.fields(&self.node, &mut put);
        let transport = match record.subject.protocol {
            Protocol::Tcp => Some("tcp"),
            Protocol::Udp => Some("udp"),
            _ => None,
        };
        if let Some(transport) = transport {
            put(NETWORK_TRANSPORT, Field::Text(transport));
        }
        let family = if record.subject.client.is_ipv4() {
            "ipv4"
        } else {
            "ipv6"
        };
        put(NETWORK_TYPE, Field::Text(family));
        if let Some(error) = error(&record.fate) {
            put(ERROR_TYPE, Field::Text(error));
        }
        if matches!(record.fate, Fate::Denied) {
            put("count", Field::Number(count));
        }
    }

    fn new_id(&mut self) -> SpanId {
        self.next += 1;
        SpanId::from_bytes(self.ids.hash_one(self.next).to_be_bytes())
    }
}

/// A `KeyValue` as a field of a message.
fn attribute(of: &mut Message<'_>, field: u32, key: &str, value: Field<'_>) {
    of.message(field, |pair| {
        pair.bytes(1, key.as_bytes());
        pair.message(2, |any| match value {
            Field::Text(text) => any.bytes(1, text.as_bytes()),
            Field::Words(text) => any.bytes(1, text.as_bytes()),
            Field::Address(address) => any.text(1, address),
            Field::Number(number) => any.varint(3, number.min(i64::MAX as u64)),
            Field::List(words) => any.message(5, |array| {
                for word in words {
                    array.message(1, |any| any.bytes(1, word.as_bytes()));
                }
            }),
        });
    });
}

/// What went wrong with a connection, by policy.
fn error(fate: &Fate) -> Option<&'static str> {
    match fate {
        Fate::Allowed(_) => None,
        Fate::Denied => Some("denied"),
        Fate::Severed { .. } => Some("severed"),
    }
}

/// What happened in the life of the connection, in its order.
fn events(span: &mut Message<'_>, record: &Record) {
    let opened = record.subject.opened;
    let mut event = |time, (name, side): (&str, Option<&str>)| {
        span.message(11, |event| {
            event.fixed64(1, nanoseconds(time));
            event.bytes(2, name.as_bytes());
            if let Some(side) = side {
                attribute(event, 3, "side", Field::Text(side));
            }
        });
    };
    event(opened, ("held", None));
    let Some(seen) = &record.subject.seen else {
        return;
    };
    let mut happened = [(None, Moment::Connected); Moment::ALL.len()];
    for ((place, moment), after) in happened.iter_mut().zip(Moment::ALL).zip(seen.moments) {
        *place = (after, moment);
    }
    happened.sort_unstable_by_key(|(after, _)| *after);
    for (after, moment) in happened {
        if let Some(after) = after {
            event(opened + after, words(moment));
        }
    }
}

/// The name of the event, and whose it is.
fn words(moment: Moment) -> (&'static str, Option<&'static str>) {
    match moment {
        Moment::Connected => ("upstream connected", None),
        Moment::Sent => ("first byte", Some("client")),
        Moment::Received => ("first byte", Some("server")),
        Moment::ClientEnded => ("half-closed", Some("client")),
        Moment::ServerEnded => ("half-closed", Some("server")),
    }
}

/// Since the epoch, in UTC.
fn nanoseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
