//! What stands for policies that ask for more than their namespace may have.
use super::{NetworkPolicy, Rule};
use crate::selector::LabelSelector;

impl NetworkPolicy {
    /// What stands for the policy where it asks for too much: it isolates the pods that it selects in
    /// the same directions, and allows nothing.
    pub(crate) fn closed(&self) -> Self {
        let closed = |rules: &Option<Vec<Rule>>| rules.as_ref().map(|_| Vec::new());
        Self {
            key: self.key.clone(),
            pods: self.pods.clone(),
            ingress: closed(&self.ingress),
            egress: closed(&self.egress),
        }
    }

    /// What stands for this policy and any others: it isolates every pod of the namespace both ways,
    /// and allows nothing.
    pub(crate) fn closed_to_all(&self) -> Self {
        Self {
            key: self.key.clone(),
            pods: LabelSelector::default(),
            ingress: Some(Vec::new()),
            egress: Some(Vec::new()),
        }
    }
}
