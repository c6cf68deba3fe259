//! The progress of one file from the disk into the state.
//!
//! Knows neither the disk nor when anything is due.
use std::time::Instant;

use super::notify::Change;
use crate::manifest::files::Stamp;

/// The progress of one file.
#[derive(Debug, Default)]
pub(super) struct Tracked {
    /// What was last read.
    pub(super) read: Option<Option<Stamp>>,
    /// A change that has not been read yet, and since when it has looked like this.
    pub(super) unread: Option<(Option<Stamp>, Instant)>,
    pub(super) missing_since: Option<Instant>,
    /// Since when somebody has it open for writing.
    pub(super) written_since: Option<Instant>,
    /// An event has reported it complete.
    pub(super) complete: bool,
    /// It is new, and no event has reported it complete yet.
    pub(super) created: bool,
}

impl Tracked {
    /// Takes in an event about it.
    pub(super) fn learn(&mut self, change: &Change, now: Instant) {
        match change {
            Change::Created(_) => {
                (self.created, self.complete) = (true, false);
                self.missing_since = None;
            }
            Change::Written(_) => {
                self.complete = false;
                self.written_since.get_or_insert(now);
            }
            Change::Complete(_) => {
                (self.written_since, self.created) = (None, false);
                (self.missing_since, self.complete) = (None, true);
            }
            Change::Gone(_) => {
                (self.written_since, self.created) = (None, false);
                self.missing_since.get_or_insert(now);
                self.complete = false;
            }
            Change::Touched(_) | Change::Directory(_) | Change::Lost => {}
        }
    }

    /// Since when it has waited for its writer to close it.
    pub(super) fn open_since(&self) -> Option<Instant> {
        self.written_since.or_else(|| {
            let (stamp, since) = self.unread?;
            (self.created && stamp.is_some_and(Stamp::is_empty)).then_some(since)
        })
    }
}
