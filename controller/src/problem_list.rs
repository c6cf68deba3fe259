//! The problems of a source as they are sent with each batch: one shared list, built again only after a change.
use std::collections::BTreeMap;
use std::mem;
use std::sync::Arc;

use crate::{Batch, Event, Problem};

/// Problems by what they belong to: an object or a file.
#[derive(Debug)]
pub(crate) struct ProblemList<K> {
    by_owner: BTreeMap<K, Vec<Problem>>,
    /// Something has changed since the list was built.
    is_stale: bool,
    list: Arc<Vec<Problem>>,
}

impl<K> Default for ProblemList<K> {
    fn default() -> Self {
        Self {
            by_owner: BTreeMap::new(),
            is_stale: false,
            list: Arc::default(),
        }
    }
}

impl<K: Ord> ProblemList<K> {
    /// Makes these the problems of `owner`, in place of its earlier ones.
    pub(crate) fn set(&mut self, owner: K, problems: Vec<Problem>) {
        let before = if problems.is_empty() {
            self.by_owner.remove(&owner)
        } else {
            self.is_stale = true;
            self.by_owner.insert(owner, problems)
        };
        self.is_stale |= before.is_some();
    }

    /// The problems of `owner`, to be edited right after [`Self::set`].
    pub(crate) fn of_mut(&mut self, owner: &K) -> &mut [Problem] {
        self.by_owner
            .get_mut(owner)
            .map_or(&mut [], Vec::as_mut_slice)
    }

    /// What has problems.
    pub(crate) fn owners(&self) -> impl Iterator<Item = &K> {
        self.by_owner.keys()
    }

    /// Every problem that belongs to an owner.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Problem> {
        self.by_owner.values().flatten()
    }

    /// A problem that belongs to no owner has come or gone.
    pub(crate) fn others_changed(&mut self, changed: bool) {
        self.is_stale |= changed;
    }

    /// The batch of `events` with every problem, `others` behind those of owners; `None` if nothing has changed since the
    /// last one.
    pub(crate) fn batch(
        &mut self,
        events: Vec<Event>,
        others: impl FnOnce() -> Vec<Problem>,
    ) -> Option<Batch> {
        if !self.rebuild(others) && events.is_empty() {
            return None;
        }
        Some(Batch {
            events,
            problems: Arc::clone(&self.list),
        })
    }

    /// Whether the list is another one than before.
    fn rebuild(&mut self, others: impl FnOnce() -> Vec<Problem>) -> bool {
        if !mem::take(&mut self.is_stale) {
            return false;
        }
        let mut list: Vec<Problem> = self.all().cloned().collect();
        list.extend(others());
        let differs = list != *self.list;
        if differs {
            self.list = Arc::new(list);
        }
        differs
    }
}
