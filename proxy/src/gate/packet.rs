//! Parses the header fields of a held packet that a verdict depends on.
use std::net::{IpAddr, SocketAddr};

use etherparse::{
    IpNumber, LaxIpPayloadSlice, LaxNetSlice, LaxSlicedPacket, TcpOptionElement, TcpSlice,
    TransportSlice,
};
use policy::Protocol;

use crate::tcp::connect::Inherited;
use kernel::conntrack::FlowId;

/// The numbers of ICMP and ICMPv6 (IANA protocol numbers).
const ICMP: [Protocol; 2] = [Protocol::Other(1), Protocol::Other(58)];
/// Protocol number of the authentication header.
const AUTHENTICATION: u8 = 51;
const FRAGMENT: u8 = 44;

/// What a held packet is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Packet {
    /// The first segment of a TCP connection.
    Syn(Syn),
    /// A TCP reset.
    Reset(Reset),
    /// In the original direction of a flow that becomes a kernel flow if allowed: UDP, SCTP,
    /// ICMP, another protocol, or TCP that began before.
    Other(FlowId),
    /// A TCP segment that is neither a SYN nor part of a connection, a packet too short for a verdict, or a link-local
    /// source.
    Invalid,
    /// Not an IP packet that we can read.
    Malformed,
}

/// A SYN without ACK, FIN or RST.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Syn {
    pub(crate) client: SocketAddr,
    pub(crate) server: SocketAddr,
    /// The initial sequence number: a repeated SYN has the same, a new attempt another.
    pub(crate) sequence: u32,
    /// TSval of its timestamps option (RFC 7323), if it has one.
    pub(crate) stamp: Option<u32>,
    /// What the upstream leg takes over.
    pub(crate) inherited: Inherited,
}

/// A TCP segment with RST and without SYN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reset {
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) sequence: u32,
    /// Whether it has an ACK too.
    pub(crate) acknowledges: bool,
}

impl From<Reset> for FlowId {
    fn from(reset: Reset) -> Self {
        Self {
            protocol: Protocol::Tcp,
            client: reset.from,
            server: reset.to,
            identifier: 0,
        }
    }
}

impl From<Syn> for FlowId {
    fn from(syn: Syn) -> Self {
        Self {
            protocol: Protocol::Tcp,
            client: syn.client,
            server: syn.server,
            identifier: 0,
        }
    }
}

impl Packet {
    /// Parses a packet from its IP header on; it may be truncated after its headers.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let Ok(sliced) = LaxSlicedPacket::from_ip(bytes) else {
            return Self::Malformed;
        };
        let Some(Network {
            from,
            to,
            payload,
            authenticated,
            dscp,
        }) = sliced.net.as_ref().and_then(network)
        else {
            return Self::Malformed;
        };
        // A link-local address identifies no sender beyond its link, and cannot be answered.
        if is_link_local(from) {
            return Self::Invalid;
        }
        // The kernel treats AH as a separate protocol: TCP inside it cannot be proxied.
        let protocol = Protocol::from_ip_number(if authenticated {
            AUTHENTICATION
        } else {
            payload.ip_number.0
        });
        let flow_of = |source, destination, identifier| {
            let (client, server) = (
                SocketAddr::new(from, source),
                SocketAddr::new(to, destination),
            );
            Self::Other(FlowId {
                protocol,
                client,
                server,
                identifier,
            })
        };
        let flow = |source, destination| flow_of(source, destination, 0);
        match (protocol, &sliced.transport) {
            (Protocol::Tcp, Some(TransportSlice::Tcp(tcp))) => {
                let ends = [(from, tcp.source_port()), (to, tcp.destination_port())];
                let [client, server] = ends.map(SocketAddr::from);
                segment(client, server, dscp, tcp)
                    .unwrap_or_else(|| flow(tcp.source_port(), tcp.destination_port()))
            }
            (Protocol::Udp, Some(TransportSlice::Udp(udp))) => {
                flow(udp.source_port(), udp.destination_port())
            }
            (Protocol::Sctp, _) if !payload.fragmented => sctp_ports(payload.payload)
                .map_or(Self::Invalid, |(source, destination)| {
                    flow(source, destination)
                }),
            (Protocol::Other(_), _) if ICMP.contains(&protocol) => {
                flow_of(0, 0, icmp_identifier(payload.payload))
            }
            (Protocol::Other(_), _) => flow(0, 0),
            _ => Self::Invalid,
        }
    }
}

