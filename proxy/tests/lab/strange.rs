//! All kinds of unusual packets, each with a name.
//!
//! Pure: addresses in, packets out. Knows nothing of what becomes of them.
mod headers;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lab::traffic::craft;
use lab::traffic::craft::{ACK, FIN, RST, SYN};

use headers::{extensions, options};

/// What is sent under one name.
pub(crate) struct Case {
    pub(crate) what: String,
    pub(crate) packets: Vec<Vec<u8>>,
    /// Of the frame, if it is not that of the packet.
    pub(crate) ethertype: Option<u16>,
}

/// The hosts' addresses, in one family.
pub(crate) struct Neighbourhood {
    pub(crate) from: IpAddr,
    pub(crate) to: IpAddr,
    /// Whose flow with `to` is allowed.
    pub(crate) friend: IpAddr,
    pub(crate) own_node: IpAddr,
    pub(crate) pods: [IpAddr; 3],
    pub(crate) nodes: [IpAddr; 2],
    pub(crate) service: IpAddr,
}

const ICMP: u8 = 1;
const UDP: u8 = 17;
const TCP: u8 = 6;

/// All of them, from `from` to `to` unless the name says otherwise.
pub(crate) fn cases(at: &Neighbourhood) -> Vec<Case> {
    let mut all = Vec::new();
    protocols(at, &mut all);
    tcp(at, &mut all);
    messages(at, &mut all);
    errors(at, &mut all);
    fragments(at, &mut all);
    tunnels(at, &mut all);
    damaged(at, &mut all);
    destinations(at, &mut all);
    spoofed(at, &mut all);
    frames(at, &mut all);
    if at.from.is_ipv4() {
        options(at, &mut all);
    } else {
        extensions(at, &mut all);
    }
    let family = if at.from.is_ipv4() { "IPv4" } else { "IPv6" };
    for case in &mut all {
        case.what = format!("{family}, {}", case.what);
    }
    all
}

fn add(all: &mut Vec<Case>, what: impl Into<String>, packet: Vec<u8>) {
    all.push(Case {
        what: what.into(),
        packets: vec![packet],
        ethertype: None,
    });
}

impl Neighbourhood {
    fn ends(&self) -> (SocketAddr, SocketAddr) {
        ((self.from, 40_000).into(), (self.to, 80).into())
    }

    fn syn(&self) -> Vec<u8> {
        let (from, to) = self.ends();
        craft::tcp(from, to, SYN, 1, &[])
    }

    fn udp(&self) -> Vec<u8> {
        let (from, to) = self.ends();
        craft::udp(from, to, b"data")
    }

