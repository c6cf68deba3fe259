//! The state of the cluster: takes objects one by one, in any order, and returns endpoints.
//!
//! Incremental and synchronous. A pod event recomputes that pod; a namespace relabel its pods; a
//! policy event the pods that it selects and those that match its new peer selectors. Each returns
//! the addresses whose endpoint changed; none if nothing relevant changed. Knows neither
//! the source of events nor the readers of its state.
mod intern;
mod labels;
mod match_sets;
mod matches;
mod ownership;
mod pod_state;
mod propagate;
mod selected;
mod selection;
mod selectors;
mod status;
mod unenforceable;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::RandomState;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use self::intern::Interner;
use self::labels::{ByLabel, Slot};
use self::match_sets::MatchSets;
pub use self::ownership::Claim;
use self::ownership::Ownership;
use self::pod_state::PodState;
pub use self::selected::Selected;
use self::selection::Selections;
use self::selectors::Selectors;
use self::status::{Ledger, PolicyStatus};
use self::unenforceable::Unenforceable;
use crate::budget::{Budget, Excess, Usage};
use crate::compile::{CompiledPolicy, Rules, SelectorId};
use crate::endpoint::Endpoint;
use crate::model::{Labels, Namespace, Node, Pod, PodKey, PolicyKey};
use crate::network_policy::NetworkPolicy;
use crate::selector::LabelSelector;
use crate::verdict::Party;

/// The addresses whose endpoint changed, came or went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use = "the changed addresses have to be published"]
pub struct Touched {
    /// Ask [`Cluster::endpoint`] what is there now.
    pub addresses: BTreeSet<IpAddr>,
}

/// All objects, and the endpoint of every pod address.
///
/// Which pods match which peer selector is kept as sets of ids on the pods, and which policies
/// select a pod as a list on it; pods with equal ones share them.
#[derive(Debug, Default)]
pub struct Cluster {
    pods: BTreeMap<PodKey, PodState>,
    /// The pods of each node that has any, whether it is known or not.
    on_node: BTreeMap<Arc<str>, BTreeSet<PodKey>>,
    namespaces: BTreeMap<Arc<str>, NamespaceState>,
    pods_by_label: ByLabel<Arc<Pod>>,
    namespaces_by_label: ByLabel<Arc<Namespace>>,
    nodes: BTreeMap<Arc<str>, Arc<Node>>,
    policies: BTreeMap<PolicyKey, PolicyState>,
    selectors: Selectors,
    rules: Interner<Rules>,
    hasher: RandomState,
    match_sets: MatchSets,
    selections: Selections,
    ownership: Ownership,
    unenforceable: Unenforceable,
    ledger: Ledger,
}

/// A namespace that was declared, or that only a pod names.
#[derive(Debug)]
struct NamespaceState {
    namespace: Arc<Namespace>,
    declared: bool,
    slot: Slot,
}

#[derive(Debug)]
struct PolicyState {
    /// The policy as it was added.
    policy: Arc<NetworkPolicy>,
    usage: Usage,
    /// `None` if it has to be rebuilt.
    status: Option<PolicyStatus>,
    /// Of the policy in force.
    pods: Option<Arc<LabelSelector>>,
    compiled: Option<Arc<CompiledPolicy>>,
    /// Each held once in [`Selectors`].
    selectors: Vec<SelectorId>,
}

impl PolicyState {
    fn new(policy: Arc<NetworkPolicy>) -> Self {
        Self {
            policy,
            usage: Usage::default(),
            status: None,
            pods: None,
            compiled: None,
            selectors: Vec::new(),
        }
    }

    /// The policy in force, if it selects pods with these labels.
    fn selecting(&self, labels: &Labels) -> Option<&Arc<CompiledPolicy>> {
        let selects = self.pods.as_ref().is_some_and(|pods| pods.matches(labels));
        self.compiled.as_ref().filter(|_| selects)
    }
}

impl Touched {
    /// Adds the changed addresses of another event.
    pub fn merge(&mut self, other: Self) {
        self.addresses.extend(other.addresses);
    }

    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }
}

impl Cluster {
    /// An empty cluster with this budget for each namespace; [`Self::default`] has the default
    /// budget.
    pub fn with_budget(budget: Budget) -> Self {
        Self {
            ledger: Ledger::new(budget),
            ..Self::default()
        }
    }

