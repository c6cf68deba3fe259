//! Which pod owns which address, and the endpoint of an address that several pods claim.
//!
//! A pod that claims an address may not have it: every user who can write pods/status can make a
//! pod claim it. So a claim can take rights from another pod, but never policies:
//!
//! - If pods of several nodes claim an address, and it lies in the pod CIDRs of some of these
//!   nodes, claims of pods on the other nodes are ignored, unless all pods on the former nodes are
//!   terminating.
//! - Among the rest, a terminating pod loses against one that is not, and an older pod against the
//!   one that started last: an address is given to another pod only after its holder's sandbox is
//!   gone. The winner is the holder, and rules for it count. In a direction in which it is not
//!   isolated but another claimant is, or in which a claimant of another namespace is isolated,
//!   nothing is allowed: the authors of the other namespace's policies must not open the address.
//! - If that does not decide, the address is contested: it gets only the rights that all possible
//!   holders have, and nothing is allowed in a direction in which any claimant is isolated.
//! - If the address is also a Node's, and lies in the pod CIDRs of no claimant's node, no rule
//!   allows anything for it either. That is for the nodes of the claimants: for all others it
//!   stays the Node's ([`Cluster::is_a_nodes_for`]).
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::pod_state::PodState;
use super::{Cluster, Touched};
use crate::endpoint::Endpoint;
use crate::isolation::Isolation;
use crate::matches::MatchSet;
use crate::model::{Direction, Node, PodKey, PolicyKey};

#[derive(Debug, Default)]
pub(super) struct Ownership {
    slots: BTreeMap<IpAddr, Slot>,
    /// Addresses that more than one pod claims, or a pod and a Node.
    claimed: BTreeSet<IpAddr>,
    /// The Nodes that have each address.
    nodes: BTreeMap<IpAddr, BTreeSet<Arc<str>>>,
    /// Changes whenever the result of [`Self::claims`] can have changed.
    pub(super) disputes: u64,
}

#[derive(Debug)]
struct Slot {
    /// Sorted; never empty.
    claimants: Vec<PodKey>,
    /// The pod whose rules count.
    holder: Option<PodKey>,
    endpoint: Arc<Endpoint>,
}

/// An address that is claimed more than once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The address.
    pub address: IpAddr,
    /// The running pods that claim it; sorted.
    pub pods: Vec<PodKey>,
    /// The Nodes that have it too; sorted.
    pub nodes: Vec<Arc<str>>,
    /// The pod whose rules count, if that is known.
    pub holder: Option<PodKey>,
}

impl Ownership {
    pub(super) fn endpoint(&self, address: IpAddr) -> Option<&Arc<Endpoint>> {
        self.slots.get(&address).map(|slot| &slot.endpoint)
    }

    pub(super) fn endpoints(&self) -> impl Iterator<Item = (IpAddr, &Arc<Endpoint>)> {
        self.slots
            .iter()
            .map(|(&address, slot)| (address, &slot.endpoint))
    }

    /// Every address that is claimed more than once; sorted.
    pub(super) fn claims(&self) -> impl Iterator<Item = Claim> {
        self.claimed.iter().filter_map(|address| {
            let slot = self.slots.get(address)?;
            let nodes = self.nodes.get(address).into_iter().flatten();
            Some(Claim {
                address: *address,
                pods: slot.claimants.clone(),
                nodes: nodes.cloned().collect(),
                holder: slot.holder.clone(),
            })
        })
    }

    /// Updates the endpoints at the addresses of a pod, of which nothing but its endpoint has
    /// changed. Returns false if another pod or a Node claims one of them: then
    /// [`Self::settle`] has to find the endpoint.
    pub(super) fn replace(&mut self, state: &PodState, touched: &mut Touched) -> bool {
        let mut addresses = state.pod.owned_addresses().iter();
        addresses.all(|address| match self.slots.get_mut(address) {
            Some(slot) if !self.claimed.contains(address) => {
                if slot.endpoint != state.endpoint {
                    slot.endpoint = state.endpoint.clone();
                    touched.addresses.insert(*address);
                }
                true
            }
            _ => false,
        })
    }

