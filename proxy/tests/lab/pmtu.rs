//! Path MTU discovery (RFC 1191, RFC 8201): through the proxy on either of its legs, and beside it.
use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use lab::traffic::{UdpOutcome, Way, bulk};
use lab::{Host, Packet, Serve};
use testbed::runner::Test;

use testbed::{DEADLINE, TestCluster, allow_all, metric, small};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    path_mtu_discovery_works_on_both_legs,
    oversized_datagram_gets_packet_too_big,
];

/// Smaller than the link of any pod or node, larger than IPv6's least.
const SMALL: &str = "1300";
const BULK: u64 = 2 << 20;

/// The small cluster under policy, whose link to the outside host has a smaller MTU than all others,
/// which the MSS of that host does not show.
fn bed() -> TestCluster {
    let mut bed = TestCluster::bare(small());
    bed.set_env("PORTREEVE_TCP", "spliced");
    bed.write_policies(&[allow_all()]);
    bed.enforce(&[]);
    let mut narrow = bed.lab.fabric().command("ip");
    narrow.args(["link", "set", "outside", "mtu", SMALL]);
    assert!(narrow.output().unwrap().status.success());
    let routes = ["203.0.113.1", "2001:db8:113::1"]
        .map(|via| format!("route change default via {via} mtu {SMALL} advmss 1440\n"));
    bed.lab.outside().ip(&routes.concat()).unwrap();
    bed
}

/// ICMP "fragmentation needed" (type 3) or ICMPv6 "packet too big" (type 2) come from a router.
fn too_big(packet: &Packet, family: SocketAddr) -> bool {
    packet.way == Way::In && packet.protocol == if family.is_ipv4() { 1 } else { 58 }
}

fn path_mtu_discovery_works_on_both_legs() {
    let bed = bed();
    let (a, c, outside) = (bed.lab.pod("x/a"), bed.lab.pod("x/c"), bed.lab.outside());
    outside.serve_as(&[90], Serve::Sink).unwrap();
    c.serve_as(&[91], Serve::Source(BULK)).unwrap();
    let node = bed.lab.node(0);
    for to in outside.addrs(90) {
        let capture = node.capture().unwrap();
        let stream = dial(&a, to);
        bulk::send(&stream, BULK).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut verdict = String::new();
        (&stream).read_to_string(&mut verdict).unwrap();
        assert_eq!(verdict, format!("{BULK} ok\n"), "upstream to {to}");
        assert!(
            capture.count(|it| too_big(it, to)) > 0,
            "{to}: nothing was too big"
        );
    }
    // On the other node, which has not learnt of that path yet.
    let other = bed.lab.node(1);
    for to in c.addrs(91) {
        let capture = other.capture().unwrap();
        let received = bulk::receive(&dial(&outside, to)).unwrap();
        assert!(
            received.is_all_of(BULK),
            "client's leg from {to}: {received}"
        );
        assert!(
            capture.count(|it| too_big(it, to)) > 0,
            "{to}: nothing was too big"
        );
    }
    let relayed = r#"portreeve_policy_verdicts_total{verdict="allow",path="spliced"}"#;
    assert_eq!([&node, &other].map(|node| metric(node, relayed)), [2, 2]);
}

fn dial(from: &Host, to: SocketAddr) -> TcpStream {
    let outcome = from.connect(to, DEADLINE).unwrap();
    let stream = outcome
        .into_stream()
        .unwrap_or_else(|error| panic!("{to}: {error}"));
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream
}

fn oversized_datagram_gets_packet_too_big() {
    let bed = bed();
    let (a, outside) = (bed.lab.pod("x/a"), bed.lab.outside());
    outside.serve_udp(&[53]).unwrap();
    let capture = a.capture().unwrap();
    let text = [7; 1400];
    // Behind a translation too: the error names the server, and is to reach who knows another address.
    let virtual_addresses: [SocketAddr; 2] =
        ["10.96.77.7:53", "[fd00:10:96::7777]:53"].map(|text| text.parse().unwrap());
    translate(&bed.lab.node(0), virtual_addresses, &outside);
    for to in outside.addrs(53).into_iter().chain(virtual_addresses) {
        let before = capture.count(|it| too_big(it, to));
        // Linux sets DF for datagrams too, and cuts them once it knows the path.
        let first = a.ask_udp(to, &text, Duration::from_millis(300)).unwrap();
        assert!(
            !matches!(first, UdpOutcome::Answered { .. }),
            "{to}: {first}"
        );
        capture
            .wait_for(DEADLINE, "word from the router", before + 1, |it| {
                too_big(it, to)
            })
            .unwrap();
        let second = a.ask_udp(to, &text, DEADLINE).unwrap();
        assert!(
            matches!(second, UdpOutcome::Answered { .. }),
            "{to}: {second}"
        );
    }
}

/// Has a node send what is for one of these addresses to `server`, as kube-proxy does for a Service.
fn translate(node: &Host, [v4, v6]: [SocketAddr; 2], server: &Host) {
    let (v4, v6) = (v4.ip(), v6.ip());
    let [to4, to6] = server.addresses();
    let rules = format!(
        "table inet translation {{\nchain prerouting {{\ntype nat hook prerouting priority dstnat;\n\
         ip daddr {v4} dnat ip to {to4}\nip6 daddr {v6} dnat ip6 to {to6}\n}}\n}}\n"
    );
    node.nft(&rules).unwrap();
}
