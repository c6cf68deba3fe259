//! Recent decisions, for operators: a live stream, counts per pair of pods, the last denials.
//!
//! Everything here is bounded and in memory. Recording a decision never blocks: a slow reader of the
//! stream loses the oldest decisions and gets their number. Knows nothing of HTTP.
mod denials;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use controller::Decision;
use dashmap::DashMap;
use parking_lot::Mutex;
use policy::{Endpoint, PodKey};
use serde_json::{Value, json};
use tokio::sync::broadcast;

use crate::telemetry::decision::VerdictKind;
use crate::telemetry::record::{Subject, shown, timestamp};

use denials::Denials;

/// Decisions that wait for the slowest reader of the stream.
const STREAM: usize = 4096;
/// Pairs of pods whose decisions are counted; all other pairs share one count.
const PAIRS: usize = 16_384;

/// A decision at the time it was made.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) kind: VerdictKind,
    pub(crate) subject: Subject,
    pub(crate) decision: Arc<Decision>,
    pub(crate) at: SystemTime,
    /// Why it was severed, if not by policy.
    pub(crate) replaced: Option<String>,
}

/// Client and server; `None` is not a pod.
type Pair = (Option<PodKey>, Option<PodKey>);

/// How often a pair was allowed, denied, severed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally([u64; 3]);

/// Recent decisions of one node.
pub(crate) struct Observed {
    since: SystemTime,
    stream: broadcast::Sender<Arc<Event>>,
    pairs: DashMap<Pair, Tally, ahash::RandomState>,
    /// Decisions of pairs beyond the maximum.
    uncounted: AtomicU64,
    denials: Mutex<Denials>,
}

impl Observed {
    /// Nothing yet.
    pub(crate) fn new() -> Self {
        Self {
            since: SystemTime::now(),
            stream: broadcast::Sender::new(STREAM),
            pairs: DashMap::default(),
            uncounted: AtomicU64::new(0),
            denials: Mutex::default(),
        }
    }

    /// Records a decision. To be called once for a denied connection, not for every retransmission
    /// of its first packet; for a severed one `replaced` says why, if not by policy.
    pub(crate) fn record(
        &self,
        kind: VerdictKind,
        subject: &Subject,
        decision: &Arc<Decision>,
        replaced: Option<String>,
    ) {
        self.count(kind, decision);
        let event = || {
            Arc::new(Event {
                kind,
                subject: subject.clone(),
                decision: Arc::clone(decision),
                at: SystemTime::now(),
                replaced,
            })
        };
        if kind == VerdictKind::Deny {
            let event = event();
            self.denials.lock().note(&event);
            let _ = self.stream.send(event);
        } else if self.stream.receiver_count() > 0 {
            // It fails only if the last reader has just gone.
            let _ = self.stream.send(event());
        }
    }

    /// Subscribes to decisions from now on.
    pub(crate) fn stream(&self) -> broadcast::Receiver<Arc<Event>> {
        self.stream.subscribe()
    }

    /// The number of subscribers.
    pub(crate) fn readers(&self) -> usize {
        self.stream.receiver_count()
    }

    /// The counts per pair of pods with their start, and the last denials, newest first. Pairs with a pod that
    /// does not `exist` any more are forgotten.
    pub(crate) fn json(&self, node: &str, exists: impl Fn(&PodKey) -> bool) -> Value {
        let stands = |end: &Option<PodKey>| end.as_ref().is_none_or(&exists);
        self.pairs
            .retain(|(from, to), _| stands(from) && stands(to));
        let pairs: Vec<Value> = self
            .pairs
            .iter()
            .map(|entry| {
                let ((from, to), Tally([allow, deny, sever])) = entry.pair();
                json!({
                    "from": from, "to": to, "allow": allow, "deny": deny, "sever": sever,
                })
            })
            .collect();
        let denials = self.denials.lock();
        json!({
            "node": node,
            "since": timestamp(self.since),
            "pairs": pairs,
            "uncounted": self.uncounted.load(Ordering::Relaxed),
            "denials": denials.json(node),
        })
    }

    fn count(&self, kind: VerdictKind, decision: &Decision) {
        let pod = |end: &Option<Arc<Endpoint>>| end.as_ref().map(|it| it.identity.key.clone());
        let pair = (pod(&decision.from), pod(&decision.to));
        if let Some(mut tally) = self.pairs.get_mut(&pair) {
            tally.0[kind as usize] += 1;
        } else if self.pairs.len() < PAIRS {
            self.pairs.entry(pair).or_default().0[kind as usize] += 1;
        } else {
            self.uncounted.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Event {
    /// The keys of a record as far as they are known when it is decided, and `time`.
    pub(crate) fn json(&self, node: &str) -> Value {
        let verdict = || self.decision.reason();
        let reason = self.replaced.clone().unwrap_or_else(verdict);
        let mut fields = shown(&self.subject, &self.decision, reason, node);
        for unknown in ["bytes.sent", "bytes.received"] {
            fields.remove(unknown);
        }
        fields.insert("verdict".to_owned(), self.kind.name().into());
        fields.insert("time".to_owned(), timestamp(self.at).into());
        Value::Object(fields)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::SocketAddr;

    use policy::{Decided, DecidedSide, Protocol};

    use super::*;
    use crate::telemetry::decision::DataPath;

    pub(crate) fn denied(port: u16) -> (Subject, Arc<Decision>) {
        let subject = Subject {
            client: SocketAddr::from(([10, 0, 0, 1], 4711)),
            server: SocketAddr::from(([10, 0, 0, 2], port)),
            protocol: Protocol::Tcp,
            path: DataPath::Spliced,
            sent: 0,
            received: 0,
            opened: SystemTime::now(),
            attempt: 0,
            seen: None,
        };
        let side = DecidedSide {
            isolated: true,
            ..DecidedSide::default()
        };
        let decision = Decision {
            verdict: Decided::of(side, side),
            from: None,
            to: None,
        };
        (subject, Arc::new(decision))
    }

    #[test]
    fn slow_reader_learns_its_losses_and_delays_nobody() {
        let observed = Observed::new();
        let mut reader = observed.stream();
        let (subject, decision) = denied(80);
        for _ in 0..STREAM + 10 {
            observed.record(VerdictKind::Allow, &subject, &decision, None);
        }
        assert!(matches!(
            reader.try_recv(),
            Err(broadcast::error::TryRecvError::Lagged(10))
        ));
        assert!(reader.try_recv().is_ok());
    }

    #[test]
    fn decisions_are_counted_by_pair_and_verdict() {
        let observed = Observed::new();
        let (subject, decision) = denied(80);
        for kind in [
            VerdictKind::Deny,
            VerdictKind::Deny,
            VerdictKind::Allow,
            VerdictKind::Sever,
        ] {
            observed.record(kind, &subject, &decision, None);
        }
        let listed = observed.json("node", |_| true);
        assert_eq!(
            listed["pairs"],
            json!([{ "from": null, "to": null, "allow": 1, "deny": 2, "sever": 1 }])
        );
        assert_eq!(listed["denials"][0]["count"], 2, "{listed}");
    }
}
