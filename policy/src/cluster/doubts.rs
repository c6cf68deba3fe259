//! Pods for which a policy does not do what it says, kept up with every change.
//!
//! Policies are about pods with addresses of their own; one that selects a hostNetwork pod does
//! nothing for it. Of the policies that select a pod a bounded number counts. Neither is to be seen
//! from a single object. Knows nothing of what is done about it.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Cluster;
use super::pod_state::{in_vain, surplus};
use super::selection::Selection;
use crate::compile::CompiledPolicy;
use crate::model::{Pod, PodKey, PolicyKey};

#[derive(Debug, Default)]
pub(super) struct Doubts {
    /// Pods that the policy selects in vain.
    out_of_reach: PodsOfPolicies,
    /// Pods of which the policy is the first one too many.
    surplus: PodsOfPolicies,
    /// Changes whenever one of them does.
    pub(super) changes: u64,
}

/// Pods by policy; no set is empty.
type PodsOfPolicies = BTreeMap<PolicyKey, BTreeSet<PodKey>>;

/// The policies that select a pod in vain, and the first one too many.
type OfPod<'a> = (&'a [Arc<CompiledPolicy>], &'a [Arc<CompiledPolicy>]);

impl Cluster {
    /// The policies that select running hostNetwork pods, which no policy isolates, with these pods;
    /// sorted.
    pub fn out_of_reach(&self) -> impl Iterator<Item = (&PolicyKey, &BTreeSet<PodKey>)> {
        self.doubts.out_of_reach.iter()
    }

    /// The policies that are the first one too many for pods that more policies select than count
    /// ([`Resource::OfAPod`]), with these pods; sorted. Such a policy isolates these pods in both
    /// directions and allows nothing, for all that come after it in the order of names.
    pub fn surplus(&self) -> impl Iterator<Item = (&PolicyKey, &BTreeSet<PodKey>)> {
        self.doubts.surplus.iter()
    }

    /// Notes what a pod is to be, and by which policies selected, instead of what it is by now.
    pub(super) fn settle_doubts(&mut self, key: &PodKey, after: Option<(&Pod, &Selection)>) {
        let before = self.pods.get(key);
        let before = before.map(|state| (&*state.pod, &*state.selection));
        let none = (&[][..], &[][..]);
        let of = |(pod, selection)| (in_vain(pod, selection), surplus(pod, selection));
        let (before, after) = (before.map_or(none, of), after.map_or(none, of));
        self.doubts.settle(key, before, after);
    }
}

impl Doubts {
    /// Notes that a pod is one of the policies of `after`, no longer of those of `before`.
    fn settle(&mut self, pod: &PodKey, before: OfPod<'_>, after: OfPod<'_>) {
        let out_of_reach = settle(&mut self.out_of_reach, pod, before.0, after.0);
        let surplus = settle(&mut self.surplus, pod, before.1, after.1);
        self.changes += u64::from(out_of_reach || surplus);
    }
}

/// Returns whether anything has changed.
fn settle(
    pods_of: &mut PodsOfPolicies,
    pod: &PodKey,
    before: &[Arc<CompiledPolicy>],
    after: &[Arc<CompiledPolicy>],
) -> bool {
    if keys(before).eq(keys(after)) {
        return false;
    }
    for key in keys(before) {
        if let Some(pods) = pods_of.get_mut(key) {
            pods.remove(pod);
            if pods.is_empty() {
                pods_of.remove(key);
            }
        }
    }
    for key in keys(after) {
        let pods = pods_of.entry(key.clone()).or_default();
        pods.insert(pod.clone());
    }
    true
}

fn keys(policies: &[Arc<CompiledPolicy>]) -> impl Iterator<Item = &PolicyKey> {
    policies.iter().map(|policy| &policy.key)
}
