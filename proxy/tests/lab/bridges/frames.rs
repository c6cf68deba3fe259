//! Frames that a pod writes by hand: none passes its bridge, none takes another's address.
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use lab::traffic::{UdpOutcome, craft};
use lab::{Host, RpFilter, wait_until};
use testbed::runner::Test;
use testbed::{
    DEADLINE, SOON, TestCluster, counter, counter_of, deny_egress, greeted, init, metric, small,
};

use super::{BRIDGE, MAGIC, Tap, frames, gateway, lies, link_address, link_of, listed, neighbour};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    isolated_pod_sends_no_frame_past_its_bridge,
    pod_cannot_take_another_pods_bridge_address,
    vlan_tagged_frame_cannot_spoof_another_pod,
    reserved_group_mac_frame_reaches_no_node_socket,
];

const EVERYBODY: [u8; 6] = [0xff; 6];

const ALL_NODES: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

/// By unicast, broadcast, multicast and the groups that bridges keep, to the pod's own and to link-local addresses, every protocol
/// number, other EtherTypes, and a VLAN tag before all.
fn isolated_pod_sends_no_frame_past_its_bridge() {
    let mut bed = TestCluster::bare(small().gateway(BRIDGE));
    bed.enforce(&[]);
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"));
    for to in b.addrs(80) {
        greeted(&a, to);
    }
    let (node, port) = (bed.lab.node(0), link_address(&b));
    let tap = Tap::new(&b);
    let shout = |to: [u8; 6]| {
        let group: IpAddr = Ipv4Addr::new(224, 0, 0, 99).into();
        let packet = craft::udp((a.ipv4(), 9).into(), (group, 9).into(), MAGIC);
        a.injector().unwrap().towards(to).send(&packet).unwrap();
    };
    shout(EVERYBODY);
    wait_until(DEADLINE, "a broadcast among non-isolated pods", || {
        tap.heard() == 1
    })
    .unwrap();

    bed.apply(&[deny_egress("a")]);
    let dropped = || counter_of(&node, "bridge", "bridge_drop");
    let before = dropped();
    let frames = frames(&a, &b);
    for to in [port, EVERYBODY, ALL_NODES] {
        let link = a.injector().unwrap().towards(to);
        for (kind, payload) in &frames {
            link.send_frame(*kind, payload).unwrap();
            let tagged = [&[0, 7][..], &kind.to_be_bytes(), payload].concat();
            link.send_frame(0x8100, &tagged).unwrap();
        }
    }
    for group in kept_by_bridges() {
        let link = a.injector().unwrap().towards(group);
        for (kind, payload) in &frames[..4] {
            link.send_frame(*kind, payload).unwrap();
        }
    }
    shout(EVERYBODY);
    wait_until(DEADLINE, "all frames to be looked at", || {
        dropped() > before + 1000
    })
    .unwrap();
    bed.apply(&[]);
    // What comes after them shows that they have all been seen.
    let marked = tap.heard();
    wait_until(DEADLINE, "a broadcast among non-isolated pods", || {
        shout(EVERYBODY);
        tap.heard() > marked
    })
    .unwrap();
    assert_eq!(marked, 1, "of {} frames in six ways", frames.len());
}

