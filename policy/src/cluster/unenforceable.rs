//! Pods on which a policy does not have its full effect, updated with every change.
//!
//! Policies apply to pods with their own addresses; one that selects a hostNetwork pod has no
//! effect on it. Of the policies that select a pod a bounded number is enforced. No single object
//! shows either. And pods that are oversized. Does not report them.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Cluster;
use super::pod_state::{in_vain, surplus};
use super::selection::Selection;
use crate::compile::CompiledPolicy;
use crate::model::{Pod, PodKey, PolicyKey};

#[derive(Debug, Default)]
pub(super) struct Unenforceable {
    /// Pods that the policy selects without effect.
    out_of_reach: PodsOfPolicies,
    /// Pods for which the policy is the first one over the limit.
    surplus: PodsOfPolicies,
    /// Pods with too many labels or ports.
    oversized: BTreeSet<PodKey>,
    /// Changes whenever one of them does.
    pub(super) changes: u64,
}

/// Pods by policy; no set is empty.
type PodsOfPolicies = BTreeMap<PolicyKey, BTreeSet<PodKey>>;

/// The policies that select a pod without effect, and the first one over the limit.
type OfPod<'a> = (&'a [Arc<CompiledPolicy>], &'a [Arc<CompiledPolicy>]);

impl Cluster {
    /// The policies that select running hostNetwork pods, which no policy isolates, with these pods;
    /// sorted.
    pub fn out_of_reach(&self) -> impl Iterator<Item = (&PolicyKey, &BTreeSet<PodKey>)> {
        self.unenforceable.out_of_reach.iter()
    }

    /// The policies that are the first one over the limit for pods that too many policies select
    /// ([`Resource::OfAPod`]), with these pods; sorted. Such a policy isolates these pods in both
    /// directions and allows nothing, for all that come after it in the order of names.
    pub fn surplus(&self) -> impl Iterator<Item = (&PolicyKey, &BTreeSet<PodKey>)> {
        self.unenforceable.surplus.iter()
    }

    /// The pods that are isolated because they have too many labels or ports; sorted.
    pub fn oversized(&self) -> impl Iterator<Item = &PodKey> {
        self.unenforceable.oversized.iter()
    }

    /// Records a pod's next state, and the policies that select it, in place of the present ones.
    pub(super) fn record_unenforceable(&mut self, key: &PodKey, after: Option<(&Pod, &Selection)>) {
        let oversized = after.is_some_and(|(pod, _)| pod.oversized);
        self.unenforceable.settle_oversized(key, oversized);
        let before = self.pods.get(key);
        let before = before.map(|state| (&*state.pod, &*state.selection));
        let none = (&[][..], &[][..]);
        let of = |(pod, selection)| (in_vain(pod, selection), surplus(pod, selection));
        let (before, after) = (before.map_or(none, of), after.map_or(none, of));
        self.unenforceable.settle(key, before, after);
    }
}

impl Unenforceable {
    /// Notes that a pod is one of the policies of `after`, no longer of those of `before`.
    fn settle(&mut self, pod: &PodKey, before: OfPod<'_>, after: OfPod<'_>) {
        let out_of_reach = settle(&mut self.out_of_reach, pod, before.0, after.0);
        let surplus = settle(&mut self.surplus, pod, before.1, after.1);
        self.changes += u64::from(out_of_reach || surplus);
    }

    fn settle_oversized(&mut self, pod: &PodKey, oversized: bool) {
        let changed = match oversized {
            true => self.oversized.insert(pod.clone()),
            false => self.oversized.remove(pod),
        };
        self.changes += u64::from(changed);
    }
}

/// Returns whether anything has changed. Both lists are sorted, and mostly hold the same policies.
fn settle(
    pods_of: &mut PodsOfPolicies,
    pod: &PodKey,
    mut before: &[Arc<CompiledPolicy>],
    mut after: &[Arc<CompiledPolicy>],
) -> bool {
    let mut changed = false;
    loop {
        match (before.split_first(), after.split_first()) {
            (Some((old, olds)), Some((new, news))) if old == new || old.key == new.key => {
                (before, after) = (olds, news);
                continue;
            }
            (Some((old, olds)), new) if new.is_none_or(|(new, _)| old.key < new.key) => {
                before = olds;
                if let Some(pods) = pods_of.get_mut(&old.key) {
                    pods.remove(pod);
                    if pods.is_empty() {
                        pods_of.remove(&old.key);
                    }
                }
            }
            (_, Some((new, news))) => {
                after = news;
                let pods = pods_of.entry(new.key.clone()).or_default();
                pods.insert(pod.clone());
            }
            (_, None) => return changed,
        }
        changed = true;
    }
}
