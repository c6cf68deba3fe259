//! Unusual packets: fragments, invalid flags, data in the SYN, and options
//! that a proxy does not support.
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use lab::traffic::craft::{self, ACK, FIN, PSH, RST, SYN, URG};
use lab::traffic::{UdpOutcome, connect_all};
use lab::{Dial, Host, Kind, wait_until};
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};
use testbed::runner::Test;

use testbed::{
    DEADLINE, SOON, TestCluster, allow_all, counter, deny_egress, greeted, metric, policy, small,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    fragmented_datagram_is_judged_once,
    invalid_tcp_segments_are_dropped_and_counted,
    resets_for_stray_segments_are_rate_limited,
    fast_open_data_waits_and_arrives_once,
    a_multipath_client_falls_back_to_plain_tcp,
    an_ipv4_mapped_address_is_the_ipv4_address,
    simultaneous_open_is_refused_and_bypasses_no_policy,
];

fn fragmented_datagram_is_judged_once() {
    let ports = json!([{ "port": 53, "protocol": "UDP" }]);
    let spec = json!({ "podSelector": { "matchLabels": { "pod": "a" } }, "policyTypes": ["Egress"], "egress": [{ "ports": ports }] });
    let mut bed = TestCluster::bare(small());
    for pod in bed.lab.pods() {
        pod.serve_udp(&[53, 55]).unwrap();
    }
    bed.write_policies(&[policy("dns", &spec)]);
    bed.enforce(&[]);
    let (a, node) = (bed.lab.pod("x/a"), bed.lab.node(0));
    let decided = |verdict: &str| {
        let name =
            format!(r#"portreeve_policy_verdicts_total{{verdict="{verdict}",path="kernel"}}"#);
        metric(&node, &name)
    };
    // More than two fragments of an Ethernet's size.
    let text: Vec<u8> = (0..4000u32).map(|n| n.to_le_bytes()[0]).collect();
    for server in ["x/b", "x/c"] {
        let server = bed.lab.pod(server);
        for to in server.addrs(53) {
            let before = decided("allow");
            match a.ask_udp(to, &text, DEADLINE).unwrap() {
                UdpOutcome::Answered { text: back, .. } => assert_eq!(back, text, "{to}"),
                other => panic!("{to}: {other}"),
            }
            assert_eq!(decided("allow"), before + 1, "{to}: once");
        }
        for to in server.addrs(55) {
            let capture = server.capture().unwrap();
            let before = decided("deny");
            let outcome = a.ask_udp(to, &text, Duration::from_millis(200)).unwrap();
            assert_eq!(outcome, UdpOutcome::TimedOut, "{to}");
            assert_eq!(decided("deny"), before + 1, "{to}: once");
            let leaked =
                capture.count(|it| it.source.ip() == a.addrs(0)[usize::from(to.is_ipv6())].ip());
            assert_eq!(leaked, 0, "{to}: not one fragment");
        }
    }
}

fn invalid_tcp_segments_are_dropped_and_counted() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let (a, b, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.node(0));
    let capture = b.capture().unwrap();
    let injector = a.injector().unwrap();
    let before = counter(&node, "out_of_state");
    let nonsense = [
        ("SYN with FIN", SYN | FIN),
        ("SYN with RST", SYN | RST),
        ("no flags", 0),
        ("all flags", FIN | SYN | RST | PSH | ACK | URG),
        ("the Christmas tree", FIN | PSH | URG),
        ("FIN alone", FIN),
        ("RST of nothing", RST),
        ("ACK of nothing", ACK),
        ("SYN-ACK of nothing", SYN | ACK),
    ];
    let mut sent = 0;
    for (from, to) in a.addrs(1000).into_iter().zip(b.addrs(80)) {
        for (what, flags) in nonsense {
            injector.send(&craft::tcp(from, to, flags, 1, &[])).unwrap();
            sent += 1;
            let counted = wait_until(DEADLINE, "it to be counted", || {
                counter(&node, "out_of_state") == before + sent
            });
            assert!(counted.is_ok(), "{what}, {to}");
        }
    }
    let counted = metric(
        &node,
        "portreeve_nft_dropped_packets_total{reason=\"out_of_state\"}",
    );
    assert_eq!(counted, before + sent);
    assert_eq!(capture.count(|it| it.source.port() == 1000), 0);
    for to in b.addrs(80) {
        assert_eq!(greeted(&a, to).server, "x/b");
    }
}

fn resets_for_stray_segments_are_rate_limited() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let (a, b, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.node(0));
    let injector = a.injector().unwrap();
    let stray = craft::tcp(a.addr_v4(1000), b.addr_v4(80), ACK, 1, &[]);
    wait_until(DEADLINE, "more than a link's rate", || {
        (0..5_000).for_each(|_| injector.send(&stray).unwrap());
        counter(&node, "rate_limited") > 0
    })
    .unwrap();
}

