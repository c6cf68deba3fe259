//! A cluster as plain data: what the cases, the naive oracle and the crate under test all start
//! from.
//!
//! Knows nothing of the `policy` crate: policies stay the JSON that the API server would store.
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::Value;

/// `metadata.labels`.
pub type Labels = BTreeMap<String, String>;
/// Namespace and name of a pod or a policy.
pub type Key = (String, String);

/// One entry of `containers[].ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerPort {
    /// Policies may name a port by it.
    pub name: Option<String>,
    /// The port.
    pub number: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name in the namespace.
    pub name: String,
    /// `metadata.labels`.
    pub labels: Labels,
    /// The name of its node.
    pub node: String,
    /// `spec.hostNetwork`: its addresses are the node's.
    pub host_network: bool,
    /// Its phase is Succeeded or Failed.
    pub finished: bool,
    /// It has a deletion timestamp.
    pub terminating: bool,
    /// What it serves.
    pub ports: Vec<ContainerPort>,
    /// `status.podIPs`.
    pub addresses: Vec<IpAddr>,
    /// RFC 3339.
    pub started: String,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// `status.addresses`.
    pub addresses: Vec<IpAddr>,
    /// CIDRs.
    pub pod_cidrs: Vec<String>,
}

/// The state of a cluster. A namespace without an entry has no label but its name's.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct World {
    /// Labels by name.
    pub namespaces: BTreeMap<String, Labels>,
    /// By name.
    pub nodes: BTreeMap<String, Node>,
    /// By namespace and name.
    pub pods: BTreeMap<Key, Pod>,
    /// Whole NetworkPolicy objects.
    pub policies: BTreeMap<Key, Value>,
}

/// One step from a state to the next: an object as it is now, or its end.
#[derive(Clone, Debug)]
pub enum Change {
    /// A namespace has these labels.
    Namespace(String, Labels),
    /// A namespace is gone.
    NoNamespace(String),
    /// A node is as given.
    Node(Node),
    /// A node is gone.
    NoNode(String),
    /// A pod is as given.
    Pod(Pod),
    /// A pod is gone.
    NoPod(Key),
    /// A policy is as given.
    Policy(Value),
    /// A policy is gone.
    NoPolicy(Key),
}

impl World {
    /// Two nodes and nothing on them.
    pub fn nodes_only() -> Self {
        let nodes = [1, 2].map(|number| (format!("node-{number}"), node(number)));
        Self {
            nodes: nodes.into(),
            ..Self::default()
        }
    }

    /// The cluster of the upstream end-to-end suite: pods a, b and c in namespaces x, y and z,
    /// labelled by their names, on two nodes by turns.
    pub fn nine_pods() -> Self {
        let mut world = Self::nodes_only();
        for namespace in ["x", "y", "z"] {
            world
                .namespaces
                .insert(namespace.into(), labels(&[("ns", namespace)]));
            for name in ["a", "b", "c"] {
                let pod = pod(world.pods.len(), namespace, name, labels(&[("pod", name)]));
                world.apply(&Change::Pod(pod));
            }
        }
        world
    }

    /// Brings `change` about.
    pub fn apply(&mut self, change: &Change) {
        match change.clone() {
            Change::Namespace(name, labels) => drop(self.namespaces.insert(name, labels)),
            Change::NoNamespace(name) => drop(self.namespaces.remove(&name)),
            Change::Node(node) => drop(self.nodes.insert(node.name.clone(), node)),
            Change::NoNode(name) => drop(self.nodes.remove(&name)),
            Change::Pod(pod) => drop(self.pods.insert(pod.key(), pod)),
            Change::NoPod(key) => drop(self.pods.remove(&key)),
            Change::Policy(policy) => drop(self.policies.insert(policy_key(&policy), policy)),
            Change::NoPolicy(key) => drop(self.policies.remove(&key)),
        }
    }

    /// The objects one by one: applied to an empty world, in any order, they give this one.
    pub fn changes(&self) -> Vec<Change> {
        let namespaces = self
            .namespaces
            .iter()
            .map(|(name, labels)| Change::Namespace(name.clone(), labels.clone()));
        namespaces
            .chain(self.nodes.values().cloned().map(Change::Node))
            .chain(self.pods.values().cloned().map(Change::Pod))
            .chain(self.policies.values().cloned().map(Change::Policy))
            .collect()
    }
}

impl Pod {
    /// Namespace and name.
    pub fn key(&self) -> Key {
        (self.namespace.clone(), self.name.clone())
    }

    /// A pod owns its addresses while it runs in a network of its own.
    pub fn owns_addresses(&self) -> bool {
        !self.host_network && !self.finished
    }
}

/// Namespace and name of a NetworkPolicy object; a missing namespace is `default`.
pub fn policy_key(policy: &Value) -> Key {
    let field = |name: &str| policy["metadata"][name].as_str().map(str::to_owned);
    let namespace = field("namespace").unwrap_or_else(|| "default".into());
    (
        namespace,
        field("name").expect("a policy has metadata.name"),
    )
}

/// Labels of pairs.
pub fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs
        .iter()
        .map(|&(key, value)| (key.into(), value.into()))
        .collect()
}

/// A running pod in the given place of the cluster: places alternate between the nodes, and fix
/// the pod's addresses. It serves 80 and 81 over every protocol, named as upstream does.
pub fn pod(slot: usize, namespace: &str, name: &str, labels: Labels) -> Pod {
    let number = 1 + slot % 2;
    let mut ports = Vec::new();
    for (port, protocol) in [80, 81]
        .iter()
        .flat_map(|port| ["TCP", "UDP", "SCTP"].map(|p| (*port, p)))
    {
        let name = format!("serve-{port}-{}", protocol.to_lowercase());
        ports.push(ContainerPort {
            name: Some(name),
            number: port,
            protocol: protocol.into(),
        });
    }
    Pod {
        namespace: namespace.into(),
        name: name.into(),
        labels,
        node: format!("node-{number}"),
        host_network: false,
        finished: false,
        terminating: false,
        ports,
        addresses: addresses(slot).into(),
        // Some start in the same second.
        started: format!("2026-01-01T00:00:{:02}Z", slot / 3),
    }
}

/// The addresses that belong to a place: 10.244.NODE.(10 + slot) and its IPv6 twin.
pub fn addresses(slot: usize) -> [IpAddr; 2] {
    let node = u8::try_from(1 + slot % 2).expect("two nodes");
    let host = u8::try_from(10 + slot).expect("fewer than 246 slots");
    [
        Ipv4Addr::new(10, 244, node, host).into(),
        Ipv6Addr::new(0xfd00, 0x10, 0x244, node.into(), 0, 0, 0, host.into()).into(),
    ]
}

fn node(number: u8) -> Node {
    let v6 = Ipv6Addr::new(0xfd00, 0x30, 0, 0, 0, 0, 0, number.into());
    Node {
        name: format!("node-{number}"),
        addresses: vec![Ipv4Addr::new(172, 30, 0, number).into(), v6.into()],
        pod_cidrs: vec![
            format!("10.244.{number}.0/24"),
            format!("fd00:10:244:{number}::/64"),
        ],
    }
}
