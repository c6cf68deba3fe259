//! What passes an interface, decoded as far as tests ask.
//!
//! A packet socket (packet(7)) without a filter in the kernel; a thread keeps it empty, so nothing
//! is lost while a test does something else.

use std::io::{self, PipeWriter};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{LinkAddr, recvfrom};
use socket2::{Domain, Protocol, Socket, Type};

use crate::cluster::host::io_error;
use crate::netns::Netns;
use crate::wait::{WaitTimedOut, wait_until};

/// Enough of a packet for every header that is decoded; the rest is cut off.
const SNAP: usize = 256;
/// Room for bursts until the thread gets a turn, bytes.
const RECEIVE_BUFFER: usize = 8 << 20;

/// Which way a packet passed the interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The host received it.
    In,
    /// The host sent it.
    Out,
}

/// The TCP flags that tests ask for (RFC 9293, 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flags(u8);

impl Flags {
    /// SYN without ACK: a client's first packet.
    #[must_use]
    pub fn is_syn(self) -> bool {
        self.0 & 0b1_0010 == 0b0_0010
    }

    /// SYN with ACK: a server's first answer.
    #[must_use]
    pub fn is_syn_ack(self) -> bool {
        self.0 & 0b1_0010 == 0b1_0010
    }

    /// RST.
    #[must_use]
    pub fn is_reset(self) -> bool {
        self.0 & 0b0_0100 != 0
    }

    /// FIN.
    #[must_use]
    pub fn is_fin(self) -> bool {
        self.0 & 0b0_0001 != 0
    }
}

/// A packet that passed the interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// When it was read, not when it passed.
    pub at: Instant,
    /// Which way.
    pub way: Way,
    /// The IP protocol number (6 TCP, 17 UDP, 1 ICMP, 58 ICMPv6).
    pub protocol: u8,
    /// Source; port 0 where the protocol has none.
    pub source: SocketAddr,
    /// Destination; port 0 where the protocol has none.
    pub destination: SocketAddr,
    /// TCP flags; none set for other protocols.
    pub flags: Flags,
    /// TCP sequence number; 0 for other protocols.
    pub sequence: u32,
    /// IPv4 identification or IPv6 flow label.
    pub number: u32,
}

impl Packet {
    /// Whether it is a client's first packet to `to`, a retransmit included.
    #[must_use]
    pub fn is_syn_to(&self, to: SocketAddr) -> bool {
        self.flags.is_syn() && self.destination == to
    }

    /// Whether it is a server's first answer from `from`.
    #[must_use]
    pub fn is_syn_ack_from(&self, from: SocketAddr) -> bool {
        self.flags.is_syn_ack() && self.source == from
    }
}

