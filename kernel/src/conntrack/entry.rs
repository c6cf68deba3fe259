//! A conntrack entry, parsed from a ctnetlink message.
//!
//! The bytes that identify an entry are sent back unchanged, so a flow in a zone is
//! identified with its zone.
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use crate::netlink::{Attributes, Message, chunk, find};
use policy::Protocol;

pub(super) const CTA_TUPLE_ORIG: u16 = 1;
pub(super) const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
/// `IPS_SEEN_REPLY` (linux/netfilter/nf_conntrack_common.h).
const SEEN_REPLY: u32 = 1 << 1;
pub(super) const CTA_PROTOINFO: u16 = 4;
pub(super) const CTA_PROTOINFO_TCP: u16 = 1;
pub(super) const CTA_PROTOINFO_TCP_STATE: u16 = 1;
/// `TCP_CONNTRACK_TIME_WAIT` (linux/netfilter/nf_conntrack_tcp.h).
pub(super) const TCP_TIME_WAIT: u8 = 7;
/// `TCP_CONNTRACK_CLOSE`.
pub(super) const TCP_CLOSE: u8 = 8;
const CTA_COUNTERS_ORIG: u16 = 9;
const CTA_COUNTERS_REPLY: u16 = 10;
const CTA_COUNTERS_BYTES: u16 = 2;
const CTA_MARK: u16 = 8;
pub(super) const CTA_ID: u16 = 12;
/// Bytes of that attribute, with its header.
const ID_LENGTH: usize = 8;
const CTA_ZONE: u16 = 18;
const CTA_TIMESTAMP: u16 = 20;
const CTA_TIMESTAMP_START: u16 = 1;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_ICMP_ID: u16 = 4;
const CTA_PROTO_ICMPV6_ID: u16 = 7;

/// Identifies a kernel flow. Ports are 0 where the protocol has
/// none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowId {
    /// That of the packets, above IP.
    pub protocol: Protocol,
    /// The source of the flow's first packet.
    pub client: SocketAddr,
    /// The source of the answers, so the server behind DNAT.
    pub server: SocketAddr,
    /// Of an ICMP query (RFC 792, RFC 4443) its identifier; else 0.
    pub identifier: u16,
}

impl FlowId {
    /// The flow in the opposite direction.
    #[must_use]
    pub fn reversed(self) -> Self {
        Self {
            client: self.server,
            server: self.client,
            ..self
        }
    }

    /// The destination port for policy; protocols without ports have none.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        (!matches!(self.protocol, Protocol::Other(_))).then_some(self.server.port())
    }
}

/// A kernel flow, as conntrack has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its ends and its protocol.
    pub flow: FlowId,
    /// Bytes of the client's IP packets, headers included; 0 unless
    /// `net.netfilter.nf_conntrack_acct` was 1 when the flow began.
    pub sent: u64,
    /// Bytes of the server's.
    pub received: u64,
    /// When it began, if `net.netfilter.nf_conntrack_timestamp` was 1 then.
    pub began: Option<SystemTime>,
    /// A closed TCP connection, whose entry waits for its timeout.
    pub over: bool,
    /// A TCP connection that was reset. Conntrack can let a new SYN between its ends pass as part of it (linux
    /// net/netfilter/nf_conntrack_proto_tcp.c).
    pub reset: bool,
    /// It has no reply yet; another node may have denied it.
    pub unanswered: bool,
    /// Its mark (`CTA_MARK`), including the bits of other programs.
    mark: u32,
    /// `CTA_TUPLE_ORIG`, `CTA_ZONE` if there is one, `CTA_ID`: as the kernel wrote them.
    name: Vec<u8>,
}

impl Entry {
    /// The entry that a message shows; `None` if it cannot be read.
    pub fn read(message: &Message<'_>) -> Option<Self> {
        let attributes = message.attributes();
        let original = find(attributes, CTA_TUPLE_ORIG)?;
        let (protocol, client, identifier) = source(original.value)?;
        let (_, server, _) = source(find(attributes, CTA_TUPLE_REPLY)?.value)?;
        let zone = find(attributes, CTA_ZONE).map_or(&[][..], |zone| zone.whole);
        let id = find(attributes, CTA_ID)?.whole;
        Some(Self {
            flow: FlowId {
                protocol,
                client,
                server,
                identifier,
            },
            sent: bytes(attributes, CTA_COUNTERS_ORIG).unwrap_or(0),
            received: bytes(attributes, CTA_COUNTERS_REPLY).unwrap_or(0),
            began: began(attributes),
            over: matches!(tcp_state(attributes), Some(TCP_TIME_WAIT | TCP_CLOSE)),
            reset: tcp_state(attributes) == Some(TCP_CLOSE),
            unanswered: status(attributes).is_some_and(|status| status & SEEN_REPLY == 0),
            mark: find(attributes, CTA_MARK)
                .and_then(|mark| chunk(mark.value, 0))
                .map_or(0, u32::from_be_bytes),
            name: [original.whole, zone, id].concat(),
        })
    }

