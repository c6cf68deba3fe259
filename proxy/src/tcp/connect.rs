//! The leg to the server: a connection from the client's own address.
//!
//! Its port comes from ranges that pods' own ports and NodePorts do not touch, one for servers on
//! this node and one for the rest, since both nodes of a connection may have to relay it. If no
//! port is free, the attempt fails: another address would change the other node's decision.
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use kernel::marks::{Marks, Reply};
use kernel::names::{LOCAL_PORTS, REMOTE_PORTS};
use kernel::sys;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::TcpStream;

use crate::telemetry::timeline::Timeline;

/// Ports that are tried for one connection before it fails.
const PORTS_TRIED: usize = 256;

/// Where the server is, seen from this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leg {
    Local,
    Remote,
}

impl Leg {
    /// The next port of this leg's range: round-robin, so that a port is reused as late as possible, and
    /// from a random start.
    fn next_port(self) -> u16 {
        static LOCAL: LazyLock<AtomicU16> = LazyLock::new(anywhere);
        static REMOTE: LazyLock<AtomicU16> = LazyLock::new(anywhere);
        let (turn, range) = match self {
            Self::Local => (&*LOCAL, LOCAL_PORTS),
            Self::Remote => (&*REMOTE, REMOTE_PORTS),
        };
        range.start() + turn.fetch_add(1, Ordering::Relaxed) % (range.end() - range.start() + 1)
    }
}

fn anywhere() -> AtomicU16 {
    let [low, high, ..] = ahash::RandomState::new().hash_one(0u8).to_ne_bytes();
    AtomicU16::new(u16::from_ne_bytes([low, high]))
}

/// Why there is no connection to the server.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// The network or the server rejected the connection; the client gets the same answer.
    #[error("{server} answered")]
    Answered {
        server: SocketAddr,
        reply: Reply,
        #[source]
        source: io::Error,
    },
    /// There was no answer until TCP gave up.
    #[error("{server} did not answer")]
    Silent { server: SocketAddr },
    /// All source ports towards this server are in use.
    #[error(
        "no free source port for {client} to {server}; a port is free again a minute after its connection ends"
    )]
    NoPort {
        client: SocketAddr,
        server: SocketAddr,
    },
    /// A system call failed on this host.
    #[error("cannot {operation} for {client}")]
    Refused {
        operation: &'static str,
        client: SocketAddr,
        #[source]
        source: io::Error,
    },
}

/// What the upstream leg takes over from the client's SYN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Inherited {
    /// The largest segment that the client receives, in bytes; a pod's interface can have a smaller MTU than the path.
    pub(crate) mss: Option<u16>,
    /// The class of its packets (RFC 2474), of 6 bits.
    pub(crate) dscp: u8,
}

impl Inherited {
    /// Gives it to a socket that is not connected yet. The kernel ignores a size that it does not accept.
    fn set(self, socket: &Socket, server: SocketAddr) -> io::Result<()> {
        if let Some(mss) = self.mss {
            let _ = socket.set_tcp_mss(mss.into());
        }
        // The two other bits are the kernel's (RFC 3168).
        let class = u32::from(self.dscp) << 2;
        match server {
            _ if class == 0 => Ok(()),
            SocketAddr::V4(_) => socket.set_tos_v4(class),
            SocketAddr::V6(_) => socket.set_tclass_v6(class),
        }
    }
}

/// Connects to `server` from `client`'s address and waits for the outcome.
///
/// # Errors
/// One [`ConnectError`] per cause. Dropping the future aborts the attempt.
pub(crate) async fn connect(
    client: SocketAddr,
    server: SocketAddr,
    leg: Leg,
    inherited: Inherited,
    marks: Marks,
    timeline: Option<&Timeline>,
) -> Result<TcpStream, ConnectError> {
    let refused = |operation| {
        move |source: io::Error| ConnectError::Refused {
            operation,
            client,
            source,
        }
    };
    let (socket, port) = started(client, server, leg, inherited, marks)?;
    if leg == Leg::Remote
        && let Some(timeline) = timeline
    {
        timeline.goes_on(port, stamp(&socket));
    }
    // A server on this node has often answered before the call returned.
    let answered = leg == Leg::Local
        && match socket.connect(&server.into()) {
            Ok(()) => true,
            Err(error) if still_connecting(&error) => false,
            Err(error) => return Err(outcome(client, server, error)),
        };
    let stream = TcpStream::from_std(socket.into()).map_err(refused("watch a socket"))?;
    if answered {
        return Ok(stream);
    }
    stream.writable().await.map_err(refused("watch a socket"))?;
    match stream.take_error() {
        Ok(None) => Ok(stream),
        Ok(Some(error)) | Err(error) => Err(outcome(client, server, error)),
    }
}

