//! The networks that users have: the same cases hold on each, by TCP and UDP, in both families, on
//! one node and across.
use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use lab::traffic::{UdpOutcome, bulk};
use lab::{Between, Builder, Gateway, Host, Kind, PodSpec, wait_until};
use nix::errno::Errno;
use serde_json::{Value, json};
use testbed::runner::Test;

use testbed::{
    DEADLINE, SEVERAL_SYNS, SOON, TestCluster, Way, connected, deny_ingress, echoes, greeted,
    policy, small,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    policies_hold_on_a_bridge,
    policies_hold_on_hairpin_bridge_without_nf_call,
    policies_hold_on_veths_behind_node_address,
    policies_hold_behind_a_proxy_arp_gateway,
    policies_hold_on_bridges_over_vxlan,
    policies_hold_on_veths_over_vxlan,
];

const BRIDGE: Gateway = Gateway::Bridge { hairpin: false };
const ASK: Duration = Duration::from_millis(500);
const MEGABYTES: u64 = 8 << 20;

fn policies_hold_on_a_bridge() {
    // As the kernel begins with it, and as kubeadm wants it.
    hold_on(small().gateway(BRIDGE), "1");
}

fn policies_hold_on_hairpin_bridge_without_nf_call() {
    hold_on(small().gateway(Gateway::Bridge { hairpin: true }), "0");
}

fn policies_hold_on_veths_behind_node_address() {
    hold_on(small().gateway(Gateway::NodeAddress), "1");
}

fn policies_hold_behind_a_proxy_arp_gateway() {
    hold_on(small().gateway(Gateway::LinkLocal), "1");
}

fn policies_hold_on_bridges_over_vxlan() {
    hold_on(small().gateway(BRIDGE).between(Between::Vxlan), "1");
}

fn policies_hold_on_veths_over_vxlan() {
    hold_on(small().between(Between::Vxlan), "1");
}

/// Lets some ports of one pod be reached by x/a only.
fn only_from_a(server: &str) -> Value {
    let ports = json!([
        { "port": 80, "protocol": "TCP" }, { "port": 82, "protocol": "TCP" },
        { "port": 53, "protocol": "UDP" }, { "port": 54, "protocol": "UDP" },
    ]);
    let from = json!([{ "podSelector": { "matchLabels": { "pod": "a" } } }]);
    let spec = json!({
        "podSelector": { "matchLabels": { "pod": server } },
        "policyTypes": ["Ingress"],
        "ingress": [{ "from": from, "ports": ports }],
    });
    policy(&format!("only-from-a-{server}"), &spec)
}

/// Sets whether bridges look into IP packets, on every node.
fn look_into_packets(bed: &TestCluster, value: &str) {
    for node in bed.lab.nodes() {
        for family in ["iptables", "ip6tables"] {
            let name = format!("bridge/bridge-nf-call-{family}");
            node.netns().set_sysctls(&[(&name, value)]).unwrap();
        }
    }
}

/// All cases, first without policy, then with, then with less.
fn hold_on(cluster: Builder, looks_into_packets: &str) {
    let mut bed = TestCluster::bare(cluster);
    look_into_packets(&bed, looks_into_packets);
    for pod in bed.lab.pods() {
        pod.serve_udp(&[53, 55]).unwrap();
    }
    bed.enforce(&[]);
    everyone_reaches_everyone(&bed);
    let policies = [only_from_a("b"), only_from_a("c")];
    bed.apply(&policies);
    allowed_clients_are_served(&bed);
    denied_clients_get_no_answer(&bed);
    the_rest_is_as_ever(&bed);
    a_change_cuts_what_it_denies(&bed);
    bed.apply(&policies);
    a_new_pod_is_held_until_it_is_known(&mut bed);
}

