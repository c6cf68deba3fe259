//! One record per connection, as JSON lines, for use without a collector (`--trace-file`).
//!
//! Writing happens on a thread of its own behind a bounded queue: a slow disk costs records, which
//! are counted, and never delays a packet.
use std::collections::{HashSet, VecDeque};
use std::fs::OpenOptions;
use std::io::{self, BufWriter, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use policy::Protocol;
use serde_json::{Map, Value, json};

use crate::decision::{Decision, Way};

/// Records that may wait for the disk.
const WAITING: usize = 16_384;
/// Denied SYNs that are remembered, so that a client's repeats do not become new records.
const REMEMBERED: usize = 8192;

/// What a record is about.
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

/// Where records go.
pub(crate) struct Recorder {
    lines: Option<SyncSender<Value>>,
    lost: AtomicU64,
    denied: Mutex<Remembered>,
}

impl Recorder {
    /// Keeps no records.
    pub(crate) fn off() -> Self {
        Self {
            lines: None,
            lost: AtomicU64::new(0),
            denied: Mutex::default(),
        }
    }

    /// Appends records to the file at `path`; `-` is standard output.
    ///
    /// # Errors
    /// If the file cannot be opened for appending or the thread cannot be started.
    pub(crate) fn to_file(path: &Path) -> io::Result<Self> {
        let out: Box<dyn Write + Send> = if path == Path::new("-") {
            Box::new(io::stdout())
        } else {
            Box::new(OpenOptions::new().create(true).append(true).open(path)?)
        };
        let (lines, queue) = sync_channel(WAITING);
        std::thread::Builder::new()
            .name("records".to_owned())
            .spawn(move || write_all(&queue, out))?;
        Ok(Self {
            lines: Some(lines),
            ..Self::off()
        })
    }

    /// Records that were lost because the disk did not keep up.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Records a denied connection, once for all repeats of its first packet.
    pub(crate) fn denied(&self, node: &str, subject: &Subject, decision: &Decision) {
        if self.lines.is_none() {
            return;
        }
        let first = self
            .denied
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert((subject.client, subject.server, subject.attempt));
        if first {
            let record = record("deny", node, subject, decision, decision.verdict.reason());
            self.send(record);
        }
    }

    /// Records an allowed connection that is over.
    pub(crate) fn ended(
        &self,
        node: &str,
        subject: &Subject,
        decision: &Decision,
        outcome: &Outcome,
    ) {
        if self.lines.is_none() {
            return;
        }
        let reason = decision.verdict.reason();
        let reason = match outcome {
            Outcome::Closed | Outcome::Carried => reason,
            Outcome::Broken(kind) => format!("{reason} Broken off: {kind}."),
            Outcome::Stopped => format!("{reason} Ended by the daemon."),
            Outcome::Unanswered(why) => format!("{reason} Not connected: {why}."),
        };
        self.send(record("allow", node, subject, decision, reason));
    }

    /// Records a connection that was allowed once and cut by a later change.
    pub(crate) fn severed(&self, node: &str, subject: &Subject, severance: &Decision) {
        if self.lines.is_some() {
            let reason = severance.verdict.reason();
            self.send(record("sever", node, subject, severance, reason));
        }
    }

    fn send(&self, record: Value) {
        if let Some(lines) = &self.lines
            && lines.try_send(record).is_err()
        {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
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

/// The record of a connection: the keys that users rely on.
pub(crate) fn record(
    verdict: &str,
    node: &str,
    subject: &Subject,
    decision: &Decision,
    reason: String,
) -> Value {
    let mut fields = Map::new();
    let mut put = |key: &str, value: Value| fields.insert(key.to_owned(), value);
    put("verdict", verdict.into());
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
    let ends = [
        ("source", subject.client, &decision.from),
        ("destination", subject.server, &decision.to),
    ];
    for (side, address, endpoint) in ends {
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
    put("end_time", timestamp(SystemTime::now()).into());
    put("path", subject.way.name().into());
    Value::Object(fields)
}

/// RFC 3339 in UTC, to the microsecond.
pub(crate) fn timestamp(time: SystemTime) -> String {
    humantime::format_rfc3339_micros(time).to_string()
}

/// Writes until the recorder is gone; flushes whenever nothing waits.
fn write_all(queue: &Receiver<Value>, out: Box<dyn Write + Send>) {
    let mut out = BufWriter::new(out);
    while let Ok(first) = queue.recv() {
        let waiting = std::iter::once(first).chain(queue.try_iter());
        let written = waiting
            .into_iter()
            .try_for_each(|record| writeln!(out, "{record}"));
        if let Err(error) = written.and_then(|()| out.flush()) {
            tracing::error!(%error, "cannot write records; no more are written");
            return;
        }
    }
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
