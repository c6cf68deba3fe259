//! Which of a namespace's policies are in force as written, and which are refused.
//!
//! A namespace's policies are counted in the order of their names. A policy that exceeds the budget
//! is refused; later ones that still fit are in force. A refused policy isolates the pods that it
//! selects and allows nothing. If there are too many policies, the first one over the limit isolates
//! every pod of the namespace and replaces all later ones. So nothing is allowed that would not be
//! allowed if all were enforced, and the order of their arrival does not matter.
use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Cluster, PolicyState, Touched, policies_of};
use crate::budget::{Budget, Excess, Resource, Usage};
use crate::compile::SelectorId;
use crate::model::PolicyKey;
use crate::network_policy::NetworkPolicy;

/// How a policy is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PolicyStatus {
    /// As it is written.
    Whole,
    /// It isolates the pods that it selects, and allows nothing.
    Closed,
    /// The first policy over the maximum number: it isolates every pod and replaces all later ones.
    ClosedToAll,
    /// The first policy over the maximum number replaces it.
    Nothing,
}

/// The sum of what the policies of each namespace use.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    budget: Budget,
    /// Of refused policies too.
    asked: BTreeMap<Arc<str>, Usage>,
    refused: BTreeMap<PolicyKey, Excess>,
    /// Changes whenever `refused` does.
    pub(super) changes: u64,
}

impl Ledger {
    pub(super) fn new(budget: Budget) -> Self {
        Self {
            budget,
            ..Self::default()
        }
    }

    /// Sorted.
    pub(super) fn refused(&self) -> impl ExactSizeIterator<Item = (&PolicyKey, &Excess)> {
        self.refused.iter()
    }

    /// How many policies of those that select a pod count as written.
    pub(super) fn of_a_pod(&self) -> usize {
        let bound = self.budget.bound(Resource::OfAPod);
        usize::try_from(bound).unwrap_or(usize::MAX)
    }

    pub(super) fn budget(&self) -> &Budget {
        &self.budget
    }

    fn account(&mut self, namespace: &Arc<str>, added: Option<&Usage>, gone: Option<&Usage>) {
        let asked = self.asked.entry(namespace.clone()).or_default();
        if let Some(gone) = gone {
            *asked = asked.minus(gone);
        }
        if let Some(added) = added {
            *asked = asked.plus(added);
        }
        if *asked == Usage::default() {
            self.asked.remove(namespace);
        }
    }

    /// Whether all policies of a namespace are in force, both before and after the change.
    fn all_stand(&self, namespace: &Arc<str>) -> bool {
        let asked = self.asked.get(namespace);
        asked.is_none_or(|asked| self.budget.holds(asked))
            && self.refused_in(namespace).next().is_none()
    }

    /// The refused policies of a namespace.
    pub(super) fn refused_in(&self, namespace: &Arc<str>) -> impl Iterator<Item = &PolicyKey> {
        let first = PolicyKey {
            namespace: namespace.clone(),
            name: "".into(),
        };
        let refused = self.refused.range(first..).map(|(key, _)| key);
        refused.take_while(move |key| key.namespace == *namespace)
    }

    fn set(&mut self, key: &PolicyKey, excess: Option<Excess>) {
        let before = match excess {
            Some(excess) => self.refused.insert(key.clone(), excess),
            None => self.refused.remove(key),
        };
        self.changes += u64::from(before != excess);
    }
}

impl Cluster {
    /// Adds, replaces (`Some`) and removes policies. Those of one namespace change together: what
    /// selects each pod is worked out once for all of them, so that their cost is bounded by the
    /// namespace's budget, not by their number.
    pub fn change_policies(
        &mut self,
        mut changes: BTreeMap<PolicyKey, Option<Arc<NetworkPolicy>>>,
    ) -> Touched {
        let mut touched = Touched::default();
        changes.retain(|key, policy| {
            let known = self.policies.get(key).map(|state| &state.policy);
            known != policy.as_ref()
        });
        let mut changes = changes.into_iter().peekable();
        while let Some((first, _)) = changes.peek() {
            let namespace = first.namespace.clone();
            let own = || changes.next_if(|(key, _)| key.namespace == namespace);
            let own = std::iter::from_fn(own).collect();
            self.settle_policies(&namespace, own, &mut touched);
        }
        // Frees their merged entries for other policies.
        self.selections.collect();
        touched
    }