/// By ARP, neighbour discovery, IP and MAC address; the victim keeps its traffic.
fn pod_cannot_take_another_pods_bridge_address() {
    let mut bed = TestCluster::bare(small().gateway(BRIDGE));
    bed.enforce(&[]);
    let [liar, hearer, victim] = ["x/a", "x/b", "x/d"].map(|name| bed.lab.pod(name));
    let node = bed.lab.node(0);
    for to in hearer.addrs(80).into_iter().chain(victim.addrs(80)) {
        greeted(&liar, to);
    }
    let known = ["ip_ports4", "ip_ports6"].map(|set| (set, victim.addresses()));
    for (set, [v4, v6]) in known {
        let address = if set == "ip_ports4" { v4 } else { v6 }.to_string();
        wait_until(DEADLINE, "the victim's address to be known", || {
            listed(&node, set).contains(&address)
        })
        .unwrap();
    }
    let lies = lies(&liar, &victim, &gateway(&liar));
    let spoofed = || counter_of(&node, "bridge", "spoofed");
    let tap = Tap::new(&hearer);
    let stolen = liar.capture().unwrap();
    assert_eq!(spoofed(), 0, "nobody has lied yet");
    for (at, (what, link, kind, payload)) in lies.iter().enumerate() {
        let way = liar.injector().unwrap().towards(EVERYBODY);
        way.in_the_name_of(*link)
            .send_frame(*kind, payload)
            .unwrap();
        let counted = wait_until(DEADLINE, "the lie to be counted", || {
            spoofed() == at as u64 + 1
        });
        assert!(counted.is_ok(), "{what}: {}", spoofed());
    }
    assert_eq!(tap.heard(), 0);
    for group in kept_by_bridges() {
        let way = liar.injector().unwrap().towards(group);
        let theirs = way.in_the_name_of(link_address(&victim));
        theirs.send_frame(0x88b5, MAGIC).unwrap();
    }
    for to in victim.addrs(80) {
        assert_eq!(greeted(&node, to).server, "x/d");
    }
    // What the victim says of itself is heard, and what is for it comes to it.
    for host in [&hearer, &node] {
        host.ip("neigh flush all\n").unwrap();
        for to in victim.addrs(80) {
            assert_eq!(greeted(host, to).server, "x/d");
        }
    }
    let to_victim = |packet: &lab::Packet| victim.addresses().contains(&packet.destination.ip());
    let theirs = stolen.count(|packet| packet.way == lab::traffic::Way::In && to_victim(packet));
    assert_eq!(theirs, 0);
    // Without the rules each of these would be heard.
    bed.kill(0);
    assert_eq!(no_learning(&node), 1);
    assert!(init(&node, "uninstall", &[]).status.success());
    assert_eq!(no_learning(&node), 0);
    for (what, link, kind, payload) in &lies {
        let before = tap.heard();
        let way = liar.injector().unwrap().towards(EVERYBODY);
        way.in_the_name_of(*link)
            .send_frame(*kind, payload)
            .unwrap();
        let heard = wait_until(DEADLINE, "the lie to be heard", || tap.heard() > before);
        assert!(heard.is_ok(), "{what}");
    }
}

/// VLAN tags and similar headers: the kernel removes some of them between the bridge and IP.
fn vlan_tagged_frame_cannot_spoof_another_pod() {
    let mut bed = TestCluster::bare(small().gateway(BRIDGE).rp_filter(RpFilter::Off));
    bed.enforce(&[]);
    let [liar, hearer, victim] = ["x/a", "x/b", "x/d"].map(|name| bed.lab.pod(name));
    let node = bed.lab.node(0);
    for to in hearer.addrs(80).into_iter().chain(victim.addrs(80)) {
        greeted(&liar, to);
        greeted(&node, to);
    }
    for address in victim.addresses() {
        let set = if address.is_ipv4() {
            "ip_ports4"
        } else {
            "ip_ports6"
        };
        wait_until(DEADLINE, "the victim's address to be known", || {
            listed(&node, set).contains(&address.to_string())
        })
        .unwrap();
    }
    let capture = hearer.capture().unwrap();
    // Whom the pod has in its table first may be another pod.
    let way = liar.injector().unwrap().towards(link_of(&node, "cni0"));
    let lied = |at: usize| capture.count(|it| it.source.ip() == victim.addresses()[at]);
    let honest = |port: u16| {
        for (from, to) in liar.addrs(port).into_iter().zip(hearer.addrs(port)) {
            way.send(&craft::udp(from, to, MAGIC)).unwrap();
            capture
                .wait_for(DEADLINE, "an honest datagram", 1, |it| it.source == from)
                .unwrap();
        }
    };
    let lies = |kind: u16| match kind {
        0x0800 => craft::udp(victim.addr_v4(9), hearer.addr_v4(9), MAGIC),
        0x86dd => craft::udp(victim.addr_v6(9), hearer.addr_v6(9), MAGIC),
        _ => {
            let gateway: Ipv4Addr = gateway(&liar).parse().unwrap();
            let theirs = (victim.ipv4(), link_address(&liar));
            craft::arp(2, theirs, (gateway, [0; 6]))
        }
    };
    let mut sent = 0;
    for kind in [0x0800, 0x86dd, 0x0806] {
        for (outer, between) in before_ip(kind) {
            way.send_frame(outer, &[between, lies(kind)].concat())
                .unwrap();
            sent += 1;
        }
    }
    honest(53);
    assert_eq!([lied(0), lied(1)], [0, 0]);
    assert_eq!(neighbour(&node, &victim), link_address(&victim));
    assert_eq!(counter_of(&node, "bridge", "frame"), sent);
    assert_eq!(
        metric(
            &node,
            "portreeve_nft_dropped_packets_total{reason=\"frame\"}"
        ),
        sent
    );
}

