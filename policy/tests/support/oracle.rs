//! What the API documentation says, in straight loops: an independent second opinion.
//!
//! Deliberately naive: it starts from the stored JSON for every question, keeps nothing, and uses
//! no code of the `policy` crate. Quotes are from the NetworkPolicy reference of
//! networking.k8s.io/v1.
use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::Value;

use testbed::cases::world::{Labels, Pod, World};

/// The same things that a verdict says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) egress: Side,
    pub(crate) ingress: Side,
    /// `self` or `node`.
    pub(crate) exempt: Option<&'static str>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Side {
    pub(crate) isolated: bool,
    pub(crate) allowed: bool,
    /// `namespace/name` of those that allow, or else of those that isolate.
    pub(crate) policies: BTreeSet<String>,
    /// The rules that allow, by policy and index.
    pub(crate) rules: BTreeSet<(String, usize)>,
}

/// A connection that somebody tries to make.
#[derive(Clone, Debug)]
pub(crate) struct Question<'a> {
    pub(crate) from: IpAddr,
    pub(crate) to: IpAddr,
    pub(crate) port: Option<u16>,
    /// `TCP`, `UDP`, `SCTP`, or the number of a protocol that has no ports.
    pub(crate) protocol: &'a str,
    /// A pod's traffic to its own node is judged.
    pub(crate) own_node_is_judged: bool,
}

impl Answer {
    pub(crate) fn allowed(&self) -> bool {
        self.exempt.is_some() || (self.egress.allowed && self.ingress.allowed)
    }
}

/// May this be, and who says so?
pub(crate) fn answer(world: &World, question: &Question<'_>) -> Answer {
    let Question { from, to, .. } = *question;
    Answer {
        egress: side(world, question, "Egress", from, to),
        ingress: side(world, question, "Ingress", to, from),
        exempt: exempt(world, question),
    }
}

/// The running pods whose claims to an address count: those on nodes whose pod CIDRs contain it, if
/// one of them is not terminating, else all.
fn claimants(world: &World, address: IpAddr) -> Vec<&Pod> {
    let claims = |pod: &&Pod| pod.owns_addresses() && pod.addresses.contains(&address);
    let mut claimants: Vec<&Pod> = world.pods.values().filter(claims).collect();
    let home = |pod: &&Pod| is_home(world, pod, address);
    if claimants.iter().any(|pod| home(pod) && !pod.terminating) {
        claimants.retain(home);
    }
    claimants
}

fn is_home(world: &World, pod: &Pod, address: IpAddr) -> bool {
    let node = world.nodes.get(&pod.node);
    let cidrs = node.into_iter().flat_map(|node| &node.pod_cidrs);
    cidrs.into_iter().any(|cidr| {
        let cidr: ipnet::IpNet = cidr.parse().expect("a CIDR");
        cidr.contains(&address)
    })
}

/// The running pods that may hold an address: of those that claim it, the ones that nobody makes
/// way for. More than one is a fault of the cluster: then they get only what all of them would get.
fn owners(world: &World, address: IpAddr) -> Vec<&Pod> {
    let claimants = claimants(world, address);
    let yields = |pod: &Pod, to: &Pod| match (pod.terminating, to.terminating) {
        (true, false) => true,
        (false, true) => false,
        _ => pod.started < to.started,
    };
    let stays = |pod: &&Pod| !claimants.iter().any(|other| yields(pod, other));
    claimants.iter().copied().filter(stays).collect()
}

/// Whether some pod claims a Node's address that is not in the pod CIDRs of the pod's node.
fn is_nobodys(world: &World, address: IpAddr) -> bool {
    let mut nodes = world.nodes.values();
    nodes.any(|node| node.addresses.contains(&address))
        && !claimants(world, address)
            .iter()
            .any(|pod| is_home(world, pod, address))
}

