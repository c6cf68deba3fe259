//! The state of the watches, for readiness and metrics: written by each watch, read by anyone.
//!
//! Logs each change once. Knows nothing of objects.
use std::collections::BTreeMap;
use std::time::SystemTime;

use parking_lot::{Mutex, MutexGuard};
use tracing::{debug, info, warn};

use super::error::ApiError;
use crate::objects::Kind;

/// The watches' state as they write it.
#[derive(Debug)]
pub struct WatchStatus {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    kinds: [KindStatus; 4],
    restored: Option<SystemTime>,
    save_error: Option<String>,
}

/// The watch of one kind.
#[derive(Clone, Debug)]
pub struct KindStatus {
    /// `pods`, `namespaces`, ...
    pub resource: &'static str,
    /// Whether its stream is open.
    pub connected: bool,
    /// Since when that is so.
    pub since: SystemTime,
    /// The number of complete lists.
    pub lists: u64,
    /// Failures by [`ApiError::cause`].
    pub errors: BTreeMap<&'static str, u64>,
    /// Why it is not connected, if it ever tried.
    pub error: Option<ApiError>,
}

impl WatchStatus {
    /// Nothing is connected yet.
    pub(super) fn new() -> Self {
        let kind = |kind: Kind| KindStatus {
            resource: kind.resource(),
            connected: false,
            since: SystemTime::now(),
            lists: 0,
            errors: BTreeMap::new(),
            error: None,
        };
        Self {
            inner: Mutex::new(Inner {
                kinds: Kind::ALL.map(kind),
                restored: None,
                save_error: None,
            }),
        }
    }

    /// One entry a kind.
    #[must_use]
    pub fn kinds(&self) -> Vec<KindStatus> {
        self.lock().kinds.to_vec()
    }

    /// When the state that is in force was written to disk; `None` once the API server has given a
    /// newer one.
    #[must_use]
    pub fn restored(&self) -> Option<SystemTime> {
        self.lock().restored
    }

    /// Why the state on disk is behind, if it is.
    #[must_use]
    pub fn save_error(&self) -> Option<String> {
        self.lock().save_error.clone()
    }

    /// Since when, and why, a watch of the API server is down; `None` while all work or
    /// nothing has failed yet.
    #[must_use]
    pub fn outage(&self) -> Option<(SystemTime, ApiError)> {
        let inner = self.lock();
        let down = inner.kinds.iter().filter(|kind| !kind.connected);
        let failed = down.filter_map(|kind| Some((kind.since, kind.error.clone()?)));
        failed.min_by_key(|(since, _)| *since)
    }

    /// Returns whether the kind was not connected before.
    pub(super) fn connected(&self, kind: Kind) -> bool {
        let mut inner = self.lock();
        let status = inner.of(kind);
        if status.connected {
            return false;
        }
        let failed = status.error.take().is_some();
        (status.connected, status.since) = (true, SystemTime::now());
        if failed && inner.kinds.iter().all(|kind| kind.connected) {
            info!("the API server is back");
        }
        true
    }

    pub(super) fn listed(&self, kind: Kind) {
        self.lock().of(kind).lists += 1;
    }

    /// Records a failure that the next request repairs: the watch counts as connected.
    pub(super) fn expired(&self, kind: Kind, error: &ApiError) {
        info!(resource = kind.resource(), "{error}");
        let mut inner = self.lock();
        *inner.of(kind).errors.entry(error.cause()).or_default() += 1;
    }

    /// Notes that a list could not be streamed and is read in pages. Logs it once.
    pub(super) fn fell_back(&self, kind: Kind, error: &ApiError) {
        let mut inner = self.lock();
        let errors = inner.of(kind).errors.entry(error.cause()).or_default();
        *errors += 1;
        let refused = !matches!(error, ApiError::Unreachable(_) | ApiError::Silent(_));
        if *errors == 1 && refused {
            info!(
                resource = kind.resource(),
                "the list could not be streamed, and is read in pages: {error}"
            );
        } else {
            debug!(
                resource = kind.resource(),
                "the list is read in pages: {error}"
            );
        }
    }

    pub(super) fn failed(&self, kind: Kind, error: ApiError) {
        let mut inner = self.lock();
        let cause = error.cause();
        let same = |status: &KindStatus| {
            status
                .error
                .as_ref()
                .is_some_and(|old| old.cause() == cause)
        };
        // Four watches meet the same fault at once, and again at each try. A permission is missing
        // for each kind on its own.
        let known = match &error {
            ApiError::Forbidden { .. } => same(inner.of(kind)),
            _ => inner.kinds.iter().any(same),
        };
        if !known {
            warn!(resource = kind.resource(), "{error}");
        }
        let status = inner.of(kind);
        if status.connected {
            (status.connected, status.since) = (false, SystemTime::now());
        }
        *status.errors.entry(cause).or_default() += 1;
        status.error = Some(error);
    }

    pub(super) fn set_restored(&self, written: Option<SystemTime>) {
        self.lock().restored = written;
    }

    pub(super) fn set_save_error(&self, reason: Option<String>) {
        let mut inner = self.lock();
        if let Some(reason) = reason.as_ref().filter(|_| inner.save_error.is_none()) {
            warn!("{reason}");
        }
        inner.save_error = reason;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }
}

impl Inner {
    fn of(&mut self, kind: Kind) -> &mut KindStatus {
        &mut self.kinds[kind as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outage_time_and_cause_last_until_all_reconnect() {
        let status = WatchStatus::new();
        assert!(status.outage().is_none(), "nothing has failed yet");
        let gone = ApiError::Unreachable("refused".to_owned());
        status.failed(Kind::Pod, gone.clone());
        let (since, why) = status.outage().expect("an outage");
        assert_eq!(why, gone);
        status.failed(Kind::Pod, ApiError::Silent(5));
        assert_eq!(status.outage().map(|(since, _)| since), Some(since));
        assert!(status.connected(Kind::Pod));
        assert!(status.outage().is_none());
        assert!(!status.connected(Kind::Pod), "it was connected before");
    }
}
