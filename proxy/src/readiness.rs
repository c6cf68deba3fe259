//! Whether this node enforces the newest state, and if not, why and since when.
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;

use crate::records::timestamp;

/// Shared by who finds out and who is asked.
#[derive(Clone)]
pub(crate) struct Readiness(Arc<watch::Sender<State>>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    /// Why not; `None`: ready.
    reason: Option<String>,
    since: SystemTime,
}

impl Readiness {
    /// Not ready, since nothing is in force yet.
    pub(crate) fn new() -> Self {
        let reason = Some("the first state is not in force yet".to_owned());
        Self(Arc::new(watch::Sender::new(State {
            reason,
            since: SystemTime::now(),
        })))
    }

    /// Everything known is in force.
    pub(crate) fn ready(&self) {
        self.set(None);
    }

    /// Something is not in force; `reason` says what and names the remedy.
    pub(crate) fn not_ready(&self, reason: impl Into<String>) {
        self.set(Some(reason.into()));
    }

    /// # Errors
    /// The reason why not, with its time.
    pub(crate) fn check(&self) -> Result<(), String> {
        let state = self.0.borrow();
        match &state.reason {
            None => Ok(()),
            Some(reason) => Err(format!("{reason} (since {})", timestamp(state.since))),
        }
    }

    /// Keeps the time of a reason that only repeats.
    fn set(&self, reason: Option<String>) {
        self.0.send_if_modified(|state| {
            let changed = state.reason != reason;
            if changed {
                *state = State {
                    reason,
                    since: SystemTime::now(),
                };
            }
            changed
        });
    }
}
