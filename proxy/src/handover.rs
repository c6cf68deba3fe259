//! Hands the state of the old daemon to the new daemon, so that no stream breaks: queues,
//! listeners and all proxied connections, over a Unix socket.
//!
//! Knows neither flows nor policy: what is handed over is values and descriptors. The new daemon evaluates each connection again. Until
//! the new daemon confirms, the old one can resume everything, since it keeps copies of the sockets. The
//! socket is at a path of the file system and not at an abstract name: any process in the node's network namespace
//! could take an abstract name, and with it every stream of the node.
mod channel;
mod listener;
mod pod_order;
mod protocol;
pub(crate) mod standby;
pub(crate) mod transfer;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use iptables_init::settings::Settings;
use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use socket2::SockRef;

use crate::tcp::relay::Left;
use crate::telemetry::timeline::Seen;

use channel::Channel;

pub(crate) use listener::{Given, Kept, Listener, Peer, come, is_offered, take_over};

/// Version of the handover protocol; another daemon may use a different one.
const FORMAT: u32 = 4;
/// How long either side waits for the other's next message.
pub(crate) const WITHIN: Duration = Duration::from_secs(2);
/// How long the running daemon may take to stop its work, and the new one to begin it.
const READY_WITHIN: Duration = Duration::from_secs(5);
/// How long handing connections over may take; the rest is reset.
const CONNECTIONS_WITHIN: Duration = Duration::from_secs(3);
/// How long the whole handover may take.
const IN_ALL: Duration = Duration::from_secs(12);

/// Why nothing was handed over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandoverError {
    #[error(
        "cannot {operation} {path}: {source}; --handover needs a path that root alone can write to"
    )]
    Path {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the peer of the handover runs as user {uid}; only daemons of the same user are accepted"
    )]
    Stranger { uid: u32 },
    #[error("the running daemon rejected the handover: {0}")]
    Refused(String),
    #[error(
        "this node's daemon is of pod {pod}, which came after this one's; it is not relieved by this one (to have it so, delete that pod)"
    )]
    Newer { pod: String },
    #[error("the other daemon did not answer in time; is it suspended? stop it first")]
    Late,
    #[error("the other daemon ended meanwhile")]
    Gone,
    #[error("malformed handover message: {0}")]
    Malformed(String),
    #[error("the socket between the daemons failed: {0}")]
    Io(#[from] io::Error),
    /// The other daemon had already stopped its work; it resumes it, or has ended.
    #[error("the handover broke off: {0}")]
    BrokenOff(#[source] Box<Self>),
}

/// The identity and settings of a daemon in a handover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hello {
    format: u32,
    /// Inode of the network namespace.
    namespace: u64,
    /// Of the redirect.
    settings: String,
    /// The uid of the daemon's pod, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pod: Option<String>,
}

impl Hello {
    /// This daemon's, which runs in `pod`.
    ///
    /// # Errors
    /// If `/proc` is not there.
    pub(crate) fn new(redirect: &Settings, pod: Option<String>) -> io::Result<Self> {
        let Settings {
            proxy_port,
            queue,
            mark_mask,
            ..
        } = redirect;
        let queues = redirect.queue_count();
        // Other values differ for new connections only.
        let tcp = if redirect.tcp.has_proxy() {
            ""
        } else {
            " --tcp kernel"
        };
        Ok(Self {
            format: FORMAT,
            namespace: std::fs::metadata("/proc/self/ns/net")?.ino(),
            settings: format!(
                "--proxy-port {proxy_port} --queue {queue} --queues {queues} --mark-mask {mark_mask}{tcp}"
            ),
            pod,
        })
    }

    /// The daemon's pod, if known.
    pub(crate) fn pod(&self) -> Option<&str> {
        self.pod.as_deref()
    }

    /// Whether a daemon with `others` can use the state of this one. A daemon that cannot takes
    /// over without it: when it starts, the rules already follow its settings, not this daemon's.
    fn suit(&self, others: &Self) -> bool {
        others.format == self.format && others.settings == self.settings
    }
}

