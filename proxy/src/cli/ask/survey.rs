//! The verdicts for all pairs of many pods, for the web page of the admin port.
//!
//! A survey is taken under the lock of the cluster's state, which is quick; it is evaluated afterwards.
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use policy::{Cluster, Direction, Endpoint, OwnNode, Party, Protocol};
use serde::Serialize;

use super::resolve::End;

/// A destination's port that declares none.
const DEFAULT_PORT: Port = Port {
    port: 80,
    protocol: Protocol::Tcp,
};

/// The pods and ports that are asked for.
#[derive(Debug, Default)]
pub(crate) struct Scope {
    /// Only pods of these namespaces; empty: of all.
    pub(crate) namespaces: BTreeSet<String>,
    /// This port of every pod; `None`: the ports that each declares, or TCP 80 if it declares none.
    pub(crate) port: Option<Port>,
    /// Maximum number of pods in scope.
    pub(crate) most: usize,
}

/// A port to ask about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct Port {
    pub(crate) port: u16,
    #[serde(serialize_with = "as_text")]
    pub(crate) protocol: Protocol,
}

fn as_text<S: serde::Serializer>(protocol: &Protocol, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(protocol)
}

/// A snapshot of the pods in scope.
pub(crate) struct Survey {
    places: Vec<Place>,
    namespaces: BTreeMap<String, usize>,
    too_many: bool,
}

struct Place {
    name: String,
    node: Arc<str>,
    ports: Vec<Port>,
    /// Its addresses with their endpoints; without one for a pod on the host network.
    ends: Vec<(IpAddr, Option<Arc<Endpoint>>)>,
}

/// The answer. `cells` has a line for each source and in it a letter for each destination:
/// `o` open, no policy isolates them; `a` allowed by rules; `s` some of its ports; `d` denied;
/// `-` no address family in common.
#[derive(Serialize)]
pub(crate) struct Plan {
    pub(crate) generation: u64,
    pods: Vec<PodOfPlan>,
    cells: Vec<String>,
    /// Every namespace with the number of its pods, in scope or not.
    namespaces: BTreeMap<String, usize>,
    /// There are more pods in scope than the maximum, so none is evaluated.
    too_many: bool,
}

#[derive(Serialize)]
struct PodOfPlan {
    name: String,
    node: String,
    ports: Vec<Port>,
}

impl Survey {
    /// Takes the pods in scope, except those that have ended or have no address.
    pub(crate) fn of(cluster: &Cluster, scope: &Scope) -> Self {
        let mut namespaces = BTreeMap::new();
        let mut places = Vec::new();
        let mut too_many = false;
        for pod in cluster.pods() {
            let Ok(end) = End::of(cluster, pod) else {
                continue;
            };
            let namespace = &*pod.key.namespace;
            *namespaces.entry(namespace.to_owned()).or_insert(0) += 1;
            if !scope.namespaces.is_empty() && !scope.namespaces.contains(namespace) {
                continue;
            }
            if places.len() == scope.most {
                too_many = true;
                continue;
            }
            let declared: BTreeSet<Port> = pod
                .ports
                .iter()
                .map(|it| Port {
                    port: it.number,
                    protocol: it.protocol,
                })
                .collect();
            let ports = match scope.port {
                Some(port) => vec![port],
                None if declared.is_empty() => vec![DEFAULT_PORT],
                None => declared.into_iter().collect(),
            };
            let ends = end.addresses().iter();
            places.push(Place {
                ends: ends.map(|&it| (it, cluster.endpoint(it))).collect(),
                name: end.name,
                node: Arc::clone(&pod.node),
                ports,
            });
        }
        if too_many {
            places.clear();
        }
        Self {
            places,
            namespaces,
            too_many,
        }
    }

    /// Every pair of them.
    pub(crate) fn plan(self, generation: u64, own_node: OwnNode) -> Plan {
        let row = |from: &Place| {
            let cells = self.places.iter().map(|to| cell(from, to, own_node));
            cells.collect()
        };
        let cells = self.places.iter().map(row).collect();
        let pods = self.places.into_iter().map(|place| PodOfPlan {
            name: place.name,
            node: place.node.to_string(),
            ports: place.ports,
        });
        Plan {
            generation,
            pods: pods.collect(),
            cells,
            namespaces: self.namespaces,
            too_many: self.too_many,
        }
    }
}

fn cell(from: &Place, to: &Place, own_node: OwnNode) -> char {
    let Some((source, destination)) = common(from, to) else {
        return '-';
    };
    let allowed =
        |it: &&Port| policy::allows(source, destination, Some(it.port), it.protocol, own_node);
    let isolated = |party: Party<'_>, direction| {
        let end = party.endpoint;
        end.is_some_and(|endpoint| endpoint.isolated(direction))
    };
    match to.ports.iter().filter(allowed).count() {
        0 => 'd',
        some if some < to.ports.len() => 's',
        _ if isolated(source, Direction::Egress) || isolated(destination, Direction::Ingress) => {
            'a'
        }
        _ => 'o',
    }
}

/// At which addresses they talk: of the first family of `from` that `to` has too.
fn common<'a>(from: &'a Place, to: &'a Place) -> Option<(Party<'a>, Party<'a>)> {
    let party = |(address, endpoint): &'a (IpAddr, Option<Arc<Endpoint>>)| Party {
        address: *address,
        endpoint: endpoint.as_deref(),
    };
    from.ends.iter().find_map(|source| {
        let same = |it: &&(IpAddr, _)| it.0.is_ipv4() == source.0.is_ipv4();
        let destination = to.ends.iter().find(same)?;
        Some((party(source), party(destination)))
    })
}