    fn settle_policies(
        &mut self,
        namespace: &Arc<str>,
        changes: Vec<(PolicyKey, Option<Arc<NetworkPolicy>>)>,
        touched: &mut Touched,
    ) {
        let (mut others, mut gone) = (Vec::new(), Vec::new());
        for (key, policy) in changes {
            let usage = policy.as_deref().map(Usage::of);
            let known = self.policies.get(&key).map(|state| state.usage);
            self.ledger
                .account(namespace, usage.as_ref(), known.as_ref());
            if let (Some(policy), Some(usage)) = (policy, usage) {
                let state = self.policies.entry(key.clone());
                let state = state.or_insert_with(|| PolicyState::new(policy.clone()));
                (state.policy, state.usage, state.status) = (policy, usage, None);
                others.push((key, PolicyStatus::Whole));
            } else {
                self.ledger.set(&key, None);
                gone.extend(self.policies.remove(&key));
            }
        }
        if !self.ledger.all_stand(namespace) {
            others = self.standings(namespace);
        }
        others.retain(|(key, status)| {
            let known = self.policies.get(key);
            known.is_some_and(|state| state.status != Some(*status))
        });
        match (&others[..], &gone[..]) {
            ([(key, status)], []) => self.stand(key, *status, touched),
            ([], [removed]) => self.reselect(removed.compiled.as_ref(), None, touched),
            _ => self.stand_together(namespace, &others, touched),
        }
        let held: Vec<SelectorId> = gone.iter().flat_map(|it| it.selectors.clone()).collect();
        self.release_selectors(&held, touched);
    }

    /// How each policy of a namespace has to be in force.
    fn standings(&mut self, namespace: &Arc<str>) -> Vec<(PolicyKey, PolicyStatus)> {
        let mut used = Usage::default();
        let (mut taken, mut standings) = (0, Vec::new());
        for state in policies_of(&self.policies, namespace) {
            let key = state.policy.key().clone();
            taken += 1;
            let excess = self.ledger.budget.excess(&used, &state.usage);
            // The number of policies bounds the refused ones too.
            let bound = self.ledger.budget.bound(Resource::Policies);
            let status = match excess {
                _ if taken > bound.saturating_add(1) => PolicyStatus::Nothing,
                _ if taken > bound => PolicyStatus::ClosedToAll,
                Some(_) => PolicyStatus::Closed,
                None => {
                    used = used.plus(&state.usage);
                    PolicyStatus::Whole
                }
            };
            let own = 1;
            let too_many = (taken > bound).then_some(Excess {
                resource: Resource::Policies,
                own,
                count: taken,
                bound,
            });
            self.ledger.set(&key, too_many.or(excess));
            standings.push((key, status));
        }
        standings
    }

    /// Updates how one policy is in force.
    fn stand(&mut self, key: &PolicyKey, status: PolicyStatus, touched: &mut Touched) {
        let compiled = |of: &Self| of.policies.get(key).and_then(|it| it.compiled.clone());
        let was = compiled(self);
        let held = self.take_in(&[(key.clone(), status)], touched);
        let is = compiled(self);
        self.reselect(was.as_ref(), is.as_ref(), touched);
        self.release_selectors(&held, touched);
    }

    /// The same for many policies of one namespace: each pod's selection is computed once for all of them.
    fn stand_together(
        &mut self,
        namespace: &Arc<str>,
        standings: &[(PolicyKey, PolicyStatus)],
        touched: &mut Touched,
    ) {
        let held = self.take_in(standings, touched);
        self.reselect_all(namespace, touched);
        self.release_selectors(&held, touched);
    }

    /// Compiles policies as they are to stand, for [`Self::reselect`]. Returns the selectors that they
    /// held before.
    fn take_in(
        &mut self,
        standings: &[(PolicyKey, PolicyStatus)],
        touched: &mut Touched,
    ) -> Vec<SelectorId> {
        let known = self.selectors.next_id();
        let (mut held, mut taken) = (Vec::new(), Vec::new());
        for (key, status) in standings {
            let Some(state) = self.policies.get_mut(key) else {
                continue;
            };
            state.status = Some(*status);
            held.append(&mut state.selectors);
            let policy = match status {
                PolicyStatus::Whole => Some(state.policy.clone()),
                PolicyStatus::Closed => Some(Arc::new(state.policy.closed())),
                PolicyStatus::ClosedToAll => Some(Arc::new(state.policy.closed_to_all())),
                PolicyStatus::Nothing => None,
            };
            let selectors = policy.as_deref().map(|it| self.hold_selectors(it));
            taken.push((key, policy, selectors.unwrap_or_default()));
        }
        // The pods get their new matches before the rules that use them.
        self.match_new(known, touched);
        for (key, policy, selectors) in taken {
            let compiled = policy.as_deref().map(|it| Arc::new(self.compile(it)));
            if let Some(state) = self.policies.get_mut(key) {
                state.selectors = selectors;
                state.compiled = compiled;
                state.pods = policy.map(|policy| Arc::new(policy.pods.clone()));
            }
        }
        held
    }
}
