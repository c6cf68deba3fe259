//! The last denials, each once with its count: a client that retries is one line.
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use policy::Protocol;
use serde_json::Value;

use super::Event;
use crate::telemetry::record::timestamp;

/// Different denials that are remembered.
const REMEMBERED: usize = 200;

/// The key of a denial: without the client's port, since every attempt has another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    client: IpAddr,
    server: IpAddr,
    port: u16,
    protocol: Protocol,
}

struct Denial {
    /// The newest of its kind.
    last: Arc<Event>,
    first: SystemTime,
    count: u64,
}

/// The newest ones.
#[derive(Default)]
pub(super) struct Denials(HashMap<Key, Denial, ahash::RandomState>);

impl Denials {
    /// Adds a denial; if there are too many, the oldest is removed.
    pub(super) fn note(&mut self, event: &Arc<Event>) {
        let subject = &event.subject;
        let key = Key {
            client: subject.client.ip(),
            server: subject.server.ip(),
            port: subject.server.port(),
            protocol: subject.protocol,
        };
        if let Some(known) = self.0.get_mut(&key) {
            known.count += 1;
            known.last = Arc::clone(event);
            return;
        }
        if self.0.len() >= REMEMBERED {
            let oldest = self.0.iter().min_by_key(|(_, denial)| denial.last.at);
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                self.0.remove(&oldest);
            }
        }
        self.0.insert(
            key,
            Denial {
                last: Arc::clone(event),
                first: event.at,
                count: 1,
            },
        );
    }

    /// Newest first: the keys of the newest of each kind, `count` and `first_time`.
    pub(super) fn json(&self, node: &str) -> Vec<Value> {
        let mut denials: Vec<_> = self.0.values().collect();
        denials.sort_unstable_by_key(|denial| std::cmp::Reverse(denial.last.at));
        let listed = denials.into_iter().map(|denial| {
            let mut fields = denial.last.json(node);
            fields["count"] = denial.count.into();
            fields["first_time"] = timestamp(denial.first).into();
            fields
        });
        listed.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::denied;
    use super::*;
    use crate::telemetry::decision::VerdictKind;

    fn event(port: u16) -> Arc<Event> {
        let (subject, decision) = denied(port);
        Arc::new(Event {
            kind: VerdictKind::Deny,
            subject,
            decision,
            at: SystemTime::now(),
            replaced: None,
        })
    }

    #[test]
    fn repeated_denials_are_counted_and_oldest_evicted() {
        let mut denials = Denials::default();
        for port in 1..=200 {
            denials.note(&event(port));
        }
        denials.note(&event(1));
        denials.note(&event(201));
        let listed = denials.json("node");
        let find = |port: u16| listed.iter().find(|it| it["destination.port"] == port);
        assert_eq!(listed.len(), REMEMBERED);
        assert_eq!(find(1).map(|it| it["count"].clone()), Some(2.into()));
        assert!(find(2).is_none(), "it was the longest ago");
        assert_eq!(listed[0]["destination.port"], 201, "newest first");
    }
}