/// A segment that begins or resets a connection, or an invalid one; `None` for any other.
fn segment(from: SocketAddr, to: SocketAddr, dscp: u8, tcp: &TcpSlice<'_>) -> Option<Packet> {
    let sequence = tcp.sequence_number();
    Some(match (tcp.syn(), tcp.ack(), tcp.fin(), tcp.rst()) {
        (true, false, false, false) => Packet::Syn(Syn {
            client: from,
            server: to,
            sequence,
            stamp: stamp(tcp),
            inherited: Inherited {
                mss: mss(tcp),
                dscp,
            },
        }),
        (false, acknowledges, _, true) => Packet::Reset(Reset {
            from,
            to,
            sequence,
            acknowledges,
        }),
        (false, true, _, false) => return None,
        _ => Packet::Invalid,
    })
}

/// Whether it is a link-local IPv6 address (RFC 4291, section 2.5.6). Link-local IPv4 addresses are not meant: some
/// networks give them to pods and route them.
fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// The fields of the IP header and its extensions.
struct Network<'a> {
    from: IpAddr,
    to: IpAddr,
    payload: &'a LaxIpPayloadSlice<'a>,
    authenticated: bool,
    dscp: u8,
}

fn network<'a>(net: &'a LaxNetSlice<'a>) -> Option<Network<'a>> {
    match net {
        LaxNetSlice::Ipv4(v4) => Some(Network {
            from: v4.header().source_addr().into(),
            to: v4.header().destination_addr().into(),
            payload: v4.payload(),
            authenticated: v4.extensions().auth.is_some(),
            dscp: v4.header().dcp().value(),
        }),
        LaxNetSlice::Ipv6(v6) => Some(Network {
            from: v6.header().source_addr().into(),
            to: v6.header().destination_addr().into(),
            payload: v6.payload(),
            authenticated: is_authenticated(
                v6.extensions().first_header(),
                v6.extensions().slice(),
            ),
            dscp: v6.header().dscp().value(),
        }),
        LaxNetSlice::Arp(_) => None,
    }
}

/// Whether an authentication header (RFC 4302) is among IPv6 extension headers. Not by their
/// iterator in etherparse, which trusts the lengths of a packet that is cut.
fn is_authenticated(first: Option<IpNumber>, mut headers: &[u8]) -> bool {
    let mut kind = first;
    while let Some(IpNumber(number)) = kind {
        if number == AUTHENTICATION {
            return true;
        }
        let (Some(next), Some(words)) = (headers.first(), headers.get(1)) else {
            return false;
        };
        // A fragment header is 8 octets, its second one reserved (RFC 8200, 4.5).
        let words = if number == FRAGMENT {
            0
        } else {
            usize::from(*words)
        };
        kind = Some(IpNumber(*next));
        headers = headers.get(8 * (words + 1)..).unwrap_or_default();
    }
    false
}

/// The sender's timestamp.
fn stamp(tcp: &TcpSlice<'_>) -> Option<u32> {
    tcp.options_iterator().find_map(|option| match option {
        Ok(TcpOptionElement::Timestamp(stamp, _)) => Some(stamp),
        _ => None,
    })
}

/// The largest segment that the sender receives (RFC 9293, section 3.7.1).
fn mss(tcp: &TcpSlice<'_>) -> Option<u16> {
    tcp.options_iterator().find_map(|option| match option {
        Ok(TcpOptionElement::MaximumSegmentSize(mss)) => Some(mss),
        _ => None,
    })
}

/// The identifier of an ICMP query (RFC 792; RFC 4443, section 4), which conntrack takes from every
/// message.
fn icmp_identifier(bytes: &[u8]) -> u16 {
    bytes.get(4..6).map_or(0, |identifier| {
        u16::from_be_bytes([identifier[0], identifier[1]])
    })
}

