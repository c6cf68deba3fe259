//! Which policies select a pod, and what that makes of its isolation; shared by all pods that the
//! same policies select.
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use crate::compile::Rules;
use crate::decider::Decider;
use crate::endpoint::Isolation;
use crate::model::{Direction, PolicyKey};

/// One state of one policy; the next state has another id.
pub(super) type PolicyId = u64;

#[derive(Debug)]
pub(super) struct CompiledPolicy {
    id: PolicyId,
    pub(super) key: PolicyKey,
    egress: Option<Arc<Rules>>,
    ingress: Option<Arc<Rules>>,
}

/// The policies that select a pod.
#[derive(Debug)]
pub(super) struct Selection {
    /// Sorted by key.
    policies: Box<[Arc<CompiledPolicy>]>,
    pub(super) egress: Option<Arc<Isolation>>,
    pub(super) ingress: Option<Arc<Isolation>>,
}

/// All selections in use.
#[derive(Debug, Default)]
pub(super) struct Selections {
    known: HashMap<Box<[PolicyId]>, Arc<Selection>>,
    collect_at: usize,
    next: PolicyId,
    /// The number of merged entries of each namespace.
    merged: HashMap<Arc<str>, Arc<AtomicUsize>>,
    /// How many selections were put together, so that tests can say what an event costs.
    #[cfg(test)]
    pub(super) made: usize,
}

impl CompiledPolicy {
    fn rules(&self, direction: Direction) -> Option<&Arc<Rules>> {
        match direction {
            Direction::Egress => self.egress.as_ref(),
            Direction::Ingress => self.ingress.as_ref(),
        }
    }
}

impl Selection {
    /// Sorted by key.
    pub(super) fn policies(&self) -> &[Arc<CompiledPolicy>] {
        &self.policies
    }

    pub(super) fn contains(&self, policy: &CompiledPolicy) -> bool {
        self.policies
            .binary_search_by(|known| known.key.cmp(&policy.key))
            .is_ok_and(|index| self.policies[index].id == policy.id)
    }

    /// The policies with the one of `key` replaced by `policy`, or without it.
    pub(super) fn with(
        &self,
        key: &PolicyKey,
        policy: Option<&Arc<CompiledPolicy>>,
    ) -> Vec<Arc<CompiledPolicy>> {
        let before = self.policies.partition_point(|known| known.key < *key);
        let after = self.policies.partition_point(|known| known.key <= *key);
        let (before, after) = (&self.policies[..before], &self.policies[after..]);
        before.iter().chain(policy).chain(after).cloned().collect()
    }
}

impl Selections {
    pub(super) fn policy(
        &mut self,
        key: PolicyKey,
        egress: Option<Arc<Rules>>,
        ingress: Option<Arc<Rules>>,
    ) -> CompiledPolicy {
        self.next += 1;
        CompiledPolicy {
            id: self.next,
            key,
            egress,
            ingress,
        }
    }

    /// `policies` are sorted by key.
    pub(super) fn intern(&mut self, policies: Vec<Arc<CompiledPolicy>>) -> Arc<Selection> {
        let ids: Box<[PolicyId]> = policies.iter().map(|policy| policy.id).collect();
        if let Some(known) = self.known.get(&ids) {
            return known.clone();
        }
        if self.known.len() >= self.collect_at {
            self.collect();
            self.collect_at = 64.max(self.known.len() * 2);
        }
        #[cfg(test)]
        {
            self.made += 1;
        }
        let selection = Arc::new(Selection {
            egress: self.isolation(&policies, Direction::Egress),
            ingress: self.isolation(&policies, Direction::Ingress),
            policies: policies.into(),
        });
        self.known.insert(ids, selection.clone());
        selection
    }

    /// Frees the selections that no pod has any more.
    pub(super) fn collect(&mut self) {
        self.known
            .retain(|_, selection| Arc::strong_count(selection) > 1);
        self.merged.retain(|_, taken| Arc::strong_count(taken) > 1);
    }

    fn isolation(
        &mut self,
        policies: &[Arc<CompiledPolicy>],
        direction: Direction,
    ) -> Option<Arc<Isolation>> {
        let isolating = policies
            .iter()
            .filter_map(|policy| Some((policy, policy.rules(direction)?)));
        let (policies, rules): (Vec<PolicyKey>, Vec<Arc<Rules>>) = isolating
            .map(|(policy, rules)| (policy.key.clone(), rules.clone()))
            .unzip();
        let namespace = policies.first()?.namespace.clone();
        let taken = self.merged.entry(namespace).or_default().clone();
        let decider = Decider::new(rules.clone(), taken);
        Some(Arc::new(Isolation {
            policies: policies.into(),
            rules: rules.into(),
            decider,
        }))
    }
}
