//! The policies in force, for people.
use policy::{Cluster, Direction, PodKey, PolicyKey};
use serde::Serialize;

use super::Table;

/// A policy in force, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PolicyInfo {
    /// `namespace/name`.
    pub policy: PolicyKey,
    /// Whether it isolates the pods that it selects for ingress.
    pub ingress: bool,
    /// Whether it isolates the pods that it selects for egress.
    pub egress: bool,
    /// The pods that it selects; sorted.
    pub pods: Vec<PodKey>,
}

impl Table {
    /// Every policy in force with the pods that it selects. Compares all pods of a namespace with
    /// each of its policies, and changes do not wait for it.
    #[must_use]
    pub fn policies(&self) -> Vec<PolicyInfo> {
        let selected = self.with_cluster(Cluster::selected);
        let listed = selected.iter().map(|(policy, pods)| PolicyInfo {
            policy: policy.key().clone(),
            ingress: policy.isolates(Direction::Ingress),
            egress: policy.isolates(Direction::Egress),
            pods,
        });
        listed.collect()
    }
}