/// Source and destination port of the SCTP common header (RFC 9260, section 3.1).
fn sctp_ports(bytes: &[u8]) -> Option<(u16, u16)> {
    let ports = bytes.first_chunk::<4>()?;
    Some((
        u16::from_be_bytes([ports[0], ports[1]]),
        u16::from_be_bytes([ports[2], ports[3]]),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;

    /// A TCP header without options (RFC 9293, section 3.1) from port 40000 to port 80.
    fn tcp(flags: u8) -> Vec<u8> {
        let mut header = vec![0; 20];
        header[..2].copy_from_slice(&40_000u16.to_be_bytes());
        header[2..4].copy_from_slice(&80u16.to_be_bytes());
        header[4..8].copy_from_slice(&7u32.to_be_bytes());
        header[12] = 5 << 4;
        header[13] = flags;
        header
    }

    /// An IPv4 packet (RFC 791) from 10.0.0.1 to 10.0.0.2; `fragment` is the flags-and-offset field.
    fn ipv4(protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![
            0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ];
        packet[6..8].copy_from_slice(&fragment.to_be_bytes());
        packet.extend_from_slice(payload);
        let length = u16::try_from(packet.len()).unwrap();
        packet[2..4].copy_from_slice(&length.to_be_bytes());
        packet
    }

    /// An IPv6 packet (RFC 8200) from fd00::1 to fd00::2.
    fn ipv6(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 0, next, 64];
        packet[4..6].copy_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
        for last in [1, 2] {
            packet.extend_from_slice(&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
        }
        packet.extend_from_slice(payload);
        packet
    }

    fn flow(client: &str, server: &str, protocol: Protocol) -> Packet {
        Packet::Other(FlowId {
            protocol,
            client: client.parse().unwrap(),
            server: server.parse().unwrap(),
            identifier: 0,
        })
    }

    #[test]
    fn syn_is_parsed_in_both_families() {
        for (bytes, client, server) in [
            (ipv4(6, 0, &tcp(SYN)), "10.0.0.1:40000", "10.0.0.2:80"),
            (
                ipv4(6, 0x4000, &tcp(SYN | 0xc0)),
                "10.0.0.1:40000",
                "10.0.0.2:80",
            ),
            (ipv6(6, &tcp(SYN)), "[fd00::1]:40000", "[fd00::2]:80"),
        ] {
            let syn = Syn {
                client: client.parse().unwrap(),
                server: server.parse().unwrap(),
                sequence: 7,
                stamp: None,
                inherited: Inherited::default(),
            };
            assert_eq!(Packet::parse(&bytes), Packet::Syn(syn));
        }
    }

    #[test]
    fn syn_options_and_traffic_class_are_parsed() {
        let mut segment = tcp(SYN);
        // MSS, SACK permitted, timestamps, padding: as Linux has them.
        segment.extend([
            2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 1, 2, 3, 0, 0, 0, 0, 1, 1, 1, 0,
        ]);
        segment[12] = 10 << 4;
        let Packet::Syn(syn) = Packet::parse(&ipv4(6, 0, &segment)) else {
            panic!("a SYN");
        };
        assert_eq!(syn.stamp, Some(0x0001_0203));
        assert_eq!(syn.inherited.mss, Some(1460));
        for mut bytes in [ipv4(6, 0, &segment), ipv6(6, &segment)] {
            // Class 46 (RFC 3246) and both bits of RFC 3168.
            let class: u8 = 46 << 2 | 3;
            match bytes[0] >> 4 {
                4 => bytes[1] = class,
                _ => (bytes[0], bytes[1]) = (0x60 | class >> 4, class << 4),
            }
            let Packet::Syn(syn) = Packet::parse(&bytes) else {
                panic!("a SYN");
            };
            assert_eq!(syn.inherited.dscp, 46);
        }
    }

    #[test]
    fn other_packets_are_flows_resets_or_invalid() {
        let v4 = |ports: (u16, u16), protocol| {
            flow(
                &format!("10.0.0.1:{}", ports.0),
                &format!("10.0.0.2:{}", ports.1),
                protocol,
            )
        };
        let reset = |acknowledges| {
            Packet::Reset(Reset {
                from: "10.0.0.1:40000".parse().unwrap(),
                to: "10.0.0.2:80".parse().unwrap(),
                sequence: 7,
                acknowledges,
            })
        };
        let hop_by_hop = [&[6, 0, 1, 4, 0, 0, 0, 0][..], &tcp(ACK)].concat();
        let wrapped = [&[6, 4, 0, 0][..], &[0; 20], &tcp(SYN)].concat();
        let ports = [0x9c, 0x40, 0, 53, 0, 8, 0, 0];
        for (bytes, expected, why) in [
            (
                ipv4(6, 0, &tcp(ACK)),
                v4((40_000, 80), Protocol::Tcp),
                "of a running stream",
            ),
            (
                ipv4(6, 0, &tcp(ACK | 0x01)),
                v4((40_000, 80), Protocol::Tcp),
                "its end",
            ),
            (
                ipv4(6, 0, &tcp(SYN | ACK)),
                Packet::Invalid,
                "an answer to nothing",
            ),
            (
                ipv4(6, 0, &tcp(SYN | 0x01)),
                Packet::Invalid,
                "SYN with FIN",
            ),
            (
                ipv4(6, 0, &tcp(SYN | 0x04)),
                Packet::Invalid,
                "SYN with RST",
            ),
            (ipv4(6, 0, &tcp(0x04)), reset(false), "RST"),
            (ipv4(6, 0, &tcp(0x14)), reset(true), "RST with ACK"),
            (ipv4(6, 0, &tcp(0x05)), reset(false), "RST with FIN"),
            (ipv4(6, 0, &tcp(0)), Packet::Invalid, "no flag at all"),
            (
                ipv4(6, 0, &tcp(SYN)[..12]),
                Packet::Invalid,
                "cut inside its header",
            ),
            (
                ipv4(6, 0x0003, &tcp(SYN)),
                Packet::Invalid,
                "a later fragment: no header of TCP",
            ),
            (ipv4(17, 0, &ports), v4((40_000, 53), Protocol::Udp), "UDP"),
            (
                ipv4(17, 0x0003, &ports),
                Packet::Invalid,
                "a later fragment of UDP",
            ),
            (
                ipv4(132, 0, &ports),
                v4((40_000, 53), Protocol::Sctp),
                "SCTP",
            ),
            (
                ipv4(132, 0, &ports[..3]),
                Packet::Invalid,
                "SCTP cut inside its ports",
            ),
            (
                ipv4(1, 0, &[8, 0, 0, 0]),
                v4((0, 0), Protocol::Other(1)),
                "ICMP",
            ),
            (
                ipv6(0, &hop_by_hop),
                flow("[fd00::1]:40000", "[fd00::2]:80", Protocol::Tcp),
                "behind an extension header",
            ),
            (
                ipv4(51, 0, &wrapped),
                v4((0, 0), Protocol::Other(51)),
                "a SYN in an authentication header",
            ),
            (
                ipv6(51, &wrapped),
                flow("[fd00::1]:0", "[fd00::2]:0", Protocol::Other(51)),
                "the same in IPv6",
            ),
            (
                ipv6(59, &[]),
                flow("[fd00::1]:0", "[fd00::2]:0", Protocol::Other(59)),
                "no next header",
            ),
            (vec![], Packet::Malformed, "nothing"),
            (vec![0x75; 40], Packet::Malformed, "IP version 7"),
        ] {
            assert_eq!(Packet::parse(&bytes), expected, "{why}");
        }
    }

    #[test]
    fn only_protocols_with_ports_ask_for_one() {
        for (protocol, expected) in [
            (Protocol::Udp, Some(53)),
            (Protocol::Sctp, Some(53)),
            (Protocol::Tcp, Some(53)),
            (Protocol::Other(1), None),
        ] {
            let ends = (
                "10.0.0.1:1".parse().unwrap(),
                "10.0.0.2:53".parse().unwrap(),
            );
            assert_eq!(
                FlowId {
                    protocol,
                    client: ends.0,
                    server: ends.1,
                    identifier: 0,
                }
                .port(),
                expected
            );
        }
    }

    #[test]
    fn pings_with_different_identifiers_are_separate_flows() {
        let echo = |kind: u8, identifier: u8| [kind, 0, 0, 0, 0, identifier, 0, 1];
        for identifier in [7, 8] {
            for (bytes, why) in [
                (ipv4(1, 0, &echo(8, identifier)), "ICMP"),
                (ipv6(58, &echo(128, identifier)), "ICMPv6"),
            ] {
                let Packet::Other(flow) = Packet::parse(&bytes) else {
                    panic!("{why}")
                };
                assert_eq!(flow.identifier, u16::from(identifier), "{why}");
            }
        }
    }

    #[test]
    fn link_local_source_is_never_a_flow() {
        for payload in [
            (6, tcp(SYN)),
            (6, tcp(ACK)),
            (17, vec![0; 8]),
            (58, vec![128; 8]),
        ] {
            let mut packet = ipv6(payload.0, &payload.1);
            packet[8..10].copy_from_slice(&[0xfe, 0x80]);
            assert_eq!(Packet::parse(&packet), Packet::Invalid, "{payload:?}");
        }
    }

    #[test]
    fn syn_behind_an_extension_header_is_parsed() {
        let payload = [&[6, 0, 1, 4, 0, 0, 0, 0][..], &tcp(SYN)].concat();
        assert!(matches!(Packet::parse(&ipv6(0, &payload)), Packet::Syn(_)));
    }

    #[test]
    fn damaged_packets_never_panic_the_parser() {
        for packet in [
            ipv4(6, 0, &tcp(SYN)),
            ipv6(6, &tcp(SYN)),
            ipv6(0, &[6, 0, 1, 4, 0, 0, 0, 0]),
            ipv6(
                60,
                &[&[44, 0, 1, 4, 0, 0, 0, 0][..], &[6; 8], &tcp(SYN)].concat(),
            ),
            ipv6(60, &[&[51, 0, 1, 4, 0, 0, 0, 0][..], &[6; 24]].concat()),
        ] {
            for length in 0..packet.len() {
                Packet::parse(&packet[..length]);
                for value in 0..=255 {
                    let mut bent = packet.clone();
                    bent[length] = value;
                    Packet::parse(&bent);
                }
            }
        }
    }
}
