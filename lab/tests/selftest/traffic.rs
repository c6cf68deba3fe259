//! Traffic as tests make and see it: TCP, UDP, captures, crafted packets.
use std::io::Read;
use std::net::Shutdown;
use std::thread;
use std::time::Duration;

use lab::traffic::{Flags, UdpOutcome, Way, bulk, craft, greeting};
use lab::{Kind, Packet, Serve};
use nix::errno::Errno;
use testbed::runner::Test;

use super::{LIMIT, seen, two_pods};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    udp_distinguishes_answered_refused_and_dropped,
    a_capture_sees_the_handshake_and_counts_retransmits,
    crafted_packets_arrive_unchanged,
    a_thousand_dials_at_once_need_no_retransmit,
    bulk_data_arrives_unchanged_and_half_close_works,
    client_sees_a_reset_as_reset,
    a_source_port_can_be_chosen,
];

/// For what must not happen: long enough for a SYN's first retransmit (1 s, RFC 6298).
const PATIENCE: Duration = Duration::from_millis(1_300);

fn udp_distinguishes_answered_refused_and_dropped() {
    let cluster = two_pods();
    let (a, b) = (cluster.pod("x/a"), cluster.pod("x/b"));
    b.serve_udp(&[53]).unwrap();
    for (at, closed) in b.addrs(53).into_iter().zip(b.addrs(54)) {
        match a.ask_udp(at, b"hello", LIMIT).unwrap() {
            UdpOutcome::Answered { text, .. } => assert_eq!(text, b"hello"),
            other => panic!("{at}: {other}"),
        }
        assert_eq!(
            a.ask_udp(closed, b"hello", LIMIT).unwrap(),
            UdpOutcome::Refused
        );
    }
    let silent = cluster.blackhole(53)[0];
    let outcome = a
        .ask_udp(silent, b"hello", Duration::from_millis(200))
        .unwrap();
    assert_eq!(outcome, UdpOutcome::TimedOut);
}

fn a_capture_sees_the_handshake_and_counts_retransmits() {
    let cluster = two_pods();
    let (a, b) = (cluster.pod("x/a"), cluster.pod("x/b"));
    b.serve(&[80]).unwrap();
    b.nft("table inet t { chain in { type filter hook input priority 0; tcp dport 81 drop; }; }")
        .unwrap();
    for (open, dropped, closed) in [
        (b.addr_v4(80), b.addr_v4(81), b.addr_v4(82)),
        (b.addr_v6(80), b.addr_v6(81), b.addr_v6(82)),
    ] {
        let capture = a.capture().unwrap();
        let on_node = cluster
            .node(1)
            .capture_on(&cluster.link_of("x/b").unwrap())
            .unwrap();
        assert_eq!(seen(&a, open).0, "x/b");
        assert_eq!((capture.syns_to(open), capture.syn_acks_from(open)), (1, 1));
        assert!(
            capture
                .packets()
                .iter()
                .any(|p| p.way == Way::Out && p.is_syn_to(open))
        );
        assert_eq!(
            on_node.syns_to(open),
            1,
            "the node sees it pass the pod's link"
        );

        assert_eq!(a.connect(dropped, PATIENCE).unwrap().kind(), Kind::TimedOut);
        assert_eq!(
            (capture.syns_to(dropped), capture.syn_acks_from(dropped)),
            (2, 0)
        );

        assert_eq!(a.connect(closed, LIMIT).unwrap().kind(), Kind::Refused);
        let resets = capture.count(|p| p.flags.is_reset() && p.source == closed);
        assert_eq!((capture.syns_to(closed), resets), (1, 1));
        capture
            .wait_for(LIMIT, "a FIN", 1, |p| p.flags.is_fin())
            .unwrap();
    }
    assert!(!Flags::default().is_syn());
}

