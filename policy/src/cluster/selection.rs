//! Which policies select a pod, and what that makes of its isolation; shared by all pods that the
//! same policies select.
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use super::intern::Interner;
use crate::compile::{CompiledPolicy, PolicyId, Rules};
use crate::isolation::Isolation;
use crate::model::{Direction, PolicyKey};

/// The policies that select a pod.
#[derive(Debug)]
pub(super) struct Selection {
    /// Sorted by key.
    policies: Arc<[Arc<CompiledPolicy>]>,
    /// How many of them count as written. One that follows isolates the pod and allows nothing, for
    /// all that come after it too.
    in_force: usize,
    pub(super) egress: Option<Arc<Isolation>>,
    pub(super) ingress: Option<Arc<Isolation>>,
}

/// All selections in use.
#[derive(Debug, Default)]
pub(super) struct Selections {
    /// By the sum of their policies' hashes, which is faster than a hash of hundreds of policies.
    known: Interner<Selection>,
    hasher: RandomState,
    next: PolicyId,
    /// The number of merged entries of each namespace.
    merged: HashMap<Arc<str>, Arc<AtomicUsize>>,
    /// How many selections were built, so that tests can check the cost of an event.
    #[cfg(test)]
    pub(super) made: usize,
}

impl Selection {
    /// Sorted by key.
    pub(super) fn policies(&self) -> &[Arc<CompiledPolicy>] {
        &self.policies
    }

    /// The first policy too many, if there is one.
    pub(super) fn surplus(&self) -> &[Arc<CompiledPolicy>] {
        &self.policies[self.in_force..]
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
            hash: self.hasher.hash_one(self.next),
            key,
            egress,
            ingress,
        }
    }

    /// `policies` are sorted by key; the first `bound` of them count as written.
    pub(super) fn intern(
        &mut self,
        mut policies: Vec<Arc<CompiledPolicy>>,
        bound: usize,
    ) -> Arc<Selection> {
        policies.truncate(bound.saturating_add(1));
        let hashes = policies.iter().map(|policy| policy.hash);
        let hash = hashes.fold(0, u64::wrapping_add);
        if let Some(known) = self.known.find(hash, |known| *known.policies == *policies) {
            return known;
        }
        #[cfg(test)]
        {
            self.made += 1;
        }
        let policies: Arc<[Arc<CompiledPolicy>]> = policies.into();
        let in_force = policies.len().min(bound);
        let selection = Selection {
            egress: self.isolation(&policies, in_force, Direction::Egress),
            ingress: self.isolation(&policies, in_force, Direction::Ingress),
            policies,
            in_force,
        };
        self.known.add(hash, selection)
    }

    /// Frees the selections that no pod has any more.
    pub(super) fn collect(&mut self) {
        self.known.collect();
        self.merged.retain(|_, taken| Arc::strong_count(taken) > 1);
    }

    fn isolation(
        &mut self,
        policies: &Arc<[Arc<CompiledPolicy>]>,
        in_force: usize,
        direction: Direction,
    ) -> Option<Arc<Isolation>> {
        let namespace = policies.first()?.key.namespace.clone();
        let taken = self.merged.entry(namespace).or_default().clone();
        Isolation::new(direction, policies, in_force, taken).map(Arc::new)
    }
}
