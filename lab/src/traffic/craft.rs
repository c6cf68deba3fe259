//! Packets crafted byte by byte, which no socket sends.
//!
//! Pure: values in, bytes out, from the IP header on. Lengths and checksums are right; a test that
//! needs wrong ones changes the bytes.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// TCP flags (RFC 9293, 3.1), to be or'ed.
pub const FIN: u8 = 0x01;
/// See [`FIN`].
pub const SYN: u8 = 0x02;
/// See [`FIN`].
pub const RST: u8 = 0x04;
/// See [`FIN`].
pub const PSH: u8 = 0x08;
/// See [`FIN`].
pub const ACK: u8 = 0x10;
/// See [`FIN`].
pub const URG: u8 = 0x20;

/// SCTP chunk types (RFC 9260, 3.2).
pub const SCTP_INIT: u8 = 1;
/// See [`SCTP_INIT`].
pub const SCTP_INIT_ACK: u8 = 2;

const HOP_LIMIT: u8 = 64;
const FRAGMENT: u8 = 44;
const ICMPV6: u8 = 58;

/// Puts an IP header before `payload` (RFC 791, RFC 8200), of the family of the addresses.
///
/// # Panics
/// If the addresses are of two families, or the payload is too long.
#[must_use]
pub fn ip(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    ip_with_options(from, to, &[], protocol, payload)
}

/// As [`ip`], with IPv4 options, a multiple of 4 bytes. IPv6 has none: there it panics.
///
/// # Panics
/// As [`ip`].
#[must_use]
pub fn ip_with_options(
    from: IpAddr,
    to: IpAddr,
    options: &[u8],
    protocol: u8,
    payload: &[u8],
) -> Vec<u8> {
    let mut packet = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let words = u8::try_from(5 + options.len() / 4).unwrap_or(0xf);
            let total = length(usize::from(words) * 4 + payload.len());
            let mut header = vec![0x40 | words, 0, total[0], total[1], 0, 0, 0, 0];
            header.extend([HOP_LIMIT, protocol, 0, 0]);
            header.extend(from.octets());
            header.extend(to.octets());
            header.extend(options);
            header
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            assert!(options.is_empty(), "IPv6 has extension headers instead");
            let [high, low] = length(payload.len());
            let mut header = vec![0x60, 0, 0, 0, high, low, protocol, HOP_LIMIT];
            header.extend(from.octets());
            header.extend(to.octets());
            header
        }
        _ => panic!("{from} and {to} are of two families"),
    };
    seal(&mut packet);
    packet.extend(payload);
    packet
}

/// Marks a packet with the low bits of a number: 16 bits of identification or 20 of flow label,
/// which a [`Capture`](super::Capture) tells.
#[must_use]
pub fn numbered(mut packet: Vec<u8>, number: u32) -> Vec<u8> {
    let [_, high, middle, low] = number.to_be_bytes();
    if packet[0] >> 4 == 4 {
        packet[4..6].copy_from_slice(&[middle, low]);
    } else {
        packet[1..4].copy_from_slice(&[high & 0xf, middle, low]);
    }
    seal(&mut packet);
    packet
}

/// Gives a packet another hop limit or time to live.
#[must_use]
pub fn with_hop_limit(mut packet: Vec<u8>, hops: u8) -> Vec<u8> {
    let at = if packet[0] >> 4 == 4 { 8 } else { 7 };
    packet[at] = hops;
    seal(&mut packet);
    packet
}

