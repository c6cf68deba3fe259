//! One record per connection, told to every sink: the trace file, and what else there is.
//!
//! A sink has a thread of its own behind a bounded queue: a slow one costs records, which are
//! counted, and never delays a packet. The packets' threads only put values together; words are
//! made of them where they are written.
mod fields;
mod file;
mod log;
mod queue;
mod sink;
#[cfg(test)]
pub(crate) mod testing;
mod windows;

use std::collections::{HashSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use policy::{Endpoint, Protocol};

use crate::decision::{Decision, Severance, Way};
use crate::metrics::Word;
use crate::observed::Observed;
use crate::telemetry::{Seen, SpanCounts, Spans};

pub(crate) use fields::{Field, shown, timestamp};
pub(crate) use queue::Queue;
pub(crate) use sink::Sink;
pub(crate) use windows::Windows;

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
    /// What a span tells beyond these, if the connection is followed for one.
    pub(crate) seen: Option<Seen>,
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
    log: Option<Sink>,
    file: Option<Sink>,
    spans: Option<Spans>,
    observed: Observed,
    denied: Mutex<Remembered>,
}

impl Recorder {
    /// Keeps no records.
    pub(crate) fn off() -> Self {
        Self {
            log: None,
            file: None,
            spans: None,
            observed: Observed::new(),
            denied: Mutex::default(),
        }
    }

    /// Logs what is refused.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub(crate) fn with_log(mut self) -> io::Result<Self> {
        self.log = Some(log::start()?);
        Ok(self)
    }

    /// Appends records of `node` to the file at `path`; `-` is standard output.
    ///
    /// # Errors
    /// If the file cannot be opened for appending or the thread cannot be started.
    pub(crate) fn with_file(mut self, path: &Path, node: Arc<str>) -> io::Result<Self> {
        self.file = Some(file::open(path, node)?);
        Ok(self)
    }

    /// Makes spans too.
    pub(crate) fn with_spans(mut self, spans: Option<Spans>) -> Self {
        self.spans = spans;
        self
    }

    /// Whether connections are to be followed for spans.
    pub(crate) fn follows(&self) -> bool {
        self.spans.is_some()
    }

    /// Spans sent and lost so far.
    pub(crate) fn spans(&self) -> SpanCounts {
        self.spans.as_ref().map(Spans::counts).unwrap_or_default()
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

    /// What has been decided lately, for people.
    pub(crate) fn observed(&self) -> &Observed {
        &self.observed
    }

    /// Records a denied connection, once for all repeats of its first packet.
    pub(crate) fn denied(&self, subject: Subject, decision: &Arc<Decision>) {
        let first = self
            .denied
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(Attempt::new(&subject, decision));
        if first {
            self.observed.saw(Word::Deny, &subject, decision, None);
            self.tell(subject, Fate::Denied, decision);
        }
    }

    /// Lets people see that a connection is allowed; its record comes when it is over.
    pub(crate) fn allowed(&self, subject: &Subject, decision: &Arc<Decision>) {
        self.observed.saw(Word::Allow, subject, decision, None);
    }

    /// Records an allowed connection that is over.
    pub(crate) fn ended(&self, subject: Subject, decision: &Arc<Decision>, outcome: Outcome) {
        self.tell(subject, Fate::Allowed(outcome), decision);
    }

    /// Records a connection that was allowed once and cut by a later change.
    pub(crate) fn severed(&self, subject: Subject, severance: Severance) {
        let Severance { decision, replaced } = severance;
        self.observed
            .saw(Word::Sever, &subject, &decision, replaced.clone());
        self.tell(subject, Fate::Severed { replaced }, &decision);
    }

    fn tell(&self, subject: Subject, fate: Fate, decision: &Arc<Decision>) {
        let spans = self.spans.as_ref();
        let spans = spans.filter(|spans| spans.wants(&subject, &fate));
        let log = self.log.as_ref().filter(|_| log::wants(&fate));
        if log.is_none() && self.file.is_none() && spans.is_none() {
            return;
        }
        let record = Arc::new(Record {
            subject,
            fate,
            decision: Arc::clone(decision),
            ended: SystemTime::now(),
        });
        let told = log.into_iter().chain(&self.file);
        told.chain(spans.map(Spans::sink))
            .for_each(|sink| sink.tell(&record));
    }

    fn sinks(&self) -> impl Iterator<Item = &Sink> {
        let sinks = self.log.iter().chain(&self.file);
        sinks.chain(self.spans.as_ref().map(Spans::sink))
    }
}

/// A first packet, and the pods whose attempt it was: from the next holder of an address it is another's.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Attempt {
    client: SocketAddr,
    server: SocketAddr,
    /// What tells a repeat from a new attempt.
    number: u32,
    uids: [Option<Arc<str>>; 2],
}

impl Attempt {
    fn new(subject: &Subject, decision: &Decision) -> Self {
        let uid = |pod: &Option<Arc<Endpoint>>| pod.as_ref().map(|it| Arc::clone(&it.identity.uid));
        Self {
            client: subject.client,
            server: subject.server,
            number: subject.attempt,
            uids: [uid(&decision.from), uid(&decision.to)],
        }
    }
}

/// The last few denied attempts.
#[derive(Default)]
struct Remembered {
    known: HashSet<Attempt, ahash::RandomState>,
    order: VecDeque<Attempt>,
}

impl Remembered {
    /// Whether this attempt was not known yet.
    fn insert(&mut self, attempt: Attempt) -> bool {
        if !self.known.insert(attempt.clone()) {
            return false;
        }
        self.order.push_back(attempt);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        true
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeat_is_known_until_newer_attempts_push_it_out() {
        let mut remembered = Remembered::default();
        let attempt = |port, number, uid: &str| Attempt {
            client: SocketAddr::from(([10, 0, 0, 1], port)),
            server: SocketAddr::from(([10, 0, 0, 2], 80)),
            number,
            uids: [Some(uid.into()), None],
        };
        assert!(remembered.insert(attempt(1, 7, "a")));
        assert!(!remembered.insert(attempt(1, 7, "a")), "the same again");
        assert!(remembered.insert(attempt(1, 8, "a")), "a new attempt");
        assert!(remembered.insert(attempt(1, 7, "b")), "another pod's");
        for port in 2..10_000 {
            remembered.insert(attempt(port, 7, "a"));
        }
        assert!(remembered.insert(attempt(1, 7, "a")), "forgotten by now");
        assert!(remembered.known.len() <= REMEMBERED && remembered.order.len() <= REMEMBERED);
    }
}
