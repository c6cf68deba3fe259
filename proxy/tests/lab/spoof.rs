//! Packets with a spoofed source are dropped at the sender's link, whatever rp_filter is;
//! the node's own links are not affected.
use std::net::SocketAddr;

use lab::traffic::craft;
use lab::{Between, Gateway, Host, PodSpec, RpFilter, wait_until};
use testbed::runner::Test;

use crate::carried::{flow, goes_on};
use testbed::{
    DEADLINE, TestCluster, allow_ingress, connected, counter, deny_ingress, greeted, metric, small,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    spoofed_source_is_dropped_at_the_pod_link,
    new_pod_link_is_known_without_any_policy,
    asymmetric_return_path_is_not_spoofing,
    vxlan_from_a_pod_is_not_decapsulated,
    pod_cannot_spoof_into_an_allowed_flow,
    outside_host_cannot_spoof_into_a_pod_flow,
    moved_address_is_dropped_on_its_old_link,
];

/// A cluster without any reverse path filter, and without policy.
fn bed(gateway: Gateway) -> TestCluster {
    let cluster = small().rp_filter(RpFilter::Off).gateway(gateway);
    let mut bed = TestCluster::bare(cluster);
    bed.enforce(&[]);
    bed
}

/// Sends a datagram from `from` to `to` with the source address of `source`.
fn lie(from: &Host, source: SocketAddr, to: SocketAddr) {
    let packet = craft::udp(source, to, b"trust me");
    from.injector().unwrap().send(&packet).unwrap();
}

#[track_caller]
fn wait_for_count(node: &Host, name: &str, expected: u64) {
    let what = format!("counter {name} to be {expected}");
    let reached = wait_until(DEADLINE, what, || counter(node, name) >= expected);
    assert_eq!(reached.map(|()| counter(node, name)).unwrap(), expected);
}

fn spoofed_source_is_dropped_at_the_pod_link() {
    for gateway in [Gateway::LinkLocal, Gateway::NodeAddress] {
        let bed = bed(gateway);
        let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"));
        let node = bed.lab.node(0);
        let capture = b.capture().unwrap();
        let names = [
            ("a pod of this node", bed.lab.pod("x/d").addrs(53)),
            ("a pod of another node", bed.lab.pod("x/c").addrs(53)),
            ("its own node", node.addrs(53)),
            ("another node", bed.lab.node(1).addrs(53)),
            ("its victim", b.addrs(53)),
            ("the world outside", bed.lab.outside().addrs(53)),
            ("a Service", bed.lab.service("x/c").addrs(53)),
        ];
        for (who, sources) in names {
            for (source, to) in sources.into_iter().zip(b.addrs(53)) {
                let before = counter(&node, "spoofed");
                lie(&a, source, to);
                let seen = wait_until(DEADLINE, "the lie to be counted", || {
                    counter(&node, "spoofed") == before + 1
                });
                assert!(seen.is_ok(), "{who}, {source}, {gateway:?}");
            }
        }
        // Its own name is good, and neighbour discovery needs a link-local one.
        for to in b.addrs(80) {
            assert_eq!(greeted(&a, to).server, "x/b");
        }
        let forged = capture.count(|it| it.source.port() == 53);
        assert_eq!(forged, 0, "{gateway:?}");
        let refused = counter(&node, "spoofed");
        assert_eq!(refused, 14, "only the lies, {gateway:?}");
        let counted = metric(
            &node,
            "portreeve_nft_dropped_packets_total{reason=\"spoofed\"}",
        );
        assert_eq!(counted, refused, "{gateway:?}");
    }
}

fn new_pod_link_is_known_without_any_policy() {
    let mut bed = bed(Gateway::LinkLocal);
    // The daemon does not know this pod.
    bed.lab.add_pod(PodSpec::new("x", "new").node(0)).unwrap();
    let (node, link) = (bed.lab.node(0), bed.lab.link_of("x/new").unwrap());
    wait_until(DEADLINE, "the link to be known", || {
        let mut nft = node.command("nft");
        nft.args(["list", "set", "inet", "portreeve", "pod_links"]);
        String::from_utf8_lossy(&nft.output().unwrap().stdout).contains(&format!("\"{link}\""))
    })
    .unwrap();
    let new = bed.lab.pod("x/new");
    for (source, to) in bed
        .lab
        .outside()
        .addrs(53)
        .into_iter()
        .zip(bed.lab.pod("x/b").addrs(53))
    {
        lie(&new, source, to);
    }
    wait_for_count(&node, "spoofed", 2);
}

