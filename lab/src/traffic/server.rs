//! A host's servers: one thread with a poll loop for any number of ports and connections.
//!
//! Dropping a [`Server`] closes its sockets and ends its thread.

use std::io::{self, ErrorKind, PipeWriter, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::bulk::{Verifier, fill};
use super::dial::Greeting;
use super::sctp;
use super::udp::EchoSocket;
use crate::cluster::{self, host::io_error};
use crate::netns::Netns;

/// Connections that the kernel keeps ready; bursts of dials must not lose a SYN to the lab.
const BACKLOG: i32 = 4096;
const BUFFER: usize = 64 * 1024;

/// What a TCP server does with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Serve {
    /// Sends one line, `NAME CLIENT-ADDRESS`, then echoes what it receives, and closes after the
    /// client has.
    Echo,
    /// Takes [`super::bulk`] data until the client closes its side, then answers with one line,
    /// `COUNT ok` or `COUNT wrong at OFFSET`.
    Sink,
    /// Sends so many bytes of [`super::bulk`] data and closes.
    Source(u64),
    /// Resets the connection at once.
    Reset,
    /// Sends nothing and keeps the connection open.
    Hold,
}

/// Greets whoever asks `addresses` at `ports` by UDP or SCTP, as [`Serve::Echo`] does by TCP, until
/// the answer is dropped: one datagram, or the state cookie of an INIT ACK (see [`super::sctp`]), says
/// the server's `name` and whom it sees.
///
/// # Errors
/// What the kernel answers. `InvalidInput` for TCP, which is [`crate::Host::serve`]'s.
pub fn introduce(
    netns: &Netns,
    name: &str,
    protocol: cluster::Protocol,
    addresses: &[IpAddr],
    ports: &[u16],
) -> io::Result<Server> {
    match protocol {
        cluster::Protocol::Tcp => Err(ErrorKind::InvalidInput.into()),
        cluster::Protocol::Udp => Server::udp(netns, addresses, ports, Some(name)),
        cluster::Protocol::Sctp => Server::sctp(netns, name, addresses, ports),
    }
}

/// Running servers of one host; they end when it is dropped.
#[derive(Debug)]
pub struct Server {
    // Closing it wakes the thread, which then ends.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves TCP on `ports` of both families.
    pub(crate) fn tcp(netns: &Netns, name: &str, ports: &[u16], serve: Serve) -> io::Result<Self> {
        let listeners = netns.run(|| listeners(ports)).map_err(io_error)??;
        let name = name.to_string();
        Self::start(move |stop| {
            Loop {
                name,
                serve,
                listeners,
                connections: Vec::new(),
            }
            .run(stop);
        })
    }

    /// Echoes UDP on `ports` of `addresses`, or greets by `name`: with sockets bound to an address,
    /// answers come from the one that was asked.
    pub(crate) fn udp(
        netns: &Netns,
        addresses: &[IpAddr],
        ports: &[u16],
        name: Option<&str>,
    ) -> io::Result<Self> {
        let bind = || {
            let all = ports
                .iter()
                .flat_map(|port| addresses.iter().map(|ip| (*ip, *port).into()));
            all.map(|at| EchoSocket::bind(at, name))
                .collect::<io::Result<Vec<_>>>()
        };
        let sockets = netns.run(bind).map_err(io_error)??;
        Self::start(move |stop| super::udp::echo(&sockets, stop))
    }

    fn sctp(netns: &Netns, name: &str, addresses: &[IpAddr], ports: &[u16]) -> io::Result<Self> {
        let bind = || {
            let all = addresses.iter().map(|at| sctp::raw_socket(*at));
            all.collect::<io::Result<Vec<_>>>()
        };
        let sockets = netns.run(bind).map_err(io_error)??;
        let (name, ports) = (name.to_owned(), ports.to_vec());
        Self::start(move |stop| sctp::greet(&sockets, &name, &ports, stop))
    }