/// A running capture; it ends when it is dropped.
#[derive(Debug)]
pub struct Capture {
    tap: Arc<Tap>,
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Tap {
    socket: Socket,
    interface: usize,
    seen: Mutex<Vec<Packet>>,
}

impl Capture {
    pub(crate) fn start(netns: &Netns, interface: &str) -> io::Result<Self> {
        let open = || -> io::Result<_> {
            let every = u16::try_from(libc::ETH_P_ALL).unwrap_or(3).to_be();
            let kind = Type::DGRAM.nonblocking();
            let socket = Socket::new(Domain::PACKET, kind, Some(Protocol::from(i32::from(every))))?;
            socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
            let interface = if_nametoindex(interface)?;
            Ok(Tap {
                socket,
                interface: interface as usize,
                seen: Mutex::default(),
            })
        };
        let tap = Arc::new(netns.run(open).map_err(io_error)??);
        let (stopped, stop) = io::pipe()?;
        let worker = Arc::clone(&tap);
        let thread = thread::Builder::new()
            .name("lab-capture".into())
            .spawn(move || worker.keep_empty(&stopped))?;
        Ok(Self {
            tap,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// All packets that have passed up to now, oldest first.
    #[must_use]
    pub fn packets(&self) -> Vec<Packet> {
        self.tap.drain().clone()
    }

    /// How many packets up to now match.
    #[must_use]
    pub fn count(&self, such: impl Fn(&Packet) -> bool) -> usize {
        self.tap
            .drain()
            .iter()
            .filter(|packet| such(packet))
            .count()
    }

    /// How many SYNs went to `to`, retransmits included.
    #[must_use]
    pub fn syns_to(&self, to: SocketAddr) -> usize {
        self.count(|packet| packet.is_syn_to(to))
    }

    /// How many SYN-ACKs came from `from`.
    #[must_use]
    pub fn syn_acks_from(&self, from: SocketAddr) -> usize {
        self.count(|packet| packet.is_syn_ack_from(from))
    }

    /// Waits until `count` packets match.
    ///
    /// # Errors
    /// [`WaitTimedOut`] after `limit`, naming `what`.
    pub fn wait_for(
        &self,
        limit: Duration,
        what: &str,
        count: usize,
        such: impl Fn(&Packet) -> bool,
    ) -> Result<(), WaitTimedOut> {
        wait_until(limit, what, || self.count(&such) >= count)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Tap {
    fn keep_empty(&self, stop: &io::PipeReader) {
        loop {
            let mut polled = [
                PollFd::new(stop.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut polled, PollTimeout::NONE) {
                Ok(_) if !polled[0].any().unwrap_or(true) => drop(self.drain()),
                Err(Errno::EINTR) => {}
                _ => return,
            }
        }
    }

    /// Reads what the kernel holds; the answer is complete up to the call.
    fn drain(&self) -> MutexGuard<'_, Vec<Packet>> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = [0; SNAP];
        loop {
            match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut buffer) {
                Ok((count, Some(from))) if from.ifindex() == self.interface => {
                    // sll_pkttype 4 is PACKET_OUTGOING (packet(7)).
                    let way = if from.pkttype() == 4 {
                        Way::Out
                    } else {
                        Way::In
                    };
                    seen.extend(decode(way, &buffer[..count]));
                }
                Ok(_) | Err(Errno::EINTR | Errno::ENETDOWN) => {}
                Err(_) => return seen,
            }
        }
    }
}

/// Reads the headers; None for what is not IP. A later fragment has no ports.
fn decode(way: Way, packet: &[u8]) -> Option<Packet> {
    let (source, destination, protocol, transport) = match packet.first()? >> 4 {
        4 => ipv4(packet)?,
        6 => ipv6(packet)?,
        _ => return None,
    };
    let word = |at: usize| {
        Some(u16::from_be_bytes([
            *transport.get(at)?,
            *transport.get(at + 1)?,
        ]))
    };
    // TCP, UDP and SCTP (6, 17, 132) begin with the ports.
    let has_ports = matches!(protocol, 6 | 17 | 132);
    let port = |at| if has_ports { word(at).unwrap_or(0) } else { 0 };
    let tcp = transport.get(..14).filter(|_| protocol == 6);
    Some(Packet {
        at: Instant::now(),
        way,
        protocol,
        source: (source, port(0)).into(),
        destination: (destination, port(2)).into(),
        flags: Flags(tcp.map_or(0, |tcp| tcp[13])),
        sequence: tcp.map_or(0, |tcp| {
            u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]])
        }),
        number: match source {
            IpAddr::V4(_) => u32::from(u16::from_be_bytes([packet[4], packet[5]])),
            IpAddr::V6(_) => u32::from_be_bytes([0, packet[1] & 0xf, packet[2], packet[3]]),
        },
    })
}

type Parts<'a> = (IpAddr, IpAddr, u8, &'a [u8]);

fn ipv4(packet: &[u8]) -> Option<Parts<'_>> {
    let address = |at: usize| {
        let bytes: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
        Some(IpAddr::from(Ipv4Addr::from(bytes)))
    };
    let header = usize::from(packet.first()? & 0xf) * 4;
    let offset = u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]) & 0x1fff;
    let transport = if offset == 0 {
        packet.get(header..)?
    } else {
        &[]
    };
    Some((address(12)?, address(16)?, *packet.get(9)?, transport))
}

fn ipv6(packet: &[u8]) -> Option<Parts<'_>> {
    let address = |at: usize| {
        let bytes: [u8; 16] = packet.get(at..at + 16)?.try_into().ok()?;
        Some(IpAddr::from(Ipv6Addr::from(bytes)))
    };
    let (mut next, mut at) = (*packet.get(6)?, 40);
    // Hop-by-hop, routing and destination options (RFC 8200, 4): next header, length in octets.
    while matches!(next, 0 | 43 | 60) {
        (next, at) = (
            *packet.get(at)?,
            at + 8 + usize::from(*packet.get(at + 1)?) * 8,
        );
    }
    Some((address(8)?, address(24)?, next, packet.get(at..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A TCP header from port 1000 to port 80 with sequence number 7.
    fn tcp(flags: u8) -> Vec<u8> {
        let mut header = vec![0x03, 0xe8, 0, 80, 0, 0, 0, 7];
        header.extend([0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
        header
    }

    #[test]
    fn tcp_is_decoded_in_both_families_behind_options() {
        let mut v4 = vec![
            0x46, 0, 0, 44, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ];
        v4.extend([1, 1, 1, 1]);
        v4.extend(tcp(0x02));
        let mut v6 = vec![0x60, 0, 0, 0, 0, 28, 0, 64];
        v6.extend(Ipv6Addr::LOCALHOST.octets());
        v6.extend(Ipv6Addr::UNSPECIFIED.octets());
        v6.extend([6, 0, 0, 0, 0, 0, 0, 0]);
        v6.extend(tcp(0x12));

        let packet = decode(Way::Out, &v4).unwrap();
        assert!(
            packet.is_syn_to("10.0.0.2:80".parse().unwrap()),
            "{packet:?}"
        );
        assert_eq!((packet.source.port(), packet.sequence), (1000, 7));
        let packet = decode(Way::In, &v6).unwrap();
        assert!(
            packet.is_syn_ack_from("[::1]:1000".parse().unwrap()),
            "{packet:?}"
        );
    }

    #[test]
    fn truncated_and_foreign_packets_are_skipped() {
        let whole = [vec![0x45; 20], tcp(0x02)].concat();
        for length in 0..20 {
            assert_eq!(decode(Way::In, &whole[..length]), None, "{length} bytes");
        }
        assert_eq!(decode(Way::In, &[0; 60]), None, "version 0");
    }
}