/// The node's route to the sender uses another link: asymmetric routing, which pods do not have.
fn asymmetric_return_path_is_not_spoofing() {
    let bed = bed(Gateway::LinkLocal);
    let (outside, node, b) = (bed.lab.outside(), bed.lab.node(0), bed.lab.pod("x/b"));
    let live = connected(&outside, b.addr_v4(80));
    node.ip("route add blackhole 198.18.0.0/24\nroute add blackhole 2001:db8:198::/64\n")
        .unwrap();
    let capture = b.capture().unwrap();
    let sources: [SocketAddr; 2] =
        ["198.18.0.7:53", "[2001:db8:198::7]:53"].map(|text| text.parse().unwrap());
    for (source, to) in sources.into_iter().zip(b.addrs(53)) {
        lie(&outside, source, to);
        capture
            .wait_for(DEADLINE, "the packet", 1, |it| it.source == source)
            .unwrap();
    }
    // But a pod's own address never comes from there, nor the node's.
    bed.apply(&[deny_ingress("b")]);
    let liars = [b.addrs(53), node.addrs(53), bed.lab.pod("x/d").addrs(53)];
    let before = counter(&node, "spoofed");
    for source in liars.into_iter().flatten() {
        let to = b.addrs(54)[usize::from(source.is_ipv6())];
        lie(&outside, source, to);
    }
    wait_for_count(&node, "spoofed", before + 6);
    assert_eq!(capture.count(|it| it.destination.port() == 54), 0);
    drop(live);
}

/// A tunnel device does not show who encapsulated a packet; its inner source may be another node's pod.
fn vxlan_from_a_pod_is_not_decapsulated() {
    let cluster = small().rp_filter(RpFilter::Off).between(Between::Vxlan);
    let mut bed = TestCluster::bare(cluster);
    let (a, b, c) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.pod("x/c"));
    let node = bed.lab.node(0);
    greeted(&a, b.addr_v4(80));
    let capture = b.capture().unwrap();
    let tunnel = tunnel_address(&node);
    let wrap = |port: u16, at: usize| {
        let (from, to) = (c.addrs(53)[at], b.addrs(53)[at]);
        let kind: u16 = if at == 0 { 0x0800 } else { 0x86dd };
        // Network 1 (RFC 7348, 5), as the lab's nodes have it.
        let mut wrapped = vec![8, 0, 0, 0, 0, 0, 1, 0];
        wrapped.extend(tunnel);
        wrapped.extend([2, 0, 0, 0, 0, 9]);
        wrapped.extend(kind.to_be_bytes());
        wrapped.extend(craft::udp(from, to, b"trust me"));
        let outer = craft::udp(a.addr_v4(5000), node.addr_v4(port), &wrapped);
        a.injector().unwrap().send(&outer).unwrap();
    };
    let arrived = |at: usize| capture.count(|it| it.source == c.addrs(53)[at]);
    for at in [0, 1] {
        wrap(8472, at);
        wait_until(DEADLINE, "the bare network to believe it", || {
            arrived(at) == 1
        })
        .unwrap();
    }
    bed.enforce(&[]);
    for at in [0, 1] {
        wrap(8472, at);
        wait_for_count(&node, "spoofed", at as u64 + 1);
        assert_eq!(arrived(at), 1);
    }
    for (protocol, count) in [(4, 3), (41, 4), (47, 5)] {
        let inner = craft::udp(c.addr_v4(53), b.addr_v4(53), b"trust me");
        let outer = craft::ip(a.ipv4().into(), node.ipv4().into(), protocol, &inner);
        a.injector().unwrap().send(&outer).unwrap();
        wait_for_count(&node, "spoofed", count);
    }
    // The nodes' own tunnel carries on.
    for to in c.addrs(80) {
        assert_eq!(greeted(&a, to).server, "x/c");
    }
}

/// The address (IEEE 802) of a node's tunnel device.
fn tunnel_address(node: &Host) -> [u8; 6] {
    let mut ip = node.command("ip");
    ip.args(["-j", "link", "show", "type", "vxlan"]);
    let links: serde_json::Value = serde_json::from_slice(&ip.output().unwrap().stdout).unwrap();
    let text = links[0]["address"].as_str().unwrap().split(':');
    let bytes: Vec<u8> = text
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    bytes.try_into().unwrap()
}

