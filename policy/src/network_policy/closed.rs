//! Replacements for policies that exceed the budget of their namespace.
use super::{NetworkPolicy, Rule};
use crate::selector::LabelSelector;

impl NetworkPolicy {
    /// The replacement for the policy if it is refused: it isolates the same pods in the same
    /// directions, and allows nothing.
    pub(crate) fn closed(&self) -> Self {
        let closed = |rules: &Option<Vec<Rule>>| rules.as_ref().map(|_| Vec::new());
        Self {
            key: self.key.clone(),
            pods: self.pods.clone(),
            ingress: closed(&self.ingress),
            egress: closed(&self.egress),
        }
    }

    /// The replacement for this policy and all further ones: it isolates every pod of the namespace
    /// in both directions, and allows nothing.
    pub(crate) fn closed_to_all(&self) -> Self {
        Self {
            key: self.key.clone(),
            pods: LabelSelector::default(),
            ingress: Some(Vec::new()),
            egress: Some(Vec::new()),
        }
    }
}