    /// What follows the IP header of a SYN, of a stray segment and of a datagram, with its protocol.
    fn payloads(&self) -> [(&'static str, u8, Vec<u8>); 3] {
        let (from, to) = self.ends();
        let header = if self.from.is_ipv4() { 20 } else { 40 };
        let cut = |packet: Vec<u8>| packet[header..].to_vec();
        [
            ("SYN", TCP, cut(self.syn())),
            ("ACK", TCP, cut(craft::tcp(from, to, ACK, 1, b"x"))),
            ("UDP", UDP, cut(self.udp())),
        ]
    }
}

fn protocols(at: &Neighbourhood, all: &mut Vec<Case>) {
    // Begins like ports 40000 and 80.
    let payload = [&[0x9c, 0x40, 0, 80][..], &[0; 36]].concat();
    for protocol in 0..=u8::MAX {
        let packet = |payload| craft::ip(at.from, at.to, protocol, payload);
        add(all, format!("protocol {protocol}"), packet(&payload));
        add(all, format!("protocol {protocol}, empty"), packet(&[]));
    }
}

fn tcp(at: &Neighbourhood, all: &mut Vec<Case>) {
    let (from, to) = at.ends();
    for flags in 0..=u8::MAX {
        for data in [&b""[..], b"data"] {
            add(
                all,
                format!("TCP flags {flags:#04x} and {} bytes", data.len()),
                craft::tcp(from, to, flags, 1, data),
            );
        }
    }
    for cut in 1..20 {
        let packet = at.syn();
        let header = packet.len() - 20;
        let short = craft::ip(at.from, at.to, TCP, &packet[header..header + cut]);
        add(all, format!("TCP of {cut} bytes"), short);
    }
}

fn messages(at: &Neighbourhood, all: &mut Vec<Case>) {
    for kind in 0..=u8::MAX {
        for code in [0, 1, 4] {
            for hops in [1, 2, 64, 255] {
                let packet = craft::icmp(at.from, at.to, kind, code, &[0; 28]);
                let what = format!("ICMP type {kind}, code {code}, hop limit {hops}");
                add(all, what, craft::with_hop_limit(packet, hops));
            }
        }
    }
}

/// ICMP errors about packets that were never sent, and about another pod's flow.
fn errors(at: &Neighbourhood, all: &mut Vec<Case>) {
    let kinds: &[(u8, u8)] = if at.from.is_ipv4() {
        &[(3, 1), (3, 3), (3, 4), (4, 0), (5, 1), (11, 0), (12, 0)]
    } else {
        &[(1, 0), (1, 4), (2, 0), (3, 0), (4, 0), (137, 0)]
    };
    let quoted = [
        ("nobody's packet", at.from, 12_345),
        ("a friend's answer", at.friend, 9_999),
        ("a friend's packet", at.friend, 9_998),
    ];
    for &(kind, code) in kinds {
        for (whose, peer, port) in quoted {
            let (target, peer) = ((at.to, port).into(), (peer, 9_999).into());
            let inner = craft::udp(target, peer, b"data");
            let rest = [&[0, 0, 5, 0][..], &inner].concat();
            let what = format!("ICMP error {kind}/{code} that quotes {whose}");
            add(all, what, craft::icmp(at.from, at.to, kind, code, &rest));
        }
    }
}

fn fragments(at: &Neighbourhood, all: &mut Vec<Case>) {
    let (from, to) = at.ends();
    let packets = [
        ("SYN", craft::tcp(from, to, SYN, 1, &[0; 60])),
        ("UDP", craft::udp(from, to, &[0; 72])),
        ("ESP", craft::ip(at.from, at.to, 50, &[0; 80])),
    ];
    let cuts: [(&str, &[(usize, usize)]); 8] = [
        ("two fragments", &[(0, 40), (40, 80)]),
        ("tiny fragments", &[(0, 8), (8, 16), (16, 80)]),
        ("fragments in reverse", &[(40, 80), (0, 40)]),
        ("overlapping fragments", &[(0, 48), (24, 80)]),
        ("fragments that overwrite the header", &[(0, 40), (8, 80)]),
        ("a first fragment alone", &[(0, 40)]),
        ("a later fragment alone", &[(40, 80)]),
        ("the same fragment twice", &[(0, 40), (0, 40), (40, 80)]),
    ];
    for (what, packet) in &packets {
        for (how, pieces) in cuts {
            all.push(Case {
                what: format!("{what} in {how}"),
                packets: craft::fragment(packet, pieces),
                ethertype: None,
            });
        }
    }
}

/// IP in IP, GRE and VXLAN around a packet of an allowed pod.
fn tunnels(at: &Neighbourhood, all: &mut Vec<Case>) {
    let (friend, target) = ((at.friend, 40_000).into(), (at.to, 80).into());
    let inner = craft::udp(friend, target, b"data");
    let (kind, number): ([u8; 2], u8) = if at.from.is_ipv4() {
        ([0x08, 0x00], 4)
    } else {
        ([0x86, 0xdd], 41)
    };
    let ethernet = [&[0xee; 12][..], &kind, &inner].concat();
    let gre = [&[0, 0][..], &kind, &inner].concat();
    let vxlan = [&[8, 0, 0, 0, 0, 0, 1, 0][..], &ethernet].concat();
    for (whither, to) in [("the target", at.to), ("the own node", at.own_node)] {
        for protocol in [4, 41, number] {
            let packet = craft::ip(at.from, to, protocol, &inner);
            add(
                all,
                format!("IP in protocol {protocol} to {whither}"),
                packet,
            );
        }
        add(
            all,
            format!("GRE to {whither}"),
            craft::ip(at.from, to, 47, &gre),
        );
        for port in [4789, 8472] {
            let packet = craft::udp((at.from, 40_000).into(), (to, port).into(), &vxlan);
            add(all, format!("VXLAN on {port} to {whither}"), packet);
        }
    }
}

fn damaged(at: &Neighbourhood, all: &mut Vec<Case>) {
    let header = if at.from.is_ipv4() { 20 } else { 40 };
    let mut bend = |what: &str, packet: &[u8], at: usize, to: &[u8]| {
        let mut packet = packet.to_vec();
        packet[at..at + to.len()].copy_from_slice(to);
        add(all, what, packet);
    };
    bend("SYN with a wrong checksum", &at.syn(), header + 16, &[1, 2]);
    bend("UDP with a wrong checksum", &at.udp(), header + 6, &[1, 2]);
    bend("UDP without a checksum", &at.udp(), header + 6, &[0, 0]);
    for length in [0u8, 7, 200] {
        let what = format!("UDP that claims {length} bytes");
        bend(&what, &at.udp(), header + 4, &[0, length]);
    }
    for words in [0, 4, 15] {
        let what = format!("SYN with a header of {words} words");
        bend(&what, &at.syn(), header + 12, &[words << 4]);
    }
    bend("ports 0", &at.udp(), header, &[0, 0, 0, 0]);
    // Sealed after this, so only a receiver that looks at the length can tell.
    let length = if at.from.is_ipv4() { 2 } else { 4 };
    bend(
        "IP that claims more than there is",
        &at.udp(),
        length,
        &[4, 0],
    );
    bend(
        "IP that claims less than there is",
        &at.udp(),
        length,
        &[0, 24],
    );
    let long = [at.udp(), vec![0; 64]].concat();
    bend("a trailer behind the packet", &long, 1, &[0]);
    for hops in [0, 1, 2, 255] {
        let packet = craft::with_hop_limit(at.udp(), hops);
        add(all, format!("UDP with hop limit {hops}"), packet);
    }
}

fn destinations(at: &Neighbourhood, all: &mut Vec<Case>) {
    let groups: &[&str] = if at.from.is_ipv4() {
        &[
            "224.0.0.1",
            "224.0.0.251",
            "239.1.1.1",
            "255.255.255.255",
            "10.244.0.255",
            "0.0.0.0",
            "127.0.0.1",
        ]
    } else {
        &[
            "ff02::1",
            "ff02::fb",
            "ff05::1",
            "ff0e::1",
            "ff01::1",
            "::",
            "::1",
            "::ffff:10.244.0.3",
            "64:ff9b::10.244.0.3",
        ]
    };
    for group in groups {
        let to: IpAddr = group.parse().unwrap();
        let (from, to) = ((at.from, 40_000).into(), (to, 80).into());
        add(
            all,
            format!("UDP to {group}"),
            craft::udp(from, to, b"data"),
        );
        add(
            all,
            format!("SYN to {group}"),
            craft::tcp(from, to, SYN, 1, &[]),
        );
    }
}

fn spoofed(at: &Neighbourhood, all: &mut Vec<Case>) {
    let mut sources = vec![
        ("the target", at.to),
        ("a friend", at.friend),
        ("the own node", at.nodes[0]),
        ("another node", at.nodes[1]),
        ("a Service", at.service),
    ];
    sources.extend(at.pods.map(|pod| ("another pod", pod)));
    let strangers: &[IpAddr] = if at.from.is_ipv4() {
        &[
            IpAddr::V4(Ipv4Addr::new(1, 2, 3, 4)),
            IpAddr::V4(Ipv4Addr::new(10, 244, 0, 200)),
            IpAddr::V4(Ipv4Addr::new(10, 244, 1, 200)),
            IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1)),
            IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V4(Ipv4Addr::BROADCAST),
            IpAddr::V4(Ipv4Addr::new(224, 0, 0, 1)),
        ]
    } else {
        &[
            IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
            IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0xc8)),
            IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, 0xc8)),
            IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0x0af4, 2)),
            IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1)),
            IpAddr::V6(Ipv6Addr::LOCALHOST),
            IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            IpAddr::V6(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1)),
        ]
    };
    sources.extend(strangers.iter().map(|address| ("a stranger", *address)));
    for (who, source) in sources.into_iter().filter(|(_, source)| *source != at.from) {
        let (from, to) = ((source, 40_000).into(), (at.to, 80).into());
        let mut forged = |what: &str, packet| {
            add(
                all,
                format!("{what} in the name of {who}, {source}"),
                packet,
            );
        };
        forged("SYN", craft::tcp(from, to, SYN, 1, &[]));
        forged("ACK", craft::tcp(from, to, ACK, 1, b"data"));
        forged("RST", craft::tcp(from, to, RST, 1, &[]));
        forged("FIN", craft::tcp(from, to, FIN | ACK, 1, &[]));
        forged("UDP", craft::udp(from, to, b"data"));
        let echo = if at.from.is_ipv4() { 8 } else { 128 };
        forged(
            "echo request",
            craft::icmp(source, at.to, echo, 0, &[0, 1, 0, 1]),
        );
        // As an answer in the flow that the friend has with the target.
        let of_the_flow = ((source, 9_999).into(), (at.to, 9_998).into());
        forged(
            "UDP of a flow",
            craft::udp(of_the_flow.0, of_the_flow.1, b"data"),
        );
    }
}

/// Frames that are not what they hold, or not IP.
fn frames(at: &Neighbourhood, all: &mut Vec<Case>) {
    let packet = at.udp();
    let (own, other) = if at.from.is_ipv4() {
        (0x0800u16, 0x86dd)
    } else {
        (0x86dd, 0x0800)
    };
    let tagged = [&[0, 1][..], &own.to_be_bytes(), &packet].concat();
    let pppoe = [&[0x11, 0, 0, 1, 0, 40, 0, 0x21][..], &packet].concat();
    for (what, kind, payload) in [
        ("the other family's EtherType", other, packet.clone()),
        ("VLAN", 0x8100, tagged.clone()),
        ("QinQ", 0x88a8, tagged),
        ("MPLS", 0x8847, [&[0, 0, 1, 64][..], &packet].concat()),
        ("PPPoE", 0x8864, pppoe),
        ("RARP", 0x8035, vec![0; 28]),
        ("LLDP", 0x88cc, vec![0; 46]),
        ("802.3 length", 46, vec![0; 46]),
    ] {
        all.push(Case {
            what: format!("{what} on the wire"),
            packets: vec![payload],
            ethertype: Some(kind),
        });
    }
}