/// A TCP segment without options: header, then `data`.
#[must_use]
pub fn tcp(from: SocketAddr, to: SocketAddr, flags: u8, sequence: u32, data: &[u8]) -> Vec<u8> {
    let mut segment = ports(from, to);
    segment.extend(sequence.to_be_bytes());
    segment.extend([0, 0, 0, 0, 5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(data);
    finish(from.ip(), to.ip(), 6, segment, 16)
}

/// A UDP datagram.
#[must_use]
pub fn udp(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Vec<u8> {
    let mut datagram = ports(from, to);
    datagram.extend(length(8 + data.len()));
    datagram.extend([0, 0]);
    datagram.extend(data);
    finish(from.ip(), to.ip(), 17, datagram, 6)
}

/// An SCTP packet with one INIT or INIT ACK chunk (RFC 9260, 3.3.2); an INIT has tag 0.
#[must_use]
pub fn sctp(from: SocketAddr, to: SocketAddr, tag: u32, chunk: u8) -> Vec<u8> {
    // Without a state cookie it is no INIT ACK.
    let cookie: &[u8] = if chunk == SCTP_INIT_ACK { &[1; 4] } else { &[] };
    let packet = sctp_chunk(from.port(), to.port(), tag, chunk, cookie);
    ip(from.ip(), to.ip(), 132, &packet)
}

/// The same without an IP header. A `cookie` that is not empty is its state cookie (RFC 9260, 3.3.3.1).
#[must_use]
pub fn sctp_chunk(from: u16, to: u16, tag: u32, chunk: u8, cookie: &[u8]) -> Vec<u8> {
    // Initiate tag, receiver window, outbound and inbound streams, initial TSN.
    let mut value = vec![0, 0, 0, 7, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1];
    if !cookie.is_empty() {
        value.extend([0, 7]);
        value.extend(length(4 + cookie.len()));
        value.extend(cookie);
    }
    let mut packet = [from.to_be_bytes(), to.to_be_bytes()].concat();
    packet.extend(tag.to_be_bytes());
    packet.extend([0; 4]);
    packet.extend([chunk, 0]);
    packet.extend(length(4 + value.len()));
    packet.extend(value);
    // A packet is a multiple of 4 bytes; what fills it up counts in no length.
    packet.resize(packet.len().next_multiple_of(4), 0);
    let sum = crc32c(&packet);
    packet[8..12].copy_from_slice(&sum.to_le_bytes());
    packet
}

/// An ICMP or ICMPv6 message, after the family: `rest` follows the checksum (RFC 792, RFC 4443).
#[must_use]
pub fn icmp(from: IpAddr, to: IpAddr, kind: u8, code: u8, rest: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, code, 0, 0];
    message.extend(rest);
    match from {
        IpAddr::V4(_) => {
            let sum = checksum(&message);
            message[2..4].copy_from_slice(&sum);
            ip(from, to, 1, &message)
        }
        IpAddr::V6(_) => finish(from, to, ICMPV6, message, 2),
    }
}

/// An ARP packet for Ethernet and IPv4 (RFC 826), to be sent by
/// [`Injector::send_frame`](super::Injector::send_frame): whose address is where, said to all.
#[must_use]
pub fn arp(operation: u16, sender: (Ipv4Addr, [u8; 6]), target: (Ipv4Addr, [u8; 6])) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4];
    packet.extend(operation.to_be_bytes());
    for (ip, link) in [sender, target] {
        packet.extend(link);
        packet.extend(ip.octets());
    }
    packet
}

/// Cuts a packet without IPv4 options or extension headers into fragments: `pieces` are where
/// each begins and ends in its payload; they begin at multiples of 8 and may overlap.
#[must_use]
pub fn fragment(packet: &[u8], pieces: &[(usize, usize)]) -> Vec<Vec<u8>> {
    let v4 = packet[0] >> 4 == 4;
    let (header, payload) = packet.split_at(if v4 { 20 } else { 40 });
    let cut = |&(start, end): &(usize, usize)| {
        let end = end.min(payload.len());
        let more = end < payload.len();
        let offset = u16::try_from(start).unwrap_or(u16::MAX);
        let mut out = header.to_vec();
        if v4 {
            out[6..8].copy_from_slice(&((offset / 8) | (u16::from(more) << 13)).to_be_bytes());
            out[2..4].copy_from_slice(&length(20 + end - start));
        } else {
            out[4..6].copy_from_slice(&length(8 + end - start));
            out[6] = FRAGMENT;
            out.extend([header[6], 0]);
            out.extend((offset | u16::from(more)).to_be_bytes());
            out.extend([0, 0, 0, 9]);
        }
        seal(&mut out);
        out.extend(&payload[start..end]);
        out
    };
    pieces.iter().map(cut).collect()
}