    fn start(body: impl FnOnce(&io::PipeReader) + Send + 'static) -> io::Result<Self> {
        let (stopped, stop) = io::pipe()?;
        let thread = thread::Builder::new()
            .name("lab-server".into())
            .spawn(move || body(&stopped))?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn listeners(ports: &[u16]) -> io::Result<Vec<TcpListener>> {
    let families = [
        IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    ];
    let all = ports
        .iter()
        .flat_map(|port| families.map(|any| SocketAddr::from((any, *port))));
    all.map(|at| {
        let socket = listen(at)?;
        socket.set_nonblocking(true)?;
        Ok(socket.into())
    })
    .collect()
}

/// A blocking listener of one family, in the calling thread's namespace.
pub(crate) fn listen(at: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if at.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&at.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

struct Loop {
    name: String,
    serve: Serve,
    listeners: Vec<TcpListener>,
    connections: Vec<Connection>,
}

impl Loop {
    fn run(mut self, stop: &io::PipeReader) {
        let mut buffer = vec![0; BUFFER];
        loop {
            let mut polled = vec![PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
            let readable = |l| PollFd::new(TcpListener::as_fd(l), PollFlags::POLLIN);
            polled.extend(self.listeners.iter().map(readable));
            polled.extend(self.connections.iter().map(Connection::interest));
            let woken = poll(&mut polled, PollTimeout::NONE);
            let ready: Vec<bool> = polled.iter().map(|fd| fd.any().unwrap_or(true)).collect();
            match woken {
                Ok(_) if !ready[0] => {}
                Err(nix::errno::Errno::EINTR) => continue,
                _ => return,
            }
            let (listeners, connections) = ready[1..].split_at(self.listeners.len());
            let mut at = 0;
            self.connections.retain_mut(|connection| {
                at += 1;
                !connections[at - 1] || connection.advance(&mut buffer).is_ok_and(|more| more)
            });
            let listeners = listeners.to_vec();
            self.accept(&listeners, &mut buffer);
        }
    }

    fn accept(&mut self, ready: &[bool], buffer: &mut [u8]) {
        for (listener, _) in self
            .listeners
            .iter()
            .zip(ready)
            .filter(|(_, ready)| **ready)
        {
            loop {
                let (stream, client) = match listener.accept() {
                    Ok(accepted) => accepted,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    // One connection's own fault (it is gone, say): the next may be fine.
                    Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                    Err(error) => {
                        eprintln!("lab: {} cannot accept: {error}", self.name);
                        // Out of descriptors, most likely; the listener stays readable.
                        thread::sleep(Duration::from_millis(10));
                        break;
                    }
                };
                self.connections.extend(Connection::new(
                    stream, client, &self.name, self.serve, buffer,
                ));
            }
        }
    }
}

/// One connection: bytes that wait to be sent, and what is to come.
struct Connection {
    stream: TcpStream,
    serve: Serve,
    out: Vec<u8>,
    sent: usize,
    /// The client has closed its side.
    ended: bool,
    sink: Verifier,
    /// Bytes of a source that are made already.
    made: u64,
}

impl Connection {
    /// None if the connection is over at once.
    fn new(
        stream: TcpStream,
        client: SocketAddr,
        name: &str,
        serve: Serve,
        buffer: &mut [u8],
    ) -> Option<Self> {
        stream.set_nonblocking(true).ok()?;
        let _ = stream.set_nodelay(true);
        if serve == Serve::Reset {
            // Closing with a linger time of zero sends a reset (socket(7), tcp(7)).
            let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            return None;
        }
        let out = match serve {
            Serve::Echo => Greeting::line(name, client).into_bytes(),
            _ => Vec::new(),
        };
        let sink = Verifier::default();
        let mut new = Self {
            stream,
            serve,
            out,
            sent: 0,
            ended: false,
            sink,
            made: 0,
        };
        new.advance(buffer).is_ok_and(|more| more).then_some(new)
    }

    fn interest(&self) -> PollFd<'_> {
        let flags = if self.wants_to_send() {
            PollFlags::POLLOUT
        } else {
            PollFlags::POLLIN
        };
        PollFd::new(self.stream.as_fd(), flags)
    }

    fn wants_to_send(&self) -> bool {
        self.sent < self.out.len()
            || matches!(self.serve, Serve::Source(total) if self.made < total)
    }

    /// Does what can be done without waiting. False once all is done; an error ends it too.
    fn advance(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        loop {
            match self.step(buffer) {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// One read or write: what waits to be sent goes first, which is the back pressure.
    fn step(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        if self.sent < self.out.len() {
            self.sent += self.stream.write(&self.out[self.sent..])?;
            return Ok(true);
        }
        self.out.clear();
        self.sent = 0;
        if let Serve::Source(total) = self.serve {
            let length = usize::try_from(total - self.made)
                .unwrap_or(BUFFER)
                .min(BUFFER);
            self.out.resize(length, 0);
            fill(self.made, &mut self.out);
            self.made += length as u64;
            return Ok(length > 0);
        }
        if self.ended {
            return Ok(false);
        }
        self.receive(buffer)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        let count = self.stream.read(buffer)?;
        self.ended = count == 0;
        match self.serve {
            Serve::Echo => self.out.extend_from_slice(&buffer[..count]),
            Serve::Sink if self.ended => self.out = format!("{}\n", self.sink).into_bytes(),
            Serve::Sink => self.sink.take(&buffer[..count]),
            Serve::Hold | Serve::Source(_) | Serve::Reset => {}
        }
        Ok(true)
    }
}
