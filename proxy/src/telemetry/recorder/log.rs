//! Logs one line per denied or severed connection, with a limit per pod and policy.
//!
//! Lines beyond it are counted and the count is logged, so that a flood fills no disk and hides
//! no other lines. A blocked log loses lines and never delays a packet.
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use controller::DecidedBy;
use policy::Endpoint;
use tracing::info;

use crate::telemetry::record::{Fate, Queue, Record, Sink, Windows};

/// Records that may wait for their line.
const WAITING: usize = 4096;
const BATCH: usize = 256;
/// How long a record waits for others.
const LINGER: Duration = Duration::from_millis(20);
/// Lines about one pod and policy in one [`WINDOW`].
const LINES: u64 = 5;
const WINDOW: Duration = Duration::from_secs(10);
/// Pods and policies that are remembered.
const ROOM: usize = 1024;
/// The name of these lines for `RUST_LOG`.
const TARGET: &str = "portreeve::denied";

/// Whose policies denied.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Refuser {
    /// The pod under policy: the client's if its egress is denied, else the server's.
    pod: Option<Arc<str>>,
    address: IpAddr,
    policies: Vec<String>,
}

/// Recent denials per pod and policies.
struct Limiter(Windows<Refuser, u64>);

/// A sink that logs.
///
/// # Errors
/// If there can be no thread.
pub(super) fn start() -> io::Result<Sink> {
    Sink::start("denials", Queue::new(WAITING, BATCH), write_all)
}

/// Whether this outcome is logged.
pub(super) fn wants(fate: &Fate) -> bool {
    !matches!(fate, Fate::Allowed(_))
}

fn write_all(queue: &Queue<Arc<Record>>) {
    let mut limiter = Limiter::new();
    let mut records = Vec::new();
    while queue.take(&mut records, LINGER, limiter.0.next_end()) {
        let now = Instant::now();
        limiter.0.ended(now).into_iter().for_each(report);
        for record in records.drain(..).filter(|record| wants(&record.fate)) {
            let (line, pushed_out) = limiter.admit(Refuser::of(&record), now);
            pushed_out.into_iter().for_each(report);
            if line {
                write(&record);
            }
        }
    }
    limiter.0.rest().for_each(report);
}

impl Limiter {
    fn new() -> Self {
        Self(Windows::new(WINDOW, ROOM))
    }

    /// Whether to log this denial, and the entry whose window ended early for it.
    fn admit(&mut self, refuser: Refuser, now: Instant) -> (bool, Option<(Refuser, u64)>) {
        if let Some(count) = self.0.running(&refuser) {
            *count += 1;
            return (*count <= LINES, None);
        }
        let pushed_out = self.0.begin(refuser.clone(), now);
        if let Some(count) = self.0.running(&refuser) {
            *count = 1;
        }
        (true, pushed_out)
    }
}

impl Refuser {
    fn of(record: &Record) -> Self {
        let decision = &record.decision;
        let (pod, address) = match decision.decided_by() {
            DecidedBy::Egress | DecidedBy::Both => (&decision.from, record.subject.client),
            DecidedBy::Ingress => (&decision.to, record.subject.server),
        };
        Self {
            pod: pod.as_ref().map(|pod| name(pod)),
            address: address.ip(),
            policies: policies(record),
        }
    }
}

fn name(pod: &Endpoint) -> Arc<str> {
    pod.identity.key.to_string().into()
}

fn policies(record: &Record) -> Vec<String> {
    let policies = record.decision.policies().into_iter();
    policies.map(|key| key.to_string()).collect()
}

fn write(record: &Record) {
    let Record {
        subject, decision, ..
    } = record;
    info!(
        target: TARGET,
        verdict = record.fate.kind().name(),
        source = decision.from.as_deref().map(name).as_deref(),
        source.address = %subject.client.ip(),
        source.port = subject.client.port(),
        destination = decision.to.as_deref().map(name).as_deref(),
        destination.address = %subject.server.ip(),
        destination.port = subject.server.port(),
        protocol = %subject.protocol,
        direction = decision.direction(),
        policies = policies(record).join(","),
        reason = record.reason(),
        "connection denied"
    );
}

/// Logs how many lines were suppressed in a window.
fn report((refuser, count): (Refuser, u64)) {
    let suppressed = count.saturating_sub(LINES);
    if suppressed > 0 {
        info!(
            target: TARGET,
            suppressed,
            pod = refuser.pod.as_deref(),
            address = %refuser.address,
            policies = refuser.policies.join(","),
            seconds = WINDOW.as_secs(),
            "more denials of the same pod and policies"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refuser(pod: &str, policy: &str) -> Refuser {
        Refuser {
            pod: Some(pod.into()),
            address: IpAddr::from([10, 0, 0, 1]),
            policies: vec![policy.to_owned()],
        }
    }

    #[test]
    fn log_lines_are_limited_per_pod_and_policy() {
        let (mut limiter, now) = (Limiter::new(), Instant::now());
        let mut lines = |pod, policy| {
            let admitted = (0..20).map(|_| limiter.admit(refuser(pod, policy), now).0);
            admitted.filter(|line| *line).count() as u64
        };
        assert_eq!(lines("x/a", "x/deny"), LINES);
        assert_eq!(lines("x/b", "x/deny"), LINES, "another pod");
        assert_eq!(lines("x/a", "x/other"), LINES, "another policy");
        let ended = limiter.0.ended(now + WINDOW);
        assert_eq!(ended.len(), 3);
        assert!(ended.iter().all(|(_, count)| *count == 20), "{ended:?}");
        assert!(
            limiter.admit(refuser("x/a", "x/deny"), now + WINDOW).0,
            "lines again"
        );
    }
}
