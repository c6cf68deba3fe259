//! Keeping pods, selectors and policies in step: who matches what, and who is selected by whom.
//!
//! The other half of [`Cluster`]: its events decide what has changed, this carries it through to the
//! endpoints.
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::pod_state::{PodState, in_vain};
use super::selection::{CompiledPolicy, Selection};
use super::{Cluster, NamespaceState, PolicyState, Touched, pods_of};
use crate::compile::{Rules, SelectorId};
use crate::model::{Direction, Labels, Namespace, Node, Pod, PodKey};
use crate::network_policy::NetworkPolicy;
use crate::selector::PeerSelector;

impl Cluster {
    /// The ids of all selectors that `pod` matches; sorted.
    pub(super) fn matching(&self, pod: &Pod) -> Vec<SelectorId> {
        let namespace = self.namespaces.get(&pod.key.namespace);
        let candidates = namespace
            .map_or(&[][..], |state| &state.candidates)
            .iter()
            .copied();
        candidates
            .filter(|&id| self.selectors.get(id).pods.matches(&pod.labels))
            .collect()
    }

    pub(super) fn ensure_namespace(&mut self, name: &Arc<str>) {
        if self.namespaces.contains_key(name) {
            return;
        }
        let namespace = Namespace::new(name.clone(), Labels::new());
        let candidates = self.selectors.covering(&namespace);
        let state = NamespaceState {
            namespace,
            declared: false,
            candidates,
        };
        self.namespaces.insert(name.clone(), state);
    }

    pub(super) fn forget_implied_namespace(&mut self, name: &Arc<str>) {
        let implied = self
            .namespaces
            .get(name)
            .is_some_and(|state| !state.declared);
        if implied && pods_of(&self.pods, name).next().is_none() {
            self.namespaces.remove(name);
        }
    }

    /// Finds anew which selectors look at a namespace, and which of them its pods match.
    pub(super) fn rescope(&mut self, name: &Arc<str>) -> Touched {
        let mut touched = Touched::default();
        let Some(state) = self.namespaces.get_mut(name) else {
            return touched;
        };
        let candidates = self.selectors.covering(&state.namespace);
        if candidates == state.candidates {
            return touched;
        }
        state.candidates = candidates;
        let pods = pods_of(&self.pods, name);
        let changes: Vec<_> = pods
            .map(|(key, state)| (key.clone(), self.matching(&state.pod)))
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

    pub(super) fn move_pods(&mut self, name: &str, node: Option<&Arc<Node>>) -> Touched {
        let mut touched = Touched::default();
        for key in self.on_node.get(name).cloned().unwrap_or_default() {
            self.update(&key, &mut touched, |state| state.set_node(node.cloned()));
        }
        touched
    }

    /// Notes what a pod is to be, and by which policies selected, instead of what it is by now.
    pub(super) fn settle_doubts(&mut self, key: &PodKey, after: Option<(&Pod, &Selection)>) {
        let before = self.pods.get(key);
        let before = before.map_or(&[][..], |state| in_vain(&state.pod, &state.selection));
        let after = after.map_or(&[][..], |(pod, selection)| in_vain(pod, selection));
        self.doubts.settle(key, before, after);
    }

    /// Notes which node a pod is to run on, instead of the one that it runs on by now.
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
        let addresses = state.pod.owned_addresses().iter().copied().collect();
        self.ownership.settle(key, &addresses, &self.pods, touched);
    }

    /// Holds every peer selector of `policy`, and lets the pods know the new ones.
    pub(super) fn hold_selectors(
        &mut self,
        policy: &NetworkPolicy,
        touched: &mut Touched,
    ) -> Vec<SelectorId> {
        let known = self.selectors.next_id();
        let selectors = policy
            .peer_selectors()
            .map(|selector| self.selectors.intern(selector));
        let selectors: BTreeSet<SelectorId> = selectors.collect();
        self.selectors.hold(&selectors);
        let new: Vec<SelectorId> = selectors.range(known..).copied().collect();
        if !new.is_empty() {
            self.match_new(&new, touched);
        }
        selectors.into_iter().collect()
    }

