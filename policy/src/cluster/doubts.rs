//! Pods that policies select in vain, kept up with every change.
//!
//! Policies are about pods with addresses of their own; one that selects a hostNetwork pod does
//! nothing for it, which no single object shows. Knows nothing of what is done about it.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::compile::CompiledPolicy;
use crate::model::{PodKey, PolicyKey};

#[derive(Debug, Default)]
pub(super) struct Doubts {
    out_of_reach: BTreeMap<PolicyKey, BTreeSet<PodKey>>,
    /// Changes whenever `out_of_reach` does.
    pub(super) changes: u64,
}

impl Doubts {
    /// Sorted; no set is empty.
    pub(super) fn out_of_reach(&self) -> impl Iterator<Item = (&PolicyKey, &BTreeSet<PodKey>)> {
        self.out_of_reach.iter()
    }

    /// Notes that a pod is selected in vain by the policies of `after`, no longer by those of `before`.
    pub(super) fn settle(
        &mut self,
        pod: &PodKey,
        before: &[Arc<CompiledPolicy>],
        after: &[Arc<CompiledPolicy>],
    ) {
        if keys(before).eq(keys(after)) {
            return;
        }
        self.changes += 1;
        for key in keys(before) {
            if let Some(pods) = self.out_of_reach.get_mut(key) {
                pods.remove(pod);
                if pods.is_empty() {
                    self.out_of_reach.remove(key);
                }
            }
        }
        for key in keys(after) {
            let pods = self.out_of_reach.entry(key.clone()).or_default();
            pods.insert(pod.clone());
        }
    }
}

fn keys(policies: &[Arc<CompiledPolicy>]) -> impl Iterator<Item = &PolicyKey> {
    policies.iter().map(|policy| &policy.key)
}