/// Non-isolated pods, and a pod to itself by its Service.
fn everyone_reaches_everyone(bed: &TestCluster) {
    for from in bed.lab.pods() {
        for to in bed.ways(80) {
            assert_eq!(
                greeted(&from, to.to).server,
                to.server,
                "{} {}",
                from.name(),
                to.what
            );
        }
    }
}

fn allowed_clients_are_served(bed: &TestCluster) {
    let a = bed.lab.pod("x/a");
    for way in bed.ways(80) {
        let greeting = greeted(&a, way.to);
        assert_eq!(greeting.server, way.server, "{}", way.what);
        assert!(
            a.addresses().contains(&greeting.client.ip()),
            "{}: {greeting:?}",
            way.what
        );
    }
    for way in bed.ways(82) {
        let outcome = a.connect(way.to, SOON).unwrap();
        assert_eq!(
            outcome.errno(),
            Some(Errno::ECONNREFUSED),
            "nobody listens, {}",
            way.what
        );
    }
    for (way, outcome) in asked(&a, bed.ways(53)) {
        let answered = matches!(outcome, UdpOutcome::Answered { .. });
        assert!(answered, "{}: {outcome}", way.what);
    }
    for (way, outcome) in asked(&a, bed.ways(54)) {
        assert_eq!(outcome, UdpOutcome::Refused, "nobody listens, {}", way.what);
    }
    for server in ["x/b", "x/c"] {
        let server = bed.lab.pod(server);
        for to in server.addrs(80) {
            a_stream_arrives_whole(&a, &server, to);
        }
    }
}

fn a_stream_arrives_whole(from: &Host, server: &Host, to: SocketAddr) {
    let any: SocketAddr = if to.is_ipv4() {
        ([0, 0, 0, 0], 82).into()
    } else {
        ([0u16; 8], 82).into()
    };
    let listener = server.listen(any).unwrap();
    let client = from
        .connect((to.ip(), 82).into(), DEADLINE)
        .unwrap()
        .into_stream()
        .unwrap();
    let (accepted, _) = listener.accept().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            bulk::send(&client, MEGABYTES).unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let seen = bulk::receive(&accepted).unwrap();
        assert!(seen.is_all_of(MEGABYTES), "{to}: {seen}");
    });
}

fn denied_clients_get_no_answer(bed: &TestCluster) {
    let (a, d) = (bed.lab.pod("x/a"), bed.lab.pod("x/d"));
    let (closed, denied) = (bed.ways(81), bed.ways(80));
    thread::scope(|scope| {
        scope.spawn(|| hears_nothing(&a, &closed));
        scope.spawn(|| hears_nothing(&d, &denied));
    });
    for (client, port) in [(&a, 55), (&d, 53)] {
        for (way, outcome) in asked(client, bed.ways(port)) {
            let what = format!("{} to {}, {}", client.name(), way.to, way.what);
            assert_eq!(outcome, UdpOutcome::TimedOut, "{what}");
        }
    }
}

/// The outcome of a datagram by each of these ways, all at once.
fn asked(client: &Host, ways: Vec<Way>) -> Vec<(Way, UdpOutcome)> {
    thread::scope(|scope| {
        let asked = ways.into_iter().map(|way| {
            let outcome = scope.spawn({
                let to = way.to;
                move || client.ask_udp(to, b"who?", ASK).unwrap()
            });
            (way, outcome)
        });
        let asked: Vec<_> = asked.collect();
        let ended = asked.into_iter();
        ended
            .map(|(way, outcome)| (way, outcome.join().unwrap()))
            .collect()
    })
}

fn hears_nothing(client: &Host, ways: &[Way]) {
    let capture = client.capture().unwrap();
    let targets: Vec<_> = ways.iter().map(|way| way.to).collect();
    let outcomes = client.connect_all(&targets, SEVERAL_SYNS).unwrap();
    for (way, outcome) in ways.iter().zip(outcomes) {
        let what = format!("{} to {}, {}: {outcome}", client.name(), way.to, way.what);
        assert_eq!(outcome.kind(), Kind::TimedOut, "{what}");
        let heard = capture.count(|packet| packet.protocol == 6 && packet.source == way.to);
        assert_eq!(heard, 0, "{what}");
    }
}