    /// Adds a pod, or replaces the one of that key.
    pub fn upsert_pod(&mut self, pod: impl Into<Arc<Pod>>) -> Touched {
        let mut touched = Touched::default();
        let pod = pod.into();
        let key = pod.key.clone();
        let previous = self.pods.get(&key);
        if previous.is_some_and(|state| state.pod == pod) {
            return touched;
        }
        let mut addresses: BTreeSet<IpAddr> = pod.owned_addresses().iter().copied().collect();
        if let Some(previous) = previous {
            addresses.extend(previous.pod.owned_addresses());
        }
        self.ensure_namespace(&key.namespace);
        let slot = self.list_pod(&pod);
        let matches = self.match_sets.intern(self.matching(&pod));
        let policies = policies_of(&self.policies, &key.namespace);
        let bound = self.ledger.of_a_pod();
        let selecting = policies.filter_map(|state| state.selecting(&pod.labels).cloned());
        let selecting = selecting.take(bound.saturating_add(1)).collect();
        let selection = self.selections.intern(selecting, bound);
        let node = self.nodes.get(&pod.node).cloned();
        let state = PodState::new(pod, slot, node, matches, selection);
        self.record_unenforceable(&key, Some((&state.pod, &state.selection)));
        self.settle_on_node(&key, Some(&state.pod.node));
        self.pods.insert(key.clone(), state);
        self.ownership
            .settle(&key, &addresses, &self.pods, &mut touched);
        touched
    }

    /// Removes a pod, if it is there.
    pub fn remove_pod(&mut self, key: &PodKey) -> Touched {
        let mut touched = Touched::default();
        self.record_unenforceable(key, None);
        self.settle_on_node(key, None);
        let Some(state) = self.pods.remove(key) else {
            return touched;
        };
        self.pods_by_label.remove(state.slot);
        let addresses = state.pod.owned_addresses().iter().copied().collect();
        self.ownership
            .settle(key, &addresses, &self.pods, &mut touched);
        self.forget_implied_namespace(&key.namespace);
        touched
    }

    /// Adds a namespace, or relabels it.
    pub fn upsert_namespace(&mut self, namespace: Namespace) -> Touched {
        let name = namespace.name().clone();
        if self.set_namespace(namespace, true) {
            self.rescope(&name)
        } else {
            Touched::default()
        }
    }

    /// Removes a namespace. While pods name it, it goes on with the one label
    /// `kubernetes.io/metadata.name`.
    pub fn remove_namespace(&mut self, name: &str) -> Touched {
        let Some(state) = self.namespaces.get(name) else {
            return Touched::default();
        };
        let name = state.namespace.name().clone();
        self.set_namespace(Namespace::new(name.clone(), Labels::new()), false);
        let touched = self.rescope(&name);
        self.forget_implied_namespace(&name);
        touched
    }

    /// Adds a node, or replaces the one of that name.
    pub fn upsert_node(&mut self, node: Node) -> Touched {
        if self
            .nodes
            .get(&node.name)
            .is_some_and(|known| **known == node)
        {
            return Touched::default();
        }
        let (name, node) = (node.name.clone(), Arc::new(node));
        let before = self.nodes.insert(name.clone(), node.clone());
        let mut touched = self.move_pods(&name, Some(&node));
        let before = before.map_or_else(Vec::new, |node| node.addresses.clone());
        let (now, pods) = (&node.addresses, &self.pods);
        self.ownership
            .settle_node(&name, &before, now, pods, &mut touched);
        touched
    }

    /// Removes a node, if it is there; its pods stay until they are removed.
    pub fn remove_node(&mut self, name: &str) -> Touched {
        let Some(node) = self.nodes.remove(name) else {
            return Touched::default();
        };
        let mut touched = self.move_pods(name, None);
        self.ownership
            .settle_node(&node.name, &node.addresses, &[], &self.pods, &mut touched);
        touched
    }

    /// Adds a policy, or replaces the one of that key.
    pub fn upsert_policy(&mut self, policy: impl Into<Arc<NetworkPolicy>>) -> Touched {
        let policy = policy.into();
        self.change_policies([(policy.key().clone(), Some(policy))].into())
    }

    /// Removes a policy, if it is there.
    pub fn remove_policy(&mut self, key: &PolicyKey) -> Touched {
        self.change_policies([(key.clone(), None)].into())
    }

    /// The endpoint of the pod that owns this address now; never a finished or hostNetwork pod.
    pub fn endpoint(&self, address: IpAddr) -> Option<Arc<Endpoint>> {
        self.ownership.endpoint(address).cloned()
    }

    /// Merges the policies of each endpoint at these addresses, so that no verdict has to. Stops
    /// when `work` lists of rules and entries are merged, at the first endpoint that exceeds it:
    /// policies of the later ones are evaluated one by one.
    pub fn prepare(&self, addresses: &BTreeSet<IpAddr>, mut work: usize) {
        for address in addresses {
            if let Some(endpoint) = self.ownership.endpoint(*address) {
                endpoint.prepare(&mut work);
            }
        }
    }

