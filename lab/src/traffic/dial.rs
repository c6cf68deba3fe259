//! TCP dials, hundreds at once in one poll loop, and their outcomes.

use std::fmt;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::cluster::host::{Host, io_error};

/// A connection to be tried.
#[derive(Debug, Clone)]
pub struct Dial {
    from: Host,
    to: SocketAddr,
    source: Option<IpAddr>,
    source_port: Option<u16>,
}

impl Dial {
    /// A dial from a host to an address.
    #[must_use]
    pub fn new(from: &Host, to: SocketAddr) -> Self {
        Self {
            from: from.clone(),
            to,
            source: None,
            source_port: None,
        }
    }

    /// Chooses the source address, of `to`'s family, for a host that has several.
    #[must_use]
    pub fn source(mut self, address: IpAddr) -> Self {
        self.source = Some(address);
        self
    }

    /// Chooses the source port. Ports in TIME_WAIT may be taken again (`SO_REUSEADDR`).
    #[must_use]
    pub fn source_port(mut self, port: u16) -> Self {
        self.source_port = Some(port);
        self
    }

    /// Dials and waits for the outcome for at most `limit`.
    ///
    /// # Errors
    /// If no socket could be made or bound; what the network answers is an [`Outcome`].
    pub fn connect(&self, limit: Duration) -> io::Result<Outcome> {
        let mut outcomes = connect_all(std::slice::from_ref(self), limit)?;
        outcomes.pop().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn socket(&self) -> io::Result<Socket> {
        let socket = Socket::new(
            Domain::for_address(self.to),
            Type::STREAM,
            Some(Protocol::TCP),
        )?;
        socket.set_nonblocking(true)?;
        if self.source_port.is_some() {
            socket.set_reuse_address(true)?;
        }
        if self.source.is_some() || self.source_port.is_some() {
            let any: IpAddr = match self.to {
                SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            let from = self.source.unwrap_or(any);
            socket.bind(&SocketAddr::new(from, self.source_port.unwrap_or(0)).into())?;
        }
        Ok(socket)
    }
}

/// The outcome of a dial.
#[derive(Debug)]
pub enum Outcome {
    /// The handshake was finished.
    Connected {
        /// The connection, blocking.
        stream: TcpStream,
        /// From the SYN to the end of the handshake, as the client saw it.
        latency: Duration,
    },
    /// A reset came back at once (`ECONNREFUSED`).
    Refused,
    /// Nothing came back before the deadline, or before the kernel gave up (`ETIMEDOUT`).
    TimedOut,
    /// The network said that there is no way, by ICMP or by a route.
    Unreachable(Errno),
    /// The connection was reset after the peer's first answer (`ECONNRESET`, `EPIPE`).
    Reset,
    /// Anything else.
    Failed(Errno),
}

/// An [`Outcome`] without its details, for comparison and for tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// See [`Outcome::Connected`].
    Connected,
    /// See [`Outcome::Refused`].
    Refused,
    /// See [`Outcome::TimedOut`].
    TimedOut,
    /// See [`Outcome::Unreachable`].
    Unreachable,
    /// See [`Outcome::Reset`].
    Reset,
    /// See [`Outcome::Failed`].
    Failed,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Connected => "connected",
            Self::Refused => "refused",
            Self::TimedOut => "timed out",
            Self::Unreachable => "unreachable",
            Self::Reset => "reset",
            Self::Failed => "failed",
        })
    }
}

impl Outcome {
    /// The outcome without its details.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Connected { .. } => Kind::Connected,
            Self::Refused => Kind::Refused,
            Self::TimedOut => Kind::TimedOut,
            Self::Unreachable(_) => Kind::Unreachable,
            Self::Reset => Kind::Reset,
            Self::Failed(_) => Kind::Failed,
        }
    }

    /// What `connect` failed with; `ETIMEDOUT` also stands for the dial's own deadline.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Connected { .. } => None,
            Self::Refused => Some(Errno::ECONNREFUSED),
            Self::TimedOut => Some(Errno::ETIMEDOUT),
            Self::Reset => Some(Errno::ECONNRESET),
            Self::Unreachable(errno) | Self::Failed(errno) => Some(*errno),
        }
    }

    /// Whether the handshake was finished.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        matches!(self, Self::Connected { .. })
    }

    /// The time of the handshake, if it was finished.
    #[must_use]
    pub fn latency(&self) -> Option<Duration> {
        match self {
            Self::Connected { latency, .. } => Some(*latency),
            _ => None,
        }
    }

    /// The connection.
    ///
    /// # Errors
    /// The outcome as an I/O error, if it is another.
    pub fn into_stream(self) -> io::Result<TcpStream> {
        match self {
            Self::Connected { stream, .. } => Ok(stream),
            other => {
                let errno = other.errno().unwrap_or(Errno::UnknownErrno);
                Err(io::Error::new(
                    io::Error::from(errno).kind(),
                    other.to_string(),
                ))
            }
        }
    }

    fn failed(errno: Errno) -> Self {
        match errno {
            Errno::ECONNREFUSED => Self::Refused,
            Errno::ETIMEDOUT => Self::TimedOut,
            Errno::ECONNRESET | Errno::EPIPE => Self::Reset,
            Errno::EHOSTUNREACH
            | Errno::ENETUNREACH
            | Errno::EACCES
            | Errno::EHOSTDOWN
            | Errno::ENETDOWN
            | Errno::EPERM => Self::Unreachable(errno),
            other => Self::Failed(other),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connected { latency, .. } => write!(f, "connected in {latency:?}"),
            Self::Unreachable(errno) | Self::Failed(errno) => {
                write!(f, "{}: {} ({errno:?})", self.kind(), errno.desc())
            }
            other => other.kind().fmt(f),
        }
    }
}

