//! Which pods each policy selects; of all policies found without the cluster, which changes meanwhile.
use std::collections::BTreeMap;
use std::sync::Arc;

use super::labels::Search;
use super::{Cluster, pods_of};
use crate::model::{Pod, PodKey, PolicyKey};
use crate::network_policy::NetworkPolicy;
use crate::selector::LabelSelector;

/// The policies and pods of one state of a cluster; cheap to take, since it shares them.
#[derive(Debug)]
pub struct Selected {
    policies: Vec<(Arc<NetworkPolicy>, Option<Arc<LabelSelector>>)>,
    /// Of the namespaces that have policies; those that a policy can isolate, sorted.
    pods: BTreeMap<Arc<str>, Vec<Arc<Pod>>>,
}

impl Cluster {
    /// The pods that a policy applies to, sorted, without hostNetwork and finished pods.
    /// Empty if there is no such policy.
    pub fn selected_by(&self, key: &PolicyKey) -> Vec<PodKey> {
        let state = self.policies.get(key);
        let Some(pods) = state.and_then(|state| state.pods.as_ref()) else {
            return Vec::new();
        };
        let scope = self.within(&key.namespace);
        let found = Search::new(&self.pods_by_label).find(pods.requirements(), Some(&scope));
        let found = found.into_iter();
        let found = found.filter_map(|slot| self.pods_by_label.get(slot));
        let policed = found.filter(|pod| pod.is_policed());
        let mut keys: Vec<PodKey> = policed.map(|pod| pod.key.clone()).collect();
        keys.sort_unstable();
        keys
    }

    /// The policies and pods as they are now.
    pub fn selected(&self) -> Selected {
        let mut pods = BTreeMap::new();
        for PolicyKey { namespace, .. } in self.policies.keys() {
            if !pods.contains_key(namespace) {
                let own = pods_of(&self.pods, namespace).map(|(_, state)| &state.pod);
                let own = own.filter(|pod| pod.is_policed()).cloned();
                pods.insert(namespace.clone(), own.collect());
            }
        }
        let policies = self.policies.values();
        let policies = policies.map(|state| (state.policy.clone(), state.pods.clone()));
        Selected {
            policies: policies.collect(),
            pods,
        }
    }
}

impl Selected {
    /// Every policy with the pods that it applies to; both sorted.
    pub fn iter(&self) -> impl Iterator<Item = (&NetworkPolicy, Vec<PodKey>)> {
        self.policies.iter().map(|(policy, selector)| {
            let pods = self.pods.get(&policy.key().namespace).into_iter().flatten();
            let selects = |pod: &&Arc<Pod>| {
                let selector = selector.as_ref();
                selector.is_some_and(|it| it.matches(&pod.labels))
            };
            let selected = pods.filter(selects).map(|pod| pod.key.clone());
            (&**policy, selected.collect())
        })
    }
}
