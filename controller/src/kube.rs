//! The Kubernetes API server as a source of cluster state.
//!
//! Watches Pods, Namespaces, NetworkPolicies and Nodes, and parses them with the same code as
//! manifests. While the API server is unreachable the last known state stays applied; after a restart
//! meanwhile, the state on disk is applied, and a log line reports that.
mod backoff;
mod connect;
mod error;
mod events;
mod foreign;
mod list;
mod load;
mod snapshot;
mod state;
mod status;
mod taint;
mod turns;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use self::connect::Connector;
use self::events::EventReporter;
use self::snapshot::{Snapshot, Unusable};
use self::state::{Kept, State};
use self::watch::{Timeouts, Update, Watch};
use crate::objects::Kind;
use crate::{Batch, Problem};

pub use error::ApiError;
pub use load::load;
pub use status::{KindStatus, WatchStatus};
pub use taint::lift_taint;

/// How long the API server has for the first full state before the one on disk is used, if it has not
/// failed before.
const FIRST_WITHIN: Duration = Duration::from_secs(5);
/// The state is written to disk at most this often ...
const WRITE_EVERY: Duration = Duration::from_secs(5);
/// ... and, since a large cluster changes all the time, not faster than this on average.
const WRITE_BYTES_A_SECOND: u32 = 100_000;
/// For how long updates that have arrived are read before they are applied.
const READ_FOR: Duration = Duration::from_millis(20);
/// How many events may wait; a faster watch is slowed down.
const UPDATES: usize = 1024;

/// The operator's settings of the source.
#[derive(Clone, Debug)]
pub struct KubeSettings {
    /// `metadata.name` of this Node.
    pub node: String,
    /// Where the last good state is kept (`--state-dir`).
    pub state_dir: PathBuf,
    /// How old a kept state may be to be used (`--state-max-age`).
    pub state_max_age: Duration,
}

/// Follows the API server.
///
/// Dropping it ends its tasks.
#[derive(Debug)]
pub struct KubeSource {
    updates: mpsc::Receiver<(Kind, Update)>,
    state: State,
    status: Arc<WatchStatus>,
    reporter: EventReporter,
    keeper: Keeper,
    /// When the state on disk is used instead; `None` once it was looked at.
    fall_back: Option<Instant>,
    _tasks: JoinSet<()>,
}

impl KubeSource {
    /// Begins to watch. The first batch is the full state, and may take long.
    ///
    /// Must be called on a runtime of tokio.
    ///
    /// # Errors
    /// If there is no usable client configuration. An unreachable API server is not an error.
    pub async fn start(settings: KubeSettings) -> Result<Self, ApiError> {
        Self::start_with(settings, Connector::Found, Timeouts::default()).await
    }

    async fn start_with(
        settings: KubeSettings,
        connector: Connector,
        timeouts: Timeouts,
    ) -> Result<Self, ApiError> {
        let snapshot = Snapshot {
            folder: settings.state_dir,
            node: settings.node,
            cluster: connector.identity().await?,
            max_age: settings.state_max_age,
        };
        let (sender, updates) = mpsc::channel(UPDATES);
        let status = Arc::new(WatchStatus::new());
        let recovered = Arc::new(Notify::new());
        let mut tasks = JoinSet::new();
        for kind in Kind::ALL {
            let watch = Watch {
                kind,
                connector: connector.clone(),
                updates: sender.clone(),
                status: Arc::clone(&status),
                recovered: Arc::clone(&recovered),
                timeouts,
            };
            tasks.spawn(watch.run());
        }
        let state = State::new(&snapshot.node);
        tasks.spawn(foreign::watch(connector.clone()));
        let (reporter, sending) = EventReporter::new(&snapshot.node, connector);
        tasks.spawn(sending);
        Ok(Self {
            updates,
            state,
            reporter,
            keeper: Keeper::new(snapshot, Arc::clone(&status)),
            status,
            fall_back: Some(Instant::now() + FIRST_WITHIN),
            _tasks: tasks,
        })
    }

    /// The state of the watches.
    #[must_use]
    pub fn status(&self) -> Arc<WatchStatus> {
        Arc::clone(&self.status)
    }

    /// Waits for the next change and returns it. Cancel safe.
    ///
    /// The first batch is the full state: the API server's, or the one on disk while that is unreachable; the
    /// API server's follows then as a change.
    pub async fn next(&mut self) -> Batch {
        loop {
            let now = Instant::now();
            // Updates that have arrived are applied together, but do not wait for all that are
            // still to come.
            while now.elapsed() < READ_FOR
                && let Ok((kind, update)) = self.updates.try_recv()
            {
                self.state.take(kind, update, now);
            }
            if let Some(batch) = self.ready() {
                return batch;
            }
            let now = Instant::now();
            let due = [self.state.due(now), self.fall_back, self.keeper.due()];
            let due = due.into_iter().flatten().min();
            tokio::select! {
                update = self.updates.recv() => {
                    let Some((kind, update)) = update else {
                        // Every watch has panicked. The applied state stays.
                        return std::future::pending().await;
                    };
                    self.state.take(kind, update, now);
                }
                () = sleep_until(due.unwrap_or(now)), if due.is_some() => {}
            }
        }
    }

