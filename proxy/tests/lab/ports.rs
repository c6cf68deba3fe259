//! Source ports: pods choose theirs as they like, whatever the proxy uses for its own legs.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;

use kernel::netlink::{self, Header};
use lab::traffic::craft::{self, ACK, FIN, PSH, SYN};
use lab::traffic::greeting;
use lab::{Dial, Host, Kind, Serve};
use nix::sys::socket::{MsgFlags, NetlinkAddr, SockProtocol, recv, sendto};
use socket2::SockRef;
use std::time::Duration;
use testbed::runner::Test;

use testbed::{
    DEADLINE, SOON, TestCluster, allow_all, allow_ingress, connected, counter, deny_egress,
    deny_ingress, echoes, small,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    two_pods_may_use_the_same_source_port,
    pod_using_proxy_upstream_ports_disturbs_nobody,
    non_isolated_pod_on_upstream_ports_disturbs_nobody,
    source_port_is_reusable_after_server_close,
    source_port_is_reusable_after_a_reset,
    source_port_works_for_pod_then_its_service,
    a_stale_upstream_entry_exposes_no_listener,
    streams_to_the_proxys_port_outlive_conntracks_memory,
    proxy_port_never_answers_for_other_hosts,
];

fn two_pods_may_use_the_same_source_port() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let clients = ["x/a", "x/d"].map(|key| bed.lab.pod(key));
    for way in bed.ways(80) {
        let dials: Vec<_> = clients
            .iter()
            .map(|pod| Dial::new(pod, way.to).source_port(40_000))
            .collect();
        let outcomes = lab::traffic::connect_all(&dials, DEADLINE).unwrap();
        let streams: Vec<_> = outcomes
            .into_iter()
            .map(|it| it.into_stream().unwrap())
            .collect();
        for (stream, client) in streams.iter().zip(&clients) {
            let greeting = greeting(stream, DEADLINE).unwrap();
            assert!(
                client.addresses().contains(&greeting.client.ip()),
                "{}: {greeting:?}",
                way.what
            );
            assert_eq!(greeting.server, way.server, "{}", way.what);
        }
        for turn in 0..3 {
            echoes(&streams[0], &format!("one {turn}"));
            echoes(&streams[1], &format!("other {turn}"));
        }
    }
}

fn pod_using_proxy_upstream_ports_disturbs_nobody() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    for way in bed.ways(80) {
        disturb(&bed, "x/a", &way.what, way.to);
    }
}

fn non_isolated_pod_on_upstream_ports_disturbs_nobody() {
    // Only the servers are under policy: what x/a sends is taken because of its destination.
    let bed = TestCluster::enforced(&[], &[allow_ingress("b"), allow_ingress("c")]);
    for way in bed.ways(80) {
        disturb(&bed, "x/a", &way.what, way.to);
    }
}

/// Connects once, learns the port that the proxy used, and dials from that one and those around
/// it, all at the same time: the proxy needs these ports for the same connections.
fn disturb(bed: &TestCluster, client: &str, what: &str, to: SocketAddr) {
    let client = bed.lab.pod(client);
    let first = client.connect(to, DEADLINE).unwrap().into_stream().unwrap();
    let seen = greeting(&first, DEADLINE).unwrap().client.port();
    assert!(
        (2048..30_000).contains(&seen),
        "{what}: {seen} is no port of the proxy"
    );
    let ports: Vec<u16> = (seen - 2..seen + 30).collect();
    let dials: Vec<_> = ports
        .iter()
        .map(|port| Dial::new(&client, to).source_port(*port))
        .collect();
    let outcomes = lab::traffic::connect_all(&dials, DEADLINE).unwrap();
    let streams: Vec<_> = ports
        .iter()
        .zip(outcomes)
        .map(|(port, it)| {
            it.into_stream()
                .unwrap_or_else(|error| panic!("{what}, from {port}: {error}\n{}", bed.logs()))
        })
        .collect();
    for (port, stream) in ports.iter().zip(&streams) {
        let client_seen = greeting(stream, DEADLINE)
            .unwrap_or_else(|error| panic!("{what}, from {port}: {error}"));
        assert!(
            client.addresses().contains(&client_seen.client.ip()),
            "{what}: {client_seen:?}"
        );
    }
    for (port, stream) in ports.iter().zip(&streams) {
        echoes(stream, &format!("from {port}"));
    }
    echoes(&first, "the first one stands");
}