/// Keep-alive of both legs: detects a peer that has silently gone within two minutes.
pub(crate) fn keepalive() -> TcpKeepalive {
    TcpKeepalive::new()
        .with_time(Duration::from_secs(60))
        .with_interval(Duration::from_secs(15))
        .with_retries(4)
}

/// Unsent bytes that may wait in a socket. Bytes in flight are not included, so a long path is as fast as without this
/// bound; but no more than this waits for a receiver that reads nothing.
const UNSENT: u32 = 128 << 10;

/// Bounds the unsent bytes in the socket (`TCP_NOTSENT_LOWAT`, tcp(7)).
///
/// # Errors
/// `ENOPROTOOPT` if it is no TCP socket.
pub(crate) fn bound_unsent(socket: impl AsFd) -> io::Result<()> {
    SockRef::from(&socket).set_tcp_notsent_lowat(UNSENT)
}

/// Makes the kernel reset the connection when the last copy of the socket is closed, also when the process is killed
/// (socket(7), `SO_LINGER` with a time of zero). Accepted sockets inherit it from their listener.
///
/// # Errors
/// `ENOTSOCK` if it is no socket.
pub(crate) fn reset_when_closed(socket: impl AsFd) -> io::Result<()> {
    SockRef::from(&socket).set_linger(Some(Duration::ZERO))
}

/// A socket whose handshake has begun, from the next port of the range that is free towards `server`.
fn started(
    client: SocketAddr,
    server: SocketAddr,
    leg: Leg,
    inherited: Inherited,
    marks: Marks,
) -> Result<(Socket, u16), ConnectError> {
    for _ in 0..PORTS_TRIED {
        let socket =
            prepared(server, inherited, marks).map_err(|source| ConnectError::Refused {
                operation: "make a transparent socket",
                client,
                source,
            })?;
        let from = SocketAddr::new(client.ip(), leg.next_port());
        match socket
            .bind(&from.into())
            .and_then(|()| socket.connect(&server.into()))
        {
            Ok(()) => return Ok((socket, from.port())),
            Err(error) if still_connecting(&error) => return Ok((socket, from.port())),
            // In use to this server, or still in TIME_WAIT: a bound socket cannot be bound
            // again, so the next port needs a new one.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EADDRNOTAVAIL | libc::EADDRINUSE)
                ) => {}
            Err(error) => return Err(outcome(client, server, error)),
        }
    }
    Err(ConnectError::NoPort { client, server })
}

/// The timestamp of the SYN that `socket` has just sent, to the millisecond or a few; none if this
/// host sends none.
fn stamp(socket: &Socket) -> Option<u32> {
    static SENT: LazyLock<bool> = LazyLock::new(|| {
        let setting = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_timestamps");
        setting.is_ok_and(|setting| setting.trim() != "0")
    });
    let sent = *SENT;
    sent.then(|| sys::tcp_timestamp(socket).ok()).flatten()
}

fn prepared(server: SocketAddr, inherited: Inherited, marks: Marks) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(server),
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )?;
    match server {
        SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
        SocketAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
    }
    inherited.set(&socket, server)?;
    socket.set_mark(marks.upstream())?;
    // One port may serve towards many servers; the kernel still keeps every pair of ends unique.
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?;
    // Urgent data stays inline (RFC 6093, section 3.2): otherwise the kernel removes its byte from the stream.
    socket.set_out_of_band_inline(true)?;
    reset_when_closed(&socket)?;
    Ok(socket)
}

fn still_connecting(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINPROGRESS | libc::EALREADY)
    )
}

/// Maps `error` to the reply that the client would get without the proxy.
fn outcome(client: SocketAddr, server: SocketAddr, error: io::Error) -> ConnectError {
    let reply = match error.raw_os_error() {
        Some(libc::ECONNREFUSED | libc::ECONNRESET) => Reply::Reset,
        Some(libc::EHOSTUNREACH | libc::EHOSTDOWN) => Reply::HostUnreachable,
        Some(libc::ENETUNREACH) => Reply::NetUnreachable,
        Some(libc::ETIMEDOUT) => return ConnectError::Silent { server },
        _ => {
            return ConnectError::Refused {
                operation: "connect",
                client,
                source: error,
            };
        }
    };
    ConnectError::Answered {
        server,
        reply,
        source: error,
    }
}
