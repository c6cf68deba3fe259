//! Relieving the daemon that runs, and being relieved by the next: `--handover`.
//!
//! A daemon that has been relieved does not exit, for whoever started it may start it again, and it would take the
//! node back.
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::enforcer::Enforcer;
use crate::handover::{self, Estate, HandoverError, Offer, Successor, Terms, WITHIN};
use crate::succession;

use super::ending::StopSignals;
use super::settings::RunArgs;

/// Where daemons relieve each other; nowhere without `--handover`.
pub(super) struct Relief(Option<(PathBuf, Terms)>);

impl Relief {
    pub(super) fn new(args: &RunArgs) -> anyhow::Result<Self> {
        let Some(path) = args.handover.clone() else {
            return Ok(Self(None));
        };
        let terms = Terms::new(&args.redirect).context("cannot tell this network namespace")?;
        Ok(Self(Some((path, terms))))
    }

    /// Whether there is a daemon to be relieved.
    pub(super) fn is_due(&self) -> bool {
        let place = self.0.as_ref();
        place.is_some_and(|(path, _)| handover::is_offered(path))
    }

    /// Takes over from the daemon that runs, if there is one that can be relieved.
    ///
    /// # Errors
    /// If the one that runs is none that this one may relieve. A fault on the way is none: then this daemon starts
    /// as if it were the first, and if the other still runs that says so.
    pub(super) async fn take_over(&self) -> anyhow::Result<Option<Estate>> {
        let Some((path, terms)) = self.0.clone() else {
            return Ok(None);
        };
        let taken = tokio::task::spawn_blocking(move || handover::take_over(&path, &terms));
        match taken.await? {
            Ok(estate) => Ok(estate),
            Err(
                error @ (HandoverError::Refused(_)
                | HandoverError::Stranger { .. }
                | HandoverError::Path { .. }),
            ) => Err(error.into()),
            Err(error) => {
                warn!("no connection is taken over: {error}");
                Ok(None)
            }
        }
    }

    /// Lets this daemon be relieved from now on.
    pub(super) fn offer(&self) -> Option<Offer> {
        let (path, terms) = self.0.clone()?;
        Offer::open(&path, terms)
            .inspect_err(|error| warn!("this daemon cannot be relieved: {error}"))
            .ok()
    }
}

/// Hands over what the workers have left, once `following` has brought its last change into the kernel. No worker may
/// run any more.
///
/// # Errors
/// If the other daemon may not have it.
pub(super) async fn hand_over(
    enforcer: &Arc<Enforcer>,
    following: JoinHandle<()>,
    successor: Successor,
) -> anyhow::Result<()> {
    let stuck = "the last change of the cluster is not in the kernel yet";
    let _ = tokio::time::timeout(WITHIN, following)
        .await
        .context(stuck)?;
    succession::leave_admitted(enforcer);
    let estate = enforcer.leaving.take();
    let connections = estate.connections.len();
    let in_flight = estate.in_flight();
    let given = tokio::task::spawn_blocking(move || successor.give(estate)).await?;
    if given.context("the connections could not be handed over, and were reset")? {
        info!(
            connections,
            in_flight, "relieved: all is handed over, this daemon rests until SIGTERM"
        );
    } else {
        warn!(
            connections,
            "relieved by a daemon that speaks another format: the connections were reset, this daemon rests until SIGTERM"
        );
    }
    Ok(())
}

/// Does nothing and holds nothing until told to end.
pub(super) fn rest(enforced: Runtime, mut signals: StopSignals) -> std::io::Result<()> {
    enforced.shutdown_background();
    let resting = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    resting.block_on(signals.received());
    Ok(())
}
