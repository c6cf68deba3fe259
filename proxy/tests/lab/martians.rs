//! Packets with invalid addresses or routes: link-local sources beyond their link, the loopback network from outside,
//! source routes. The rules drop them before the gate sees them.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lab::traffic::craft::{self, SYN};
use lab::{Capture, Cluster, Gateway, Host, RpFilter};
use testbed::runner::Test;

use crate::bridges::BRIDGE;
use testbed::{
    DEADLINE, TestCluster, allow_ingress, counter, deny_egress, deny_ingress, metric, small,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    a_link_local_source_stays_on_its_link,
    a_pod_cannot_reach_its_nodes_loopback_network,
    source_routed_packets_reach_no_pod,
];

const NEAR: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x98);
/// The arrival of this packet shows that all earlier ones were processed.
const SENTINEL: u16 = 9999;

/// Sends a valid datagram in each family, and waits until it arrives.
fn settle(from: &Host, to: &Host, capture: &Capture) {
    for to in to.addrs(SENTINEL) {
        let such = |it: &lab::Packet| it.destination == to;
        let before = capture.count(such);
        from.ask_udp(to, b"all?", std::time::Duration::ZERO)
            .unwrap();
        capture
            .wait_for(DEADLINE, &format!("a sentinel at {to}"), before + 1, such)
            .unwrap();
    }
}

fn a_link_local_source_stays_on_its_link() {
    for gateway in [Gateway::LinkLocal, BRIDGE] {
        let mut bed = TestCluster::bare(small().rp_filter(RpFilter::Off).gateway(gateway));
        bed.write_policies(&[allow_ingress("b"), deny_egress("a")]);
        bed.enforce(&[]);
        let (a, b, d) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.pod("x/d"));
        let (node, outside) = (bed.lab.node(0), bed.lab.outside());
        for from in [&a, &outside] {
            settle_neighbours(from, &node);
        }
        let capture = b.capture().unwrap();
        let mut sent = 0;
        for from in [&a, &outside] {
            for port in 0..10 {
                let (from_port, to) = ((NEAR, 1000 + port).into(), b.addr_v6(80));
                let way = from.injector().unwrap();
                way.send(&craft::tcp(from_port, to, SYN, 1, &[])).unwrap();
                way.send(&craft::udp(from_port, to, b"?")).unwrap();
                sent += 2;
            }
        }
        settle(&d, &b, &capture);
        let near = |it: &lab::Packet| it.source.ip() == NEAR && it.protocol != 58;
        assert_eq!(capture.count(near), 0, "{gateway:?}");
        let allowed = metric(&node, "portreeve_policy_verdicts_total{verdict=\"allow\"}");
        assert_eq!(allowed, 2, "{gateway:?}: of {sent}, and the sentinels");
        let log = bed.daemon(0).log();
        assert!(!log.contains("connection denied"), "{gateway:?}: {log}");
        // From outside the kernel itself may refuse them first.
        assert!(counter(&node, "link_local") >= sent / 2, "{gateway:?}");
        let counted = metric(
            &node,
            "portreeve_nft_dropped_packets_total{reason=\"link_local\"}",
        );
        assert_eq!(counted, counter(&node, "link_local"), "{gateway:?}");
    }
}

/// A sender of hand-made packets needs its neighbour's link address.
fn settle_neighbours(from: &Host, to: &Host) {
    for to in to.addrs(9) {
        let wait = std::time::Duration::from_millis(200);
        from.ask_udp(to, b"hello", wait).unwrap();
    }
}

fn a_pod_cannot_reach_its_nodes_loopback_network() {
    for gateway in [Gateway::LinkLocal, BRIDGE] {
        let mut bed = TestCluster::bare(small().rp_filter(RpFilter::Off).gateway(gateway));
        bed.write_policies(&[deny_egress("a"), deny_ingress("a")]);
        bed.enforce(&[]);
        let node = bed.lab.node(0);
        let sysctl = [("ipv4/conf/all/route_localnet", "1")];
        node.netns().set_sysctls(&sysctl).unwrap();
        let admin = SocketAddr::from((Ipv4Addr::LOCALHOST, 15020));
        let (policed, free) = (bed.lab.pod("x/a"), bed.lab.pod("x/d"));
        for (from, to) in [(&policed, &bed.lab.pod("x/c")), (&free, &policed)] {
            settle_neighbours(from, to);
        }
        for (at, pod) in [&policed, &free].into_iter().enumerate() {
            let capture = pod.capture().unwrap();
            // The node needs the neighbour's link address: a pod answers no ARP request from 127.0.0.1.
            settle(&node, pod, &capture);
            let way = pod.injector().unwrap();
            for port in 0..3 {
                let syn = craft::tcp(pod.addr_v4(1000 + port), admin, SYN, 1, &[]);
                way.send(&syn).unwrap();
            }
            // Another address of that network, and the network as the sender.
            let other = SocketAddr::from(([127, 1, 2, 3], 15020));
            way.send(&craft::tcp(pod.addr_v4(1003), other, SYN, 1, &[]))
                .unwrap();
            way.send(&craft::tcp(admin, node.addr_v4(80), SYN, 1, &[]))
                .unwrap();
            for to in ["::1", "::ffff:127.0.0.1"] {
                let to = SocketAddr::from((to.parse::<IpAddr>().unwrap(), 15020));
                way.send(&craft::tcp(pod.addr_v6(1004), to, SYN, 1, &[]))
                    .unwrap();
            }
            settle(&node, pod, &capture);
            let answers = capture.count(|it| it.source.port() == 15020 && it.protocol == 6);
            assert_eq!(answers, 1, "{gateway:?}, {}: but its own lie", pod.name());
            // The policed pod's to a mapped address is one more.
            let dropped = counter(&node, "martian");
            assert_eq!(dropped, [5, 9][at], "{gateway:?}, {}", pod.name());
        }
    }
}