/// Conntrack assigns any packet with a flow's addresses and ports to it, so its mark proves nothing.
fn pod_cannot_spoof_into_an_allowed_flow() {
    for gateway in [Gateway::LinkLocal, Gateway::NodeAddress] {
        let mut bed = TestCluster::bare(small().rp_filter(RpFilter::Off).gateway(gateway));
        let (a, b, liar) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.pod("x/d"));
        b.serve_udp(&[53]).unwrap();
        bed.write_policies(&[allow_ingress("b")]);
        bed.enforce(&[]);
        let node = bed.lab.node(0);
        let capture = b.capture().unwrap();
        for to in b.addrs(53) {
            let live = flow(&a, to);
            assert!(goes_on(&live), "{to}, {gateway:?}");
            let source = live.local_addr().unwrap();
            let (before, heard) = (
                counter(&node, "spoofed"),
                capture.count(|it| it.source == source),
            );
            lie(&liar, source, to);
            wait_for_count(&node, "spoofed", before + 1);
            assert_eq!(
                capture.count(|it| it.source == source),
                heard,
                "{to}, {gateway:?}"
            );
            assert!(goes_on(&live), "{to}, {gateway:?}");
        }
    }
}

/// From outside, as either end of a flow of datagrams, before and after it was answered.
fn outside_host_cannot_spoof_into_a_pod_flow() {
    let mut bed = TestCluster::bare(small().rp_filter(RpFilter::Loose));
    let (a, b, outside) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.outside());
    for to in b.addrs(81) {
        drop(connected(&outside, to));
    }
    b.serve_udp(&[53]).unwrap();
    bed.write_policies(&[allow_ingress("b")]);
    bed.enforce(&[]);
    let node = bed.lab.node(0);
    let heard = [&a, &b].map(|pod| pod.capture().unwrap());
    let lies = |source: SocketAddr, to: SocketAddr| {
        let before = counter(&node, "spoofed");
        let count = || {
            let such = |it: &lab::Packet| (it.source, it.destination) == (source, to);
            let [a, b] = &heard;
            a.count(such) + b.count(such)
        };
        let so_far = count();
        lie(&outside, source, to);
        wait_for_count(&node, "spoofed", before + 1);
        assert_eq!(count(), so_far, "{source} to {to}");
    };
    for to in b.addrs(53) {
        let live = flow(&a, to);
        assert!(goes_on(&live), "{to}");
        let own = live.local_addr().unwrap();
        lies(own, to);
        lies(to, own);
        assert!(goes_on(&live), "{to}");
    }
    // Once cut, its packets are judged one by one: also when policy allows it again.
    for to in b.addrs(53) {
        bed.apply(&[allow_ingress("b")]);
        let live = flow(&a, to);
        assert!(goes_on(&live), "{to}");
        bed.apply(&[deny_ingress("b")]);
        assert!(!goes_on(&live), "{to}");
        bed.apply(&[allow_ingress("b")]);
        let own = live.local_addr().unwrap();
        lies(own, to);
        lies(to, own);
        assert!(goes_on(&live), "{to}");
    }
    for to in b.addrs(54) {
        let unanswered = flow(&a, to);
        let own = unanswered.local_addr().unwrap();
        b.nft("table inet mute { chain out { type filter hook output priority 0; icmp type destination-unreachable drop; icmpv6 type destination-unreachable drop; }; }")
            .unwrap();
        assert!(!goes_on(&unanswered), "{to}");
        lies(own, to);
    }
}

fn moved_address_is_dropped_on_its_old_link() {
    let bed = bed(Gateway::LinkLocal);
    let (node, a, b, d) = (
        bed.lab.node(0),
        bed.lab.pod("x/a"),
        bed.lab.pod("x/b"),
        bed.lab.pod("x/d"),
    );
    let [link_a, link_d] = ["x/a", "x/d"].map(|pod| bed.lab.link_of(pod).unwrap());
    let link_sources = |pod: &Host, link: &str| {
        ["link_sources4", "link_sources6"]
            .into_iter()
            .zip(pod.addrs(53))
            .all(|(set, own)| {
                let mut nft = node.command("nft");
                nft.args(["list", "set", "inet", "portreeve", set]);
                let listing = String::from_utf8_lossy(&nft.output().unwrap().stdout).into_owned();
                listing.contains(&format!("\"{link}\" . {}", own.ip()))
            })
    };
    wait_until(DEADLINE, "each address in the set of its link", || {
        link_sources(&a, &link_a) && link_sources(&d, &link_d)
    })
    .unwrap();
    for (pod, link) in [(&a, &link_d), (&d, &link_a)] {
        for own in pod.addrs(53).map(|own| own.ip()) {
            let length = if own.is_ipv4() { 32 } else { 128 };
            node.ip(&format!("route replace {own}/{length} dev {link}\n"))
                .unwrap();
        }
    }
    wait_until(DEADLINE, "the pins to follow the routes", || {
        link_sources(&a, &link_d) && link_sources(&d, &link_a)
    })
    .unwrap();
    for (source, to) in a.addrs(53).into_iter().zip(b.addrs(53)) {
        lie(&a, source, to);
    }
    wait_for_count(&node, "spoofed", 2);
}
