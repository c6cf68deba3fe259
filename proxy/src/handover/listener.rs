//! The socket path at which a running daemon waits for a new one, and the connection between both.
use std::fs::{self, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use kernel::sys;
use nix::unistd::Uid;
use socket2::{Domain, SockAddr, SockRef, Socket, Type};
use tokio::io::unix::AsyncFd;
use tracing::{debug, warn};

use super::channel::Channel;
use super::protocol::Reply;
use super::{
    CONNECTIONS_WITHIN, FORMAT, HandoverConnection, HandoverError, Hello, READY_WITHIN, State,
    WITHIN, pod_order,
};
use crate::tcp::relay::Left;

/// The listener of a running daemon for a handover.
pub(crate) struct Listener {
    listener: AsyncFd<OwnedFd>,
    place: PathBuf,
    terms: Hello,
}

/// The new daemon, which takes over from this one.
pub(crate) struct Peer {
    line: Channel,
    /// Whether it can use what would be handed over.
    suited: bool,
}

/// The result of a handover.
#[derive(Debug)]
pub(crate) struct Given {
    /// Whether the other end could use it.
    pub(crate) suited: bool,
    /// Connections that were handed over.
    pub(crate) connections: usize,
    /// Bytes in flight on these.
    pub(crate) in_flight: usize,
    /// Connections that were not handed over, and were reset.
    pub(crate) reset: usize,
}

/// Everything that was not handed over, still complete, and the reason.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) state: State,
    pub(crate) error: HandoverError,
}

impl Listener {
    /// Listens at `path` for daemons of the same user, and replaces an earlier socket there.
    ///
    /// # Errors
    /// If the socket cannot be created.
    pub(crate) fn open(path: &Path, terms: Hello) -> Result<Self, HandoverError> {
        let failed = |operation| {
            move |source: io::Error| HandoverError::Path {
                operation,
                path: path.to_owned(),
                source,
            }
        };
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(failed("replace")(error));
            }
            _ => {}
        }
        let address = SockAddr::unix(path).map_err(failed("name a socket"))?;
        let socket = unix_socket()?;
        socket.bind(&address).map_err(failed("make a socket at"))?;
        // Before it listens: until then nobody can connect.
        fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed("protect"))?;
        socket.listen(8)?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            listener: sys::watch(socket.into())?,
            place: path.to_owned(),
            terms,
        })
    }

    /// Waits for a new daemon that may take over.
    pub(crate) async fn taken(&self) -> Peer {
        loop {
            match self.asked().await {
                Ok(successor) => return successor,
                // Another daemon checked whether one is running.
                Err(HandoverError::Gone) => debug!("a daemon has found this one"),
                Err(error) => warn!("handover request rejected: {error}"),
            }
        }
    }

    async fn asked(&self) -> Result<Peer, HandoverError> {
        let socket = loop {
            let mut ready = self.listener.readable().await?;
            match ready.try_io(|listener| SockRef::from(listener.get_ref()).accept()) {
                Ok(accepted) => break accepted?.0,
                Err(_would_block) => {}
            }
        };
        let (place, terms) = (self.place.clone(), self.terms.clone());
        let greet = move || Peer::greet(socket.into(), &place, &terms, Uid::effective());
        let greeted = tokio::task::spawn_blocking(greet).await;
        greeted.unwrap_or_else(|panicked| Err(io::Error::other(panicked).into()))
    }
}

impl Peer {
    /// Reads the request of the new daemon, and rejects it if it is not allowed.
    fn greet(
        socket: OwnedFd,
        place: &Path,
        terms: &Hello,
        user: Uid,
    ) -> Result<Self, HandoverError> {
        let mut line = Channel::to(socket, user, WITHIN)?;
        let asked: Hello = line.hear()?;
        let reply = reply(place, terms, &asked);
        line.say(&reply)?;
        match reply.refused {
            Some(reason) => Err(HandoverError::Refused(reason)),
            None => Ok(Self {
                line,
                suited: terms.suit(&asked),
            }),
        }
    }