    /// `new` ids are greater than all others, so that appending keeps every set sorted.
    fn match_new(&mut self, new: &[SelectorId], touched: &mut Touched) {
        let mut changes = Vec::new();
        for (name, state) in &mut self.namespaces {
            let covers = |id: &SelectorId| {
                self.selectors
                    .get(*id)
                    .namespaces
                    .covers(name, state.namespace.labels())
            };
            let covering: Vec<SelectorId> = new.iter().copied().filter(covers).collect();
            if covering.is_empty() {
                continue;
            }
            state.candidates.extend(&covering);
            for (key, pod) in pods_of(&self.pods, name) {
                let matches =
                    |id: &SelectorId| self.selectors.get(*id).pods.matches(&pod.pod.labels);
                let mut added = covering.iter().copied().filter(matches).peekable();
                if added.peek().is_some() {
                    changes.push((
                        key.clone(),
                        pod.matches.iter().copied().chain(added).collect(),
                    ));
                }
            }
        }
        self.rematch(changes, touched);
    }

    /// Lets go of a policy's selectors. Those that nobody holds stay known for a while, since a
    /// policy often comes back; when they pile up, they are forgotten everywhere.
    pub(super) fn release_selectors(&mut self, selectors: &[SelectorId], touched: &mut Touched) {
        self.selectors.release(selectors);
        if !self.selectors.sweep() {
            return;
        }
        for state in self.namespaces.values_mut() {
            state.candidates.retain(|&id| self.selectors.is_known(id));
        }
        let stale = self
            .pods
            .iter()
            .filter(|(_, pod)| pod.matches.iter().any(|&id| !self.selectors.is_known(id)));
        let changes = stale.map(|(key, pod)| {
            let known = pod
                .matches
                .iter()
                .copied()
                .filter(|&id| self.selectors.is_known(id));
            (key.clone(), known.collect())
        });
        let changes = changes.collect();
        self.rematch(changes, touched);
    }

    pub(super) fn compile(&mut self, policy: &NetworkPolicy) -> CompiledPolicy {
        let selectors = &self.selectors;
        let id_of = |selector: &PeerSelector| selectors.id(selector);
        let mut compiled = |direction| {
            policy
                .rules(direction)
                .map(|rules| self.rules.intern_value(Rules::new(rules, id_of)))
        };
        let (egress, ingress) = (compiled(Direction::Egress), compiled(Direction::Ingress));
        self.selections
            .policy(policy.key().clone(), egress, ingress)
    }

    /// Puts `added` in the place of `replaced` on the pods that either selects. Both are of one
    /// key.
    pub(super) fn reselect(
        &mut self,
        replaced: Option<&PolicyState>,
        added: Option<&Arc<CompiledPolicy>>,
        touched: &mut Touched,
    ) {
        let replaced = replaced.map(|state| &state.compiled);
        let Some(key) = added.or(replaced).map(|policy| policy.key.clone()) else {
            return;
        };
        let added = added.zip(self.policies.get(&key).map(|state| &state.policy.pods));
        let mut changes: Vec<(PodKey, Arc<Selection>)> = Vec::new();
        // Most pods share their selection with others; each distinct one is worked out once.
        let mut done: HashMap<(*const Selection, bool), Arc<Selection>> = HashMap::new();
        for (pod_key, pod) in pods_of(&self.pods, &key.namespace) {
            let had = replaced.is_some_and(|policy| pod.selection.contains(policy));
            let has = added.filter(|(_, pods)| pods.matches(&pod.pod.labels));
            if !had && has.is_none() {
                continue;
            }
            let selection = done
                .entry((Arc::as_ptr(&pod.selection), has.is_some()))
                .or_insert_with(|| {
                    let policies = pod.selection.with(&key, has.map(|(policy, _)| policy));
                    self.selections.intern(policies)
                });
            changes.push((pod_key.clone(), selection.clone()));
        }
        for (key, selection) in changes {
            if let Some(pod) = self.pods.get(&key).map(|state| state.pod.clone()) {
                self.settle_doubts(&key, Some((&pod, &selection)));
            }
            self.update(&key, touched, |state| state.selection = selection);
        }
    }
}
