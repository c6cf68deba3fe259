//! Records each connection once in every sink, and publishes its decision to operators.
//!
//! A sink has a thread of its own behind a bounded queue: a slow one costs records, which are
//! counted, and never delays a packet.
mod file;
mod log;

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use controller::{Decision, Severance};
use parking_lot::Mutex;
use policy::{Endpoint, Protocol};

use crate::telemetry::decision::{DataPath, VerdictKind};
use crate::telemetry::recent::Observed;
use crate::telemetry::record::{Fate, Outcome, Record, Sink, Subject, Windows};
use crate::telemetry::spans::{SpanCounts, Spans};

/// Denied attempts that are remembered, so that a client's repeats do not become new records.
const REMEMBERED: usize = 8192;
/// How long a client retransmits its SYN (`tcp_syn_retries` of 6, 127 s), plus a margin.
const REPEATED_WITHIN: Duration = Duration::from_secs(130);

/// Sends records to all sinks.
pub(crate) struct Recorder {
    log: Option<Sink>,
    file: Option<Sink>,
    file_trouble: file::Trouble,
    spans: Option<Spans>,
    observed: Observed,
    denied: Mutex<Denied>,
}

impl Recorder {
    /// Keeps no records.
    pub(crate) fn off() -> Self {
        Self {
            log: None,
            file: None,
            file_trouble: file::Trouble::default(),
            spans: None,
            observed: Observed::new(),
            denied: Mutex::default(),
        }
    }

    /// Logs denied and severed connections.
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
        let (sink, trouble) = file::open(path, node)?;
        (self.file, self.file_trouble) = (Some(sink), trouble);
        Ok(self)
    }

    /// Why records cannot be written to the trace file now.
    pub(crate) fn note(&self) -> Option<String> {
        self.file_trouble.note()
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

    /// Waits until all sinks have written their records, for at most `limit` in all.
    pub(crate) fn finish(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        self.sinks().for_each(|sink| sink.finish(deadline));
    }

    /// Records of the trace file that were lost because the disk was slow or full.
    pub(crate) fn lost(&self) -> u64 {
        self.file.as_ref().map_or(0, Sink::lost)
    }

    /// The recent decisions.
    pub(crate) fn observed(&self) -> &Observed {
        &self.observed
    }

    /// Records a denied connection, once for all repeats of its first packet.
    pub(crate) fn denied(&self, subject: Subject, decision: &Arc<Decision>) {
        let first = self
            .denied
            .lock()
            .is_first(&subject, decision, Instant::now());
        if first {
            let decision = &Arc::new(decision.to_keep());
            self.observed
                .record(VerdictKind::Deny, &subject, decision, None);
            self.send(subject, Fate::Denied, decision);
        }
    }

    /// Publishes that a connection is allowed; its record follows at its end.
    pub(crate) fn allowed(&self, subject: &Subject, decision: &Arc<Decision>) {
        self.observed
            .record(VerdictKind::Allow, subject, decision, None);
    }

    /// Records an allowed connection that is over.
    pub(crate) fn ended(&self, subject: Subject, decision: &Arc<Decision>, outcome: Outcome) {
        self.send(subject, Fate::Allowed(outcome), decision);
    }

    /// Records a severed connection.
    pub(crate) fn severed(&self, subject: Subject, severance: Severance) {
        let Severance { decision, replaced } = severance;
        self.observed
            .record(VerdictKind::Sever, &subject, &decision, replaced.clone());
        self.send(subject, Fate::Severed { replaced }, &decision);
    }

    fn send(&self, subject: Subject, fate: Fate, decision: &Arc<Decision>) {
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
        let sinks = log.into_iter().chain(&self.file);
        sinks
            .chain(spans.map(Spans::sink))
            .for_each(|sink| sink.send(&record));
    }

    fn sinks(&self) -> impl Iterator<Item = &Sink> {
        let sinks = self.log.iter().chain(&self.file);
        sinks.chain(self.spans.as_ref().map(Spans::sink))
    }
}

