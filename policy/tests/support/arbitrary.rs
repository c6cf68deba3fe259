//! Random clusters and policies from a small vocabulary, so that selectors often hit.
//!
//! All that is generated is valid by the API server's rules.
use std::net::IpAddr;

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use proptest::{option, strategy::Union};
use serde_json::{Map, Value, json};

use testbed::cases::world::{Change, ContainerPort, Labels, Pod, World, addresses, pod};

const NAMESPACES: [&str; 3] = ["x", "y", "z"];
const KEYS: [&str; 3] = ["app", "tier", "env"];
const VALUES: [&str; 3] = ["a", "b", "c"];
const BLOCKS: [(&str, &[&str]); 7] = [
    (
        "0.0.0.0/0",
        &["10.0.0.0/8", "10.244.1.0/24", "203.0.113.0/24"],
    ),
    (
        "10.244.0.0/16",
        &["10.244.2.0/24", "10.244.1.8/29", "10.244.1.10/32"],
    ),
    ("10.244.1.0/24", &["10.244.1.8/29", "10.244.1.12/30"]),
    ("10.244.2.11/32", &[]),
    ("172.30.0.0/16", &["172.30.0.1/32"]),
    ("::/0", &["fd00::/8", "fd00:10:244:1::/64"]),
    ("fd00:10:244:1::/64", &["fd00:10:244:1::c/126"]),
];

/// How many places of the cluster pods are put in.
pub(crate) const SLOTS: usize = 6;

/// Addresses that no pod has: the nodes', one beside the pods', and some outside.
pub(crate) fn strangers() -> Vec<IpAddr> {
    let texts = [
        "172.30.0.1",
        "172.30.0.2",
        "10.244.1.200",
        "203.0.113.7",
        "fd00:30::1",
        "2001:db8::7",
    ];
    texts
        .iter()
        .map(|text| text.parse().expect("an address"))
        .collect()
}

/// Every place's addresses, and those that no pod has.
pub(crate) fn all_addresses() -> std::collections::BTreeSet<IpAddr> {
    (0..SLOTS).flat_map(addresses).chain(strangers()).collect()
}

/// A cluster in which every address belongs to one pod at most.
pub(crate) fn worlds() -> BoxedStrategy<World> {
    let pods: Vec<_> = (0..SLOTS)
        .map(|slot| option::weighted(0.8, pods_at(slot)))
        .collect();
    (pods, namespaces(), vec(policies(), 0..5))
        .prop_map(|(pods, namespaces, policies)| {
            let mut world = World {
                namespaces,
                ..World::nodes_only()
            };
            pods.into_iter()
                .flatten()
                .for_each(|pod| world.apply(&Change::Pod(pod)));
            policies
                .into_iter()
                .for_each(|policy| world.apply(&Change::Policy(policy)));
            world
        })
        .boxed()
}

fn namespaces() -> impl Strategy<Value = std::collections::BTreeMap<String, Labels>> {
    btree_map(
        select(&NAMESPACES[..]).prop_map(str::to_owned),
        label_sets(),
        0..=3,
    )
}

/// The pod of one place; its name is the place's, so two pods never meet.
fn pods_at(slot: usize) -> BoxedStrategy<Pod> {
    let kind =
        prop_oneof![8 => Just((false, false)), 1 => Just((true, false)), 1 => Just((false, true))];
    let terminating = prop_oneof![4 => Just(false), 1 => Just(true)];
    (
        select(&NAMESPACES[..]),
        label_sets(),
        container_ports(),
        kind,
        terminating,
    )
        .prop_map(
            move |(namespace, labels, ports, (host_network, finished), terminating)| {
                let name = format!("pod-{slot}");
                Pod {
                    ports,
                    host_network,
                    finished,
                    terminating,
                    ..pod(slot, namespace, &name, labels)
                }
            },
        )
        .boxed()
}

fn container_ports() -> impl Strategy<Value = Vec<ContainerPort>> {
    let names = prop_oneof![1 => Just(None), 3 => Just(Some("web")), 1 => Just(Some("dns"))];
    let port = (
        names,
        select(vec![80, 80, 81, 53]),
        select(vec!["TCP", "UDP"]),
    )
        .prop_map(|(name, number, protocol)| ContainerPort {
            name: name.map(str::to_owned),
            number,
            protocol: protocol.into(),
        });
    vec(port, 0..4)
}

fn label_sets() -> impl Strategy<Value = Labels> {
    let key = select(&KEYS[..]).prop_map(str::to_owned);
    btree_map(key, select(&VALUES[..]).prop_map(str::to_owned), 0..=3)
}

/// A policy of one of few names, so that policies also replace each other.
pub(crate) fn policies() -> BoxedStrategy<Value> {
    let types = prop_oneof![
        Just(None),
        Just(Some(json!(["Ingress"]))),
        Just(Some(json!(["Egress"]))),
        Just(Some(json!(["Ingress", "Egress"]))),
    ];
    let name = (
        select(&NAMESPACES[..]),
        select(vec!["p0", "p1", "p2", "p3"]),
    );
    (name, selectors(), types, lists("from"), lists("to"))
        .prop_map(|((namespace, name), pods, types, ingress, egress)| {
            let mut spec = Map::from_iter([("podSelector".to_owned(), pods)]);
            spec.extend(types.map(|types| ("policyTypes".to_owned(), types)));
            spec.extend(ingress.map(|rules| ("ingress".to_owned(), rules)));
            spec.extend(egress.map(|rules| ("egress".to_owned(), rules)));
            json!({"metadata": {"namespace": namespace, "name": name}, "spec": spec})
        })
        .boxed()
}

