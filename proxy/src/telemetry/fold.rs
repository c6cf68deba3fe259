//! Makes one of many: the repeated denials of a client that keeps trying.
//!
//! The first denial is told at once, so that it is seen while somebody looks for it. Those that
//! follow with the same ends and the same reason are counted and told as one when their window ends.
//! Bounded; knows neither clocks nor spans.
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use policy::Protocol;

use crate::records::{Fate, Record};

/// How long repeats are counted before they are told.
const WINDOW: Duration = Duration::from_secs(10);
/// Different denials that are remembered; beyond that the oldest window ends early.
const ROOM: usize = 4096;

/// One record that stands for `count` connections, the first of which was opened at `since`.
pub(super) struct Folded {
    pub(super) record: Arc<Record>,
    pub(super) since: SystemTime,
    pub(super) count: u64,
}

/// What makes two denials the same: all but the client's port and the time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Alike {
    client: IpAddr,
    server: SocketAddr,
    protocol: Protocol,
    reason: String,
    /// An address may go to another pod.
    uids: [Option<Arc<str>>; 2],
}

/// The denials of the last while.
#[derive(Default)]
pub(super) struct Fold {
    windows: HashMap<Alike, Option<Folded>, ahash::RandomState>,
    /// When which window ends; each is in here once.
    ends: VecDeque<(Instant, Alike)>,
}

impl Fold {
    /// Takes a record in. What comes back is to be told now: nothing, the record itself, or
    /// what had to make room for it.
    pub(super) fn add(
        &mut self,
        record: Arc<Record>,
        now: Instant,
    ) -> impl Iterator<Item = Folded> {
        let since = record.subject.opened;
        let told = |record| Folded {
            record,
            since,
            count: 1,
        };
        if !matches!(record.fate, Fate::Denied) {
            return [Some(told(record)), None].into_iter().flatten();
        }
        let alike = Alike::of(&record);
        if let Some(window) = self.windows.get_mut(&alike) {
            match window {
                Some(repeats) => {
                    repeats.count += 1;
                    repeats.record = record;
                }
                None => *window = Some(told(record)),
            }
            return [None, None].into_iter().flatten();
        }
        let pushed_out = (self.windows.len() >= ROOM)
            .then(|| self.end_first())
            .flatten();
        self.windows.insert(alike.clone(), None);
        self.ends.push_back((now + WINDOW, alike));
        [pushed_out, Some(told(record))].into_iter().flatten()
    }

    /// What to tell of the windows that have ended; one that saw repeats begins anew.
    pub(super) fn due(&mut self, now: Instant) -> Vec<Folded> {
        let mut told = Vec::new();
        while let Some((end, _)) = self.ends.front()
            && *end <= now
            && let Some((_, alike)) = self.ends.pop_front()
        {
            match self.windows.get_mut(&alike).and_then(Option::take) {
                Some(repeats) => {
                    told.push(repeats);
                    self.ends.push_back((now + WINDOW, alike));
                }
                None => {
                    self.windows.remove(&alike);
                }
            }
        }
        told
    }

    /// When [`Self::due`] is to be asked next.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.ends.front().map(|(end, _)| *end)
    }

    /// Everything that has not been told, in no order.
    pub(super) fn rest(&mut self) -> Vec<Folded> {
        self.ends.clear();
        self.windows
            .drain()
            .filter_map(|(_, repeats)| repeats)
            .collect()
    }

    fn end_first(&mut self) -> Option<Folded> {
        let (_, alike) = self.ends.pop_front()?;
        self.windows.remove(&alike).flatten()
    }
}

impl Alike {
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
