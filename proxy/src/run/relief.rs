//! Relieving the daemon that runs, and being relieved by the next: `--handover`.
//!
//! A daemon that has been relieved does not exit, for whoever started it may start it again, and it would take the
//! node back. In a pod (`POD_UID`) it takes the node on again if nobody has it any more: the one that relieved it may
//! have been rolled back.
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::enforcer::Enforcer;
use crate::handover::{self, Estate, HandoverError, Offer, Successor, Terms, WITHIN};
use crate::succession;

use super::ending::StopSignals;
use super::settings::RunArgs;

/// How often a daemon that rests looks for others.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long a node must seem to be without a daemon: longer than two take for a handover.
const GRACE: Duration = Duration::from_secs(2);

/// Where daemons relieve each other; nowhere without `--handover`.
pub(super) struct Relief {
    place: Option<(PathBuf, Terms)>,
    admin: SocketAddr,
}

/// Why a daemon rests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rest {
    /// Another has the node, and keeps it.
    Relieved,
    /// Something has a port that this one needs, and does not let itself be relieved.
    Occupied,
}

impl Relief {
    pub(super) fn new(args: &RunArgs) -> anyhow::Result<Self> {
        let admin = args.admin;
        let Some(path) = args.handover.clone() else {
            return Ok(Self { place: None, admin });
        };
        let terms = Terms::new(&args.redirect, args.pod());
        let terms = terms.context("cannot tell this network namespace")?;
        if let Err(error) = handover::come(&path, &terms) {
            warn!("who is started last has the node, whatever its pod: {error}");
        }
        let place = Some((path, terms));
        Ok(Self { place, admin })
    }

    /// The pod of this daemon, if pods' daemons relieve each other.
    fn pod(&self) -> Option<&str> {
        self.place.as_ref()?.1.pod()
    }

    /// Whether there is a daemon to be relieved.
    pub(super) fn is_due(&self) -> bool {
        let place = self.place.as_ref();
        place.is_some_and(|(path, _)| handover::is_offered(path))
    }

    /// Takes over from the daemon that runs, if there is one that can be relieved.
    ///
    /// # Errors
    /// If the one that runs is none that this one may relieve. A fault on the way is none: then this daemon starts
    /// as if it were the first, and if the other still runs that says so.
    pub(super) async fn take_over(&self) -> anyhow::Result<Option<Estate>> {
        let Some((path, terms)) = self.place.clone() else {
            return Ok(None);
        };
        let taken = tokio::task::spawn_blocking(move || handover::take_over(&path, &terms));
        match taken.await? {
            Ok(estate) => Ok(estate),
            Err(
                error @ (HandoverError::Refused(_)
                | HandoverError::Newer { .. }
                | HandoverError::Stranger { .. }
                | HandoverError::Path { .. }),
            ) => Err(error.into()),
            Err(error) => {
                warn!("no connection is taken over: {error}");
                Ok(None)
            }
        }
    }

    /// Lets this daemon be relieved from now on, and tells whose it is then.
    pub(super) fn offer(&self, whose: &OnceLock<String>) -> Option<Offer> {
        let (path, terms) = self.place.clone()?;
        let offer = Offer::open(&path, terms)
            .inspect_err(|error| warn!("this daemon cannot be relieved: {error}"))
            .ok()?;
        if let Some(pod) = self.pod() {
            whose.get_or_init(|| pod.to_owned());
        }
        Some(offer)
    }

    /// Whether a daemon that could not start for this reason waits for a better time: its pod is the node's next or
    /// last, and whoever has the node may end. Without a pod nobody would end it.
    pub(super) fn rest_for(&self, error: &anyhow::Error) -> Option<Rest> {
        self.pod()?;
        if let Some(HandoverError::Newer { .. }) = error.downcast_ref() {
            return Some(Rest::Relieved);
        }
        let fault: &io::Error = error.downcast_ref()?;
        (fault.kind() == io::ErrorKind::AddrInUse).then_some(Rest::Occupied)
    }

    /// Does nothing and holds nothing until told to end, or, in a pod, until this daemon may try again. Returns whether
    /// it may.
    ///
    /// # Errors
    /// If this process may not have what a runtime needs.
    pub(super) fn rest(
        &self,
        enforced: Runtime,
        signals: &mut StopSignals,
        rest: Rest,
    ) -> io::Result<bool> {
        enforced.shutdown_background();
        let resting = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let again = async {
            match self.pod() {
                Some(_) => self.again(rest).await,
                None => std::future::pending().await,
            }
        };
        Ok(resting.block_on(async {
            tokio::select! {
                () = signals.received() => false,
                () = again => true,
            }
        }))
    }

    async fn again(&self, rest: Rest) {
        let mut free_since = None;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let offered = self.is_due();
            let free = !offered && !self.is_served().await;
            let since = *free_since.get_or_insert_with(Instant::now);
            match rest {
                Rest::Occupied if free || offered => return,
                Rest::Relieved if free && since.elapsed() >= GRACE => return,
                _ if !free => free_since = None,
                _ => {}
            }
        }
    }

    /// Whether anybody has the admin port.
    async fn is_served(&self) -> bool {
        let asked = tokio::time::timeout(LOOK_EVERY, TcpStream::connect(self.admin));
        !matches!(asked.await, Ok(Err(_)))
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
            in_flight, "relieved: all is handed over, this daemon rests"
        );
    } else {
        warn!(
            connections,
            "relieved by a daemon that speaks another format or has other settings: the connections were reset, this daemon rests"
        );
    }
    Ok(())
}