    /// Whether `now` is the same entry with the same mark.
    pub(super) fn has_mark_of(&self, now: &Self) -> bool {
        self.mark == now.mark && self.is_same(now)
    }

    /// Whether `now` is the same entry.
    pub(super) fn is_same(&self, now: &Self) -> bool {
        self.name == now.name
    }

    /// The attributes by which a request names it.
    pub(super) fn name(&self) -> &[u8] {
        &self.name
    }

    /// The same without its id.
    pub(super) fn without_id(&self) -> &[u8] {
        let id = self.name.len().saturating_sub(ID_LENGTH);
        self.name.get(..id).unwrap_or_default()
    }
}

/// Writes the source address of a tuple.
pub(super) fn write_source(tuple: &mut Attributes<'_>, address: IpAddr) {
    tuple.nested(CTA_TUPLE_IP, |ip| match address {
        IpAddr::V4(v4) => ip.bytes(CTA_IP_V4_SRC, &v4.octets()),
        IpAddr::V6(v6) => ip.bytes(CTA_IP_V6_SRC, &v6.octets()),
    });
}

/// The bits of `enum ip_conntrack_status`.
fn status(attributes: &[u8]) -> Option<u32> {
    chunk(find(attributes, CTA_STATUS)?.value, 0).map(u32::from_be_bytes)
}

/// The state of a TCP entry (linux/netfilter/nf_conntrack_tcp.h).
fn tcp_state(attributes: &[u8]) -> Option<u8> {
    let tcp = find(find(attributes, CTA_PROTOINFO)?.value, CTA_PROTOINFO_TCP)?.value;
    let [state] = chunk(find(tcp, CTA_PROTOINFO_TCP_STATE)?.value, 0)?;
    Some(state)
}

/// The bytes of one direction.
fn bytes(attributes: &[u8], direction: u16) -> Option<u64> {
    let counters = find(attributes, direction)?.value;
    let bytes = find(counters, CTA_COUNTERS_BYTES)?.value;
    Some(u64::from_be_bytes(chunk(bytes, 0)?))
}

/// When the entry was made; the kernel counts nanoseconds since 1970.
fn began(attributes: &[u8]) -> Option<SystemTime> {
    let start = find(find(attributes, CTA_TIMESTAMP)?.value, CTA_TIMESTAMP_START)?.value;
    let since = Duration::from_nanos(u64::from_be_bytes(chunk(start, 0)?));
    SystemTime::UNIX_EPOCH.checked_add(since)
}

/// The protocol of a tuple, the end that it begins at, and its ICMP identifier.
fn source(tuple: &[u8]) -> Option<(Protocol, SocketAddr, u16)> {
    let ip = find(tuple, CTA_TUPLE_IP)?.value;
    let address: IpAddr = match find(ip, CTA_IP_V4_SRC) {
        Some(v4) => chunk::<4>(v4.value, 0)?.into(),
        None => chunk::<16>(find(ip, CTA_IP_V6_SRC)?.value, 0)?.into(),
    };
    let transport = find(tuple, CTA_TUPLE_PROTO)?.value;
    let [number] = chunk(find(transport, CTA_PROTO_NUM)?.value, 0)?;
    let protocol = Protocol::from_ip_number(number);
    let value = |kind| Some(u16::from_be_bytes(chunk(find(transport, kind)?.value, 0)?));
    let port = match protocol {
        Protocol::Tcp | Protocol::Udp | Protocol::Sctp => value(CTA_PROTO_SRC_PORT)?,
        // GRE has its key where others have a port.
        Protocol::Other(_) => 0,
    };
    let identifier = value(CTA_PROTO_ICMP_ID).or_else(|| value(CTA_PROTO_ICMPV6_ID));
    Some((
        protocol,
        SocketAddr::new(address, port),
        identifier.unwrap_or(0),
    ))
}