/// "A pod cannot block access to itself", and traffic to and from the node a pod runs on is always
/// allowed.
fn exempt(world: &World, question: &Question<'_>) -> Option<&'static str> {
    if question.from == question.to && !owners(world, question.from).is_empty() {
        return Some("self");
    }
    let runs_on = |pod: IpAddr, node: IpAddr| {
        let claimants = claimants(world, pod);
        let homes: BTreeSet<&String> = claimants.iter().map(|pod| &pod.node).collect();
        let home = homes.first().and_then(|home| world.nodes.get(*home));
        // Claimants on two nodes have no node in common, and an address that a pod owns is no node.
        homes.len() == 1
            && !is_nobodys(world, pod)
            && owners(world, node).is_empty()
            && home.is_some_and(|home| home.addresses.contains(&node))
    };
    let to_node = runs_on(question.from, question.to) && !question.own_node_is_judged;
    let from_node = runs_on(question.to, question.from);
    (to_node || from_node).then_some("node")
}

/// Judges one end of the connection: `own` is that end, `peer` the other.
fn side(
    world: &World,
    question: &Question<'_>,
    direction: &str,
    own: IpAddr,
    peer: IpAddr,
) -> Side {
    let owners = owners(world, own);
    // A single holder has its own policies. If it has none, or a claimant of another namespace has
    // any, or the holder is not known, the policies of every claimant isolate, and none of their
    // rules allows anything.
    let chosen = |pods: &[&Pod]| {
        world.policies.iter().any(|((namespace, _), policy)| {
            let spec = &policy["spec"];
            let selects = |pod: &&Pod| {
                pod.namespace == *namespace && selected(&spec["podSelector"], &pod.labels)
            };
            applies_to(spec, direction) && pods.iter().any(selects)
        })
    };
    let elsewhere = |pod: &&Pod| owners.iter().all(|owner| owner.namespace != pod.namespace);
    let others: Vec<&Pod> = claimants(world, own)
        .into_iter()
        .filter(elsewhere)
        .collect();
    let decided =
        owners.len() == 1 && !is_nobodys(world, own) && chosen(&owners) && !chosen(&others);
    let owners = if decided {
        owners
    } else {
        claimants(world, own)
    };
    let mut isolating = BTreeSet::new();
    let mut allowing = BTreeSet::new();
    let mut rules = BTreeSet::new();
    for ((namespace, name), policy) in &world.policies {
        let spec = &policy["spec"];
        let selects = |pod: &&&Pod| {
            pod.namespace == *namespace && selected(&spec["podSelector"], &pod.labels)
        };
        if !applies_to(spec, direction) || !owners.iter().any(|pod| selects(&pod)) {
            continue;
        }
        let key = format!("{namespace}/{name}");
        isolating.insert(key.clone());
        let list = if direction == "Ingress" {
            "ingress"
        } else {
            "egress"
        };
        for (index, rule) in items(&spec[list]).iter().enumerate() {
            // Two pods at one address: neither one's rules may serve the other.
            if decided && rule_matches(world, question, namespace, direction, rule, peer) {
                allowing.insert(key.clone());
                rules.insert((key.clone(), index));
            }
        }
    }
    let isolated = !isolating.is_empty();
    let allowed = !isolated || !allowing.is_empty();
    let policies = if allowed { allowing } else { isolating };
    Side {
        isolated,
        allowed,
        policies,
        rules,
    }
}

/// "If no policyTypes are specified on a NetworkPolicy then by default Ingress will always be set
/// and Egress will be set if the NetworkPolicy has any egress rules."
fn applies_to(spec: &Value, direction: &str) -> bool {
    let types = items(&spec["policyTypes"]);
    if types.is_empty() {
        return direction == "Ingress" || !items(&spec["egress"]).is_empty();
    }
    types.iter().any(|kind| kind == direction)
}

/// "This rule allows traffic if the traffic matches at least one port in the list" and "at least
/// one item in the from list"; "if this field is empty or missing, this rule matches all".
fn rule_matches(
    world: &World,
    question: &Question<'_>,
    namespace: &str,
    direction: &str,
    rule: &Value,
    peer: IpAddr,
) -> bool {
    let peers = items(&rule[if direction == "Ingress" { "from" } else { "to" }]);
    let ports = items(&rule["ports"]);
    let peer_fits = peers.is_empty()
        || peers
            .iter()
            .any(|item| peer_matches(world, namespace, item, peer));
    let port_fits =
        ports.is_empty() || ports.iter().any(|item| port_matches(world, question, item));
    peer_fits && port_fits
}

fn peer_matches(world: &World, namespace: &str, item: &Value, peer: IpAddr) -> bool {
    if !item["ipBlock"].is_null() {
        let block = &item["ipBlock"];
        let excepted = items(&block["except"])
            .iter()
            .any(|range| contains(range, peer));
        return contains(&block["cidr"], peer) && !excepted;
    }
    let owners = owners(world, peer);
    !owners.is_empty()
        && !is_nobodys(world, peer)
        && owners
            .iter()
            .all(|pod| pod_matches(world, namespace, item, pod))
}

/// "If namespaceSelector is also set, then the NetworkPolicyPeer as a whole selects the pods
/// matching podSelector in the namespaces selected by namespaceSelector. Otherwise it selects the
/// pods matching podSelector in the policy's own namespace."
fn pod_matches(world: &World, namespace: &str, item: &Value, pod: &Pod) -> bool {
    let namespace_fits = if item["namespaceSelector"].is_null() {
        pod.namespace == namespace
    } else {
        let mut labels = world
            .namespaces
            .get(&pod.namespace)
            .cloned()
            .unwrap_or_default();
        labels.insert("kubernetes.io/metadata.name".into(), pod.namespace.clone());
        selected(&item["namespaceSelector"], &labels)
    };
    namespace_fits && (item["podSelector"].is_null() || selected(&item["podSelector"], &pod.labels))
}

/// "If not specified, this field defaults to TCP"; "if this field is not provided, this matches all
/// port names and numbers"; a name is that of a port of the destination pod; "endPort indicates
/// that the range of ports from port to endPort if set, inclusive, should be allowed".
fn port_matches(world: &World, question: &Question<'_>, item: &Value) -> bool {
    if item["protocol"].as_str().unwrap_or("TCP") != question.protocol {
        return false;
    }
    let Some(port) = question.port else {
        return false;
    };
    match &item["port"] {
        Value::Null => true,
        Value::String(name) => {
            let owners = owners(world, question.to);
            let serves = |pod: &&Pod| {
                pod.ports.iter().any(|served| {
                    let named = served.name.as_ref() == Some(name);
                    named && served.protocol == question.protocol && served.number == port
                })
            };
            !owners.is_empty() && !is_nobodys(world, question.to) && owners.iter().all(serves)
        }
        first => {
            let first = first.as_u64().expect("a port is a name or a number");
            let last = item["endPort"].as_u64().unwrap_or(first);
            (first..=last).contains(&port.into())
        }
    }
}

/// "The result of matchLabels and matchExpressions are ANDed. An empty label selector matches all
/// objects."
fn selected(selector: &Value, labels: &Labels) -> bool {
    let wanted = selector["matchLabels"].as_object();
    for (key, value) in wanted.into_iter().flatten() {
        if labels.get(key).map(String::as_str) != value.as_str() {
            return false;
        }
    }
    items(&selector["matchExpressions"])
        .iter()
        .all(|expression| holds(expression, labels))
}

/// NotIn and DoesNotExist hold for an object without the key.
fn holds(expression: &Value, labels: &Labels) -> bool {
    let value = labels.get(expression["key"].as_str().expect("an expression has a key"));
    let listed =
        value.is_some_and(|value| items(&expression["values"]).iter().any(|one| one == value));
    match expression["operator"].as_str() {
        Some("In") => listed,
        Some("NotIn") => !listed,
        Some("Exists") => value.is_some(),
        Some("DoesNotExist") => value.is_none(),
        other => panic!("{other:?} is no operator"),
    }
}

/// Compares bit by bit, so that no CIDR library has a say.
fn contains(cidr: &Value, address: IpAddr) -> bool {
    let (network, length) = cidr
        .as_str()
        .and_then(|text| text.split_once('/'))
        .expect("a CIDR");
    let network: IpAddr = network.parse().expect("an address");
    let length: usize = length.parse().expect("a prefix length");
    network.is_ipv4() == address.is_ipv4() && bits(network)[..length] == bits(address)[..length]
}

fn bits(address: IpAddr) -> Vec<bool> {
    let octets = match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    octets
        .iter()
        .flat_map(|octet| (0..8).rev().map(move |bit| octet >> bit & 1 == 1))
        .collect()
}

/// A list that is missing or null has no items.
fn items(list: &Value) -> &[Value] {
    list.as_array().map_or(&[], Vec::as_slice)
}
