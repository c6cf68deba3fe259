//! Whether this node enforces the newest state, and if not, why and since when.
use std::sync::Arc;
use std::time::SystemTime;

use controller::kube::WatchStatus;
use tokio::sync::watch;
use tracing::error;

use crate::telemetry::record::timestamp;

/// A shared handle to the node's readiness, which sets the state of one part.
#[derive(Clone)]
pub(crate) struct Readiness {
    parts: Arc<watch::Sender<[State; PARTS]>>,
    part: usize,
    /// Of the watches of the Kubernetes API, if that is the source.
    watches: Option<Arc<WatchStatus>>,
}

/// Following the cluster's state.
const CLUSTER: usize = 0;
/// Watching the node's bridges.
const BRIDGES: usize = 1;
/// Watching what others do on the node.
const NODE: usize = 2;
/// The watch of the redirect.
const REDIRECT: usize = 3;
/// The watch of pods' links.
const LINKS: usize = 4;
const PARTS: usize = 5;

#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    /// Why not; `None`: ready.
    reason: Option<String>,
    since: SystemTime,
}

impl Readiness {
    /// Not ready, since nothing is applied yet. Sets the part of the cluster's state.
    pub(crate) fn new(watches: Option<Arc<WatchStatus>>) -> Self {
        let state = |reason: &str| State {
            reason: Some(reason.to_owned()),
            since: SystemTime::now(),
        };
        let parts = [
            state("the first state is not in force yet"),
            state("the node's bridges have not been looked at yet"),
            state("the node has not been looked at yet"),
            state("the redirect has not been looked at yet"),
            // Links are read before everything else; their faults are reported only after a while.
            State {
                reason: None,
                since: SystemTime::now(),
            },
        ];
        Self {
            parts: Arc::new(watch::Sender::new(parts)),
            part: CLUSTER,
            watches,
        }
    }

    /// A handle that sets the part of the node's bridges.
    pub(crate) fn of_bridges(&self) -> Self {
        Self {
            part: BRIDGES,
            ..self.clone()
        }
    }

    /// A handle that sets the part of other software on the node.
    pub(crate) fn of_node(&self) -> Self {
        Self {
            part: NODE,
            ..self.clone()
        }
    }

    /// The same, for the redirect.
    pub(crate) fn of_redirect(&self) -> Self {
        Self {
            part: REDIRECT,
            ..self.clone()
        }
    }

    /// The same, for pods' links.
    pub(crate) fn of_links(&self) -> Self {
        Self {
            part: LINKS,
            ..self.clone()
        }
    }

    /// Whether the cluster's state is up to date: all watches of the API server are connected.
    pub(crate) fn is_heard(&self) -> bool {
        let behind =
            |watches: &WatchStatus| watches.outage().is_some() || watches.restored().is_some();
        !self.watches.as_deref().is_some_and(behind)
    }

    /// Sets the part ready: everything known is applied.
    pub(crate) fn ready(&self) {
        self.set(None);
    }

    /// Sets the part not ready; `reason` says what is not applied, with the remedy.
    pub(crate) fn not_ready(&self, reason: impl Into<String>) {
        self.set(Some(reason.into()));
    }

    /// Sets the result of a repeated check; `None` is ready. A fault is logged if it differs from the last one.
    pub(crate) fn found(&self, fault: Option<String>) {
        if let Some(reason) = &fault
            && self.parts.borrow()[self.part].reason != fault
        {
            error!("{reason}");
        }
        self.set(fault);
    }

    /// Waits until all parts are ready.
    pub(crate) async fn awaited(&self) {
        let mut parts = self.parts.subscribe();
        let ready = |parts: &[State; PARTS]| parts.iter().all(|part| part.reason.is_none());
        // This fails only without a sender, and `self` has one.
        let _ = parts.wait_for(ready).await;
    }

    /// Checks all parts.
    ///
    /// # Errors
    /// The first reason why not, with its time.
    pub(crate) fn check(&self) -> Result<(), String> {
        let parts = self.parts.borrow();
        let why = |state: &State| Some((state.reason.clone()?, state.since));
        match parts.iter().find_map(why) {
            None => Ok(()),
            Some((reason, since)) => Err(format!("{reason} (since {})", timestamp(since))),
        }
    }

    /// How the applied state may be out of date: a line each. A daemon that gets no updates stays
    /// ready, since no other daemon could enforce a newer state.
    pub(crate) fn notes(&self) -> Vec<String> {
        let Some(watches) = &self.watches else {
            return Vec::new();
        };
        let away = watches.outage().map(|(since, why)| {
            let since = timestamp(since);
            let how = match watches.kinds().iter().any(|kind| kind.connected) {
                true => "heard only in part",
                false => "away",
            };
            let kept = match self.check() {
                Ok(()) => ", the last known state stays in force",
                Err(_) => "",
            };
            format!("the API server is {how} since {since}{kept}: {why}")
        });
        let restored = watches.restored().map(|written| {
            let written = timestamp(written);
            format!("the state in force is one kept on disk, of {written}")
        });
        away.into_iter()
            .chain(restored)
            .chain(watches.save_error())
            .collect()
    }

    /// Keeps the time of a reason that only repeats.
    fn set(&self, reason: Option<String>) {
        self.parts.send_if_modified(|parts| {
            let state = &mut parts[self.part];
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unready_part_names_its_reason() {
        let cluster = Readiness::new(None);
        let bridges = cluster.of_bridges();
        cluster.ready();
        cluster.of_node().ready();
        let reason = cluster.check().unwrap_err();
        assert!(
            reason.contains("bridges have not been looked at"),
            "{reason}"
        );
        bridges.ready();
        assert!(cluster.check().unwrap_err().contains("redirect has not"));
        cluster.of_redirect().ready();
        assert_eq!(cluster.check(), Ok(()));
        bridges.not_ready("cni0 is gone");
        assert!(
            cluster
                .check()
                .unwrap_err()
                .starts_with("cni0 is gone (since ")
        );
        cluster.ready();
        assert!(
            cluster.check().is_err(),
            "one part does not speak for the other"
        );
    }
}
