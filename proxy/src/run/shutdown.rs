//! What ends a daemon's work: a signal, a worker's failure, or another daemon.
use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal};
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tracing::info;

use crate::enforcer::Enforcer;
use crate::handover::standby;
use crate::handover::{Listener, Outgoing, Peer, State};

/// How long the last records may take to be written when the daemon stops.
const FINISH_WITHIN: Duration = Duration::from_secs(2);

/// A worker's thread.
pub(super) type Thread = std::thread::JoinHandle<io::Result<()>>;

/// Why a daemon stops enforcing.
enum Ending {
    /// It got a signal to stop.
    Stopped,
    /// Another daemon takes over.
    Relieved(Peer),
}

/// The signals that end the daemon.
pub(super) struct StopSignals {
    terminate: Signals,
    interrupt: Signals,
    _hangup: Signals,
}

impl StopSignals {
    /// Listens for them from now on; call within a tokio runtime.
    pub(super) fn listen() -> anyhow::Result<Self> {
        // The parent process may have blocked them, and a blocked signal is inherited.
        SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]).thread_unblock()?;
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            // The state is watched; SIGHUP must not end the daemon.
            _hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for SIGTERM or SIGINT, in whatever runtime.
    pub(super) async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// What a daemon does after it has stopped enforcing.
pub(super) enum Ended {
    Stopped,
    /// Nothing: another daemon has taken over.
    Relieved,
    /// Resume everything that another daemon did not take over.
    Kept(State),
}

/// The parts of a daemon that enforces.
pub(super) struct Running {
    pub(super) outgoing: Arc<Outgoing>,
    pub(super) workers: Vec<Thread>,
    /// Follows the cluster's state, and stops between two changes when asked.
    pub(super) following: JoinHandle<()>,
    pub(super) tasks: JoinSet<()>,
    /// The admin port.
    pub(super) serving: JoinHandle<()>,
    pub(super) stop: watch::Sender<bool>,
}

impl Running {
    /// Waits for the end of this daemon's work, and takes its parts down.
    ///
    /// # Errors
    /// A worker's failure.
    pub(super) async fn until_ended(
        mut self,
        enforcer: &Arc<Enforcer>,
        signals: &mut StopSignals,
        offer: Option<Listener>,
    ) -> anyhow::Result<Ended> {
        let stop = |ending: &Ending| {
            match ending {
                Ending::Stopped => self.following.abort(),
                Ending::Relieved(_) => enforcer.draining.begin(),
            }
            self.stop.send_replace(true);
        };
        let ended = until_told(self.workers, signals, offer, stop).await;
        self.tasks.shutdown().await;
        let _ = self.serving.await;
        let ended = match ended {
            Ok(Ending::Relieved(successor)) => {
                let kept =
                    standby::hand_over(enforcer, &self.outgoing, self.following, successor).await;
                kept.map(|kept| kept.map_or(Ended::Relieved, Ended::Kept))
            }
            other => other.map(|_| Ended::Stopped),
        };
        // Whatever was not taken over is reset.
        drop(self.outgoing.take());
        enforcer.recorder.finish(FINISH_WITHIN);
        info!(node = %enforcer.node, "stopped");
        ended
    }
}

/// Waits for a signal, the failure of a worker or the daemon that relieves this one; then calls `stop` and waits for
/// the workers.
///
/// # Errors
/// A worker's failure.
async fn until_told(
    workers: Vec<Thread>,
    signals: &mut StopSignals,
    offer: Option<Listener>,
    stop: impl FnOnce(&Ending),
) -> anyhow::Result<Ending> {
    let (failed, mut failure) = tokio::sync::mpsc::channel(workers.len());
    for worker in workers {
        let failed = failed.clone();
        tokio::task::spawn_blocking(move || {
            let panicked = |_| Err(io::Error::other("a worker panicked"));
            let result = worker.join().unwrap_or_else(panicked);
            // The channel has a place for each.
            let _ = failed.try_send(result);
        });
    }
    drop(failed);
    let relieved = async {
        match &offer {
            Some(offer) => offer.taken().await,
            None => std::future::pending().await,
        }
    };
    let (ending, early) = tokio::select! {
        () = signals.received() => (Ending::Stopped, None),
        ended = failure.recv() => (Ending::Stopped, ended),
        successor = relieved => (Ending::Relieved(successor), None),
    };
    stop(&ending);
    let mut result = early.unwrap_or(Ok(()));
    while let Some(ended) = failure.recv().await {
        result = result.and(ended);
    }
    result.context("a worker failed")?;
    Ok(ending)
}