/// A list of rules, which may also be missing.
fn lists(peers_field: &'static str) -> BoxedStrategy<Option<Value>> {
    let rule = (
        option::of(vec(peers(), 0..3)),
        option::of(vec(ports(), 0..3)),
    )
        .prop_map(move |(peers, ports)| {
            let mut rule = Map::new();
            rule.extend(peers.map(|peers| (peers_field.to_owned(), Value::from(peers))));
            rule.extend(ports.map(|ports| ("ports".to_owned(), Value::from(ports))));
            Value::from(rule)
        });
    option::of(vec(rule, 0..4).prop_map(Value::from)).boxed()
}

fn peers() -> BoxedStrategy<Value> {
    let block = select(&BLOCKS[..]).prop_flat_map(|(cidr, inside)| {
        subsequence(inside.to_vec(), 0..=inside.len()).prop_map(move |except| {
            if except.is_empty() {
                json!({"ipBlock": {"cidr": cidr}})
            } else {
                json!({"ipBlock": {"cidr": cidr, "except": except}})
            }
        })
    });
    prop_oneof![
        2 => selectors().prop_map(|pods| json!({"podSelector": pods})),
        2 => selectors().prop_map(|namespaces| json!({"namespaceSelector": namespaces})),
        2 => (selectors(), selectors()).prop_map(|(pods, namespaces)| {
            json!({"podSelector": pods, "namespaceSelector": namespaces})
        }),
        2 => block,
    ]
    .boxed()
}

fn ports() -> BoxedStrategy<Value> {
    let protocol = || option::of(select(vec!["TCP", "UDP", "SCTP"]));
    let with_protocol = |protocol: Option<&str>, mut port: Value| {
        if let Some(protocol) = protocol {
            port["protocol"] = protocol.into();
        }
        port
    };
    Union::new([
        protocol()
            .prop_map(move |p| with_protocol(p, json!({})))
            .boxed(),
        (protocol(), select(vec![53, 80, 81]))
            .prop_map(move |(p, n)| with_protocol(p, json!({"port": n})))
            .boxed(),
        (protocol(), select(vec!["web", "web", "dns"]))
            .prop_map(move |(p, n)| with_protocol(p, json!({"port": n})))
            .boxed(),
        (protocol(), 50..82_u16, 0..40_u16)
            .prop_map(move |(p, n, more)| with_protocol(p, json!({"port": n, "endPort": n + more})))
            .boxed(),
    ])
    .boxed()
}

/// Label selectors; those for namespaces often ask for the name.
fn selectors() -> BoxedStrategy<Value> {
    let key = || prop_oneof![4 => select(&KEYS[..]), 1 => Just("kubernetes.io/metadata.name")];
    let value = || prop_oneof![4 => select(&VALUES[..]), 1 => select(&NAMESPACES[..])];
    let listed = (key(), select(vec!["In", "NotIn"]), vec(value(), 1..3)).prop_map(
        |(key, operator, values)| json!({"key": key, "operator": operator, "values": values}),
    );
    let bare = (key(), select(vec!["Exists", "DoesNotExist"]))
        .prop_map(|(key, operator)| json!({"key": key, "operator": operator}));
    let expressions = vec(prop_oneof![2 => listed, 1 => bare], 0..3);
    let matched = btree_map(key(), value(), 0..2);
    let both = (matched, expressions).prop_map(|(labels, expressions)| {
        let mut selector = Map::new();
        if !labels.is_empty() {
            selector.insert("matchLabels".into(), json!(labels));
        }
        if !expressions.is_empty() {
            selector.insert("matchExpressions".into(), expressions.into());
        }
        Value::from(selector)
    });
    prop_oneof![1 => Just(json!({})), 3 => both].boxed()
}

/// What may happen to a cluster next. Pods may claim each other's addresses if `contests`.
pub(crate) fn changes(contests: bool) -> BoxedStrategy<Change> {
    let namespace = || select(&NAMESPACES[..]).prop_map(str::to_owned);
    let pod = (0..SLOTS, 0..SLOTS).prop_flat_map(move |(slot, other)| {
        pods_at(slot).prop_map(move |pod| {
            let claimed = addresses(if contests { other } else { slot });
            Change::Pod(Pod {
                addresses: claimed.into(),
                ..pod
            })
        })
    });
    let no_pod = (namespace(), 0..SLOTS)
        .prop_map(|(namespace, slot)| Change::NoPod((namespace, format!("pod-{slot}"))));
    let no_policy = (namespace(), select(vec!["p0", "p1", "p2", "p3"]))
        .prop_map(|(namespace, name)| Change::NoPolicy((namespace, name.into())));
    let node = (select(vec!["node-1", "node-2"]), 0..6).prop_map(|(name, kind)| {
        let mut node = World::nodes_only()
            .nodes
            .remove(name)
            .expect("a node of that name");
        match kind {
            0 | 1 => node.addresses = vec!["203.0.113.7".parse().expect("an address")],
            2 => node.addresses = addresses(2).into(),
            _ => {}
        }
        Change::Node(node)
    });
    prop_oneof![
        4 => pod,
        2 => no_pod,
        4 => policies().prop_map(Change::Policy),
        2 => no_policy,
        2 => (namespace(), label_sets()).prop_map(|(name, labels)| Change::Namespace(name, labels)),
        1 => namespace().prop_map(Change::NoNamespace),
        1 => node,
        1 => select(vec!["node-1", "node-2"]).prop_map(|name| Change::NoNode(name.into())),
    ]
    .boxed()
}
