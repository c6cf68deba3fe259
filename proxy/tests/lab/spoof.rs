//! Whoever sends in another's name is refused by the link that it sits on, whatever rp_filter is;
//! the node's own links are left alone.
use std::net::SocketAddr;

use lab::runner::Test;
use lab::traffic::craft;
use lab::{Gateway, Host, PodSpec, RpFilter, wait_until};

use crate::support::{Bed, DEADLINE, connected, counter, deny_ingress, greeted, metric, small};

pub(crate) const TESTS: &[Test] = &lab::tests![
    a_pod_that_sends_in_anothers_name_is_refused_by_its_link,
    a_new_pods_link_is_known_at_once_and_without_any_policy,
    what_comes_back_another_way_than_it_went_is_no_lie_on_the_nodes_own_link,
];

/// A cluster without any reverse path filter, and without policy.
fn bed(gateway: Gateway) -> Bed {
    let cluster = small().rp_filter(RpFilter::Off).gateway(gateway);
    let mut bed = Bed::bare(cluster);
    bed.enforce(&[]);
    bed
}

/// Sends a datagram from `from` to `to` in the name of `source`.
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

fn a_pod_that_sends_in_anothers_name_is_refused_by_its_link() {
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
        let told = metric(&node, "portreeve_rule_drops_total{cause=\"spoofed\"}");
        assert_eq!(told, refused, "{gateway:?}");
    }
}

fn a_new_pods_link_is_known_at_once_and_without_any_policy() {
    let mut bed = bed(Gateway::LinkLocal);
    // Nobody has told the daemon of this pod.
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

/// The node's way to the sender leads elsewhere: asymmetric routing, which is no pod's.
fn what_comes_back_another_way_than_it_went_is_no_lie_on_the_nodes_own_link() {
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