/// Dials all at once and waits for the outcomes for at most `limit`; they are in the same order.
///
/// All sockets are made before the first SYN is sent. One thread serves them all.
///
/// # Errors
/// If a socket could not be made or bound, `EMFILE` for one.
pub fn connect_all(dials: &[Dial], limit: Duration) -> io::Result<Vec<Outcome>> {
    let sockets = sockets(dials)?;
    let deadline = Instant::now() + limit;
    let mut outcomes: Vec<Option<Outcome>> = Vec::with_capacity(dials.len());
    let mut open: Vec<(usize, Socket, Instant)> = Vec::new();
    for (at, (dial, socket)) in dials.iter().zip(sockets).enumerate() {
        let started = Instant::now();
        outcomes.push(match socket.connect(&SockAddr::from(dial.to)) {
            Ok(()) => Some(connected(socket, started.elapsed())),
            Err(error) if error.raw_os_error() == Some(Errno::EINPROGRESS as i32) => {
                open.push((at, socket, started));
                None
            }
            Err(error) => Some(Outcome::failed(errno_of(&error))),
        });
    }
    while !open.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        let ready = ready(open.iter().map(|(_, socket, _)| socket), left)?;
        let mut waiting = Vec::with_capacity(open.len());
        for ((at, socket, started), ready) in open.into_iter().zip(ready) {
            if ready {
                outcomes[at] = Some(settled(socket, started.elapsed()));
            } else {
                waiting.push((at, socket, started));
            }
        }
        open = waiting;
    }
    Ok(outcomes
        .into_iter()
        .map(|outcome| outcome.unwrap_or(Outcome::TimedOut))
        .collect())
}

/// Makes every dial's socket inside its host, entering each run of equal hosts once.
fn sockets(dials: &[Dial]) -> io::Result<Vec<Socket>> {
    let mut sockets = Vec::with_capacity(dials.len());
    let inode = |dial: &Dial| dial.from.netns().inode();
    for group in dials.chunk_by(|one, other| inode(one) == inode(other)) {
        let made = group[0].from.run(|| {
            group
                .iter()
                .map(Dial::socket)
                .collect::<io::Result<Vec<_>>>()
        });
        sockets.extend(made.map_err(io_error)??);
    }
    Ok(sockets)
}

/// Which sockets have an answer, after waiting for one for at most `left`.
fn ready<'a>(sockets: impl Iterator<Item = &'a Socket>, left: Duration) -> io::Result<Vec<bool>> {
    let mut polled: Vec<_> = sockets
        .map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLOUT))
        .collect();
    match poll(&mut polled, timeout(left)) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    Ok(polled.iter().map(|fd| fd.any().unwrap_or(false)).collect())
}

/// A poll timeout that is never shorter than `left`, so that a loop does not spin at its end.
pub(super) fn timeout(left: Duration) -> PollTimeout {
    let millis = left.as_millis().saturating_add(1).min(60_000);
    i32::try_from(millis)
        .ok()
        .and_then(|ms| ms.try_into().ok())
        .unwrap_or(PollTimeout::MAX)
}

fn settled(socket: Socket, latency: Duration) -> Outcome {
    match socket.take_error() {
        Ok(None) => connected(socket, latency),
        Ok(Some(error)) | Err(error) => Outcome::failed(errno_of(&error)),
    }
}

fn connected(socket: Socket, latency: Duration) -> Outcome {
    match socket.set_nonblocking(false) {
        Ok(()) => Outcome::Connected {
            stream: socket.into(),
            latency,
        },
        Err(error) => Outcome::failed(errno_of(&error)),
    }
}

pub(super) fn errno_of(error: &io::Error) -> Errno {
    error
        .raw_os_error()
        .map_or(Errno::UnknownErrno, Errno::from_raw)
}

/// What an echo server says first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// The server's name.
    pub server: String,
    /// The client's address as the server saw it.
    pub client: SocketAddr,
}

impl Greeting {
    /// As a server says it.
    pub(super) fn line(server: &str, client: SocketAddr) -> String {
        format!("{server} {client}\n")
    }

    /// Parses what a server sent; `None` if it is not a greeting.
    #[must_use]
    pub fn parse(said: &[u8]) -> Option<Self> {
        let line = str::from_utf8(said).ok()?;
        let (server, client) = line.trim_end().split_once(' ')?;
        Some(Self {
            server: server.into(),
            client: client.parse().ok()?,
        })
    }
}

/// Reads the line that a [`super::Serve::Echo`] server says first, within `limit`.
///
/// # Errors
/// `TimedOut` or `WouldBlock` if nothing came, `InvalidData` if something else came.
pub fn greeting(stream: &TcpStream, limit: Duration) -> io::Result<Greeting> {
    let before = stream.read_timeout()?;
    stream.set_read_timeout(Some(limit))?;
    let mut line = Vec::new();
    let mut byte = [0];
    let mut stream_ref = stream;
    // Byte by byte: what follows the line belongs to the caller.
    while line.len() < 256 && stream_ref.read(&mut byte)? == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    stream.set_read_timeout(before)?;
    Greeting::parse(&line).ok_or_else(|| {
        let line = String::from_utf8_lossy(&line);
        let text = format!("{line:?} is not a greeting; is this port served by Serve::Echo?");
        io::Error::new(io::ErrorKind::InvalidData, text)
    })
}