/// The state that a daemon hands over. Connections that are still in it when it is dropped are reset: a plain close
/// would look like a complete stream.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// By number of the NFQUEUE.
    pub(crate) workers: BTreeMap<u16, WorkerSockets>,
    pub(crate) connections: Vec<HandoverConnection>,
    /// The channel to the old daemon, which resumes its work unless this one confirms the takeover.
    from: Option<Channel>,
}

/// The sockets of a worker, bound and listening: packets and connections wait while no worker serves them.
#[derive(Debug)]
pub(crate) struct WorkerSockets {
    pub(crate) queue: OwnedFd,
    /// None with `--tcp kernel`.
    pub(crate) listener: Option<OwnedFd>,
}

/// A relayed connection.
#[derive(Debug)]
pub(crate) struct HandoverConnection {
    pub(crate) state: ConnectionState,
    pub(crate) server: OwnedFd,
    /// `None`: the listener still completes its handshake.
    pub(crate) client: Option<OwnedFd>,
    /// Bytes read from the client and from the server, and not written yet.
    pub(crate) in_flight: [Left; 2],
}

/// What is known of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ConnectionState {
    pub(crate) client: std::net::SocketAddr,
    pub(crate) server: std::net::SocketAddr,
    /// Of the client's SYN.
    pub(crate) sequence: u32,
    pub(crate) opened: SystemTime,
    pub(crate) age: Duration,
    /// Bytes from the client and from the server, those in flight included.
    pub(crate) moved: [u64; 2],
    /// Client and server, if they are pods.
    pub(crate) pods: [Option<Pod>; 2],
    pub(crate) seen: Option<Seen>,
}

/// The pod that a connection belongs to; another at its address must not inherit it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pod {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
}

impl State {
    /// Bytes that were read from one side of a connection and not yet written to the other.
    pub(crate) fn in_flight(&self) -> usize {
        let left = self.connections.iter().flat_map(|it| &it.in_flight);
        left.map(Left::len).sum()
    }

    /// Confirms to the old daemon, if there is one, that this daemon resumes this many of its
    /// connections. This must be the last step, since after it the old daemon does not resume.
    ///
    /// # Errors
    /// [`HandoverError::BrokenOff`] if the other daemon no longer waits: it has resumed, or has ended.
    pub(crate) fn begin(&mut self, connections: usize) -> Result<(), HandoverError> {
        let Some(line) = self.from.take() else {
            return Ok(());
        };
        let begun = line.say_begun(connections);
        begun.map_err(|error| HandoverError::BrokenOff(error.into()))
    }

    /// The connections, which are the caller's from now on.
    pub(crate) fn take_connections(&mut self) -> Vec<HandoverConnection> {
        std::mem::take(&mut self.connections)
    }
}

impl Drop for State {
    fn drop(&mut self) {
        self.take_connections()
            .into_iter()
            .for_each(HandoverConnection::reset);
    }
}

impl HandoverConnection {
    /// Ends it by a reset on both sides.
    pub(crate) fn reset(self) {
        for socket in self.client.iter().chain([&self.server]) {
            // It fails only on what is no socket; then there is nothing to reset.
            let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
        }
    }
}

/// Collects the state of each part of a daemon for a handover.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    gates_stopped: AtomicUsize,
    state: Mutex<State>,
}

impl Outgoing {
    /// To be called by each worker whose gate has stopped.
    pub(crate) fn gate_stopped(&self) {
        self.gates_stopped.fetch_add(1, Ordering::AcqRel);
    }

    /// How many gates have stopped.
    pub(crate) fn gates_stopped(&self) -> usize {
        self.gates_stopped.load(Ordering::Acquire)
    }

    /// Adds a connection.
    pub(crate) fn connection(&self, connection: HandoverConnection) {
        self.state().connections.push(connection);
    }

    /// Adds a worker's queue, of this number, and its listener.
    pub(crate) fn worker(&self, queue: u16, sockets: WorkerSockets) {
        self.state().workers.insert(queue, sockets);
    }

    /// Takes the collected state.
    pub(crate) fn take(&self) -> State {
        std::mem::take(&mut *self.state())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}
