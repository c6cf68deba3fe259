//! Decides whether any rule of the policies that isolate a pod allows a connection: by one merged
//! structure, while the namespace's merged entries are within their bound.
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use crate::access::Access;
use crate::compile::{Question, Rules};

/// Merged entries that a namespace may have at one time (16 bytes each at most, 40 for IPv6).
/// Beyond it, further sets of policies are evaluated policy by policy.
const MERGED: usize = 1_200_000;

/// Evaluates lists of rules, which the first query passes to it.
#[derive(Debug, Default)]
pub(crate) struct Decider {
    /// The number of merged entries of the namespace.
    taken: Arc<AtomicUsize>,
    built: OnceLock<Built>,
}

#[derive(Debug)]
enum Built {
    Merged(Box<Merged>),
    /// One list or none, or the bound leaves no room for another copy.
    Apart(Box<[Arc<Rules>]>),
}

#[derive(Debug)]
struct Merged {
    access: Access,
    _lease: Lease,
}

/// A part of the namespace's merged entries; released when dropped.
#[derive(Debug)]
struct Lease {
    taken: Arc<AtomicUsize>,
    entries: usize,
}

impl Decider {
    /// A decider of a namespace that has `taken` merged entries now.
    pub(crate) fn new(taken: Arc<AtomicUsize>) -> Self {
        Self {
            taken,
            built: OnceLock::new(),
        }
    }

    /// How many lists it evaluates one by one.
    #[cfg(test)]
    pub(crate) fn evaluated(&self) -> usize {
        match self.built.get() {
            Some(Built::Apart(lists)) => lists.len(),
            Some(Built::Merged(_)) | None => 0,
        }
    }

    /// Whether any rule of `lists` allows the connection.
    pub(crate) fn allows(
        &self,
        question: Question<'_>,
        lists: impl FnOnce() -> Vec<Arc<Rules>>,
    ) -> bool {
        match self.built(lists) {
            Built::Merged(merged) => merged.access.allows(question),
            Built::Apart(lists) => lists.iter().any(|it| it.access.allows(question)),
        }
    }

    /// Builds the merged structure, so that the first lookup does not wait for it.
    pub(crate) fn prepare(&self, lists: impl FnOnce() -> Vec<Arc<Rules>>) {
        self.built(lists);
    }

    fn built(&self, lists: impl FnOnce() -> Vec<Arc<Rules>>) -> &Built {
        self.built.get_or_init(|| {
            // Equal rules share an allocation, so that addresses identify them.
            let mut lists = lists();
            lists.retain(|rules| !rules.list.is_empty());
            lists.sort_unstable_by_key(Arc::as_ptr);
            lists.dedup_by_key(|rules| Arc::as_ptr(rules));
            let all: Vec<_> = lists.iter().map(|rules| &rules.access).collect();
            let entries = all.iter().map(|access| access.entries()).sum();
            let several = all.len() > 1;
            let lease = several.then(|| Lease::take(&self.taken, entries, MERGED));
            match lease.flatten() {
                Some(_lease) => {
                    let access = Access::merged(&all);
                    Built::Merged(Box::new(Merged { access, _lease }))
                }
                None => Built::Apart(lists.into()),
            }
        })
    }
}

impl Lease {
    /// Adds `entries` to `taken`, if the sum is within `bound`.
    fn take(taken: &Arc<AtomicUsize>, entries: usize, bound: usize) -> Option<Self> {
        let fits = |now: usize| now.checked_add(entries).filter(|next| *next <= bound);
        taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
            .ok()?;
        Some(Self {
            taken: taken.clone(),
            entries,
        })
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.taken.fetch_sub(self.entries, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_merges_a_bounded_number_of_entries() {
        let taken = Arc::new(AtomicUsize::new(0));
        let first = Lease::take(&taken, 6, 10);
        assert!(first.is_some() && Lease::take(&taken, 5, 10).is_none());
        let second = Lease::take(&taken, 4, 10);
        assert!(second.is_some());
        drop(first);
        assert!(Lease::take(&taken, 6, 10).is_some());
        assert_eq!(taken.load(Ordering::Relaxed), 4, "given back when dropped");
    }
}
