//! Source ports: pods choose theirs as they like, whatever the proxy uses for its own legs.
use std::net::SocketAddr;

use lab::runner::Test;
use lab::traffic::greeting;
use lab::{Dial, Serve};
use socket2::SockRef;
use std::time::Duration;

use crate::support::{Bed, DEADLINE, allow_all, allow_ingress, echoes};

pub(crate) const TESTS: &[Test] = &lab::tests![
    two_pods_that_dial_from_the_same_port_do_not_disturb_each_other,
    a_pod_on_the_proxys_own_upstream_ports_disturbs_nobody,
    a_released_pod_on_the_proxys_own_upstream_ports_disturbs_nobody,
    a_source_port_can_be_used_again_right_after_the_server_closed,
    a_source_port_can_be_used_again_right_after_a_reset,
    a_source_port_can_go_to_a_pod_and_then_to_its_service,
];

fn two_pods_that_dial_from_the_same_port_do_not_disturb_each_other() {
    let bed = Bed::enforced(&[], &[allow_all()]);
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

fn a_pod_on_the_proxys_own_upstream_ports_disturbs_nobody() {
    let bed = Bed::enforced(&[], &[allow_all()]);
    for way in bed.ways(80) {
        disturb(&bed, "x/a", &way.what, way.to);
    }
}

fn a_released_pod_on_the_proxys_own_upstream_ports_disturbs_nobody() {
    // Only the servers are under policy: what x/a sends is taken because of its destination.
    let bed = Bed::enforced(&[], &[allow_ingress("b"), allow_ingress("c")]);
    for way in bed.ways(80) {
        disturb(&bed, "x/a", &way.what, way.to);
    }
}

/// Connects once, learns the port that the proxy used, and dials from that one and those around
/// it, all at the same time: the proxy will want them for these very connections.
fn disturb(bed: &Bed, client: &str, what: &str, to: SocketAddr) {
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

fn a_source_port_can_be_used_again_right_after_the_server_closed() {
    let bed = Bed::enforced(&[], &[allow_all()]);
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

fn a_source_port_can_be_used_again_right_after_a_reset() {
    let bed = Bed::enforced(&[], &[allow_all()]);
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

fn a_source_port_can_go_to_a_pod_and_then_to_its_service() {
    let bed = Bed::enforced(&[], &[allow_all()]);
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
