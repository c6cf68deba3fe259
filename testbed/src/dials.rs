//! The cells of a grid on the wire, all at once: TCP connections, UDP questions, SCTP associations.
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use lab::traffic::{Greeting, greeting, sctp};
use lab::{Netns, Protocol};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Socket, Type};

use crate::DEADLINE;
use crate::cases::{Family, Grid};

/// How long denied connections may still succeed once all allowed ones are established:
/// all were sent before the first of these was answered.
const GRACE: Duration = Duration::from_millis(400);

/// How a server is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// By its own address.
    Address,
    /// By the ClusterIP of its Service.
    Service,
}

/// One cell of a grid.
pub struct Dial {
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// The source's place in the grid.
    pub row: usize,
    /// The destination's place in the grid.
    pub column: usize,
    /// The family of all its addresses.
    pub family: Family,
    /// How `to` names the server.
    pub by: By,
    /// Whether it must succeed.
    pub expected: bool,
    /// Where the socket is made.
    pub netns: Netns,
    /// The client's address.
    pub source: IpAddr,
    /// Where it connects to.
    pub to: SocketAddr,
    /// Where `to` leads.
    pub server_address: SocketAddr,
    /// The pod that is to answer; `None` for an external host.
    pub server: Option<String>,
}

/// A dial that succeeded.
pub enum Reached {
    /// Its greeting waits to be read.
    Stream(TcpStream),
    /// UDP's or SCTP's answer.
    Greeting(Greeting),
}

impl Reached {
    /// What the server said; of a stream it can be read once.
    pub fn greeting(&self) -> io::Result<Greeting> {
        match self {
            Self::Stream(stream) => greeting(stream, DEADLINE),
            Self::Greeting(greeting) => Ok(greeting.clone()),
        }
    }
}

impl Dial {
    /// Returns an error if another server answered, or if it saw another client.
    pub fn misled(&self, reached: &Reached, grid: &Grid) -> Option<String> {
        let server = self.server.as_ref()?;
        let (from, to) = (&grid.parties[self.row], &grid.parties[self.column]);
        match reached.greeting() {
            Err(error) => Some(format!(
                "{from} to {to} ({}) is connected to nobody: {error}",
                self.to
            )),
            Ok(Greeting { server: other, .. }) if other != *server => {
                Some(format!("{from} to {to} ({}) reached {other}", self.to))
            }
            // A pod that reaches itself by its Service is hidden behind its node.
            Ok(Greeting { client, .. })
                if self.row != self.column && client.ip() != self.source =>
            {
                Some(format!("{to} saw {from} ({}) as {client}", self.source))
            }
            Ok(_) => None,
        }
    }

    fn start(&self) -> Call {
        static PORTS: AtomicU16 = AtomicU16::new(10_000);
        let port = match self.protocol {
            Protocol::Sctp => PORTS.fetch_add(1, Ordering::Relaxed),
            _ => 0,
        };
        let socket = match self.protocol {
            // The outside host has several addresses.
            Protocol::Tcp => socket(Type::STREAM, self.source),
            Protocol::Udp => socket(Type::DGRAM, self.source),
            Protocol::Sctp => sctp::raw_socket(self.source).unwrap(),
        };
        // What any of them answers is read off the socket later.
        let _ = match self.protocol {
            Protocol::Tcp => socket.connect(&self.to.into()),
            Protocol::Udp => socket
                .connect(&self.to.into())
                .and_then(|()| socket.send(b"who?").map(drop)),
            Protocol::Sctp => sctp::ask(&socket, port, self.to),
        };
        let (protocol, to) = (self.protocol, self.to);
        Call {
            protocol,
            to,
            port,
            socket: Some(socket),
            end: None,
        }
    }
}

fn socket(kind: Type, source: IpAddr) -> Socket {
    let source = SocketAddr::from((source, 0));
    let socket = Socket::new(Domain::for_address(source), kind.nonblocking(), None).unwrap();
    socket.bind(&source.into()).unwrap();
    socket
}

/// Dials all at once; waits until all expected ones have succeeded (or the deadline), and
/// then a grace period for those that must not. `None` is a failure.
pub fn dial_all(dials: &[Dial]) -> Vec<Option<Reached>> {
    let mut calls: Vec<Call> = Vec::with_capacity(dials.len());
    for group in dials.chunk_by(|one, other| one.netns.inode() == other.netns.inode()) {
        let started = group[0]
            .netns
            .run(|| group.iter().map(Dial::start).collect::<Vec<_>>());
        calls.extend(started.unwrap());
    }
    for (expected, limit) in [(true, DEADLINE), (false, GRACE)] {
        let chosen = calls.iter_mut().zip(dials);
        let chosen = chosen.filter(|(_, dial)| dial.expected == expected);
        settle(chosen.map(|(call, _)| call).collect(), limit);
    }
    let ends = calls.into_iter().map(|call| call.end?.ok());
    ends.collect()
}

/// A dial under way.
struct Call {
    protocol: Protocol,
    to: SocketAddr,
    /// SCTP's source port.
    port: u16,
    /// `None` once it has become a stream.
    socket: Option<Socket>,
    end: Option<io::Result<Reached>>,
}

impl Call {
    fn interest(&self) -> Option<PollFd<'_>> {
        let flags = match self.protocol {
            Protocol::Tcp => PollFlags::POLLOUT,
            Protocol::Udp | Protocol::Sctp => PollFlags::POLLIN,
        };
        Some(PollFd::new(self.socket.as_ref()?.as_fd(), flags))
    }

    /// Checks its progress; returns whether it has ended.
    fn look(&mut self) -> bool {
        let Some(socket) = self.socket.take() else {
            return true;
        };
        let seen = match self.protocol {
            Protocol::Tcp => {
                self.end = Some(stream(socket));
                return true;
            }
            Protocol::Udp => answer(&socket),
            Protocol::Sctp => sctp::answer(&socket, self.port, self.to),
        };
        self.socket = Some(socket);
        match seen {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            end => {
                self.end = Some(end.map(Reached::Greeting));
                true
            }
        }
    }
}

/// Waits until the calls have come to an end, for at most `limit`.
fn settle(mut waiting: Vec<&mut Call>, limit: Duration) {
    let deadline = Instant::now() + limit;
    while !waiting.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let mut polled: Vec<_> = waiting.iter().filter_map(|call| call.interest()).collect();
        poll(&mut polled, timeout).unwrap();
        let ready: Vec<bool> = polled.iter().map(|fd| fd.any().unwrap()).collect();
        let mut ready = ready.into_iter();
        waiting.retain_mut(|call| !(ready.next().unwrap() && call.look()));
    }
}

fn stream(socket: Socket) -> io::Result<Reached> {
    socket.peer_addr()?;
    socket.set_nonblocking(false)?;
    Ok(Reached::Stream(socket.into()))
}

fn answer(mut socket: &Socket) -> io::Result<Greeting> {
    let mut said = [0; 256];
    let count = io::Read::read(&mut socket, &mut said)?;
    Greeting::parse(&said[..count]).ok_or_else(|| io::ErrorKind::InvalidData.into())
}