    /// Every address that a pod owns; sorted.
    pub fn endpoints(&self) -> impl Iterator<Item = (IpAddr, &Arc<Endpoint>)> {
        self.ownership.endpoints()
    }

    /// An end of a connection, as [`crate::judge`] takes it.
    pub fn party(&self, address: IpAddr) -> Party<'_> {
        Party {
            address,
            endpoint: self.ownership.endpoint(address).map(|endpoint| &**endpoint),
        }
    }

    /// The pod of that key, whether it owns an address or not.
    pub fn pod(&self, key: &PodKey) -> Option<&Pod> {
        self.pods.get(key).map(|state| &*state.pod)
    }

    /// All pods, finished and hostNetwork ones too; sorted by key.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values().map(|state| &*state.pod)
    }

    /// The addresses that pods of this node own, each with its endpoint, in no order: one that is
    /// contested is listed once for each claimant.
    pub fn endpoints_on(&self, node: &str) -> impl Iterator<Item = (IpAddr, &Arc<Endpoint>)> {
        let pods = self.on_node.get(node).into_iter().flatten();
        let addresses = pods
            .filter_map(|key| self.pods.get(key))
            .flat_map(|state| state.pod.owned_addresses());
        let owned = addresses.filter_map(|&it| Some((it, self.ownership.endpoint(it)?)));
        owned.filter(move |(_, endpoint)| *endpoint.identity.node_name == *node)
    }

    /// All namespaces, those that only a pod names too; sorted by name.
    pub fn namespaces(&self) -> impl Iterator<Item = &Namespace> {
        self.namespaces.values().map(|state| &*state.namespace)
    }

    /// The node of that name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name).map(|node| &**node)
    }

    /// All nodes; sorted by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values().map(|node| &**node)
    }

    /// All policies; sorted by key.
    pub fn policies(&self) -> impl ExactSizeIterator<Item = &NetworkPolicy> {
        self.policies.values().map(|state| &*state.policy)
    }

    /// `spec.podCIDRs` of all nodes.
    pub fn pod_cidrs(&self) -> Vec<IpNet> {
        self.nodes
            .values()
            .flat_map(|node| node.pod_cidrs.iter().copied())
            .collect()
    }

    /// The addresses whose holder among the running pods is unknown, with the pods that claim
    /// them; sorted.
    pub fn contested(&self) -> Vec<(IpAddr, Vec<PodKey>)> {
        let undecided = self.claims().filter(|claim| claim.holder.is_none());
        undecided.map(|claim| (claim.address, claim.pods)).collect()
    }

    /// The addresses that more than one running pod claims, or a pod and a Node; sorted.
    pub fn claims(&self) -> impl Iterator<Item = Claim> {
        self.ownership.claims()
    }

    /// What each namespace may have.
    pub fn budget(&self) -> &Budget {
        self.ledger.budget()
    }

    /// The policies that are refused because they exceed their namespace's budget; sorted. Each
    /// isolates the pods that it selects and allows nothing. If there are too many policies, the
    /// first one over the limit isolates every pod of the namespace and replaces all later ones.
    pub fn refused(&self) -> impl ExactSizeIterator<Item = (&PolicyKey, &Excess)> {
        self.ledger.refused()
    }

    /// A number that changes whenever the result of [`Self::claims`], [`Self::out_of_reach`],
    /// [`Self::oversized`], [`Self::surplus`] or [`Self::refused`] changes.
    pub fn findings_version(&self) -> u64 {
        self.ownership.disputes + self.unenforceable.changes + self.ledger.changes
    }
}

fn pods_of<'a>(
    pods: &'a BTreeMap<PodKey, PodState>,
    namespace: &Arc<str>,
) -> impl Iterator<Item = (&'a PodKey, &'a PodState)> {
    let first = PodKey {
        namespace: namespace.clone(),
        name: "".into(),
    };
    pods.range(first..)
        .take_while(move |(key, _)| key.namespace == *namespace)
}

fn policies_of<'a>(
    policies: &'a BTreeMap<PolicyKey, PolicyState>,
    namespace: &Arc<str>,
) -> impl Iterator<Item = &'a PolicyState> {
    let first = PolicyKey {
        namespace: namespace.clone(),
        name: "".into(),
    };
    policies
        .range(first..)
        .take_while(move |(key, _)| key.namespace == *namespace)
        .map(|(_, state)| state)
}

#[cfg(test)]
mod tests;
