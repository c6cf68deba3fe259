//! The keys of a record that users rely on, the same in the trace file, in spans and on the admin
//! port.
use std::net::{IpAddr, SocketAddr};
use std::time::SystemTime;

use controller::Decision;
use policy::Endpoint;
use serde_json::{Map, Value, json};

use super::{Fate, Record, Subject};
use crate::telemetry::decision::VerdictKind;

/// The value of a key.
pub(crate) enum Field<'a> {
    Text(&'a str),
    Words(String),
    Address(IpAddr),
    Number(u64),
    List(Vec<String>),
}

/// The names of an endpoint's keys.
struct Names {
    address: &'static str,
    port: &'static str,
    namespace: &'static str,
    pod: &'static str,
    uid: &'static str,
}

const SOURCE: Names = Names {
    address: "source.address",
    port: "source.port",
    namespace: "source.k8s.namespace.name",
    pod: "source.k8s.pod.name",
    uid: "source.k8s.pod.uid",
};
const DESTINATION: Names = Names {
    address: "destination.address",
    port: "destination.port",
    namespace: "destination.k8s.namespace.name",
    pod: "destination.k8s.pod.name",
    uid: "destination.k8s.pod.uid",
};

impl Fate {
    /// The name of it in records (`verdict`).
    pub(crate) fn kind(&self) -> VerdictKind {
        match self {
            Self::Denied => VerdictKind::Deny,
            Self::Allowed(_) => VerdictKind::Allow,
            Self::Severed { .. } => VerdictKind::Sever,
        }
    }
}

impl Record {
    /// Passes every key but the times to `put`, as reported by `node`.
    pub(crate) fn fields(&self, node: &str, mut put: impl FnMut(&'static str, Field<'_>)) {
        put("verdict", Field::Text(self.fate.kind().name()));
        fields(&self.subject, &self.decision, self.reason(), node, put);
    }

    /// Every key, in JSON.
    pub(crate) fn json(&self, node: &str) -> Value {
        let mut shown = shown(&self.subject, &self.decision, self.reason(), node);
        let mut put = |key: &str, value: Value| shown.insert(key.to_owned(), value);
        put("verdict", self.fate.kind().name().into());
        put("end_time", timestamp(self.ended).into());
        Value::Object(shown)
    }
}

/// The keys of a connection that do not depend on its outcome, in JSON.
pub(crate) fn shown(
    subject: &Subject,
    decision: &Decision,
    reason: String,
    node: &str,
) -> Map<String, Value> {
    let mut shown = Map::new();
    let mut put = |key: &str, value: Value| shown.insert(key.to_owned(), value);
    put("start_time", timestamp(subject.opened).into());
    fields(subject, decision, reason, node, |key, field| {
        let value = match field {
            Field::Text(text) => text.into(),
            Field::Words(text) => text.into(),
            Field::Address(address) => json!(address),
            Field::Number(number) => number.into(),
            Field::List(words) => words.into(),
        };
        put(key, value);
    });
    shown
}

fn fields(
    subject: &Subject,
    decision: &Decision,
    reason: String,
    node: &str,
    mut put: impl FnMut(&'static str, Field<'_>),
) {
    let policies = decision.policies().into_iter().map(|key| key.to_string());
    put("direction", Field::Text(decision.direction()));
    put("policies", Field::List(policies.collect()));
    put("reason", Field::Words(reason));
    put("protocol", Field::Words(subject.protocol.to_string()));
    end(&SOURCE, subject.client, decision.from.as_deref(), &mut put);
    end(
        &DESTINATION,
        subject.server,
        decision.to.as_deref(),
        &mut put,
    );
    put("k8s.node.name", Field::Text(node));
    put("bytes.sent", Field::Number(subject.sent));
    put("bytes.received", Field::Number(subject.received));
    put("path", Field::Text(subject.path.name()));
}

fn end(
    names: &Names,
    address: SocketAddr,
    pod: Option<&Endpoint>,
    put: &mut impl FnMut(&'static str, Field<'_>),
) {
    put(names.address, Field::Address(address.ip()));
    put(names.port, Field::Number(address.port().into()));
    if let Some(pod) = pod {
        let identity = &pod.identity;
        put(names.namespace, Field::Text(&identity.key.namespace));
        put(names.pod, Field::Text(&identity.key.name));
        put(names.uid, Field::Text(&identity.uid));
    }
}

/// RFC 3339 in UTC, to the microsecond.
pub(crate) fn timestamp(time: SystemTime) -> String {
    humantime::format_rfc3339_micros(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc_3339_in_utc() {
        assert_eq!(
            timestamp(SystemTime::UNIX_EPOCH),
            "1970-01-01T00:00:00.000000Z"
        );
    }
}
