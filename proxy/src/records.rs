//! One record per connection, told to every sink: the trace file, and what else there is.
//!
//! A sink has a thread of its own behind a bounded queue: a slow one costs records, which are
//! counted, and never delays a packet. The packets' threads only put values together; words are
//! made of them where they are written.
mod file;
mod queue;
mod sink;

use std::collections::{HashSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use policy::{Endpoint, Protocol};
use serde_json::{Map, Value, json};

use crate::decision::{Decision, Severance, Way};

pub(crate) use queue::Queue;
pub(crate) use sink::Sink;

/// Denied SYNs that are remembered, so that a client's repeats do not become new records.
const REMEMBERED: usize = 8192;

/// What a record is about.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    pub(crate) client: SocketAddr,
    pub(crate) server: SocketAddr,
    pub(crate) protocol: Protocol,
    pub(crate) way: Way,
    /// Payload bytes from the client.
    pub(crate) sent: u64,
    /// Payload bytes to the client.
    pub(crate) received: u64,
    pub(crate) opened: SystemTime,
    /// What tells a repeat of the first packet from a new attempt.
    pub(crate) attempt: u32,
}

/// How an allowed connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Both sides closed.
    Closed,
    /// A side was reset or gone; the other was reset in turn.
    Broken(io::ErrorKind),
    /// The daemon ended it.
    Stopped,
    /// It goes on in the kernel; this is its first packet.
    Carried,
    /// There was no connection to the server; the client heard the same.
    Unanswered(String),
}

/// What became of a connection.
#[derive(Clone, Debug)]
pub(crate) enum Fate {
    /// Never connected.
    Denied,
    /// Allowed, and over or handed to the kernel.
    Allowed(Outcome),
    /// Allowed once, and cut by a later change.
    Severed {
        /// If no policy did it: what became of the pod at one of its ends.
        replaced: Option<String>,
    },
}

/// A connection and what became of it.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) subject: Subject,
    pub(crate) fate: Fate,
    /// What it rested on; of a severed one, what ended it.
    pub(crate) decision: Arc<Decision>,
    pub(crate) ended: SystemTime,
}

/// Tells every sink.
pub(crate) struct Recorder {
    file: Option<Sink>,
    denied: Mutex<Remembered>,
}

impl Recorder {
    /// Keeps no records.
    pub(crate) fn off() -> Self {
        Self {
            file: None,
            denied: Mutex::default(),
        }
    }

    /// Appends records of `node` to the file at `path`; `-` is standard output.
    ///
    /// # Errors
    /// If the file cannot be opened for appending or the thread cannot be started.
    pub(crate) fn with_file(mut self, path: &Path, node: Arc<str>) -> io::Result<Self> {
        self.file = Some(file::open(path, node)?);
        Ok(self)
    }

    /// Lets every sink finish what it has been told, for at most `limit` in all.
    pub(crate) fn finish(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        self.sinks().for_each(|sink| sink.finish(deadline));
    }

    /// Records that the trace file lost because the disk did not keep up.
    pub(crate) fn lost(&self) -> u64 {
        self.file.as_ref().map_or(0, Sink::lost)
    }

    /// Records a denied connection, once for all repeats of its first packet.
    pub(crate) fn denied(&self, subject: Subject, decision: &Arc<Decision>) {
        if self.is_off() {
            return;
        }
        let first = self
            .denied
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert((subject.client, subject.server, subject.attempt));
        if first {
            self.tell(subject, Fate::Denied, decision);
        }
    }

    /// Records an allowed connection that is over.
    pub(crate) fn ended(&self, subject: Subject, decision: &Arc<Decision>, outcome: Outcome) {
        self.tell(subject, Fate::Allowed(outcome), decision);
    }

    /// Records a connection that was allowed once and cut by a later change.
    pub(crate) fn severed(&self, subject: Subject, severance: Severance) {
        let fate = Fate::Severed {
            replaced: severance.replaced,
        };
        self.tell(subject, fate, &severance.decision);
    }

    fn tell(&self, subject: Subject, fate: Fate, decision: &Arc<Decision>) {
        if self.is_off() {
            return;
        }
        let record = Arc::new(Record {
            subject,
            fate,
            decision: Arc::clone(decision),
            ended: SystemTime::now(),
        });
        self.sinks().for_each(|sink| sink.tell(&record));
    }

    fn is_off(&self) -> bool {
        self.sinks().next().is_none()
    }

    fn sinks(&self) -> impl Iterator<Item = &Sink> {
        self.file.iter()
    }
}

/// Client, server and what tells a repeat from a new attempt.
type Attempt = (SocketAddr, SocketAddr, u32);

