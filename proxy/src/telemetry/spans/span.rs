//! Converts a record to an OpenTelemetry span: the record's keys, the conventions' names, the events.
use std::sync::Arc;

use opentelemetry::trace::{Event, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceState};
use opentelemetry::{Array, InstrumentationScope, KeyValue, StringValue, Value};
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator, SpanData, SpanEvents, SpanLinks};
use opentelemetry_semantic_conventions::attribute::{ERROR_TYPE, NETWORK_TRANSPORT, NETWORK_TYPE};
use policy::Protocol;

use super::aggregate::Aggregated;
use super::span_ids::Place;
use crate::telemetry::record::{Fate, Field, Record};
use crate::telemetry::timeline::Milestone;

/// Makes the spans of one node.
pub(super) struct Spanner {
    node: Arc<str>,
    scope: InstrumentationScope,
    ids: RandomIdGenerator,
}

impl Spanner {
    /// For the spans of `node`.
    pub(super) fn new(node: Arc<str>) -> Self {
        let scope = InstrumentationScope::builder("portreeve")
            .with_version(env!("CARGO_PKG_VERSION"))
            .build();
        Self {
            node,
            scope,
            ids: RandomIdGenerator::default(),
        }
    }

    /// The span of one connection, or of many that were denied alike.
    pub(super) fn span(&self, aggregated: &Aggregated) -> SpanData {
        let record = &*aggregated.record;
        let place = Place::of(record, &self.node);
        let id = place.span.unwrap_or_else(|| self.ids.new_span_id());
        SpanData {
            span_context: SpanContext::new(
                place.trace,
                id,
                TraceFlags::SAMPLED,
                false,
                TraceState::NONE,
            ),
            parent_span_id: place.parent.unwrap_or(SpanId::INVALID),
            parent_span_is_remote: place.parent.is_some(),
            span_kind: SpanKind::Internal,
            name: record.fate.kind().name().into(),
            start_time: aggregated.since,
            end_time: record.ended,
            attributes: self.attributes(record, aggregated.count),
            dropped_attributes_count: 0,
            events: events(record),
            links: SpanLinks::default(),
            status: status(record),
            instrumentation_scope: self.scope.clone(),
        }
    }

    fn attributes(&self, record: &Record, count: u64) -> Vec<KeyValue> {
        let mut attributes = Vec::with_capacity(24);
        record.fields(&self.node, |key, field| {
            attributes.push(KeyValue::new(key, value(field)));
        });
        let transport = match record.subject.protocol {
            Protocol::Tcp => Some("tcp"),
            Protocol::Udp => Some("udp"),
            _ => None,
        };
        if let Some(transport) = transport {
            attributes.push(KeyValue::new(NETWORK_TRANSPORT, transport));
        }
        let family = if record.subject.client.is_ipv4() {
            "ipv4"
        } else {
            "ipv6"
        };
        attributes.push(KeyValue::new(NETWORK_TYPE, family));
        if let Some(error) = error(&record.fate) {
            attributes.push(KeyValue::new(ERROR_TYPE, error));
        }
        if matches!(record.fate, Fate::Denied) {
            attributes.push(KeyValue::new("count", number(count)));
        }
        attributes
    }
}

/// What went wrong with a connection, by policy.
fn error(fate: &Fate) -> Option<&'static str> {
    match fate {
        Fate::Allowed(_) => None,
        Fate::Denied => Some("denied"),
        Fate::Severed { .. } => Some("severed"),
    }
}

fn status(record: &Record) -> Status {
    match record.fate {
        Fate::Allowed(_) => Status::Unset,
        Fate::Denied | Fate::Severed { .. } => Status::error(record.reason()),
    }
}

fn value(field: Field<'_>) -> Value {
    match field {
        Field::Text(text) => text.to_owned().into(),
        Field::Words(text) => text.into(),
        Field::Address(address) => address.to_string().into(),
        Field::Number(n) => Value::I64(number(n)),
        Field::List(words) => Value::Array(Array::String(
            words.into_iter().map(StringValue::from).collect(),
        )),
    }
}

fn number(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// What happened in the life of the connection, in its order.
fn events(record: &Record) -> SpanEvents {
    let mut events = SpanEvents::default();
    let opened = record.subject.opened;
    events
        .events
        .push(Event::new("held", opened, Vec::new(), 0));
    if let Some(seen) = &record.subject.seen {
        let mut happened: Vec<_> = Milestone::ALL
            .into_iter()
            .zip(seen.moments)
            .filter_map(|(moment, after)| Some((after?, moment)))
            .collect();
        happened.sort_unstable_by_key(|(after, _)| *after);
        events
            .events
            .extend(happened.into_iter().map(|(after, moment)| {
                let (name, side) = words(moment);
                let side = side.map(|side| KeyValue::new("side", side));
                Event::new(name, opened + after, side.into_iter().collect(), 0)
            }));
    }
    events
}

/// The name of the event, and its side.
fn words(moment: Milestone) -> (&'static str, Option<&'static str>) {
    match moment {
        Milestone::Connected => ("upstream connected", None),
        Milestone::Sent => ("first byte", Some("client")),
        Milestone::Received => ("first byte", Some("server")),
        Milestone::ClientEnded => ("half-closed", Some("client")),
        Milestone::ServerEnded => ("half-closed", Some("server")),
    }
}

#[cfg(test)]
mod tests;
