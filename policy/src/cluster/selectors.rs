//! Every distinct peer selector of the policies, each with its id.
//!
//! An id is never reused: an old id in a pod's set or in a rule can never refer to
//! another selector. Selectors are listed under a label that a pod must have to match, so
//! that for a new pod only the selectors under its own and its namespace's labels are checked.
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::labels::{ByLabel, NAMESPACE};
use crate::compile::SelectorId;
use crate::model::{Labels, Namespace, Pod};
use crate::selector::{NamespaceScope, PeerSelector, Requirement, Test};

#[derive(Debug, Default)]
pub(super) struct Selectors {
    ids: HashMap<Arc<PeerSelector>, SelectorId>,
    entries: HashMap<SelectorId, Entry>,
    /// By a label of the pod; its namespace's name counts as one ([`NAMESPACE`]).
    by_pod: Listed,
    /// By a label of the pod's namespace.
    by_namespace: Listed,
    /// Those that need no label.
    open: Vec<Named>,
    /// How many entries nobody holds.
    unheld: usize,
    next: SelectorId,
}

/// A selector with its id.
pub(super) type Named = (SelectorId, Arc<PeerSelector>);

#[derive(Debug)]
struct Entry {
    selector: Arc<PeerSelector>,
    /// How many policies have it.
    holders: usize,
}

/// Selectors by a label that they need.
#[derive(Debug, Default)]
struct Listed(HashMap<Arc<str>, OfKey>);

#[derive(Debug, Default)]
struct OfKey {
    any_value: Vec<Named>,
    values: HashMap<Arc<str>, Vec<Named>>,
}

/// Up to this many unheld selectors are kept whatever the number of others.
const UNHELD: usize = 256;

impl Selectors {
    /// The id that the next new selector gets; all others are below it.
    pub(super) fn next_id(&self) -> SelectorId {
        self.next
    }

    /// The id of `selector`, new if it is. It has to be held before the next [`Self::sweep`].
    /// `pods` and `namespaces` show which of the labels that it needs is the rarest now.
    ///
    /// # Panics
    /// After four billion distinct selectors: a panic is better than an ambiguous id.
    pub(super) fn intern(
        &mut self,
        selector: &PeerSelector,
        pods: &ByLabel<Arc<Pod>>,
        namespaces: &ByLabel<Arc<Namespace>>,
    ) -> SelectorId {
        if let Some(&id) = self.ids.get(selector) {
            return id;
        }
        let id = self.next;
        self.next = id
            .checked_add(1)
            .expect("selector ids are used up: restart the process");
        let selector = Arc::new(selector.clone());
        self.ids.insert(selector.clone(), id);
        let holders = 0;
        self.list((id, selector.clone()), pods, namespaces);
        self.entries.insert(id, Entry { selector, holders });
        self.unheld += 1;
        id
    }

    fn list(
        &mut self,
        named: Named,
        pods: &ByLabel<Arc<Pod>>,
        namespaces: &ByLabel<Arc<Namespace>>,
    ) {
        let selector = named.1.clone();
        let own = match &selector.namespaces {
            NamespaceScope::Named(name) => Some(in_namespaces([name.clone()].into())),
            NamespaceScope::Matching(_) => None,
        };
        let of_pod = selector.pods.requirements().iter().chain(&own);
        let of_pod = of_pod.filter(|it| it.is_positive());
        let of_pod = of_pod.min_by_key(|it| pods.count(it));
        let of_namespace = match &selector.namespaces {
            NamespaceScope::Named(_) => None,
            NamespaceScope::Matching(scope) => {
                let positive = scope.requirements().iter().filter(|it| it.is_positive());
                positive.min_by_key(|it| namespaces.count(it))
            }
        };
        match (of_pod, of_namespace) {
            (of_pod, Some(rare)) if of_pod.is_none() || namespaces.count(rare) == 0 => {
                self.by_namespace.insert(rare, &named);
            }
            (Some(rare), _) => self.by_pod.insert(rare, &named),
            (None, _) => self.open.push(named),
        }
    }

    /// The id of a selector that is known.
    pub(super) fn id(&self, selector: &PeerSelector) -> SelectorId {
        self.ids[selector]
    }

