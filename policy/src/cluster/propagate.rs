//! Keeps pods, selectors and policies in sync: which pods match which selectors and policies.
//!
//! The other half of [`Cluster`]: its events determine what has changed, this module updates the
//! endpoints.
use std::collections::{BTreeSet, HashMap};
use std::hash::BuildHasher;
use std::mem;
use std::sync::Arc;

use super::labels::{Search, Shared, Slot};
use super::matches::Matches;
use super::pod_state::PodState;
use super::selection::Selection;
use super::selectors::{Named, in_namespaces};
use super::{Cluster, NamespaceState, Touched, pods_of, policies_of};
use crate::compile::{CompiledPolicy, Rules, SelectorId};
use crate::matches::MatchSet;
use crate::model::{Direction, Labels, Namespace, Node, Pod, PodKey};
use crate::network_policy::NetworkPolicy;
use crate::selector::{NamespaceScope, PeerSelector};

impl Cluster {
    /// Lists a pod that is new, or has changed, under its labels.
    pub(super) fn list_pod(&mut self, pod: &Arc<Pod>) -> Slot {
        match self.pods.get(&pod.key) {
            Some(known) if known.pod.labels == pod.labels => {
                self.pods_by_label.replace(known.slot, pod.clone());
                known.slot
            }
            known => {
                if let Some(known) = known {
                    self.pods_by_label.remove(known.slot);
                }
                self.pods_by_label.insert(pod.clone())
            }
        }
    }

    /// The ids of all selectors that `pod` matches; sorted.
    pub(super) fn matching(&self, pod: &Pod) -> Vec<SelectorId> {
        let namespace = self.namespaces.get(&pod.key.namespace);
        namespace.map_or_else(Vec::new, |state| {
            self.selectors.matching(pod, &state.namespace)
        })
    }

    pub(super) fn ensure_namespace(&mut self, name: &Arc<str>) {
        if !self.namespaces.contains_key(name) {
            self.set_namespace(Namespace::new(name.clone(), Labels::new()), false);
        }
    }

    /// Stores a namespace. Returns whether its labels have changed.
    pub(super) fn set_namespace(&mut self, namespace: Namespace, declared: bool) -> bool {
        let name = namespace.name().clone();
        if let Some(known) = self.namespaces.get_mut(&name) {
            known.declared = declared;
            if *known.namespace == namespace {
                return false;
            }
            self.namespaces_by_label.remove(known.slot);
        }
        let namespace = Arc::new(namespace);
        let slot = self.namespaces_by_label.insert(namespace.clone());
        let state = NamespaceState {
            namespace,
            declared,
            slot,
        };
        self.namespaces.insert(name, state);
        true
    }

    pub(super) fn forget_implied_namespace(&mut self, name: &Arc<str>) {
        let implied = self.namespaces.get(name).filter(|state| !state.declared);
        if let Some(slot) = implied.map(|state| state.slot)
            && pods_of(&self.pods, name).next().is_none()
        {
            self.namespaces_by_label.remove(slot);
            self.namespaces.remove(name);
        }
    }

    /// Finds the selectors that the pods of a relabelled namespace match now.
    pub(super) fn rescope(&mut self, name: &Arc<str>) -> Touched {
        let mut touched = Touched::default();
        let changes: Vec<_> = pods_of(&self.pods, name)
            .filter_map(|(key, state)| {
                let matches = self.matching(&state.pod);
                (*matches != **state.matches).then(|| (key.clone(), matches))
            })
            .collect();
        self.rematch(changes, &mut touched);
        touched
    }

    fn rematch(&mut self, changes: Vec<(PodKey, Vec<SelectorId>)>, touched: &mut Touched) {
        for (key, matches) in changes {
            let matches = self.match_sets.intern(matches);
            self.update(&key, touched, |state| state.matches = matches);
        }
    }

    /// Which pods match any of these selectors. The cost is the number of matches, not of all pods
    /// for each selector.
    fn matched_by(&self, selectors: &[Named]) -> Matches {
        let mut scopes = HashMap::new();
        let mut namespaces = Search::new(&self.namespaces_by_label);
        for (_, selector) in selectors {
            let scope = scopes.entry(&selector.namespaces);
            scope.or_insert_with(|| self.scope(&selector.namespaces, &mut namespaces));
        }
        let mut pods = Search::new(&self.pods_by_label);
        let mut matches = Matches::new(self.pods_by_label.slots_end(), selectors.len());
        let mut last = Vec::new();
        for (id, selector) in selectors {
            let scope = scopes[&selector.namespaces].as_ref();
            let found = pods.find(selector.pods.requirements(), scope);
            // A selector often matches the same pods as the one before.
            matches.add(*id, (found != last).then_some(&found));
            last = found;
        }
        matches
    }