/// The last few denied attempts.
#[derive(Default)]
struct Remembered {
    known: HashSet<Attempt, ahash::RandomState>,
    order: VecDeque<Attempt>,
}

impl Remembered {
    /// Whether this SYN was not known yet.
    fn insert(&mut self, syn: Attempt) -> bool {
        if !self.known.insert(syn) {
            return false;
        }
        self.order.push_back(syn);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        true
    }
}

impl Fate {
    /// As records name it (`verdict`).
    pub(crate) fn verdict(&self) -> &'static str {
        match self {
            Self::Denied => "deny",
            Self::Allowed(_) => "allow",
            Self::Severed { .. } => "sever",
        }
    }
}

impl Record {
    /// Why, in sentences: the verdict's, and how an allowed connection came to its end.
    pub(crate) fn reason(&self) -> String {
        let reason = || self.decision.verdict.reason();
        let (reason, outcome) = match &self.fate {
            Fate::Severed {
                replaced: Some(replaced),
            } => return replaced.clone(),
            Fate::Denied | Fate::Severed { .. } => return reason(),
            Fate::Allowed(outcome) => (reason(), outcome),
        };
        match outcome {
            Outcome::Closed | Outcome::Carried => reason,
            Outcome::Broken(kind) => format!("{reason} Broken off: {kind}."),
            Outcome::Stopped => format!("{reason} Ended by the daemon."),
            Outcome::Unanswered(why) => format!("{reason} Not connected: {why}."),
        }
    }

    /// The keys that users rely on, in JSON.
    pub(crate) fn json(&self, node: &str) -> Value {
        let mut fields = keys(&self.subject, &self.decision, self.reason(), node);
        let mut put = |key: &str, value: Value| fields.insert(key.to_owned(), value);
        put("verdict", self.fate.verdict().into());
        put("end_time", timestamp(self.ended).into());
        Value::Object(fields)
    }
}

/// The keys of a connection whatever becomes of it.
pub(crate) fn keys(
    subject: &Subject,
    decision: &Decision,
    reason: String,
    node: &str,
) -> Map<String, Value> {
    let mut fields = Map::new();
    let mut put = |key: &str, value: Value| fields.insert(key.to_owned(), value);
    put("direction", decision.direction().into());
    put(
        "policies",
        decision
            .policies()
            .iter()
            .map(|key| Value::from(key.to_string()))
            .collect(),
    );
    put("reason", reason.into());
    put("protocol", subject.protocol.to_string().into());
    for (side, address, endpoint) in subject.ends(decision) {
        put(&format!("{side}.address"), json!(address.ip()));
        put(&format!("{side}.port"), json!(address.port()));
        if let Some(endpoint) = endpoint {
            let identity = &endpoint.identity;
            put(
                &format!("{side}.k8s.namespace.name"),
                Value::from(&*identity.key.namespace),
            );
            put(
                &format!("{side}.k8s.pod.name"),
                Value::from(&*identity.key.name),
            );
            put(&format!("{side}.k8s.pod.uid"), Value::from(&*identity.uid));
        }
    }
    put("k8s.node.name", node.into());
    put("bytes.sent", subject.sent.into());
    put("bytes.received", subject.received.into());
    put("start_time", timestamp(subject.opened).into());
    put("path", subject.way.name().into());
    fields
}

impl Subject {
    /// Both ends, as records name them, with the pods behind them.
    pub(crate) fn ends<'a>(
        &self,
        decision: &'a Decision,
    ) -> [(&'static str, SocketAddr, Option<&'a Endpoint>); 2] {
        [
            ("source", self.client, decision.from.as_deref()),
            ("destination", self.server, decision.to.as_deref()),
        ]
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
    fn a_repeated_syn_is_known_until_newer_ones_push_it_out() {
        let mut remembered = Remembered::default();
        let server = SocketAddr::from(([10, 0, 0, 2], 80));
        let client = |port| (SocketAddr::from(([10, 0, 0, 1], port)), server, 7);
        assert!(remembered.insert(client(1)));
        assert!(!remembered.insert(client(1)), "the same SYN again");
        assert!(
            remembered.insert((client(1).0, server, 8)),
            "a new attempt from the same port"
        );
        for port in 2..10_000 {
            remembered.insert(client(port));
        }
        assert!(remembered.insert(client(1)), "forgotten by now");
        assert!(remembered.known.len() <= REMEMBERED && remembered.order.len() <= REMEMBERED);
    }

    #[test]
    fn times_are_rfc_3339_in_utc() {
        assert_eq!(
            timestamp(SystemTime::UNIX_EPOCH),
            "1970-01-01T00:00:00.000000Z"
        );
    }
}
