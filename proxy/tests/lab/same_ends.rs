//! Flows for which conntrack has several entries, or another name than the gate: a change severs all of them.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use lab::traffic::craft::{self, SYN};
use lab::traffic::{Way, introduce};
use lab::{Capture, Cluster, PodSpec, ServiceSpec, wait_until};
use testbed::runner::Test;

use testbed::{DEADLINE, TestCluster, allow_all, deny_egress};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    udp_flows_with_equal_ends_are_severed_together,
    icmp_flows_of_one_identifier_are_severed_together,
    tcp_behind_an_authentication_header_is_severed,
];

/// How long a change may take; the list of flows is compared with conntrack every 15 seconds only.
const CHANGE: Duration = Duration::from_secs(2);
const ANSWER: Duration = Duration::from_millis(100);

/// A pod sends from one port to another pod, and to the same pod by its Services.
fn udp_flows_with_equal_ends_are_severed_together() {
    let services = ["one", "two"].map(|name| {
        let service = ServiceSpec::new("x", name).selects("pod", "b");
        service.port_of(53, 53, lab::Protocol::Udp)
    });
    let pods = ["a", "b"].map(|name| PodSpec::new("x", name).node(0).label("pod", name));
    let cluster = Cluster::builder().nodes(1).pods(pods).services(services);
    let mut bed = TestCluster::bare(cluster);
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"));
    let (protocol, addresses) = (lab::Protocol::Udp, b.addresses());
    let _server = introduce(b.netns(), b.name(), protocol, &addresses, &[53]).unwrap();
    bed.write_policies(&[allow_all()]);
    bed.enforce(&[]);
    let any: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    for (family, any) in any.into_iter().enumerate() {
        bed.apply(&[allow_all()]);
        let socket = a.run(|| UdpSocket::bind((any, 0))).unwrap().unwrap();
        socket.set_read_timeout(Some(ANSWER)).unwrap();
        let by = |service: &str| bed.lab.service(service).addrs(53)[family];
        let ways = [b.addrs(53)[family], by("x/one"), by("x/two")];
        let answers = |to: SocketAddr| {
            let answered = socket.send_to(b"who?", to).is_ok();
            answered && socket.recv_from(&mut [0; 512]).is_ok()
        };
        for to in ways {
            assert!(answers(to), "{to}: allowed at first");
        }
        assert_stops(&bed, || ways.iter().any(|to| answers(*to)));
    }
}

/// Conntrack has an entry for each type of query (nf_conntrack_proto_icmp.c).
fn icmp_flows_of_one_identifier_are_severed_together() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"));
    let (from, to) = (a.addresses()[0], b.addresses()[0]);
    // Echo and timestamp, with identifier 7.
    let [echo, timestamp] = [(8, 4), (13, 16)].map(|(kind, length)| {
        craft::icmp(
            from,
            to,
            kind,
            0,
            &[&[0, 7][..], &[0; 14]].concat()[..length],
        )
    });
    let injector = a.injector().unwrap();
    let capture = b.capture().unwrap();
    let arrives = |packet: &Vec<u8>| arrives(&capture, || injector.send(packet).unwrap());
    assert!(arrives(&echo) && arrives(&timestamp), "allowed at first");
    assert_stops(&bed, || [&echo, &timestamp].map(arrives) != [false; 2]);
}

/// Conntrack follows TCP through the header in IPv6 only.
fn tcp_behind_an_authentication_header_is_severed() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"));
    let (from, to) = (SocketAddr::new(a.addresses()[1], 40_000), b.addrs(82)[1]);
    let segment = craft::tcp(from, to, SYN, 1, b"");
    let header = [&[6, 4, 0, 0][..], &[0; 20], &segment[40..]].concat();
    let wrapped = craft::ip(from.ip(), to.ip(), 51, &header);
    let injector = a.injector().unwrap();
    let capture = b.capture().unwrap();
    let arrives = |packet: &Vec<u8>| arrives(&capture, || injector.send(packet).unwrap());
    assert!(arrives(&wrapped), "allowed at first");
    bed.apply(&[deny_egress("a")]);
    assert!(!arrives(&segment), "as one more packet of the flow");
}

/// Denies all that `x/a` sends, and waits until nothing of it goes on.
#[track_caller]
fn assert_stops(bed: &TestCluster, goes_on: impl Fn() -> bool) {
    let changed = Instant::now();
    bed.write_policies(&[deny_egress("a")]);
    wait_until(DEADLINE, "the denied flows to stop", || !goes_on()).unwrap();
    let took = changed.elapsed();
    assert!(took < CHANGE, "stopped only after {took:?}");
}

/// Whether anything arrives soon after `send`.
fn arrives(capture: &Capture, send: impl Fn()) -> bool {
    let count = || capture.count(|packet| packet.way == Way::In);
    let before = count();
    send();
    wait_until(ANSWER, "the packet to arrive", || count() > before).is_ok()
}