    /// The requirement that the pods of a scope meet; none if the scope is every namespace.
    fn scope<'a>(
        &self,
        scope: &'a NamespaceScope,
        namespaces: &mut Search<'a, Arc<Namespace>>,
    ) -> Option<Shared> {
        let names = match scope {
            NamespaceScope::Named(name) => vec![name.clone()],
            NamespaceScope::Matching(scope) if scope.requirements().is_empty() => return None,
            NamespaceScope::Matching(scope) => {
                let found = namespaces.find(scope.requirements(), None).into_iter();
                let found = found.filter_map(|slot| self.namespaces_by_label.get(slot));
                let mut names: Vec<_> = found.map(|it| it.name().clone()).collect();
                names.sort_unstable();
                names
            }
        };
        Some(Shared::new(
            in_namespaces(names.into()),
            &self.pods_by_label,
        ))
    }

    pub(super) fn move_pods(&mut self, name: &str, node: Option<&Arc<Node>>) -> Touched {
        let mut touched = Touched::default();
        for key in self.on_node.get(name).cloned().unwrap_or_default() {
            self.update(&key, &mut touched, |state| state.set_node(node.cloned()));
        }
        touched
    }

    /// Records the node that a pod will run on, in place of its present one.
    pub(super) fn settle_on_node(&mut self, key: &PodKey, node: Option<&Arc<str>>) {
        let known = self.pods.get(key).map(|state| &state.pod.node);
        if known == node {
            return;
        }
        if let Some(known) = known
            && let Some(pods) = self.on_node.get_mut(known)
        {
            pods.remove(key);
            if pods.is_empty() {
                self.on_node.remove(known);
            }
        }
        if let Some(node) = node {
            let pods = self.on_node.entry(node.clone()).or_default();
            pods.insert(key.clone());
        }
    }

    /// Changes one pod's state and brings its endpoint up to date.
    pub(super) fn update(
        &mut self,
        key: &PodKey,
        touched: &mut Touched,
        change: impl FnOnce(&mut PodState),
    ) {
        let Some(state) = self.pods.get_mut(key) else {
            return;
        };
        change(state);
        state.rebuild();
        if !self.ownership.replace(state, touched) {
            let addresses = state.pod.owned_addresses().iter().copied().collect();
            self.ownership.settle(key, &addresses, &self.pods, touched);
        }
    }

    /// Holds every peer selector of `policy`; [`Self::match_new`] lets the pods know the new ones.
    pub(super) fn hold_selectors(&mut self, policy: &NetworkPolicy) -> Vec<SelectorId> {
        let selectors = policy.peer_selectors().map(|selector| {
            self.selectors
                .intern(selector, &self.pods_by_label, &self.namespaces_by_label)
        });
        let selectors: BTreeSet<SelectorId> = selectors.collect();
        self.selectors.hold(&selectors);
        selectors.into_iter().collect()
    }

    /// Lets the pods know the selectors with ids from `known` on. They are greater than all others,
    /// so that appending keeps every set sorted.
    pub(super) fn match_new(&mut self, known: SelectorId, touched: &mut Touched) {
        let new = self.selectors.named(known..self.selectors.next_id());
        if new.is_empty() {
            return;
        }
        let matches = self.matched_by(&new);
        // Pods often share a set, and the change is the same.
        let mut sets: HashMap<(u64, &[u64]), Arc<MatchSet>> = HashMap::new();
        for (slot, groups) in matches.slots() {
            let pod = self.pods_by_label.get(slot);
            let Some(key) = pod.map(|pod| pod.key.clone()) else {
                continue;
            };
            let Some(had) = self.pods.get(&key).map(|state| &state.matches) else {
                continue;
            };
            let set = sets.entry((had.number(), groups)).or_insert_with(|| {
                let ids = had.iter().copied().chain(matches.ids(groups));
                self.match_sets.intern(ids.collect())
            });
            let set = set.clone();
            self.update(&key, touched, |state| state.matches = set);
        }
    }

    /// Releases a policy's selectors. Those that no policy holds are kept for a while, since a
    /// policy often comes back; when there are many, they are removed everywhere.
    pub(super) fn release_selectors(&mut self, selectors: &[SelectorId], touched: &mut Touched) {
        self.selectors.release(selectors);
        let gone = self.selectors.sweep();
        if gone.is_empty() {
            return;
        }
        // Of each distinct set; most pods share theirs with others.
        let mut rest: HashMap<u64, Arc<MatchSet>> = HashMap::new();
        let mut changes = Vec::new();
        for (key, state) in &self.pods {
            let had = &state.matches;
            let rest = rest.entry(had.number()).or_insert_with(|| {
                let mut gone = gone.iter().peekable();
                let stays = |id: &SelectorId| {
                    while gone.next_if(|gone| *gone < id).is_some() {}
                    gone.next_if_eq(&id).is_none()
                };
                let rest = had.iter().copied().filter(stays).collect();
                self.match_sets.intern(rest)
            });
            if !Arc::ptr_eq(rest, had) {
                changes.push((key.clone(), rest.clone()));
            }
        }
        for (key, matches) in changes {
            self.update(&key, touched, |state| state.matches = matches);
        }
    }

    pub(super) fn compile(&mut self, policy: &NetworkPolicy) -> CompiledPolicy {
        let selectors = &self.selectors;
        let id_of = |selector: &PeerSelector| selectors.id(selector);
        let mut compiled = |direction| {
            let rules = Rules::new(policy.rules(direction)?, id_of);
            let hash = self.hasher.hash_one(&rules);
            let known = self.rules.find(hash, |known| *known == rules);
            Some(known.unwrap_or_else(|| self.rules.add(hash, rules)))
        };
        let (egress, ingress) = (compiled(Direction::Egress), compiled(Direction::Ingress));
        self.selections
            .policy(policy.key().clone(), egress, ingress)
    }

    /// Replaces `replaced` with `added` on the pods that either selects. Both have the same
    /// key.
    pub(super) fn reselect(
        &mut self,
        replaced: Option<&Arc<CompiledPolicy>>,
        added: Option<&Arc<CompiledPolicy>>,
        touched: &mut Touched,
    ) {
        let Some(key) = added.or(replaced).map(|policy| policy.key.clone()) else {
            return;
        };
        let state = added.and_then(|_| self.policies.get(&key));
        let pods = state.and_then(|state| state.pods.as_ref());
        let selected = pods.map_or_else(Vec::new, |pods| {
            let scope = self.within(&key.namespace);
            Search::new(&self.pods_by_label).find(pods.requirements(), Some(&scope))
        });
        let (bound, mut all) = (self.ledger.of_a_pod(), false);
        let mut changes: Vec<(PodKey, Arc<Selection>)> = Vec::new();
        // Most pods share their selection with others; each distinct one is computed once.
        let mut done: HashMap<(*const Selection, bool), Arc<Selection>> = HashMap::new();
        for (pod_key, pod) in pods_of(&self.pods, &key.namespace) {
            let had = replaced.is_some_and(|policy| pod.selection.contains(policy));
            let has = added.filter(|_| selected.binary_search(&pod.slot).is_ok());
            if !had && has.is_none() {
                continue;
            }
            // Another policy may take its place.
            all = has.is_none() && !pod.selection.surplus().is_empty();
            if all {
                break;
            }
            let selection = done
                .entry((Arc::as_ptr(&pod.selection), has.is_some()))
                .or_insert_with(|| {
                    let policies = pod.selection.with(&key, has);
                    self.selections.intern(policies, bound)
                });
            changes.push((pod_key.clone(), selection.clone()));
        }
        if all {
            self.reselect_all(&key.namespace, touched);
        } else {
            self.select(changes, touched);
        }
    }

    /// Recomputes which policies select each pod of a namespace.
    pub(super) fn reselect_all(&mut self, namespace: &Arc<str>, touched: &mut Touched) {
        let scope = self.within(namespace);
        let mut search = Search::new(&self.pods_by_label);
        let bound = self.ledger.of_a_pod();
        let mut selecting = vec![Vec::new(); self.pods_by_label.slots_end()];
        for state in policies_of(&self.policies, namespace) {
            if let (Some(pods), Some(policy)) = (&state.pods, &state.compiled) {
                for slot in search.find(pods.requirements(), Some(&scope)) {
                    let of_pod = &mut selecting[slot as usize];
                    if of_pod.len() <= bound {
                        of_pod.push(policy.clone());
                    }
                }
            }
        }
        let mut changes = Vec::new();
        for (key, pod) in pods_of(&self.pods, namespace) {
            let policies = mem::take(&mut selecting[pod.slot as usize]);
            let selection = self.selections.intern(policies, bound);
            if !Arc::ptr_eq(&selection, &pod.selection) {
                changes.push((key.clone(), selection));
            }
        }
        self.select(changes, touched);
    }

    /// The requirement that a namespace's pods meet.
    pub(super) fn within(&self, namespace: &Arc<str>) -> Shared {
        let own = in_namespaces([namespace.clone()].into());
        Shared::new(own, &self.pods_by_label)
    }

    fn select(&mut self, changes: Vec<(PodKey, Arc<Selection>)>, touched: &mut Touched) {
        for (key, selection) in changes {
            if let Some(pod) = self.pods.get(&key).map(|state| state.pod.clone()) {
                self.record_unenforceable(&key, Some((&pod, &selection)));
            }
            self.update(&key, touched, |state| state.selection = selection);
        }
    }
}
