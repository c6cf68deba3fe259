//! Every distinct peer selector of the policies, each with its id.
//!
//! An id is never given twice: a pod's set or a rule that still has an old one can never mean
//! another selector by it.
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::compile::SelectorId;
use crate::model::Namespace;
use crate::selector::PeerSelector;

#[derive(Debug, Default)]
pub(super) struct Selectors {
    ids: HashMap<Arc<PeerSelector>, SelectorId>,
    entries: BTreeMap<SelectorId, Entry>,
    /// How many entries nobody holds.
    unheld: usize,
    next: SelectorId,
}

#[derive(Debug)]
struct Entry {
    selector: Arc<PeerSelector>,
    /// How many policies have it.
    holders: usize,
}

/// Up to this many unheld selectors are kept whatever the number of others.
const UNHELD: usize = 256;

impl Selectors {
    /// The id that the next new selector gets; all others are below it.
    pub(super) fn next_id(&self) -> SelectorId {
        self.next
    }

    /// The id of `selector`, new if it is. It has to be held before the next [`Self::sweep`].
    ///
    /// # Panics
    /// After four billion distinct selectors; to stop is better than to mistake one for another.
    pub(super) fn intern(&mut self, selector: &PeerSelector) -> SelectorId {
        if let Some(&id) = self.ids.get(selector) {
            return id;
        }
        let id = self.next;
        self.next = id
            .checked_add(1)
            .expect("selector ids are used up: restart the process");
        let selector = Arc::new(selector.clone());
        self.ids.insert(selector.clone(), id);
        self.entries.insert(
            id,
            Entry {
                selector,
                holders: 0,
            },
        );
        self.unheld += 1;
        id
    }

    /// The id of a selector that is known.
    pub(super) fn id(&self, selector: &PeerSelector) -> SelectorId {
        self.ids[selector]
    }

    /// The selector of an id that is known.
    pub(super) fn get(&self, id: SelectorId) -> &PeerSelector {
        &self.entries[&id].selector
    }

    pub(super) fn is_known(&self, id: SelectorId) -> bool {
        self.entries.contains_key(&id)
    }

    /// The ids of the selectors that look at this namespace's pods; sorted.
    pub(super) fn covering(&self, namespace: &Namespace) -> Vec<SelectorId> {
        let covers = |entry: &Entry| {
            entry
                .selector
                .namespaces
                .covers(namespace.name(), namespace.labels())
        };
        self.entries
            .iter()
            .filter(|(_, entry)| covers(entry))
            .map(|(&id, _)| id)
            .collect()
    }

    pub(super) fn hold(&mut self, ids: &BTreeSet<SelectorId>) {
        for id in ids {
            if let Some(entry) = self.entries.get_mut(id) {
                self.unheld -= usize::from(entry.holders == 0);
                entry.holders += 1;
            }
        }
    }

    /// Takes back one [`Self::hold`] of each.
    pub(super) fn release(&mut self, ids: &[SelectorId]) {
        for id in ids {
            if let Some(entry) = self.entries.get_mut(id) {
                entry.holders -= 1;
                self.unheld += usize::from(entry.holders == 0);
            }
        }
    }

    /// Forgets the unheld selectors if they are many; says whether it did.
    pub(super) fn sweep(&mut self) -> bool {
        let held = self.entries.len() - self.unheld;
        if self.unheld <= UNHELD.max(held) {
            return false;
        }
        self.entries.retain(|_, entry| entry.holders > 0);
        self.ids.retain(|_, id| self.entries.contains_key(id));
        self.unheld = 0;
        true
    }
}