/// A first packet with its pods: from the next pod at an address it is another attempt.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Attempt {
    /// Without the port if `sequence` tells more: conntrack, which forgets a dropped SYN, may give its
    /// repeat another port.
    client: SocketAddr,
    server: SocketAddr,
    protocol: Protocol,
    sequence: u32,
    uids: [Option<Arc<str>>; 2],
}

/// The recently denied attempts.
struct Denied(Windows<Attempt, ()>);

impl Default for Denied {
    fn default() -> Self {
        Self(Windows::new(REPEATED_WITHIN, REMEMBERED))
    }
}

impl Denied {
    /// Whether this attempt has not been denied yet.
    fn is_first(&mut self, subject: &Subject, decision: &Decision, now: Instant) -> bool {
        self.0.ended(now);
        let attempt = Attempt::of(subject, decision);
        if self.0.running(&attempt).is_some() {
            return false;
        }
        self.0.begin(attempt, now);
        true
    }
}

impl Attempt {
    fn of(subject: &Subject, decision: &Decision) -> Self {
        let uid = |pod: &Option<Arc<Endpoint>>| pod.as_ref().map(|it| Arc::clone(&it.identity.uid));
        let mut client = subject.client;
        if subject.path == DataPath::Spliced {
            client.set_port(0);
        }
        Self {
            client,
            server: subject.server,
            protocol: subject.protocol,
            sequence: subject.attempt,
            uids: [uid(&decision.from), uid(&decision.to)],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::record::testing;

    fn syn(port: u16, sequence: u32) -> Subject {
        Subject {
            client: SocketAddr::from(([10, 0, 0, 1], port)),
            server: SocketAddr::from(([10, 0, 0, 2], 80)),
            protocol: Protocol::Tcp,
            path: DataPath::Spliced,
            sent: 0,
            received: 0,
            opened: SystemTime::now(),
            attempt: sequence,
            seen: None,
        }
    }

    fn datagram(port: u16) -> Subject {
        Subject {
            protocol: Protocol::Udp,
            path: DataPath::Kernel,
            ..syn(port, 0)
        }
    }

    #[test]
    fn repeated_first_packets_are_one_denied_attempt() {
        let (mut denied, now) = (Denied::default(), Instant::now());
        let decision = testing::decision("node-1", true);
        for (subject, first, why) in [
            (syn(1, 7), true, "an attempt"),
            (syn(1, 7), false, "the same SYN again"),
            (syn(1, 8), true, "a new attempt from the same port"),
            (syn(2, 9), true, "one from another port"),
            (syn(3, 9), false, "conntrack gave the repeat another port"),
            (datagram(1), true, "a datagram"),
            (datagram(1), false, "the next of its flow"),
            (datagram(2), true, "another flow"),
        ] {
            assert_eq!(denied.is_first(&subject, &decision, now), first, "{why}");
        }
        let mut elsewhere = syn(1, 7);
        elsewhere.server.set_port(81);
        let first = denied.is_first(&elsewhere, &decision, now);
        assert!(first, "a scan uses one number");
        let (from, to) = (None, decision.to.clone());
        let verdict = decision.verdict;
        let others = Decision { verdict, from, to };
        assert!(denied.is_first(&syn(1, 7), &others, now), "another's");
    }

    #[test]
    fn long_running_denial_is_reported_again() {
        let (mut denied, now) = (Denied::default(), Instant::now());
        let decision = testing::decision("node-1", true);
        let mut is_first = |after| denied.is_first(&datagram(1), &decision, now + after);
        assert!(is_first(Duration::ZERO));
        assert!(!is_first(REPEATED_WITHIN / 2));
        assert!(is_first(REPEATED_WITHIN));
    }

    #[test]
    fn denial_seen_by_several_workers_is_recorded_once() {
        let recorder = Recorder::off();
        let decision = testing::decision("node-1", true);
        let mut observed = recorder.observed().stream();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..100).for_each(|n| recorder.denied(syn(1, n), &decision)));
            }
        });
        let count = std::iter::from_fn(|| observed.try_recv().ok()).count();
        assert_eq!(count, 100);
    }
}