    /// Updates the owners of `addresses`, which `key` owns or owned, from `pods`.
    pub(super) fn settle(
        &mut self,
        key: &PodKey,
        addresses: &BTreeSet<IpAddr>,
        pods: &BTreeMap<PodKey, PodState>,
        touched: &mut Touched,
    ) {
        let owned = pods
            .get(key)
            .map_or(&[][..], |state| state.pod.owned_addresses());
        for &address in addresses {
            let slot = self.slots.get(&address);
            let mut claimants = slot.map_or_else(Vec::new, |slot| slot.claimants.clone());
            match (claimants.binary_search(key), owned.contains(&address)) {
                (Err(index), true) => claimants.insert(index, key.clone()),
                (Ok(index), false) => drop(claimants.remove(index)),
                _ => {}
            }
            if self.settle_one(address, claimants, pods) {
                touched.addresses.insert(address);
            }
        }
    }

    /// Records that a Node has the addresses `now` instead of those of `before`.
    pub(super) fn settle_node(
        &mut self,
        name: &Arc<str>,
        before: &[IpAddr],
        now: &[IpAddr],
        pods: &BTreeMap<PodKey, PodState>,
        touched: &mut Touched,
    ) {
        for &address in before.iter().chain(now) {
            let nodes = self.nodes.entry(address).or_default();
            let changed = match now.contains(&address) {
                true => nodes.insert(name.clone()),
                false => nodes.remove(name),
            };
            if nodes.is_empty() {
                self.nodes.remove(&address);
            }
            let claimants = self.slots.get(&address).map(|slot| slot.claimants.clone());
            if let Some(claimants) = claimants.filter(|_| changed)
                && self.settle_one(address, claimants, pods)
            {
                touched.addresses.insert(address);
            }
        }
    }

    /// Whether the endpoint at `address` changed.
    fn settle_one(
        &mut self,
        address: IpAddr,
        claimants: Vec<PodKey>,
        pods: &BTreeMap<PodKey, PodState>,
    ) -> bool {
        let states: Vec<&PodState> = claimants.iter().filter_map(|key| pods.get(key)).collect();
        let of_node = self.nodes.contains_key(&address);
        let is_claimed = states.len() > 1 || of_node && !states.is_empty();
        let was_claimed = match is_claimed {
            true => !self.claimed.insert(address),
            false => self.claimed.remove(&address),
        };
        self.disputes += u64::from(was_claimed || is_claimed);
        let is_home = states.iter().any(|state| is_home(state, address));
        let rivals = rivals(address, states);
        let holders = holders(rivals.clone());
        let (holder, endpoint) = match holders[..] {
            [] => return self.slots.remove(&address).is_some(),
            [first, ..] if of_node && !is_home => (None, Arc::new(nobody(first, &rivals))),
            [holder] => (Some(holder.pod.key.clone()), held(holder, &rivals)),
            [first, ref others @ ..] => (None, Arc::new(common(first, others, &rivals))),
        };
        let slot = self.slots.get(&address);
        let changed = slot.is_none_or(|slot| slot.endpoint != endpoint);
        self.slots.insert(
            address,
            Slot {
                claimants,
                holder,
                endpoint,
            },
        );
        changed
    }
}

impl Cluster {
    /// Whether `address` is a Node's, and no pod that claims it runs on `node`, or on a node with the address in its pod
    /// CIDRs. Then `node` takes it for the Node's: claims must close it for nobody.
    pub fn is_a_nodes_for(&self, node: &str, address: IpAddr) -> bool {
        let slot = self.ownership.slots.get(&address);
        let claimants = slot.into_iter().flat_map(|slot| &slot.claimants);
        let mut claimants = claimants.filter_map(|key| self.pods.get(key));
        self.ownership.nodes.contains_key(&address)
            && !claimants.any(|claimant| is_home(claimant, address) || *claimant.pod.node == *node)
    }
}

/// Whether the pod's node has the address in its pod CIDRs.
fn is_home(state: &PodState, address: IpAddr) -> bool {
    let node = state.endpoint.identity.node.as_ref();
    node.is_some_and(|node| node.pod_cidrs.iter().any(|cidr| cidr.contains(&address)))
}

/// The `claimants` whose claims count.
fn rivals(address: IpAddr, mut claimants: Vec<&PodState>) -> Vec<&PodState> {
    let stays = |state: &&PodState| is_home(state, address) && !state.pod.terminating;
    if claimants.iter().any(stays) {
        claimants.retain(|state| is_home(state, address));
    }
    claimants
}

