//! Aggregates the repeated denials of a client that keeps trying.
//!
//! The first denial is reported at once, so that an operator sees it without delay. Those that
//! follow with the same endpoints and reason are counted and reported as one when their window ends.
//! Bounded; knows neither clocks nor spans.
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use policy::Protocol;

use crate::telemetry::record::{Fate, Record, Windows};

/// How long repeats are counted before they are reported.
const WINDOW: Duration = Duration::from_secs(10);
/// Different denials that are remembered; beyond that the oldest window ends early.
const ROOM: usize = 4096;

/// One record that stands for `count` connections, the first of which was opened at `since`.
pub(super) struct Aggregated {
    pub(super) record: Arc<Record>,
    pub(super) since: SystemTime,
    pub(super) count: u64,
}

/// What makes two denials the same: all but the client's port and the time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    client: IpAddr,
    server: SocketAddr,
    protocol: Protocol,
    reason: String,
    /// An address may go to another pod.
    uids: [Option<Arc<str>>; 2],
}

/// Recent denials, each with its repeats so far.
pub(super) struct Aggregator(Windows<Key, Option<Aggregated>>);

impl Default for Aggregator {
    fn default() -> Self {
        Self(Windows::new(WINDOW, ROOM))
    }
}

impl Aggregator {
    /// Adds a record. Returns what to report now: nothing, the record itself, or
    /// what had to make room for it.
    pub(super) fn add(
        &mut self,
        record: Arc<Record>,
        now: Instant,
    ) -> impl Iterator<Item = Aggregated> + use<> {
        let since = record.subject.opened;
        let due = |record| Aggregated {
            record,
            since,
            count: 1,
        };
        let (pushed_out, itself) = if matches!(record.fate, Fate::Denied) {
            let key = Key::of(&record);
            match self.0.running(&key) {
                None => (self.0.begin(key, now), Some(due(record))),
                Some(Some(repeats)) => {
                    repeats.count += 1;
                    repeats.record = record;
                    (None, None)
                }
                Some(repeats) => {
                    *repeats = Some(due(record));
                    (None, None)
                }
            }
        } else {
            (None, Some(due(record)))
        };
        pushed_out
            .and_then(|(_, repeats)| repeats)
            .into_iter()
            .chain(itself)
    }

    /// What to report of the windows that have ended; one with repeats starts again.
    pub(super) fn due(&mut self, now: Instant) -> Vec<Aggregated> {
        let mut due = Vec::new();
        for (key, repeats) in self.0.ended(now) {
            if let Some(repeats) = repeats {
                due.push(repeats);
                self.0.begin(key, now);
            }
        }
        due
    }

    /// When [`Self::due`] is to be asked next.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.0.next_end()
    }

    /// Everything that has not been reported, in no order.
    pub(super) fn rest(&mut self) -> Vec<Aggregated> {
        self.0.rest().filter_map(|(_, repeats)| repeats).collect()
    }
}

impl Key {
    fn of(record: &Record) -> Self {
        let subject = &record.subject;
        Self {
            client: subject.client.ip(),
            server: subject.server,
            protocol: subject.protocol,
            reason: record.reason(),
            uids: [&record.decision.from, &record.decision.to]
                .map(|pod| pod.as_ref().map(|pod| Arc::clone(&pod.identity.uid))),
        }
    }
}

#[cfg(test)]
mod tests;