fn crafted_packets_arrive_unchanged() {
    let cluster = two_pods();
    let (a, b) = (cluster.pod("x/a"), cluster.pod("x/b"));
    b.serve_udp(&[53]).unwrap();
    let injector = a.injector().unwrap();
    let capture = b.capture().unwrap();
    for (from, to) in [
        (a.addr_v4(1000), b.addr_v4(53)),
        (a.addr_v6(1000), b.addr_v6(53)),
    ] {
        let (source, target) = (from.ip(), to.ip());
        let whole = craft::udp(from, to, &[7; 1000]);
        let made = [
            (6, craft::tcp(from, to, craft::SYN | craft::FIN, 1, &[])),
            (132, craft::sctp(from, to, 0, craft::SCTP_INIT)),
            (253, craft::ip(source, target, 253, b"experiment")),
            (17, craft::udp(from, to, b"question")),
        ];
        for (number, (protocol, packet)) in (1..).zip(made) {
            injector.send(&craft::numbered(packet, number)).unwrap();
            let such = |it: &Packet| {
                it.way == Way::In
                    && (it.protocol, it.number, it.source.ip()) == (protocol, number, source)
            };
            capture.wait_for(LIMIT, "the packet", 1, such).unwrap();
        }
        for piece in craft::fragment(&whole, &[(0, 504), (504, 1008)]) {
            injector.send(&piece).unwrap();
        }
        // The checksums are right: a socket answers, once a datagram.
        let answer =
            |it: &Packet| it.way == Way::Out && it.protocol == 17 && it.destination.ip() == source;
        capture.wait_for(LIMIT, "the answers", 2, answer).unwrap();
    }
}

fn a_thousand_dials_at_once_need_no_retransmit() {
    let cluster = two_pods();
    let (a, b) = (cluster.pod("x/a"), cluster.pod("x/b"));
    raise_descriptor_limit();
    b.serve(&[80]).unwrap();
    let capture = a.capture().unwrap();
    let to = b.addr_v4(80);
    let outcomes = a.connect_all(&[to; 1_000], LIMIT).unwrap();
    assert!(outcomes.iter().all(lab::Outcome::is_connected));
    assert_eq!(capture.syns_to(to), 1_000);
}

fn bulk_data_arrives_unchanged_and_half_close_works() {
    const TOTAL: u64 = 20_000_000;
    let cluster = two_pods();
    let (a, b) = (cluster.pod("x/a"), cluster.pod("x/b"));
    b.serve(&[80]).unwrap();
    b.serve_as(&[81], Serve::Sink).unwrap();
    b.serve_as(&[82], Serve::Source(TOTAL)).unwrap();

    let mut sink = a
        .connect(b.addr_v4(81), LIMIT)
        .unwrap()
        .into_stream()
        .unwrap();
    bulk::send(&sink, TOTAL).unwrap();
    sink.shutdown(Shutdown::Write).unwrap();
    let mut received = String::new();
    sink.read_to_string(&mut received).unwrap();
    assert_eq!(
        received,
        format!("{TOTAL} ok\n"),
        "the answer comes after the client's end"
    );

    let source = a
        .connect(b.addr_v6(82), LIMIT)
        .unwrap()
        .into_stream()
        .unwrap();
    assert!(bulk::receive(source).unwrap().is_all_of(TOTAL));

    let echo = a
        .connect(b.addr_v4(80), LIMIT)
        .unwrap()
        .into_stream()
        .unwrap();
    greeting(&echo, LIMIT).unwrap();
    let seen = thread::scope(|scope| {
        scope.spawn(|| {
            bulk::send(&echo, TOTAL).unwrap();
            echo.shutdown(Shutdown::Write).unwrap();
        });
        bulk::receive(&echo).unwrap()
    });
    assert!(seen.is_all_of(TOTAL), "{seen}");
}

fn client_sees_a_reset_as_reset() {
    let cluster = two_pods();
    let (a, b) = (cluster.pod("x/a"), cluster.pod("x/b"));
    b.serve_as(&[80], Serve::Reset).unwrap();
    let outcome = a.connect(b.addr_v4(80), LIMIT).unwrap();
    // The reset can be there before the client looks at its finished handshake.
    let kind = match outcome.kind() {
        Kind::Connected => outcome
            .into_stream()
            .unwrap()
            .read(&mut [0])
            .unwrap_err()
            .raw_os_error(),
        _ => outcome.errno().map(|errno| errno as i32),
    };
    assert_eq!(kind, Some(Errno::ECONNRESET as i32));
}

fn a_source_port_can_be_chosen() {
    let cluster = two_pods();
    let (a, b) = (cluster.pod("x/a"), cluster.pod("x/b"));
    b.serve(&[80]).unwrap();
    let stream = a
        .connect_from(40_001, b.addr_v4(80), LIMIT)
        .unwrap()
        .into_stream()
        .unwrap();
    assert_eq!(greeting(&stream, LIMIT).unwrap().client, a.addr_v4(40_001));
}

fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
}