/// The `rivals` that may have the address now: one, unless that cannot be decided.
fn holders(mut rivals: Vec<&PodState>) -> Vec<&PodState> {
    if rivals.iter().any(|state| !state.pod.terminating) {
        rivals.retain(|state| !state.pod.terminating);
    }
    let starts = || rivals.iter().map(|state| &state.pod.started);
    // A pod without a start time may have started at any time.
    if let Some(latest) = starts().max().cloned()
        && starts().all(|start| !start.is_empty())
    {
        rivals.retain(|state| state.pod.started == latest);
    }
    rivals
}

/// The endpoint for an address of which one of the `rivals` is the holder.
fn held(holder: &PodState, rivals: &[&PodState]) -> Arc<Endpoint> {
    let own = &holder.endpoint;
    let elsewhere = |rival: &&&PodState| rival.pod.key.namespace != holder.pod.key.namespace;
    let shut = |direction| {
        let mut others = rivals.iter().filter(elsewhere);
        let shuts = !own.isolated(direction) || others.any(|it| it.endpoint.isolated(direction));
        shuts.then(|| closed(endpoints(rivals), direction))?
    };
    let (egress, ingress) = (shut(Direction::Egress), shut(Direction::Ingress));
    let own_node = node_of_all(rivals);
    if egress.is_none() && ingress.is_none() && own_node == own.own_node {
        return own.clone();
    }
    Arc::new(Endpoint {
        own_node,
        contested: egress.is_some() || ingress.is_some(),
        egress: egress.or_else(|| own.egress.clone()),
        ingress: ingress.or_else(|| own.ingress.clone()),
        ..(**own).clone()
    })
}

/// The endpoint for an address that may belong to no pod: isolated by all policies of the rivals,
/// and no rule allows anything.
fn nobody(first: &PodState, rivals: &[&PodState]) -> Endpoint {
    Endpoint {
        egress: closed(endpoints(rivals), Direction::Egress),
        ingress: closed(endpoints(rivals), Direction::Ingress),
        own_node: None,
        contested: true,
        ..Endpoint::bare((*first.endpoint.identity).clone())
    }
}

fn endpoints<'a>(states: &'a [&PodState]) -> impl Iterator<Item = &'a Endpoint> {
    states.iter().map(|state| &*state.endpoint)
}

/// The node that all of these run on.
fn node_of_all(states: &[&PodState]) -> Option<Arc<Node>> {
    let node = endpoints(states).next()?.own_node.clone()?;
    let all = endpoints(states).all(|it| it.own_node.as_ref() == Some(&node));
    all.then_some(node)
}

/// The endpoint for an address that any of these may have, and that the `rivals` claim.
fn common(first: &PodState, others: &[&PodState], rivals: &[&PodState]) -> Endpoint {
    let claimants = || std::iter::once(first).chain(others.iter().copied());
    let endpoints = || claimants().map(|state| &*state.endpoint);
    let start = |state: &PodState| (state.pod.started.clone(), state.pod.key.clone());
    let latest = claimants()
        .max_by_key(|state| start(state))
        .unwrap_or(first);
    let matches = first.endpoint.matches.iter().copied();
    let matches = matches.filter(|id| endpoints().all(|it| it.matches.binary_search(id).is_ok()));
    let named = first.endpoint.named_ports.iter();
    let named = named.filter(|port| endpoints().all(|it| it.named_ports.contains(port)));
    Endpoint {
        identity: latest.endpoint.identity.clone(),
        matches: Arc::new(MatchSet::new(0, matches.collect())),
        named_ports: named.cloned().collect(),
        own_node: node_of_all(rivals),
        egress: closed(self::endpoints(rivals), Direction::Egress),
        ingress: closed(self::endpoints(rivals), Direction::Ingress),
        contested: true,
    }
}

/// Isolation by all policies of all claimants, without rules that allow anything.
fn closed<'a>(
    claimants: impl Iterator<Item = &'a Endpoint>,
    direction: Direction,
) -> Option<Arc<Isolation>> {
    let policies: BTreeSet<&PolicyKey> = claimants
        .flat_map(|endpoint| endpoint.isolating(direction))
        .collect();
    Isolation::closed(policies.into_iter().cloned().collect()).map(Arc::new)
}
