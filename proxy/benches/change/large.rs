//! A large cluster, nearly all of it on other nodes, as its manifests.
//!
//! Does not know where its objects go.
use serde_json::{Value, json};

/// Pods of a node, those of ours as well.
const OF_A_NODE: u32 = 250;
/// Applications of all teams; a namespace has some of them, with replicas.
const APPLICATIONS: u32 = 40;

/// A cluster of so many pods: a twentieth as many namespaces, a fifth as many policies.
#[derive(Clone, Copy)]
pub(crate) struct Large {
    pub(crate) pods: u32,
}

impl Large {
    pub(crate) fn namespaces(self) -> u32 {
        (self.pods / 20).max(1)
    }

    pub(crate) fn policies(self) -> u32 {
        self.pods / 5
    }

    /// Its nodes but the first, which is ours, and its namespaces.
    pub(crate) fn frame(self) -> impl Iterator<Item = Value> {
        let nodes = 1..self.pods.div_ceil(OF_A_NODE);
        nodes.map(node).chain((0..self.namespaces()).map(namespace))
    }

    /// Its pods and policies.
    pub(crate) fn content(self) -> impl Iterator<Item = Value> {
        let pods = (0..self.pods).map(move |number| self.pod(number, 0));
        pods.chain((0..self.policies()).map(move |number| self.policy(number)))
    }

    /// A pod after so many changes; each gives it the labels of another application.
    pub(crate) fn pod(self, number: u32, change: u32) -> Value {
        let team = number % self.namespaces();
        let replica = number / self.namespaces();
        let app = (team + replica % 5 + change) % APPLICATIONS;
        let (node, place) = (number / OF_A_NODE, number % OF_A_NODE);
        // The lab's own pods are at the beginning of the first node's network.
        let ip = format!("{}.{}", network(node), 254 - place);
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "namespace": format!("team-{team}"),
                "name": format!("pod-{number}"),
                "uid": format!("uid-{number}"),
                "labels": { "app": format!("app-{app}"), "tier": format!("tier-{}", number % 3) },
            },
            "spec": { "nodeName": format!("node-{node}"), "containers": [{ "name": "main", "image": "none" }] },
            "status": {
                "phase": "Running",
                "podIP": ip,
                "podIPs": [{ "ip": ip }],
                "startTime": "2026-01-01T00:00:00Z",
            },
        })
    }

    /// What most policies are: who of an application may be talked to by another.
    fn policy(self, number: u32) -> Value {
        let (team, which) = (number % self.namespaces(), number / self.namespaces());
        let app = |next: u32| {
            let app = (team + which + next) % APPLICATIONS;
            json!({ "matchLabels": { "app": format!("app-{app}") } })
        };
        let from =
            json!([{ "podSelector": app(1) }, { "namespaceSelector": {}, "podSelector": app(2) }]);
        let ports = json!([{ "port": 80 + number % 20 }]);
        json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": { "namespace": format!("team-{team}"), "name": format!("policy-{number}") },
            "spec": { "podSelector": app(0), "ingress": [{ "from": from, "ports": ports }] },
        })
    }
}

fn node(number: u32) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": format!("node-{number}") },
        "spec": { "podCIDRs": [format!("{}.0/24", network(number))] },
        "status": { "addresses": [{ "type": "InternalIP", "address": format!("172.30.0.{number}") }] },
    })
}

fn namespace(number: u32) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": { "name": format!("team-{number}"), "labels": { "team": format!("{number}") } },
    })
}

/// The first three bytes of a node's pods' addresses, as the lab has them.
fn network(node: u32) -> String {
    format!("10.{}.{}", 244 + node / 256, node % 256)
}