fn source_port_is_reusable_after_server_close() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let a = bed.lab.pod("x/a");
    for server in ["x/b", "x/c"] {
        bed.lab
            .pod(server)
            .serve_as(&[82], Serve::Source(100))
            .unwrap();
    }
    for way in bed.ways(82) {
        let capture = a.capture().unwrap();
        for turn in 1..=10 {
            let outcome = a.connect_from(41_000, way.to, DEADLINE).unwrap();
            let stream = outcome
                .into_stream()
                .unwrap_or_else(|error| panic!("{}, {turn}: {error}", way.what));
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            // The server closes first: the wait for late packets is its, not ours.
            let seen = lab::traffic::bulk::receive(&stream).unwrap();
            assert!(seen.is_all_of(100), "{}, {turn}: {seen}", way.what);
            drop(stream);
        }
        assert_eq!(
            capture.syns_to(way.to),
            10,
            "{}: a SYN was repeated",
            way.what
        );
    }
}

fn source_port_is_reusable_after_a_reset() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let a = bed.lab.pod("x/a");
    for way in bed.ways(80) {
        let capture = a.capture().unwrap();
        for turn in 1..=10 {
            let outcome = a.connect_from(42_000, way.to, DEADLINE).unwrap();
            let stream = outcome
                .into_stream()
                .unwrap_or_else(|error| panic!("{}, {turn}: {error}", way.what));
            greeting(&stream, DEADLINE)
                .unwrap_or_else(|error| panic!("{}, {turn}: {error}", way.what));
            echoes(&stream, "hello");
            SockRef::from(&stream)
                .set_linger(Some(Duration::ZERO))
                .unwrap();
            drop(stream);
        }
        assert_eq!(
            capture.syns_to(way.to),
            10,
            "{}: a SYN was repeated",
            way.what
        );
    }
}

fn source_port_works_for_pod_then_its_service() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let a = bed.lab.pod("x/a");
    for server in ["x/b", "x/c"] {
        let (pod, service) = (bed.lab.pod(server), bed.lab.service(server));
        for (direct, translated) in pod.addrs(80).into_iter().zip(service.addrs(80)) {
            for (port, order) in [
                (44_000, [direct, translated]),
                (44_001, [translated, direct]),
            ] {
                let capture = a.capture().unwrap();
                for to in order {
                    let outcome = a.connect_from(port, to, DEADLINE).unwrap();
                    let stream = outcome.into_stream();
                    let stream = stream.unwrap_or_else(|error| panic!("{to} from {port}: {error}"));
                    let seen = greeting(&stream, DEADLINE).unwrap();
                    assert!(a.addresses().contains(&seen.client.ip()), "{to}: {seen:?}");
                    drop(stream);
                    bed.wait_for_no_connection();
                    assert_eq!(
                        capture.syns_to(to),
                        1,
                        "{to} from {port}: a SYN was repeated"
                    );
                }
            }
        }
    }
}

