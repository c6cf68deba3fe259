//! The bridge from plain data to the crate under test.
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use policy::{
    Cluster, Exempt, NetworkPolicy, OwnNode, Party, PodKey, PodPort, PolicyKey, Protocol,
};
use policy::{Side, Touched, Verdict};
use serde_json::Value;

use super::oracle::{self, Answer, Question};
use testbed::cases::world::{Change, Key, Labels, Node, Pod, World, policy_key};

/// The cluster that has seen the objects of `world`, in the order of [`World::changes`].
pub(crate) fn cluster(world: &World) -> Cluster {
    let mut cluster = Cluster::default();
    for one in world.changes() {
        change(&mut cluster, &one);
    }
    cluster
}

/// Tells `cluster` of a change.
pub(crate) fn change(cluster: &mut Cluster, change: &Change) {
    let Touched { .. } = touched_by(cluster, change);
}

/// Tells `cluster` of a change, and which addresses that concerned.
pub(crate) fn touched_by(cluster: &mut Cluster, change: &Change) -> Touched {
    match change {
        Change::Namespace(name, list) => cluster.upsert_namespace(policy::Namespace::new(
            Arc::from(name.as_str()),
            labels(list),
        )),
        Change::NoNamespace(name) => cluster.remove_namespace(name),
        Change::Node(written) => cluster.upsert_node(node(written)),
        Change::NoNode(name) => cluster.remove_node(name),
        Change::Pod(written) => cluster.upsert_pod(pod(written)),
        Change::NoPod(key) => cluster.remove_pod(&pod_key(key)),
        Change::Policy(object) => cluster.upsert_policy(network_policy(object)),
        Change::NoPolicy(key) => cluster.remove_policy(&key_of(key)),
    }
}

/// A valid policy.
///
/// # Panics
/// When it is not valid.
pub(crate) fn network_policy(object: &Value) -> NetworkPolicy {
    let spec = serde_json::from_value(object["spec"].clone())
        .unwrap_or_else(|error| panic!("{object}: {error}"));
    NetworkPolicy::new(key_of(&policy_key(object)), spec)
        .unwrap_or_else(|faults| panic!("{object}: {faults:?}"))
}

/// Asks the crate.
///
/// # Panics
/// When `allows` and `judge` disagree, or a verdict has no reason: that is never right.
pub(crate) fn judge(cluster: &Cluster, question: &Question<'_>) -> Verdict {
    let (from, to) = (
        cluster.endpoint(question.from),
        cluster.endpoint(question.to),
    );
    let from = Party {
        address: question.from,
        endpoint: from.as_deref(),
    };
    let to = Party {
        address: question.to,
        endpoint: to.as_deref(),
    };
    let protocol = protocol(question.protocol);
    let own_node = if question.own_node_is_judged {
        OwnNode::Judge
    } else {
        OwnNode::Allow
    };
    let verdict = policy::judge(from, to, question.port, protocol, own_node);
    let short = policy::allows(from, to, question.port, protocol, own_node);
    assert_eq!(
        short,
        verdict.allowed(),
        "allows() and judge() differ on {question:?}: {verdict:?}"
    );
    assert!(!verdict.reason().is_empty(), "no reason for {question:?}");
    verdict
}

/// A verdict in the oracle's terms.
///
/// # Panics
/// When the lists of a side are not sorted and unique, or `allowed` contradicts the sides.
pub(crate) fn as_answer(verdict: &Verdict) -> Answer {
    let exempt = match &verdict.exempt {
        Some(Exempt::SelfTraffic) => Some("self"),
        Some(Exempt::Node) => Some("node"),
        None => None,
    };
    let answer = Answer {
        egress: side(&verdict.egress),
        ingress: side(&verdict.ingress),
        exempt,
    };
    assert_eq!(
        verdict.allowed(),
        answer.allowed(),
        "{verdict:?} contradicts itself"
    );
    answer
}

/// Compares the crate with the oracle on every detail of one verdict; `at` says where this is.
///
/// # Panics
/// When they differ.
pub(crate) fn check_against_oracle(
    at: &str,
    world: &World,
    cluster: &Cluster,
    question: &Question<'_>,
) {
    let ours = as_answer(&judge(cluster, question));
    let theirs = oracle::answer(world, question);
    assert!(
        ours == theirs,
        "{at}\n  {question:?}\n  judge:  {ours:?}\n  oracle: {theirs:?}"
    );
}

/// Every ordered pair of `addresses` that share a family.
pub(crate) fn pairs(addresses: &BTreeSet<IpAddr>) -> Vec<(IpAddr, IpAddr)> {
    let all = addresses
        .iter()
        .flat_map(|&from| addresses.iter().map(move |&to| (from, to)));
    all.filter(|(from, to)| from.is_ipv4() == to.is_ipv4())
        .collect()
}

fn side(side: &Side) -> oracle::Side {
    assert!(
        side.policies.is_sorted_by(|one, next| one < next),
        "{:?} is not sorted and unique",
        side.policies
    );
    oracle::Side {
        isolated: side.isolated,
        allowed: side.allowed,
        policies: side.policies.iter().map(ToString::to_string).collect(),
        rules: side
            .rules
            .iter()
            .map(|rule| (rule.policy.to_string(), rule.index))
            .collect(),
    }
}

fn labels(written: &Labels) -> policy::Labels {
    written
        .iter()
        .map(|(key, value)| (key.as_str().into(), value.as_str().into()))
        .collect()
}

fn node(written: &Node) -> policy::Node {
    policy::Node {
        name: written.name.as_str().into(),
        addresses: written.addresses.clone(),
        pod_cidrs: written
            .pod_cidrs
            .iter()
            .map(|cidr| cidr.parse().expect("a CIDR"))
            .collect(),
    }
}

fn pod(written: &Pod) -> policy::Pod {
    let port = |port: &testbed::cases::world::ContainerPort| PodPort {
        name: port.name.as_deref().map(Into::into),
        number: port.number,
        protocol: protocol(&port.protocol),
    };
    policy::Pod {
        key: pod_key(&written.key()),
        uid: format!("uid-of-{}-{}", written.namespace, written.name).into(),
        labels: labels(&written.labels),
        node: written.node.as_str().into(),
        host_network: written.host_network,
        ports: written.ports.iter().map(port).collect(),
        addresses: written.addresses.clone(),
        finished: written.finished,
        terminating: written.terminating,
        started: written.started.as_str().into(),
        oversized: false,
    }
}

pub(crate) fn protocol(text: &str) -> Protocol {
    let number = |_| text.parse().map(Protocol::Other);
    text.parse()
        .or_else(number)
        .expect("a protocol is named or numbered")
}

fn pod_key((namespace, name): &Key) -> PodKey {
    PodKey {
        namespace: namespace.as_str().into(),
        name: name.as_str().into(),
    }
}

pub(crate) fn key_of((namespace, name): &Key) -> PolicyKey {
    PolicyKey {
        namespace: namespace.as_str().into(),
        name: name.as_str().into(),
    }
}
