//! A cluster as plain data: what the cases, the naive oracle and the crate under test all start
//! from.
//!
//! Knows nothing of the `policy` crate: policies stay the JSON that the API server would store.
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::Value;

/// `metadata.labels`.
pub(crate) type Labels = BTreeMap<String, String>;
/// Namespace and name of a pod or a policy.
pub(crate) type Key = (String, String);

/// One entry of `containers[].ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ContainerPort {
    pub(crate) name: Option<String>,
    pub(crate) number: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub(crate) protocol: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pod {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) labels: Labels,
    pub(crate) node: String,
    pub(crate) host_network: bool,
    pub(crate) finished: bool,
    pub(crate) terminating: bool,
    pub(crate) ports: Vec<ContainerPort>,
    pub(crate) addresses: Vec<IpAddr>,
    /// RFC 3339.
    pub(crate) started: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) addresses: Vec<IpAddr>,
    /// CIDRs.
    pub(crate) pod_cidrs: Vec<String>,
}

/// The state of a cluster. A namespace without an entry has no label but its name's.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct World {
    pub(crate) namespaces: BTreeMap<String, Labels>,
    pub(crate) nodes: BTreeMap<String, Node>,
    pub(crate) pods: BTreeMap<Key, Pod>,
    /// Whole NetworkPolicy objects.
    pub(crate) policies: BTreeMap<Key, Value>,
}

/// One step from a state to the next: an object as it is now, or its end.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Namespace(String, Labels),
    NoNamespace(String),
    Node(Node),
    NoNode(String),
    Pod(Pod),
    NoPod(Key),
    Policy(Value),
    NoPolicy(Key),
}

impl World {
    /// Two nodes and nothing on them.
    pub(crate) fn nodes_only() -> Self {
        let nodes = [1, 2].map(|number| (format!("node-{number}"), node(number)));
        Self {
            nodes: nodes.into(),
            ..Self::default()
        }
    }

    /// The cluster of the upstream end-to-end suite: pods a, b and c in namespaces x, y and z,
    /// labelled by their names, on two nodes by turns.
    pub(crate) fn nine_pods() -> Self {
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
    pub(crate) fn apply(&mut self, change: &Change) {
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
    pub(crate) fn changes(&self) -> Vec<Change> {
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
    pub(crate) fn key(&self) -> Key {
        (self.namespace.clone(), self.name.clone())
    }

    /// A pod owns its addresses while it runs in a network of its own.
    pub(crate) fn owns_addresses(&self) -> bool {
        !self.host_network && !self.finished
    }
}

/// Namespace and name of a NetworkPolicy object; a missing namespace is `default`.
pub(crate) fn policy_key(policy: &Value) -> Key {
    let field = |name: &str| policy["metadata"][name].as_str().map(str::to_owned);
    let namespace = field("namespace").unwrap_or_else(|| "default".into());
    (
        namespace,
        field("name").expect("a policy has metadata.name"),
    )
}

pub(crate) fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs
        .iter()
        .map(|&(key, value)| (key.into(), value.into()))
        .collect()
}

/// A running pod in the given place of the cluster: places alternate between the nodes, and fix
/// the pod's addresses. It serves 80 and 81 over every protocol, named as upstream does.
pub(crate) fn pod(slot: usize, namespace: &str, name: &str, labels: Labels) -> Pod {
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
pub(crate) fn addresses(slot: usize) -> [IpAddr; 2] {
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
