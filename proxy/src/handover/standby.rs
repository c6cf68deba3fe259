//! Takes over from the old daemon, and hands over to a new one: `--handover`.
//!
//! A daemon that has handed over does not exit, since it might be restarted and would take
//! over again. In a pod (`POD_UID`) it resumes enforcement if no daemon runs any more: the new one may
//! have been rolled back.
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::Context;
use iptables_init::settings::Settings;
use kernel::nfqueue::Queue;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::enforcer::Enforcer;

use super::transfer;
use super::{
    Given, HandoverError, Hello, Kept, Listener, Outgoing, Peer, State, WITHIN, come, is_offered,
    take_over,
};

/// How often a standby daemon looks for others.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often a daemon looks while another one ends or gives up.
const LOOK_SOON: Duration = Duration::from_millis(50);
/// How long that may take.
pub(crate) const FREE_WITHIN: Duration = Duration::from_secs(5);
/// Attempts if the old daemon breaks off the handover.
const ATTEMPTS: usize = 3;
/// How long a node must seem to be without a daemon: longer than two take for a handover.
const GRACE: Duration = Duration::from_secs(2);

/// The handover settings; `place` is empty without `--handover`.
pub(crate) struct Standby {
    place: Option<(PathBuf, Hello)>,
    admin: SocketAddr,
    /// The number of the first queue.
    queue: u16,
}

/// Why a daemon stands by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rest {
    /// Another daemon enforces on this node, and continues.
    Relieved,
    /// A port is in use by a process that does not hand over.
    Occupied,
}

impl Standby {
    /// Of a daemon with the settings `redirect`, in `pod` if any, whose admin port is at `admin`.
    ///
    /// # Errors
    /// If this network namespace cannot be named.
    pub(crate) fn new(
        path: Option<PathBuf>,
        redirect: &Settings,
        pod: Option<String>,
        admin: SocketAddr,
    ) -> anyhow::Result<Self> {
        let queue = redirect.queue;
        let Some(path) = path else {
            return Ok(Self {
                place: None,
                admin,
                queue,
            });
        };
        let terms = Hello::new(redirect, pod);
        let terms = terms.context("cannot identify this network namespace")?;
        if let Err(error) = come(&path, &terms) {
            warn!(
                "cannot record the order of pods; the daemon that was started last has the node: {error}"
            );
        }
        let place = Some((path, terms));
        Ok(Self {
            place,
            admin,
            queue,
        })
    }

    /// The pod of this daemon, if handovers are enabled.
    fn pod(&self) -> Option<&str> {
        self.place.as_ref()?.1.pod()
    }

    /// Whether there is a daemon to take over from.
    pub(crate) fn is_due(&self) -> bool {
        let place = self.place.as_ref();
        place.is_some_and(|(path, _)| is_offered(path))
    }

    /// Takes over from the running daemon, if one can be relieved, unless this daemon goes on with what it has `kept`.
    /// If the other daemon ends meanwhile or breaks off the handover, waits until it is gone or can be asked again.
    ///
    /// # Errors
    /// If this daemon may not take over from the running one. Other failures are not errors: then this daemon starts
    /// as the first one, and fails to bind its ports if the other still runs.
    pub(crate) async fn take_over(&self, kept: Option<State>) -> anyhow::Result<Option<State>> {
        let Some((path, terms)) = self.place.as_ref().filter(|_| kept.is_none()) else {
            return Ok(kept);
        };
        let mut attempts = 0;
        loop {
            let (path, terms) = (path.clone(), terms.clone());
            let taking = move || take_over(&path, &terms);
            attempts += 1;
            let error = match tokio::task::spawn_blocking(taking).await? {
                Ok(state) => return Ok(state),
                Err(
                    error @ (HandoverError::Refused(_)
                    | HandoverError::Newer { .. }
                    | HandoverError::Stranger { .. }
                    | HandoverError::Path { .. }),
                ) => return Err(error.into()),
                Err(error) => error,
            };
            warn!("no connection is taken over: {error}");
            let again = matches!(error, HandoverError::BrokenOff(_) | HandoverError::Gone);
            if !again || attempts == ATTEMPTS {
                return Ok(None);
            }
            self.settled().await;
        }
    }