    /// Hands over as many connections as the time allows, the least expensive first, and resets the rest; resets all if
    /// the other end cannot use them. Blocks.
    ///
    /// # Errors
    /// If the new daemon does not take over: then this daemon must resume.
    pub(crate) fn give(mut self, mut state: State) -> Result<Given, Box<Kept>> {
        let all = state.connections.len();
        if !self.suited {
            return Ok(Given {
                suited: false,
                connections: 0,
                in_flight: 0,
                reset: all,
            });
        }
        let cost = |it: &HandoverConnection| {
            let pipes = it.in_flight.iter().flat_map(|left| &left.pipe).count();
            (pipes, it.in_flight.iter().map(Left::len).sum::<usize>())
        };
        state.connections.sort_by_cached_key(cost);
        match self.line.give(&state, [CONNECTIONS_WITHIN, READY_WITHIN]) {
            Ok(connections) => {
                let reset = state.connections.split_off(connections);
                let in_flight = state.in_flight();
                // The other daemon has copies of them.
                drop(state.take_connections());
                state.connections = reset;
                Ok(Given {
                    suited: true,
                    connections,
                    in_flight,
                    reset: all - connections,
                })
            }
            Err(error) => Err(Box::new(Kept { state, error })),
        }
    }
}

/// The reply of the daemon with `terms` to a handover request.
fn reply(place: &Path, terms: &Hello, asked: &Hello) -> Reply {
    let newer = match (terms.pod(), asked.pod()) {
        (Some(ours), Some(theirs)) => pod_order::is_before(place, theirs, ours).then_some(ours),
        _ => None,
    };
    let refused = match newer {
        _ if asked.namespace != terms.namespace => {
            Some("it enforces in another network namespace".to_owned())
        }
        Some(ours) => Some(format!("its pod, {ours}, came after the other's")),
        None => None,
    };
    Reply {
        format: FORMAT,
        refused,
        newer: newer.map(str::to_owned),
        settings: terms.settings.clone(),
    }
}

/// Records the pod of the daemon with `terms` as started on this node.
///
/// # Errors
/// If it cannot be recorded.
pub(crate) fn come(path: &Path, terms: &Hello) -> Result<(), HandoverError> {
    let failed = |source| HandoverError::Path {
        operation: "record the order of pods at",
        path: path.to_owned(),
        source,
    };
    terms
        .pod()
        .map_or(Ok(()), |pod| pod_order::enter(path, pod).map_err(failed))
}

/// Whether a daemon listens at `path` for a handover.
pub(crate) fn is_offered(path: &Path) -> bool {
    connected(path).is_ok_and(|socket| socket.is_some())
}

/// Takes over from the daemon that waits at `path`, if there is one. Blocks, for seconds at most. A daemon with another
/// format or other settings hands over no connection. The other daemon goes on itself until [`State::begin`] says that
/// this daemon begins.
///
/// # Errors
/// Why it did not hand over; [`HandoverError::BrokenOff`] if it had already stopped its work.
pub(crate) fn take_over(path: &Path, terms: &Hello) -> Result<Option<State>, HandoverError> {
    let Some(socket) = connected(path)? else {
        return Ok(None);
    };
    let mut line = Channel::to(socket, Uid::effective(), WITHIN)?;
    line.say(terms)?;
    let reply: Reply = line.hear()?;
    line.wait(READY_WITHIN);
    match reply {
        Reply {
            newer: Some(pod), ..
        } => return Err(HandoverError::Newer { pod }),
        Reply {
            refused: Some(reason),
            ..
        } => return Err(HandoverError::Refused(reason)),
        _ => {}
    }
    let mut state = State::default();
    let differs = match &reply {
        Reply { format, .. } if *format != FORMAT => {
            format!("uses another format ({format}, not {FORMAT})")
        }
        Reply { settings, .. } if *settings != terms.settings => {
            format!("runs with other settings ({settings})")
        }
        _ => {
            let taken = line.take(&mut state);
            taken.map_err(|error| HandoverError::BrokenOff(error.into()))?;
            state.from = Some(line);
            return Ok(Some(state));
        }
    };
    warn!("the running daemon {differs}: it ends without a handover");
    let error = match line.receive() {
        Err(HandoverError::Gone) => return Ok(Some(state)),
        Err(error) => error,
        Ok(_) => HandoverError::Malformed("an unexpected message".to_owned()),
    };
    Err(HandoverError::BrokenOff(error.into()))
}

/// `None`: no daemon listens there.
fn connected(path: &Path) -> Result<Option<OwnedFd>, HandoverError> {
    let failed = |operation| {
        move |source: io::Error| HandoverError::Path {
            operation,
            path: path.to_owned(),
            source,
        }
    };
    let address = SockAddr::unix(path).map_err(failed("name a socket"))?;
    let socket = unix_socket()?;
    // A full backlog must not make it wait.
    socket.set_nonblocking(true)?;
    match socket.connect(&address) {
        Ok(()) => Ok(Some(socket.into())),
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::ConnectionRefused
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(failed("reach the daemon at")(error)),
    }
}

fn unix_socket() -> io::Result<Socket> {
    Socket::new(Domain::UNIX, Type::SEQPACKET, None)
}

#[cfg(test)]
mod tests;
