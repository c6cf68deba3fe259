//! Datagrams: one question, one answer.

use std::fmt;
use std::io::{self, PipeReader};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};

use super::dial::{Greeting, errno_of, timeout};
use crate::cluster::host::io_error;
use crate::netns::Netns;

/// The outcome of a datagram.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UdpOutcome {
    /// An answer came from the address that was asked.
    Answered {
        /// What it said.
        text: Vec<u8>,
        /// From question to answer.
        latency: Duration,
    },
    /// "Port unreachable" came back by ICMP (`ECONNREFUSED`).
    Refused,
    /// Nothing came back before the deadline.
    TimedOut,
    /// The network said that there is no way, by ICMP or by a route.
    Unreachable(Errno),
}

impl fmt::Display for UdpOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered { latency, .. } => write!(f, "answered in {latency:?}"),
            Self::Refused => f.write_str("refused"),
            Self::TimedOut => f.write_str("timed out"),
            Self::Unreachable(errno) => write!(f, "unreachable: {} ({errno:?})", errno.desc()),
        }
    }
}

/// Sends `text` once to `to` and waits for an answer from there for at most `limit`.
pub(crate) fn ask(
    netns: &Netns,
    to: SocketAddr,
    text: &[u8],
    limit: Duration,
) -> io::Result<UdpOutcome> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = netns.run(|| UdpSocket::bind(any)).map_err(io_error)??;
    socket.set_nonblocking(true)?;
    let started = Instant::now();
    // Connected: only answers from `to` count, and ICMP errors reach the socket.
    if let Err(error) = socket.connect(to).and_then(|()| socket.send(text)) {
        return Ok(failed(&error));
    }
    let mut buffer = vec![0; 65_536];
    loop {
        match socket.recv(&mut buffer) {
            Ok(count) => {
                let latency = started.elapsed();
                return Ok(UdpOutcome::Answered {
                    text: buffer[..count].to_vec(),
                    latency,
                });
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Ok(failed(&error)),
        }
        let left = limit.saturating_sub(started.elapsed());
        if left.is_zero() {
            return Ok(UdpOutcome::TimedOut);
        }
        match poll(
            &mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)],
            timeout(left),
        ) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn failed(error: &io::Error) -> UdpOutcome {
    match errno_of(error) {
        Errno::ECONNREFUSED => UdpOutcome::Refused,
        errno => UdpOutcome::Unreachable(errno),
    }
}

/// Bytes that may wait for a server: the kernel's default takes 277 datagrams, and drops what else comes while a
/// busy machine gives the server no time.
const RECEIVE_BUFFER: usize = 8 << 20;

#[derive(Debug)]
pub(super) struct EchoSocket {
    socket: UdpSocket,
    /// Answers with a greeting of this server instead.
    name: Option<String>,
}

impl EchoSocket {
    pub(super) fn bind(at: SocketAddr, name: Option<&str>) -> io::Result<Self> {
        let socket = UdpSocket::bind(at)?;
        socket.set_nonblocking(true)?;
        // Without the right to force it, the system's limit has to do.
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER);
        let name = name.map(str::to_owned);
        Ok(Self { socket, name })
    }

    /// Answers everything that has come. A datagram that cannot be answered is dropped, as UDP
    /// may.
    fn answer(&self, buffer: &mut [u8]) {
        loop {
            match self.socket.recv_from(buffer) {
                Ok((count, from)) => {
                    let greeting = self.name.as_deref().map(|name| Greeting::line(name, from));
                    let answer = greeting.as_ref().map_or(&buffer[..count], String::as_bytes);
                    drop(self.socket.send_to(answer, from));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // An ICMP error for an earlier answer; reading it clears it.
                Err(_) => {}
            }
        }
    }
}

/// Echoes until `stop` is closed at its other end.
pub(super) fn echo(sockets: &[EchoSocket], stop: &PipeReader) {
    let mut buffer = vec![0; 65_536];
    loop {
        let mut polled = vec![PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        polled.extend(
            sockets
                .iter()
                .map(|s| PollFd::new(s.socket.as_fd(), PollFlags::POLLIN)),
        );
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) if !polled[0].any().unwrap_or(true) => {}
            Err(Errno::EINTR) => continue,
            _ => return,
        }
        for (socket, fd) in sockets.iter().zip(&polled[1..]) {
            if fd.any().unwrap_or(true) {
                socket.answer(&mut buffer);
            }
        }
    }
}
