//! Data for a connection's span beyond its record, collected while the connection lives.
//!
//! Noting costs one reading of the clock and one store. Knows neither spans nor sockets.
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Something that happens once in a connection's life, after its first packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Milestone {
    /// The server has answered our SYN.
    Connected,
    /// The first byte from the client has arrived.
    Sent,
    /// The first byte from the server has arrived.
    Received,
    /// The client has sent its FIN, and the server has not.
    ClientEnded,
    /// The server has sent its FIN, and the client has not.
    ServerEnded,
}

impl Milestone {
    pub(crate) const ALL: [Self; 5] = [
        Self::Connected,
        Self::Sent,
        Self::Received,
        Self::ClientEnded,
        Self::ServerEnded,
    ];
}

/// How the connection left for another node: its source port there, and the SYN's timestamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Onward {
    pub(crate) port: u16,
    pub(crate) stamp: Option<u32>,
}

/// The notes on one connection.
#[derive(Debug)]
pub(crate) struct Timeline {
    started: Instant,
    /// Timestamp of the client's SYN (RFC 7323, TSval), if it has one.
    stamp: Option<u32>,
    onward: OnceLock<Onward>,
    /// Nanoseconds since `started`, and one; 0 as long as it has not happened.
    moments: [AtomicU64; Milestone::ALL.len()],
}

/// What a [`Timeline`] says at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    pub(crate) stamp: Option<u32>,
    pub(crate) onward: Option<Onward>,
    /// In the order of [`Milestone::ALL`], since the first packet.
    pub(crate) moments: [Option<Duration>; Milestone::ALL.len()],
}

impl Timeline {
    /// Begins with the first packet.
    pub(crate) fn new(started: Instant, stamp: Option<u32>) -> Self {
        Self {
            started,
            stamp,
            onward: OnceLock::new(),
            moments: Default::default(),
        }
    }

    /// Goes on from what an earlier daemon has noted since `started`.
    pub(crate) fn resumed(started: Instant, seen: Seen) -> Self {
        let noted = |moment: Option<Duration>| {
            let nanos = moment.map_or(0, |since| nanos(since) + 1);
            AtomicU64::new(nanos)
        };
        Self {
            started,
            stamp: seen.stamp,
            onward: seen.onward.map_or_else(OnceLock::new, OnceLock::from),
            moments: seen.moments.map(noted),
        }
    }

    /// Notes that it happens now, unless it has happened before.
    pub(crate) fn note(&self, moment: Milestone) {
        let place = &self.moments[moment as usize];
        if place.load(Ordering::Relaxed) == 0 {
            place.store(nanos(self.started.elapsed()) + 1, Ordering::Relaxed);
        }
    }

    /// Notes the leg to another node.
    pub(crate) fn goes_on(&self, port: u16, stamp: Option<u32>) {
        // A connection leaves once.
        let _ = self.onward.set(Onward { port, stamp });
    }

    /// What has been noted so far.
    pub(crate) fn seen(&self) -> Seen {
        let read = |noted: &AtomicU64| {
            let nanos = noted.load(Ordering::Relaxed).checked_sub(1)?;
            Some(Duration::from_nanos(nanos))
        };
        Seen {
            stamp: self.stamp,
            onward: self.onward.get().copied(),
            moments: self.moments.each_ref().map(read),
        }
    }
}

fn nanos(since: Duration) -> u64 {
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_time_of_each_moment_is_kept() {
        let timeline = Timeline::new(Instant::now(), None);
        assert!(timeline.seen().moments.iter().all(Option::is_none));
        timeline.note(Milestone::Sent);
        let first = timeline.seen().moments[Milestone::Sent as usize];
        timeline.note(Milestone::Sent);
        assert!(first.is_some());
        assert_eq!(timeline.seen().moments[Milestone::Sent as usize], first);
        assert_eq!(timeline.seen().moments[Milestone::Received as usize], None);
    }

    #[test]
    fn trail_keeps_moments_of_the_old_daemon() {
        let started = Instant::now();
        let first = Timeline::new(started, Some(7));
        first.goes_on(16_000, Some(8));
        first.note(Milestone::Sent);
        let seen = first.seen();
        let second = Timeline::resumed(started, seen);
        assert_eq!(second.seen(), seen);
        second.note(Milestone::Sent);
        second.note(Milestone::Received);
        assert_eq!(
            second.seen().moments[Milestone::Sent as usize],
            seen.moments[Milestone::Sent as usize]
        );
        assert!(second.seen().moments[Milestone::Received as usize].is_some());
    }
}