    /// Those of `ids` that are known, with their selectors.
    pub(super) fn named(&self, ids: impl Iterator<Item = SelectorId>) -> Vec<Named> {
        ids.filter_map(|id| Some((id, self.entries.get(&id)?.selector.clone())))
            .collect()
    }

    /// The ids of all selectors that a pod in this namespace matches; sorted.
    pub(super) fn matching(&self, pod: &Pod, namespace: &Namespace) -> Vec<SelectorId> {
        let own_namespace = [(Arc::from(NAMESPACE), namespace.name().clone())];
        let own_namespace = Labels::from(own_namespace);
        let listed = self.by_pod.under(&pod.labels);
        let listed = listed.chain(self.by_pod.under(&own_namespace));
        let listed = listed.chain(self.by_namespace.under(namespace.labels()));
        let asked = listed.chain(&self.open).filter(|(_, selector)| {
            selector.pods.matches(&pod.labels)
                && selector
                    .namespaces
                    .covers(namespace.name(), namespace.labels())
        });
        let mut matching: Vec<SelectorId> = asked.map(|(id, _)| *id).collect();
        matching.sort_unstable();
        matching
    }

    pub(super) fn hold(&mut self, ids: &BTreeSet<SelectorId>) {
        for id in ids {
            if let Some(entry) = self.entries.get_mut(id) {
                self.unheld -= usize::from(entry.holders == 0);
                entry.holders += 1;
            }
        }
    }

    /// Undoes one [`Self::hold`] of each.
    pub(super) fn release(&mut self, ids: &[SelectorId]) {
        for id in ids {
            if let Some(entry) = self.entries.get_mut(id) {
                entry.holders -= 1;
                self.unheld += usize::from(entry.holders == 0);
            }
        }
    }

    /// Removes the unheld selectors if they are many, and returns their ids, sorted; the caller has
    /// to remove them from the pods.
    pub(super) fn sweep(&mut self) -> Vec<SelectorId> {
        let held = self.entries.len() - self.unheld;
        if self.unheld <= UNHELD.max(held) {
            return Vec::new();
        }
        let gone = self.entries.extract_if(|_, entry| entry.holders == 0);
        let mut gone: Vec<SelectorId> = gone.map(|(id, _)| id).collect();
        gone.sort_unstable();
        self.ids.retain(|_, id| self.entries.contains_key(id));
        let known = |(id, _): &Named| self.entries.contains_key(id);
        self.by_pod.retain(known);
        self.by_namespace.retain(known);
        self.open.retain(known);
        self.unheld = 0;
        gone
    }
}

impl Listed {
    /// Lists a selector under every value of a positive requirement.
    fn insert(&mut self, needed: &Requirement, named: &Named) {
        let of_key = self.0.entry(needed.key.clone()).or_default();
        match &needed.test {
            Test::In(values) => {
                for value in values {
                    let of_value = of_key.values.entry(value.clone()).or_default();
                    of_value.push(named.clone());
                }
            }
            _ => of_key.any_value.push(named.clone()),
        }
    }

    /// The selectors that are listed under one of `labels`; each once.
    fn under<'a>(&'a self, labels: &'a Labels) -> impl Iterator<Item = &'a Named> {
        labels.iter().flat_map(|(key, value)| {
            let of_key = self.0.get(key).into_iter();
            of_key.flat_map(move |of_key| {
                let of_value = of_key.values.get(value).into_iter().flatten();
                of_key.any_value.iter().chain(of_value)
            })
        })
    }

    fn retain(&mut self, known: impl Fn(&Named) -> bool) {
        self.0.retain(|_, of_key| {
            of_key.any_value.retain(&known);
            of_key.values.retain(|_, of_value| {
                of_value.retain(&known);
                !of_value.is_empty()
            });
            !of_key.any_value.is_empty() || !of_key.values.is_empty()
        });
    }
}

/// The requirement that exactly the pods of these namespaces meet; `names` are sorted.
pub(super) fn in_namespaces(names: Box<[Arc<str>]>) -> Requirement {
    Requirement {
        key: NAMESPACE.into(),
        test: Test::In(names),
    }
}
