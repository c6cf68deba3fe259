//! The first two packets of SCTP, by raw sockets: INIT and INIT ACK (RFC 9260, 5.1), with a
//! greeting as the state cookie. For machines whose kernel has no SCTP.

use std::io::{self, PipeReader};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{SockaddrStorage, recvfrom};
use socket2::{Domain, Protocol, Socket, Type};

use super::craft::{self, SCTP_INIT, SCTP_INIT_ACK};
use super::dial::Greeting;

const SCTP: i32 = 132;
/// The tag that every INIT made here asks its peer to use.
const TAG: u32 = 7;
/// The common header and an INIT's fixed part; parameters follow.
const FIXED: usize = 12 + 20;

/// A socket for the SCTP packets of one address, not blocking, in the calling thread's namespace.
///
/// # Errors
/// What the kernel answers.
pub fn raw_socket(at: IpAddr) -> io::Result<Socket> {
    let at = SocketAddr::from((at, 0));
    let kind = Type::RAW.nonblocking();
    let socket = Socket::new(Domain::for_address(at), kind, Some(Protocol::from(SCTP)))?;
    socket.bind(&at.into())?;
    Ok(socket)
}

/// Asks for an association by a [`raw_socket`].
///
/// # Errors
/// What the kernel answers.
pub fn ask(socket: &Socket, source_port: u16, to: SocketAddr) -> io::Result<()> {
    let init = craft::sctp_chunk(source_port, to.port(), 0, SCTP_INIT, &[]);
    send(socket, &init, to.ip())
}

/// Reads what has come to a [`raw_socket`] until it is the answer to [`ask`]; other packets of the
/// address are passed over.
///
/// # Errors
/// `WouldBlock` if there is none yet; `InvalidData` if it is no server of ours that answered; what the
/// network says.
pub fn answer(socket: &Socket, source_port: u16, to: SocketAddr) -> io::Result<Greeting> {
    loop {
        let (from, packet) = receive(socket)?;
        let fits = (packet.tag, packet.chunk, packet.to) == (TAG, SCTP_INIT_ACK, source_port);
        if fits && from == to {
            return Greeting::parse(&packet.cookie)
                .ok_or_else(|| io::ErrorKind::InvalidData.into());
        }
    }
}

/// Answers every INIT to one of `ports` until `stop` is closed at its other end.
pub(super) fn greet(sockets: &[Socket], name: &str, ports: &[u16], stop: &PipeReader) {
    loop {
        let mut polled = vec![PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        let readable = |it| PollFd::new(Socket::as_fd(it), PollFlags::POLLIN);
        polled.extend(sockets.iter().map(readable));
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) if !polled[0].any().unwrap_or(true) => {}
            Err(Errno::EINTR) => continue,
            _ => return,
        }
        for (socket, _) in sockets
            .iter()
            .zip(&polled[1..])
            .filter(|(_, fd)| fd.any().unwrap_or(true))
        {
            // An ICMP error for an earlier answer ends the turn; the socket stays readable.
            while let Ok((client, packet)) = receive(socket) {
                if packet.chunk == SCTP_INIT && ports.contains(&packet.to) {
                    let line = Greeting::line(name, client);
                    let back = craft::sctp_chunk(
                        packet.to,
                        client.port(),
                        packet.initiate_tag,
                        SCTP_INIT_ACK,
                        line.as_bytes(),
                    );
                    // What cannot be sent is lost, as packets may be.
                    let _ = send(socket, &back, client.ip());
                }
            }
        }
    }
}

fn send(socket: &Socket, packet: &[u8], to: IpAddr) -> io::Result<()> {
    // A raw socket has no ports (raw(7)).
    socket.send_to(packet, &SocketAddr::from((to, 0)).into())?;
    Ok(())
}

/// The next packet with one chunk that begins an association, and who sent it.
fn receive(socket: &Socket) -> io::Result<(SocketAddr, Packet)> {
    let mut buffer = [0; 2048];
    loop {
        let (count, from) = recvfrom::<SockaddrStorage>(socket.as_raw_fd(), &mut buffer)?;
        let Some(from) = from.as_ref().and_then(address) else {
            continue;
        };
        // IPv4's raw sockets give the IP header too, IPv6's do not (raw(7), RFC 3542).
        let skipped = match from {
            IpAddr::V4(_) => usize::from(buffer[0] & 0xf) * 4,
            IpAddr::V6(_) => 0,
        };
        if let Some(packet) = buffer[..count].get(skipped..).and_then(decode) {
            return Ok(((from, packet.from).into(), packet));
        }
    }
}

fn address(from: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = || Some(from.as_sockaddr_in()?.ip().into());
    let v6 = || Some(from.as_sockaddr_in6()?.ip().into());
    v4().or_else(v6)
}

/// What tests ask of a packet.
#[derive(Debug, PartialEq, Eq)]
struct Packet {
    from: u16,
    to: u16,
    tag: u32,
    chunk: u8,
    initiate_tag: u32,
    /// Empty if there is none.
    cookie: Vec<u8>,
}

/// `None` for what does not begin an association.
fn decode(packet: &[u8]) -> Option<Packet> {
    let short = |at: usize| Some(u16::from_be_bytes(*packet.get(at..)?.first_chunk()?));
    let long = |at: usize| Some(u32::from_be_bytes(*packet.get(at..)?.first_chunk()?));
    let chunk = *packet.get(12)?;
    if ![SCTP_INIT, SCTP_INIT_ACK].contains(&chunk) {
        return None;
    }
    // The state cookie is the only parameter that is made here, so it is the first.
    let cookie = match short(FIXED) {
        Some(7) => packet.get(FIXED + 4..FIXED + usize::from(short(FIXED + 2)?))?,
        _ => &[],
    };
    Some(Packet {
        from: short(0)?,
        to: short(2)?,
        tag: long(4)?,
        chunk,
        initiate_tag: long(16)?,
        cookie: cookie.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sctp_packets_decode_only_when_whole() {
        let init = craft::sctp_chunk(5000, 80, 0, SCTP_INIT, &[]);
        let expected = Packet {
            from: 5000,
            to: 80,
            tag: 0,
            chunk: SCTP_INIT,
            initiate_tag: TAG,
            cookie: Vec::new(),
        };
        assert_eq!(decode(&init), Some(expected));
        let answer = craft::sctp_chunk(80, 5000, TAG, SCTP_INIT_ACK, b"x/b 10.0.0.1:5000\n");
        assert_eq!(answer.len() % 4, 0);
        let said = decode(&answer).unwrap().cookie;
        assert_eq!(Greeting::parse(&said).unwrap().server, "x/b");
        for length in 0..20 {
            assert_eq!(decode(&answer[..length]), None, "{length} bytes");
        }
        assert_eq!(
            decode(&craft::sctp_chunk(1, 2, 3, 10, &[])),
            None,
            "COOKIE ECHO"
        );
    }
}
