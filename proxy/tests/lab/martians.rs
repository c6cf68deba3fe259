//! Packets whose addresses or routes cannot be: link-local ones that ask for something beyond their link, the loopback
//! network from outside, source routes. The rules drop them before anybody judges them.
use std::net::Ipv6Addr;

use lab::runner::Test;
use lab::traffic::craft::{self, SYN};
use lab::{Capture, Gateway, Host, RpFilter};

use crate::bridges::BRIDGE;
use crate::support::{Bed, DEADLINE, allow_ingress, counter, deny_egress, metric, small};

pub(crate) const TESTS: &[Test] =
    &lab::tests![a_link_local_source_asks_for_nothing_beyond_its_link,];

const NEAR: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x98);
/// Tells that all before it has been through.
const SENTINEL: u16 = 9999;

/// Sends an honest datagram in each family, and waits until it has come.
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

fn a_link_local_source_asks_for_nothing_beyond_its_link() {
    for gateway in [Gateway::LinkLocal, BRIDGE] {
        let mut bed = Bed::bare(small().rp_filter(RpFilter::Off).gateway(gateway));
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
        let allowed = metric(&node, "portreeve_decisions_total{verdict=\"allow\"}");
        assert_eq!(allowed, 2, "{gateway:?}: of {sent}, and the sentinels");
        let log = bed.daemon(0).log();
        assert!(!log.contains("refused"), "{gateway:?}: {log}");
        // From outside the kernel itself may refuse them first.
        assert!(counter(&node, "link_local") >= sent / 2, "{gateway:?}");
        let told = metric(&node, "portreeve_rule_drops_total{cause=\"link_local\"}");
        assert_eq!(told, counter(&node, "link_local"), "{gateway:?}");
    }
}

/// Who sends packets made by hand must know its neighbour.
fn settle_neighbours(from: &Host, to: &Host) {
    for to in to.addrs(9) {
        let wait = std::time::Duration::from_millis(200);
        from.ask_udp(to, b"hello", wait).unwrap();
    }
}
