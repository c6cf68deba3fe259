//! The few header fields of a held packet that a verdict rests on.
use std::net::{IpAddr, SocketAddr};

use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};
use policy::Protocol;

/// What a held packet is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Packet {
    /// The first segment of a TCP connection.
    Syn(Syn),
    /// Anything else, with what could be read of it.
    Other {
        from: IpAddr,
        to: IpAddr,
        protocol: Protocol,
    },
    /// Not an IP packet that we can read.
    Unreadable,
}

/// A SYN without ACK, FIN or RST.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Syn {
    pub(crate) client: SocketAddr,
    pub(crate) server: SocketAddr,
    /// The initial sequence number: a repeated SYN has the same, a new attempt another.
    pub(crate) sequence: u32,
}

impl Packet {
    /// Reads a packet from its IP header on; it may be cut short behind its headers.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let Ok(sliced) = LaxSlicedPacket::from_ip(bytes) else {
            return Self::Unreadable;
        };
        let (from, to, protocol): (IpAddr, IpAddr, u8) = match &sliced.net {
            Some(LaxNetSlice::Ipv4(v4)) => (
                v4.header().source_addr().into(),
                v4.header().destination_addr().into(),
                v4.payload().ip_number.0,
            ),
            Some(LaxNetSlice::Ipv6(v6)) => (
                v6.header().source_addr().into(),
                v6.header().destination_addr().into(),
                v6.payload().ip_number.0,
            ),
            _ => return Self::Unreadable,
        };
        match sliced.transport {
            Some(TransportSlice::Tcp(tcp))
                if tcp.syn() && !tcp.ack() && !tcp.fin() && !tcp.rst() =>
            {
                Self::Syn(Syn {
                    client: SocketAddr::new(from, tcp.source_port()),
                    server: SocketAddr::new(to, tcp.destination_port()),
                    sequence: tcp.sequence_number(),
                })
            }
            _ => Self::Other {
                from,
                to,
                protocol: Protocol::from_ip_number(protocol),
            },
        }
    }
}