    /// Waits until the other daemon can be asked again, or its queue is free, for [`FREE_WITHIN`] at most.
    async fn settled(&self) {
        let until = Instant::now() + FREE_WITHIN;
        while Instant::now() < until {
            tokio::time::sleep(LOOK_SOON).await;
            if self.is_due() || Queue::bind(self.queue).is_ok() {
                return;
            }
        }
    }

    /// Offers a handover from now on, and sets this daemon's pod in `whose`.
    pub(crate) fn offer(&self, whose: &OnceLock<String>) -> Option<Listener> {
        let (path, terms) = self.place.clone()?;
        let offer = Listener::open(&path, terms)
            .inspect_err(|error| warn!("this daemon cannot be relieved: {error}"))
            .ok()?;
        if let Some(pod) = self.pod() {
            whose.get_or_init(|| pod.to_owned());
        }
        Some(offer)
    }

    /// Whether a daemon that cannot start for this reason stands by: its pod is newer or older than that of the
    /// running daemon, which may end. Without a pod, nothing would ever stop the standby daemon.
    pub(crate) fn rest_for(&self, error: &anyhow::Error) -> Option<Rest> {
        self.pod()?;
        if let Some(HandoverError::Newer { .. }) = error.downcast_ref() {
            return Some(Rest::Relieved);
        }
        is_taken(error).then_some(Rest::Occupied)
    }

    /// Stands by without resources until stopped, or, in a pod, until this daemon may try again. Returns whether
    /// it may.
    ///
    /// # Errors
    /// If the runtime cannot be created.
    pub(crate) fn rest(
        &self,
        enforced: Runtime,
        stop: impl Future<Output = ()>,
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
                () = stop => false,
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

    /// Whether a process listens on the admin port.
    async fn is_served(&self) -> bool {
        let asked = tokio::time::timeout(LOOK_EVERY, TcpStream::connect(self.admin));
        !matches!(asked.await, Ok(Err(_)))
    }
}

/// Hands over what the workers have left, once `following` has brought its last change into the kernel. No worker may
/// run any more. If the other daemon does not take over, returns what this one has to go on with.
///
/// # Errors
/// If the thread that hands over fails.
pub(crate) async fn hand_over(
    enforcer: &Enforcer,
    outgoing: &Outgoing,
    following: JoinHandle<()>,
    successor: Peer,
) -> anyhow::Result<Option<State>> {
    let stuck = tokio::time::timeout(WITHIN, following).await.is_err();
    transfer::leave_admitted(enforcer, outgoing);
    let late = transfer::end_others(enforcer);
    let state = outgoing.take();
    if stuck {
        warn!(
            "the last cluster change is not applied to the kernel yet: no handover, this daemon continues"
        );
        return Ok(Some(state));
    }
    let given = tokio::task::spawn_blocking(move || successor.give(state)).await?;
    let Given {
        suited,
        connections,
        in_flight,
        reset,
    } = match given.map_err(|kept| *kept) {
        Ok(given) => given,
        Err(Kept { state, error }) => {
            warn!("the new daemon did not take over, this one goes on: {error}");
            return Ok(Some(state));
        }
    };
    let reset = reset + late;
    if !suited {
        warn!(
            connections = reset,
            "replaced by a daemon of another format or with other settings: the connections were reset; standing by"
        );
    } else if reset > 0 {
        warn!(
            connections,
            in_flight,
            reset,
            "handover complete; connections that could not be handed over in time were reset; standing by"
        );
    } else {
        info!(connections, in_flight, "handover complete; standing by");
    }
    Ok(None)
}

/// Repeats `act` for this long while another daemon that is ending still has the port.
///
/// # Errors
/// What `act` answers in the end.
pub(crate) async fn once_free<T>(
    act: impl AsyncFn() -> anyhow::Result<T>,
    patience: Duration,
) -> anyhow::Result<T> {
    let until = Instant::now() + patience;
    loop {
        match act().await {
            Err(error) if is_taken(&error) && Instant::now() < until => {
                tokio::time::sleep(LOOK_SOON).await;
            }
            other => return other,
        }
    }
}

fn is_taken(error: &anyhow::Error) -> bool {
    let fault: Option<&io::Error> = error.downcast_ref();
    fault.is_some_and(|fault| fault.kind() == io::ErrorKind::AddrInUse)
}