fn ports(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    [from.port().to_be_bytes(), to.port().to_be_bytes()].concat()
}

fn length(bytes: usize) -> [u8; 2] {
    match u16::try_from(bytes) {
        Ok(bytes) => bytes.to_be_bytes(),
        Err(_) => panic!("{bytes} bytes are too many for a packet"),
    }
}

/// Writes the checksum at `at`, which covers a pseudo-header too, and puts the IP header before it.
fn finish(from: IpAddr, to: IpAddr, protocol: u8, mut payload: Vec<u8>, at: usize) -> Vec<u8> {
    let mut covered = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
        (IpAddr::V6(from), IpAddr::V6(to)) => [from.octets(), to.octets()].concat(),
        _ => panic!("{from} and {to} are of two families"),
    };
    covered.extend(length(payload.len()));
    covered.extend([0, protocol]);
    covered.extend(&payload);
    let sum = checksum(&covered);
    payload[at..at + 2].copy_from_slice(&sum);
    ip(from, to, protocol, &payload)
}

/// Recomputes the header's checksum, if it has one.
fn seal(packet: &mut [u8]) {
    if packet[0] >> 4 == 4 {
        let header = usize::from(packet[0] & 0xf) * 4;
        packet[10..12].copy_from_slice(&[0, 0]);
        let sum = checksum(&packet[..header]);
        packet[10..12].copy_from_slice(&sum);
    }
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let [_, _, high, low] = (!sum).to_be_bytes();
    [high, low]
}

/// SCTP's checksum (RFC 9260, appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
    !bytes
        .iter()
        .fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(v6: bool) -> (SocketAddr, SocketAddr) {
        let texts = if v6 {
            ["[fd00::1]:1000", "[fd00::2]:80"]
        } else {
            ["10.0.0.1:1000", "10.0.0.2:80"]
        };
        let [from, to] = texts.map(|text| text.parse().unwrap());
        (from, to)
    }

    #[test]
    fn checksums_match_the_rfcs() {
        assert_eq!(
            checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]),
            [0x22, 0x0d],
            "RFC 1071, 3"
        );
        assert_eq!(crc32c(b"123456789"), 0xe306_9283, "the usual check value");
    }

    #[test]
    fn header_checksum_stays_valid_after_later_changes() {
        let (from, to) = ends(false);
        let packet = with_hop_limit(numbered(tcp(from, to, SYN, 7, b"data"), 0x1234), 3);
        assert_eq!(checksum(&packet[..20]), [0, 0]);
        assert_eq!(packet.len(), 44);
        assert_eq!(packet[4..6], [0x12, 0x34]);
        assert_eq!(packet[8], 3);
    }

    #[test]
    fn fragments_hold_the_payload_once() {
        for v6 in [false, true] {
            let (from, to) = ends(v6);
            let whole = udp(from, to, &[7; 92]);
            let pieces = fragment(&whole, &[(0, 48), (48, 100)]);
            let header = if v6 { 48 } else { 20 };
            let payload = [&pieces[0][header..], &pieces[1][header..]].concat();
            assert_eq!(payload, whole[if v6 { 40 } else { 20 }..]);
            let offset = |piece: &[u8]| {
                let at = if v6 { 42 } else { 6 };
                u16::from_be_bytes([piece[at], piece[at + 1]])
            };
            let expected = if v6 { (1, 48) } else { (0x2000, 6) };
            assert_eq!((offset(&pieces[0]), offset(&pieces[1])), expected);
        }
    }
}