/// TCP Fast Open (RFC 7413), with data in the SYN although the server gave no cookie.
fn fast_open_data_waits_and_arrives_once() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let a = bed.lab.pod("x/a");
    // ip-sysctl, tcp_fastopen: 1 as a client, 4 without a cookie.
    a.netns()
        .set_sysctls(&[("ipv4/tcp_fastopen", "5")])
        .unwrap();
    for way in bed.ways(80) {
        let socket = a.tcp_socket(way.to.ip()).unwrap();
        setsockopt(&socket, sockopt::TcpFastOpenConnect, &true).unwrap();
        socket.connect(&way.to.into()).unwrap();
        let mut stream = TcpStream::from(socket);
        stream.write_all(b"early\n").unwrap();
        assert_eq!(said(&mut stream, &way.server), "early\n", "{}", way.what);
    }
    bed.apply(&[deny_egress("a")]);
    for way in bed.ways(80) {
        let capture = bed.lab.pod(&way.server).capture().unwrap();
        let socket = a.tcp_socket(way.to.ip()).unwrap();
        setsockopt(&socket, sockopt::TcpFastOpenConnect, &true).unwrap();
        socket.set_write_timeout(Some(SOON)).unwrap();
        socket.connect(&way.to.into()).unwrap();
        let mut stream = TcpStream::from(socket);
        let _ = stream.write_all(b"early\n");
        stream.set_read_timeout(Some(SOON)).unwrap();
        assert!(stream.read(&mut [0; 8]).is_err(), "{}", way.what);
        assert_eq!(capture.count(|it| it.protocol == 6), 0, "{}", way.what);
    }
}

/// What an echo server says after its greeting.
#[track_caller]
fn said(stream: &mut TcpStream, server: &str) -> String {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let greeting = lab::traffic::greeting(stream, DEADLINE).unwrap();
    assert_eq!(greeting.server, server);
    let mut text = [0; 6];
    stream.read_exact(&mut text).unwrap();
    String::from_utf8_lossy(&text).into_owned()
}

/// Multipath TCP (RFC 8684): both ends offer it, the proxy between them does not.
fn a_multipath_client_falls_back_to_plain_tcp() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let (a, c) = (bed.lab.pod("x/a"), bed.lab.pod("x/c"));
    let multipath = |host: &Host, at: SocketAddr| {
        let open = || Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::MPTCP));
        host.run(open)
            .unwrap()
            .unwrap_or_else(|error| panic!("MPTCP sockets: {error}; the kernel needs CONFIG_MPTCP"))
    };
    for at in c.addrs(90) {
        let listener = multipath(&c, at);
        listener.bind(&at.into()).unwrap();
        listener.listen(1).unwrap();
        let client = multipath(&a, at);
        client.connect_timeout(&at.into(), DEADLINE).unwrap();
        let (accepted, peer) = listener.accept().unwrap();
        assert_eq!(
            peer.as_socket().map(|it| it.ip()),
            Some(a.addrs(0)[usize::from(at.is_ipv6())].ip())
        );
        (&client).write_all(b"plain\n").unwrap();
        accepted.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut text = [0; 6];
        (&accepted).read_exact(&mut text).unwrap();
        assert_eq!(&text, b"plain\n", "{at}");
    }
}

fn an_ipv4_mapped_address_is_the_ipv4_address() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"));
    let mapped = |to: &Host| SocketAddr::from((to.ipv4().to_ipv6_mapped(), 80));
    let dial = || {
        let open = || Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP));
        let socket = a.run(open).unwrap().unwrap();
        socket.set_only_v6(false).unwrap();
        socket
            .connect_timeout(&mapped(&b).into(), SOON)
            .map(|()| TcpStream::from(socket))
    };
    let greeting = lab::traffic::greeting(&dial().unwrap(), DEADLINE).unwrap();
    assert_eq!(greeting.client.ip(), a.addr_v4(0).ip());
    bed.apply(&[deny_egress("a")]);
    assert!(dial().is_err());
}

/// RFC 9293, 3.5: it cannot work where the server sees another port than the client's.
fn simultaneous_open_is_refused_and_bypasses_no_policy() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"));
    let both = |port: u16| {
        let ends = a.addrs(port).into_iter().zip(b.addrs(port + 1));
        ends.map(|(at_a, at_b)| {
            [
                Dial::new(&a, at_b).source_port(at_a.port()),
                Dial::new(&b, at_a).source_port(at_b.port()),
            ]
        })
    };
    for pair in both(6000) {
        let outcomes = connect_all(&pair, DEADLINE).unwrap();
        let kinds: Vec<_> = outcomes.iter().map(lab::Outcome::kind).collect();
        assert_eq!(kinds, [Kind::Refused, Kind::Refused]);
    }
    bed.apply(&[deny_egress("b")]);
    let capture = a.capture().unwrap();
    for pair in both(6100) {
        let outcomes = connect_all(&pair, SOON).unwrap();
        assert_eq!(outcomes[1].kind(), Kind::TimedOut, "denied");
    }
    let from_b = |it: &lab::Packet| b.addresses().contains(&it.source.ip()) && it.flags.is_syn();
    assert_eq!(
        capture.count(|it| it.way == lab::traffic::Way::In && from_b(it)),
        0
    );
}
