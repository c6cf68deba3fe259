//! The cases of the policy crate, replayed on the wire from manifests on disk.
use std::fs;
use std::net::SocketAddr;

use lab::traffic::UdpOutcome;
use lab::{Protocol, ServiceSpec};
use serde_json::{Value, json};
use testbed::runner::Test;

use testbed::cases::world::{Change, World};
use testbed::matrix::{self, MatrixCluster, Source};
use testbed::{SOON, TestCluster, marker, policy, small};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    kubernetes_documentation_policies_pass_on_real_connections,
    upstream_cases_pass_with_tcp_udp_and_sctp,
    upstream_cases_pass_without_a_proxy,
    network_policy_recipes_pass_on_real_connections,
    additional_conformance_cases_pass_on_real_connections,
    egress_rules_match_pods_behind_a_service,
];

fn kubernetes_documentation_policies_pass_on_real_connections() {
    replay("docs", 13);
}

fn upstream_cases_pass_with_tcp_udp_and_sctp() {
    replay("upstream", 48);
}

fn upstream_cases_pass_without_a_proxy() {
    let cases = matrix::cases("upstream", 48);
    let mut matrix = MatrixCluster::new(&cases, |bed| {
        bed.set_env("PORTREEVE_TCP", "kernel");
        Manifests::new(bed)
    });
    matrix.play_all(&cases);
}

fn network_policy_recipes_pass_on_real_connections() {
    replay("recipes", 14);
}

fn additional_conformance_cases_pass_on_real_connections() {
    replay("more", 7);
}

/// Policies match pods' addresses and ports, after DNAT of the Service.
fn egress_rules_match_pods_behind_a_service() {
    let front = ServiceSpec::new("x", "front").selects("pod", "b");
    let front = front.port(8080, 80).port_of(5353, 53, Protocol::Udp);
    let mut bed = TestCluster::bare(small().service(front));
    let (a, b, front) = (
        bed.lab.pod("x/a"),
        bed.lab.pod("x/b"),
        bed.lab.service("x/front"),
    );
    b.serve_udp(&[53]).unwrap();
    bed.enforce(&[]);
    let to = |addresses: [SocketAddr; 2], udp: u16| {
        let blocks = addresses.map(|it| {
            let length = if it.is_ipv4() { 32 } else { 128 };
            json!({ "ipBlock": { "cidr": format!("{}/{length}", it.ip()) } })
        });
        let ports = json!([{ "port": addresses[0].port() }, { "port": udp, "protocol": "UDP" }]);
        let spec = json!({ "podSelector": { "matchLabels": { "pod": "a" } }, "policyTypes": ["Egress"], "egress": [{ "to": blocks, "ports": ports }] });
        policy("to", &spec)
    };
    for (rule, allowed) in [
        (to(b.addrs(80), 53), true),
        (to(front.addrs(8080), 5353), false),
        (to(b.addrs(8080), 5353), false),
    ] {
        bed.apply(&[rule]);
        for address in front.addrs(8080) {
            let outcome = a.connect(address, SOON).unwrap();
            assert_eq!(outcome.is_connected(), allowed, "{address}: {outcome}");
        }
        for address in front.addrs(5353) {
            let outcome = a.ask_udp(address, b"who?", SOON).unwrap();
            let answered = matches!(outcome, UdpOutcome::Answered { .. });
            assert_eq!(answered, allowed, "{address}: {outcome}");
        }
    }
}

/// Replays every case of a directory.
fn replay(directory: &str, at_least: usize) {
    let cases = matrix::cases(directory, at_least);
    let mut cluster = MatrixCluster::new(&cases, |bed| Manifests::new(bed));
    cluster.play_all(&cases);
}

/// The whole state in one file of the watched directory, so that it comes into force as one.
pub(crate) struct Manifests(());

impl Manifests {
    /// In place of the lab's own manifests.
    pub(crate) fn new(bed: &TestCluster) -> Self {
        fs::remove_file(bed.manifests().join("cluster.json")).unwrap();
        Self(())
    }
}

impl Source for Manifests {
    fn step(&mut self, bed: &TestCluster, nodes: &[Value], world: &World, _: &[Change]) {
        let mark = bed.mark();
        let mut items = matrix::objects(nodes, world);
        items.push(marker(&mark));
        bed.write(
            "state.json",
            &json!({ "apiVersion": "v1", "kind": "List", "items": items }),
        );
        bed.wait_in_force(&mark);
    }
}
