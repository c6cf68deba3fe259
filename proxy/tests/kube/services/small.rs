//! Session affinity, and Services without endpoints.
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use lab::kubernetes::{ControlPlane, ProxyMode};
use lab::traffic::{Greeting, Server, UdpOutcome};
use lab::{Child, Cluster, Host, Kind, PodSpec, Protocol};
use serde_json::{Value, json};
use testbed::runner::Test;
use testbed::{DEADLINE, TestCluster, greeted, policy};

use crate::control;

use super::{PROTOCOLS, cluster_ips, serve, start_kube_proxies};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    session_affinity_holds_with_and_without_policy,
    service_without_endpoints_refuses_with_any_policy,
];

fn session_affinity_holds_with_and_without_policy() {
    for mode in [ProxyMode::Iptables, ProxyMode::Nftables] {
        let small = Small::new(
            mode,
            &[("sticky", STICKY, "ClientIP"), ("spread", SPREAD, "None")],
        );
        for client in small.clients() {
            for family in [0, 1] {
                let servers = |service: u8, protocol| -> BTreeSet<String> {
                    let to = (cluster_ips(service)[family], 80).into();
                    let once = |_| match protocol {
                        Protocol::Udp => asked(&client, to).server,
                        _ => greeted(&client, to).server,
                    };
                    (0..24).map(once).collect()
                };
                for protocol in PROTOCOLS {
                    let what = format!("{mode:?}, {}, {protocol}", client.name());
                    let (stuck, met) = (servers(STICKY, protocol), servers(SPREAD, protocol));
                    assert_eq!(stuck.len(), 1, "{what}: {stuck:?}");
                    // By chance of 2^-23 all are one.
                    assert_eq!(met.len(), 2, "{what}: {met:?}");
                }
            }
        }
    }
}

fn service_without_endpoints_refuses_with_any_policy() {
    for mode in [ProxyMode::Iptables, ProxyMode::Nftables] {
        let small = Small::new(mode, &[("empty", EMPTY, "None")]);
        for client in small.clients() {
            for ip in cluster_ips(EMPTY) {
                let what = format!("{mode:?}, {} to {ip}", client.name());
                let outcome = client.connect((ip, 80).into(), DEADLINE).unwrap();
                assert_eq!(outcome.kind(), Kind::Refused, "{what}: {outcome}");
                let asked = client.ask_udp((ip, 80).into(), b"who?", DEADLINE).unwrap();
                assert_eq!(asked, UdpOutcome::Refused, "{what}");
            }
        }
    }
}

/// The server that answers a datagram.
#[track_caller]
fn asked(from: &Host, to: SocketAddr) -> Greeting {
    match from.ask_udp(to, b"who?", DEADLINE).unwrap() {
        UdpOutcome::Answered { text, .. } => Greeting::parse(&text).unwrap(),
        other => panic!("{to}: {other}"),
    }
}

/// The last parts of ClusterIPs.
const STICKY: u8 = 30;

const SPREAD: u8 = 31;

const EMPTY: u8 = 32;

/// Two servers on two nodes, and two clients of which one is under egress policy.
struct Small {
    bed: TestCluster,
    _udp: Vec<Server>,
    _control: Arc<ControlPlane>,
    _proxies: Vec<Child>,
}

impl Small {
    /// With Services of these names, ClusterIPs and `sessionAffinity`; the servers are behind all but
    /// [`EMPTY`].
    fn new(mode: ProxyMode, services: &[(&str, u8, &str)]) -> Self {
        let server = |name, node| PodSpec::new("x", name).node(node).label("app", "server");
        let lab = Cluster::builder()
            .nodes(2)
            .pods([server("one", 0), server("two", 1)])
            .pod(PodSpec::new("x", "policed").node(0).label("policed", "yes"))
            .pod(PodSpec::new("x", "free").node(0))
            .build()
            .unwrap();
        let control = control::joined(&lab);
        let services: Vec<_> = services
            .iter()
            .map(|(name, ip, affinity)| cluster_ip_service(name, *ip, affinity))
            .collect();
        let proxies = start_kube_proxies(&control, &lab, mode, &services);
        let udp = ["x/one", "x/two"].map(|name| serve(&lab, name)).into();
        let mut bed = TestCluster::of(lab);
        let spec = json!({
            "podSelector": { "matchLabels": { "policed": "yes" } },
            "policyTypes": ["Egress"], "egress": [{}],
        });
        bed.write_policies(&[policy("may-go-out", &spec)]);
        bed.enforce(&[]);
        Self {
            bed,
            _udp: udp,
            _control: control,
            _proxies: proxies,
        }
    }

    fn clients(&self) -> [Host; 2] {
        ["x/policed", "x/free"].map(|name| self.bed.lab.pod(name))
    }
}

fn cluster_ip_service(name: &str, ip: u8, affinity: &str) -> Value {
    let ips = cluster_ips(ip);
    let app = if ip == EMPTY { "nobody" } else { "server" };
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "namespace": "x", "name": name },
        "spec": {
            "clusterIP": ips[0], "clusterIPs": ips,
            "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
            "sessionAffinity": affinity, "selector": { "app": app },
            "ports": PROTOCOLS.map(|protocol| json!({
                "name": protocol.to_string().to_lowercase(), "protocol": protocol.to_string(),
                "port": 80, "targetPort": 8080,
            })),
        },
    })
}