/// Our leg is gone, but its conntrack entry is not: a SYN of the server would reach any socket that listens on the
/// leg's port.
fn a_stale_upstream_entry_exposes_no_listener() {
    let mut bed = TestCluster::bare(small());
    bed.write_policies(&[allow_ingress("b"), deny_egress("b")]);
    bed.enforce(&["--own-node", "judge"]);
    let (a, b, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.node(0));
    // It says nothing, as a server behind a firewall.
    b.nft(
        "table inet silent { chain in { type filter hook input priority 0; tcp dport 99 drop; }; }",
    )
    .unwrap();
    let capture = b.capture().unwrap();
    let mut legs = Vec::new();
    for to in b.addrs(99) {
        assert_eq!(a.connect(to, SOON).unwrap().kind(), Kind::TimedOut);
        let leg = capture.packets().into_iter().find(|it| it.is_syn_to(to));
        legs.push((to, leg.unwrap().source));
    }
    bed.kill(0);
    let way = b.injector().unwrap();
    for (at, (from, to)) in legs.into_iter().enumerate().rev() {
        let any: IpAddr = if to.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        let _listener = node.listen((any, to.port()).into()).unwrap();
        let before = counter(&node, "out_of_state");
        way.send(&craft::tcp(from, to, SYN, 1, &[])).unwrap();
        // One honest packet, which comes back after it.
        let _pong = node.connect(b.addrs(80)[at], DEADLINE).unwrap();
        assert_eq!(capture.syn_acks_from(to), 0, "{to}");
        assert_eq!(counter(&node, "out_of_state"), before + 1, "{to}");
    }
}

fn streams_to_the_proxys_port_outlive_conntracks_memory() {
    let bed = TestCluster::enforced(&[], &[deny_ingress("d")]);
    let (a, b, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.node(0));
    b.serve(&[15_001, 15_002]).unwrap();
    let to = [b.addrs(15_001), b.addrs(15_002)].concat();
    let streams: Vec<_> = to.into_iter().map(|to| connected(&a, to)).collect();
    forget_all(&node);
    for stream in &streams {
        echoes(stream, "still here");
    }
}

/// Neither for addresses that no host has, nor for pods; for any kind of packet.
fn proxy_port_never_answers_for_other_hosts() {
    let bed = TestCluster::enforced(&[], &[deny_ingress("d")]);
    let (a, b, outside) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.outside());
    for to in b.addrs(80) {
        drop(connected(&a, to));
    }
    let capture = a.capture().unwrap();
    let way = a.injector().unwrap();
    let others = [bed.lab.blackhole(15_001), bed.lab.unreachable(15_001)];
    for to in others.concat() {
        let from = a.addrs(4000)[usize::from(to.is_ipv6())];
        for flags in [ACK, ACK | PSH, FIN | ACK, SYN | ACK, 0] {
            way.send(&craft::tcp(from, to, flags, 1, &[])).unwrap();
        }
    }
    // An existing host answers for itself, which shows that all packets were processed.
    for (from, to) in a.addrs(4001).into_iter().zip(outside.addrs(15_001)) {
        way.send(&craft::tcp(from, to, ACK, 1, &[])).unwrap();
        capture
            .wait_for(DEADLINE, "a reset", 1, |it| {
                it.source == to && it.flags.is_reset()
            })
            .unwrap();
    }
    let answered = |it: &lab::Packet| it.destination.port() == 4000 && it.protocol == 6;
    assert_eq!(capture.count(answered), 0);
}

/// Has conntrack of a node forget every connection (linux/netfilter/nfnetlink_conntrack.h).
fn forget_all(node: &Host) {
    const CTNETLINK_DELETE: u16 = 1 << 8 | 2;
    node.run(|| {
        let kernel = netlink::asking(SockProtocol::NetlinkNetFilter).unwrap();
        let mut request = Vec::new();
        let header = Header {
            kind: CTNETLINK_DELETE,
            flags: netlink::REQUEST | netlink::ACK,
            ..Header::default()
        };
        netlink::write(&mut request, header, |_| {});
        let fd = kernel.as_raw_fd();
        sendto(fd, &request, &NetlinkAddr::new(0, 0), MsgFlags::empty()).unwrap();
        let mut answer = [0; 256];
        let length = recv(fd, &mut answer, MsgFlags::empty()).unwrap();
        let last = netlink::messages(&answer[..length]).all(|it| it.is_last().unwrap());
        assert!(last);
    })
    .unwrap();
}
