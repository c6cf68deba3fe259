//! Whether this node enforces the newest state, and if not, why and since when.
use std::sync::Arc;
use std::time::SystemTime;

use controller::kube::WatchStatus;
use tokio::sync::watch;

use crate::records::timestamp;

/// Shared by who finds out and who is asked.
#[derive(Clone)]
pub(crate) struct Readiness {
    state: Arc<watch::Sender<State>>,
    /// Of the watches of the Kubernetes API, if that is the source.
    watches: Option<Arc<WatchStatus>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    /// Why not; `None`: ready.
    reason: Option<String>,
    since: SystemTime,
}

impl Readiness {
    /// Not ready, since nothing is in force yet.
    pub(crate) fn new(watches: Option<Arc<WatchStatus>>) -> Self {
        let reason = Some("the first state is not in force yet".to_owned());
        let state = State {
            reason,
            since: SystemTime::now(),
        };
        Self {
            state: Arc::new(watch::Sender::new(state)),
            watches,
        }
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
        let state = self.state.borrow();
        match &state.reason {
            None => Ok(()),
            Some(reason) => Err(format!("{reason} (since {})", timestamp(state.since))),
        }
    }

    /// How far what is in force may be from the cluster: a line each. Being behind for want of news is
    /// no reason not to be ready, nobody could enforce better.
    pub(crate) fn notes(&self) -> Vec<String> {
        let Some(watches) = &self.watches else {
            return Vec::new();
        };
        let away = watches.away().map(|(since, why)| {
            let since = timestamp(since);
            format!(
                "the API server is away since {since}, the last known state stays in force: {why}"
            )
        });
        let restored = watches.restored().map(|written| {
            let written = timestamp(written);
            format!("the state in force is one kept on disk, of {written}")
        });
        away.into_iter().chain(restored).collect()
    }

    /// Keeps the time of a reason that only repeats.
    fn set(&self, reason: Option<String>) {
        self.state.send_if_modified(|state| {
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