/// To a pod without a grant, by a pod without policy and from outside, where the node follows such routes.
fn source_routed_packets_reach_no_pod() {
    let mut bed = TestCluster::bare(small().rp_filter(RpFilter::Off));
    bed.write_policies(&[deny_ingress("b")]);
    bed.enforce(&[]);
    let (b, d, node) = (bed.lab.pod("x/b"), bed.lab.pod("x/d"), bed.lab.node(0));
    let outside = bed.lab.outside();
    follow_source_routes(&bed.lab, &node);
    let capture = b.capture().unwrap();
    let mut sent = 0;
    for from in [&d, &outside] {
        settle_neighbours(from, &node);
        let way = from.injector().unwrap();
        for packet in routed(from, &node, &b) {
            way.send(&packet).unwrap();
            sent += 1;
        }
    }
    settle(&node, &b, &capture);
    let arrived = capture.count(|it| it.destination.port() == 80);
    assert_eq!(arrived, 0, "of {sent}");
    let dropped = counter(&node, "source_route");
    assert!(dropped >= 6, "{dropped} of {sent}");
    // Without the rules most of them arrive.
    bed.kill(0);
    let said = testbed::init(&node, "uninstall", &[]);
    assert!(said.status.success(), "{said:?}");
    let packets = routed(&d, &node, &b);
    for packet in &packets {
        d.injector().unwrap().send(packet).unwrap();
    }
    settle(&node, &b, &capture);
    let arrived = capture.count(|it| it.destination.port() == 80);
    assert_eq!(arrived, 3, "by both options and a segment routing header");
}

/// Has a node follow IPv4 source routes and IPv6 segment routing headers (ip-sysctl, seg6-sysctl).
fn follow_source_routes(lab: &Cluster, node: &Host) {
    let link = lab.link_of("x/d").unwrap();
    let mut settings = vec![("ipv4/conf/all/accept_source_route".to_owned(), "1")];
    for link in ["all", "eth0", link.as_str()] {
        settings.push((format!("ipv4/conf/{link}/accept_source_route"), "1"));
        settings.push((format!("ipv6/conf/{link}/seg6_enabled"), "1"));
        settings.push((format!("ipv6/conf/{link}/accept_source_route"), "1"));
    }
    let settings: Vec<_> = settings.iter().map(|(name, on)| (&**name, *on)).collect();
    node.netns().set_sysctls(&settings).unwrap();
}

/// Datagrams to port 80 that go to `by` first and have `to` as the rest of their way.
fn routed(from: &Host, by: &Host, to: &Host) -> Vec<Vec<u8>> {
    let datagram = |header: usize, from: SocketAddr, to: SocketAddr| {
        craft::udp(from, to, b"data")[header..].to_vec()
    };
    let mut packets = Vec::new();
    let [a, b, c, d] = to.ipv4().octets();
    for kind in [131, 137] {
        // Type, length, pointer, one address (RFC 791, 3.1).
        let option = [kind, 7, 4, a, b, c, d, 0];
        let payload = datagram(20, from.addr_v4(1000), to.addr_v4(80));
        let (from, by) = (from.ipv4().into(), by.ipv4().into());
        packets.push(craft::ip_with_options(from, by, &option, 17, &payload));
    }
    let payload = datagram(40, from.addr_v6(1000), to.addr_v6(80));
    let (from, by) = (from.ipv6().into(), by.ipv6().into());
    for kind in [0, 2, 3, 253] {
        let header = [&[17, 2, kind, 1, 0, 0, 0, 0][..], &to.ipv6().octets()].concat();
        packets.push(craft::ip(from, by, 43, &[&header[..], &payload].concat()));
    }
    // The segments in reverse order, the first of them done with (RFC 8754, 2), and behind other headers too.
    let IpAddr::V6(first) = by else {
        return packets;
    };
    let segments = [to.ipv6().octets(), first.octets()].concat();
    let header = [&[17, 4, 4, 1, 1, 0, 0, 0][..], &segments].concat();
    packets.push(craft::ip(from, by, 43, &[&header[..], &payload].concat()));
    packets
}