/// Traffic outside of the policy: the isolated pod's egress, also to itself, its node, the world.
fn the_rest_is_as_ever(bed: &TestCluster) {
    for server in ["x/b", "x/c"] {
        let from = bed.lab.pod(server);
        let own = bed.lab.service(server).addrs(80);
        for to in bed.lab.pod("x/d").addrs(80).into_iter().chain(own) {
            greeted(&from, to);
        }
        for to in from.addrs(80) {
            assert_eq!(greeted(&bed.lab.node_of(server), to).server, server);
        }
        for to in bed.lab.outside().addrs(99) {
            let outcome = from.connect(to, SOON).unwrap();
            assert_eq!(
                outcome.errno(),
                Some(Errno::ECONNREFUSED),
                "{server} to {to}"
            );
        }
        for to in bed.lab.node_of(server).addrs(99) {
            let outcome = from.connect(to, SOON).unwrap();
            assert_eq!(
                outcome.errno(),
                Some(Errno::ECONNREFUSED),
                "{server} to {to}"
            );
        }
    }
}

fn a_change_cuts_what_it_denies(bed: &TestCluster) {
    let a = bed.lab.pod("x/a");
    let (b, c) = (bed.lab.pod("x/b"), bed.lab.pod("x/c"));
    let spared = c.addrs(80).map(|to| connected(&a, to));
    let doomed = b.addrs(80).map(|to| connected(&a, to));
    let services = bed.lab.service("x/b").addrs(53);
    let flows: Vec<_> = b
        .addrs(53)
        .into_iter()
        .chain(services)
        .map(|to| flow(&a, to))
        .collect();
    assert!(flows.iter().all(goes_on));
    bed.apply(&[deny_ingress("b"), only_from_a("c")]);
    for stream in &doomed {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let read = std::io::Read::read(&mut &*stream, &mut [0; 16]);
        assert_eq!(
            read.map_err(|error| error.kind()),
            Err(std::io::ErrorKind::ConnectionReset)
        );
    }
    wait_until(DEADLINE, "the denied datagrams to stop", || {
        !flows.iter().any(goes_on)
    })
    .unwrap();
    spared
        .iter()
        .for_each(|stream| echoes(stream, "still there"));
}

/// One pair of ends for many datagrams.
fn flow(from: &Host, to: SocketAddr) -> UdpSocket {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = from.run(|| UdpSocket::bind(any)).unwrap().unwrap();
    socket.connect(to).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    socket
}

fn goes_on(flow: &UdpSocket) -> bool {
    flow.send(b"still?").is_ok() && flow.recv(&mut [0; 512]).is_ok()
}

fn a_new_pod_is_held_until_it_is_known(bed: &mut TestCluster) {
    for (name, node) in [("e", 0), ("f", 1)] {
        bed.lab
            .add_pod(PodSpec::new("x", name).node(node).label("pod", name))
            .unwrap();
        bed.lab.pod(&format!("x/{name}")).serve(&[80]).unwrap();
    }
    let a = bed.lab.pod("x/a");
    let new: Vec<_> = ["x/e", "x/f"]
        .iter()
        .flat_map(|name| bed.lab.pod(name).addrs(80))
        .collect();
    thread::scope(|scope| {
        let asked = a.capture().unwrap();
        let waiting = scope.spawn(|| a.connect_all(&new, DEADLINE).unwrap());
        wait_until(DEADLINE, "the first packets to be sent", || {
            new.iter().all(|to| asked.syns_to(*to) > 0)
        })
        .unwrap();
        bed.write_cluster();
        for (to, outcome) in new.iter().zip(waiting.join().unwrap()) {
            assert!(outcome.is_connected(), "{to}: {outcome}");
        }
    });
}