    /// Creates an Event, once, on each policy that one of `problems` is about.
    pub fn report(&mut self, problems: &[Problem]) {
        // Problems that are known from disk only may be fixed already.
        if self.state.is_complete() {
            self.reporter
                .report(problems, |key| self.state.written(key));
        }
    }

    /// What can be sent now.
    fn ready(&mut self) -> Option<Batch> {
        let now = Instant::now();
        if let Some(batch) = self.state.changes(now) {
            if self.fall_back.take().is_none() && self.status.restored().is_some() {
                info!("the API server's state replaces the one from disk");
            }
            self.status.set_restored(None);
            self.keeper.changed |= !batch.events.is_empty();
            return Some(batch);
        }
        self.keeper.keep(&self.state, now);
        let late = self
            .fall_back
            .is_some_and(|at| at <= now || self.status.outage().is_some());
        if !late {
            return None;
        }
        self.fall_back = None;
        let (objects, written) = self.keeper.kept()?;
        self.status.set_restored(Some(written));
        Some(self.state.restore(objects))
    }
}

/// Writes the state to disk, at a limited rate and never on the runtime's thread.
#[derive(Debug)]
struct Keeper {
    snapshot: Arc<Snapshot>,
    status: Arc<WatchStatus>,
    /// The disk is behind the state.
    changed: bool,
    not_before: Instant,
    /// When the last write began, and how many bytes it wrote; 0 once the pause was set by them.
    began: Instant,
    bytes: Arc<AtomicU32>,
    writing: Option<JoinHandle<()>>,
}

impl Keeper {
    fn new(snapshot: Snapshot, status: Arc<WatchStatus>) -> Self {
        Self {
            status,
            snapshot: Arc::new(snapshot),
            changed: false,
            not_before: Instant::now(),
            began: Instant::now(),
            bytes: Arc::default(),
            writing: None,
        }
    }

    fn due(&self) -> Option<Instant> {
        self.changed.then_some(self.not_before)
    }

    fn keep(&mut self, state: &State, now: Instant) {
        if !self.changed || now < self.not_before {
            return;
        }
        self.not_before = now + WRITE_EVERY;
        let idle = self.writing.as_ref().is_none_or(JoinHandle::is_finished);
        // The more was written, the longer the pause.
        let bytes = self.bytes.swap(0, Ordering::Relaxed);
        let pause = Duration::from_secs(1) * bytes / WRITE_BYTES_A_SECOND;
        if !idle || bytes > 0 && self.began + pause > now {
            self.not_before = self.not_before.max(self.began + pause);
            return;
        }
        (self.changed, self.began) = (false, now);
        let (objects, written_bytes) = (state.objects(), Arc::clone(&self.bytes));
        let (snapshot, status) = (Arc::clone(&self.snapshot), Arc::clone(&self.status));
        self.writing = Some(tokio::task::spawn_blocking(move || {
            let body = snapshot::body(objects.iter().map(Kept::json));
            drop(objects);
            let bytes = u32::try_from(body.len()).unwrap_or(u32::MAX);
            written_bytes.store(bytes, Ordering::Relaxed);
            let written = snapshot.write(&body, SystemTime::now());
            status.set_save_error(written.err().map(|error| {
                let path = snapshot.path();
                format!(
                    "cannot save the state in {}, so a restart while the API server is unreachable would find none: {error}; make the directory writable, or choose another with --state-dir",
                    path.display()
                )
            }));
        }));
    }

    /// The state on disk, if it can be used; logs either case.
    fn kept(&self) -> Option<(Vec<serde_json::Value>, SystemTime)> {
        let path = self.snapshot.path();
        match self.snapshot.read(SystemTime::now()) {
            Ok((objects, written)) => {
                let age = SystemTime::now()
                    .duration_since(written)
                    .unwrap_or_default();
                warn!(
                    "the API server is unreachable; using the state of {} ago from {}",
                    humantime::format_duration(Duration::from_secs(age.as_secs())),
                    path.display()
                );
                Some((objects, written))
            }
            Err(Unusable::Missing) => {
                info!(
                    "there is no saved state in {}: until the API server answers, pods within --pod-cidr are isolated unless an earlier daemon made them non-isolated; other pods stay as that daemon left them, and on a new node they are non-isolated",
                    path.display()
                );
                None
            }
            Err(reason) => {
                warn!("ignoring the state in {}: {reason}", path.display());
                None
            }
        }
    }
}

#[cfg(test)]
mod tests;