/// Frames to the bridge's reserved group addresses reach IP as if its port had received them.
fn reserved_group_mac_frame_reaches_no_node_socket() {
    let mut bed = TestCluster::bare(small().gateway(BRIDGE).rp_filter(RpFilter::Off));
    bed.enforce(&[]);
    let [liar, victim] = ["x/a", "x/d"].map(|name| bed.lab.pod(name));
    let node = bed.lab.node(0);
    node.serve_udp(&[53]).unwrap();
    for to in node.addrs(53) {
        assert!(is_answered(&liar, to), "{to}");
    }
    let capture = victim.capture().unwrap();
    let answered = || capture.count(|it| it.source.port() == 53);
    let mut sent = 0;
    for group in kept_by_bridges() {
        let way = liar.injector().unwrap().towards(group);
        for (from, to) in victim.addrs(9).into_iter().zip(node.addrs(53)) {
            way.send(&craft::udp(from, to, MAGIC)).unwrap();
            sent += 1;
        }
    }
    // The packet after them shows that they were processed.
    for to in node.addrs(53) {
        assert!(is_answered(&liar, to), "{to}");
        assert!(is_answered(&victim, to), "{to}");
    }
    assert_eq!(answered(), 2, "of {sent} in the victim's name");
    // Two of the groups do not reach IP: a bridge without STP forwards STP frames, and drops pause frames.
    assert_eq!(counter(&node, "frame"), sent - 4);
}

fn is_answered(from: &Host, to: SocketAddr) -> bool {
    let outcome = from.ask_udp(to, b"who?", SOON).unwrap();
    matches!(outcome, UdpOutcome::Answered { .. })
}

/// Headers between a frame's addresses and a payload of `kind`: the frame's type, and the bytes after it. Linux removes
/// tags of VLAN 0 (IEEE 802.1Q), however many.
fn before_ip(kind: u16) -> Vec<(u16, Vec<u8>)> {
    let tag = |vlan: u16, next: u16| [vlan.to_be_bytes(), next.to_be_bytes()].concat();
    let snap = [&[0xaa, 0xaa, 3, 0, 0, 0][..], &kind.to_be_bytes()].concat();
    vec![
        (0x8100, tag(0, kind)),
        (0x8100, [tag(0, 0x8100), tag(0, kind)].concat()),
        (
            0x8100,
            [tag(0, 0x8100), tag(0, 0x8100), tag(0, kind)].concat(),
        ),
        (0x88a8, tag(0, kind)),
        // QinQ (IEEE 802.1ad), and the other way round.
        (0x88a8, [tag(0, 0x8100), tag(0, kind)].concat()),
        (0x8100, [tag(0, 0x88a8), tag(0, kind)].concat()),
        // With a priority, of VLAN 7, and with an older service tag.
        (0x8100, tag(0xe000, kind)),
        (0x8100, tag(7, kind)),
        (0x9100, tag(0, kind)),
        // MPLS, PPPoE, and a length in the type's place (IEEE 802.3) with SNAP.
        (0x8847, vec![0, 0, 1, 64]),
        (0x8864, vec![0x11, 0, 0, 1, 0, 40, 0, 0x21]),
        (64, snap),
    ]
}

/// The groups that a bridge keeps for itself (IEEE 802.1Q, table 8-1).
fn kept_by_bridges() -> impl Iterator<Item = [u8; 6]> {
    (0..16).map(|last| [1, 0x80, 0xc2, 0, 0, last])
}

/// Whether the pods' bridge learns nothing from frames to reserved groups.
fn no_learning(node: &Host) -> u64 {
    let mut ip = node.command("ip");
    ip.args(["-j", "-d", "link", "show", "cni0"]);
    let links: serde_json::Value = serde_json::from_slice(&ip.output().unwrap().stdout).unwrap();
    let learning = &links[0]["linkinfo"]["info_data"]["no_linklocal_learn"];
    learning.as_u64().unwrap()
}
