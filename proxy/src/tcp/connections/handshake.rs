//! Removes a client's incomplete handshake from the kernel when its connection has ended.
//!
//! The listener has answered the SYN, and would repeat the SYN-ACK for a minute, to a client that may now be denied.
//! A flood of these would fill its backlog, which all connections of the node share. No system call removes an entry; a
//! reset from the client does, so this sends one to this host with the client's address.
use std::net::{IpAddr, SocketAddr};

use kernel::marks::Marks;
use socket2::{Domain, Protocol, Socket, Type};

use super::Connection;
use kernel::checksum;

/// IANA protocol number of TCP.
const TCP: u8 = 6;
const RST: u8 = 0b100;

/// Raw sockets for these resets; none without `CAP_NET_RAW`: then the handshake times out.
#[derive(Default)]
pub(super) struct Handshakes {
    v4: Option<Socket>,
    v6: Option<Socket>,
}

impl Handshakes {
    /// Sockets whose packets the rules route to this host.
    pub(super) fn of(marks: Marks) -> Self {
        let open = |domain| {
            let protocol = Protocol::from(libc::IPPROTO_RAW);
            let socket = Socket::new(domain, Type::RAW.nonblocking(), Some(protocol)).ok()?;
            socket.set_mark(marks.divert()).ok()?;
            Some(socket)
        };
        Self {
            v4: open(Domain::IPV4),
            v6: open(Domain::IPV6),
        }
    }

    /// Removes the handshake of this connection's client from the backlog. If the client has completed it meanwhile,
    /// the connection is reset.
    pub(super) fn forget(&self, connection: &Connection) {
        let (client, server) = (connection.key.client, connection.key.server);
        let socket = match client {
            SocketAddr::V4(_) => &self.v4,
            SocketAddr::V6(_) => &self.v6,
        };
        if let Some(socket) = socket
            && let Some(packet) = reset(client, server, connection.sequence.wrapping_add(1))
        {
            // A raw socket has no port. If sending fails, the handshake times out.
            let to = SocketAddr::new(server.ip(), 0);
            let _ = socket.send_to(&packet, &to.into());
        }
    }
}

/// A reset from `client` (RFC 9293, 3.1) with its IP header; none if the families differ.
fn reset(client: SocketAddr, server: SocketAddr, sequence: u32) -> Option<Vec<u8>> {
    let mut segment = [0; 20];
    segment[..2].copy_from_slice(&client.port().to_be_bytes());
    segment[2..4].copy_from_slice(&server.port().to_be_bytes());
    segment[4..8].copy_from_slice(&sequence.to_be_bytes());
    segment[12..14].copy_from_slice(&[5 << 4, RST]);
    let (mut packet, ends) = match (client.ip(), server.ip()) {
        (IpAddr::V4(client), IpAddr::V4(server)) => {
            let ends = [client.octets(), server.octets()].concat();
            // The kernel fills in length, number and checksum (raw(7)).
            let header = [0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, TCP, 0, 0];
            ([&header[..], &ends].concat(), ends)
        }
        (IpAddr::V6(client), IpAddr::V6(server)) => {
            let ends = [client.octets(), server.octets()].concat();
            let header = [0x60, 0, 0, 0, 0, 20, TCP, 64];
            ([&header[..], &ends].concat(), ends)
        }
        _ => return None,
    };
    // With its pseudo header (RFC 9293, 3.1).
    let checksum = checksum::of(&[&ends, &[0, TCP, 0, 20], &segment]);
    segment[16..18].copy_from_slice(&checksum);
    packet.extend(segment);
    Some(packet)
}

#[cfg(test)]
mod tests {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};

    use super::*;

    #[test]
    fn a_client_reset_has_a_valid_checksum() {
        for (client, server) in [
            ("10.0.0.1:40000", "10.0.0.2:80"),
            ("[fd00::1]:40000", "[fd00::2]:80"),
        ] {
            let ends = [client, server].map(|end| end.parse().unwrap());
            let packet = reset(ends[0], ends[1], 0xffff_fff0).unwrap();
            let sliced = SlicedPacket::from_ip(&packet).unwrap();
            let Some(TransportSlice::Tcp(tcp)) = &sliced.transport else {
                panic!("TCP")
            };
            assert!(tcp.rst() && !tcp.ack() && !tcp.syn());
            assert_eq!((tcp.source_port(), tcp.destination_port()), (40_000, 80));
            assert_eq!(tcp.sequence_number(), 0xffff_fff0);
            let right = match &sliced.net {
                Some(NetSlice::Ipv4(v4)) => {
                    let header = v4.header();
                    tcp.calc_checksum_ipv4(header.source(), header.destination())
                }
                Some(NetSlice::Ipv6(v6)) => {
                    let header = v6.header();
                    tcp.calc_checksum_ipv6(header.source(), header.destination())
                }
                _ => panic!("IP"),
            };
            assert_eq!(tcp.checksum(), right.unwrap());
        }
        let mixed = ["10.0.0.1:1", "[fd00::2]:80"].map(|end| end.parse().unwrap());
        assert_eq!(reset(mixed[0], mixed[1], 7), None);
    }
}
