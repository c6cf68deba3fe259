//! Decides whether any rule of the policies that isolate a pod allows a connection: by one merged
//! structure, while the namespace's merged entries are within their bound.
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use crate::access::Access;
use crate::compile::{Question, Rules};

/// Merged entries that a namespace may have at one time (16 bytes each at most, 40 for IPv6).
/// Beyond it, further sets of policies are evaluated policy by policy.
const MERGED: usize = 1_200_000;

/// Evaluates lists of rules, which each call passes to it.
#[derive(Debug, Default)]
pub(crate) struct Decider {
    /// The number of merged entries of the namespace.
    taken: Arc<AtomicUsize>,
    merged: OnceLock<Merged>,
}

#[derive(Debug)]
enum Merged {
    /// The only list that is not empty, if there is one.
    One(Option<Arc<Rules>>),
    All {
        access: Box<Access>,
        _lease: Lease,
    },
    /// There is no room for another copy: every list is evaluated.
    No,
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
            merged: OnceLock::new(),
        }
    }

    /// How many lists it evaluates one by one.
    #[cfg(test)]
    pub(crate) fn evaluated<'a>(&self, lists: impl Iterator<Item = &'a Arc<Rules>>) -> usize {
        match self.merged.get() {
            Some(Merged::One(list)) => list.iter().count(),
            Some(Merged::No) => lists.count(),
            Some(Merged::All { .. }) | None => 0,
        }
    }

    /// Whether any rule of `lists` allows the connection. The first call merges them, unless
    /// [`Self::prepare`] was called.
    pub(crate) fn allows<'a, I>(&self, question: Question<'_>, lists: impl Fn() -> I) -> bool
    where
        I: Iterator<Item = &'a Arc<Rules>>,
    {
        let mut unbounded = usize::MAX;
        let merge = || self.merge(lists(), &mut unbounded);
        match self.merged.get_or_init(merge) {
            Merged::One(list) => list.iter().any(|it| it.access.allows(question)),
            Merged::All { access, .. } => access.allows(question),
            Merged::No => lists().any(|it| it.access.allows(question)),
        }
    }

    /// Merges the lists, so that the first lookup does not wait for it, and subtracts their number
    /// and that of their entries from `work`. If no work is left, they stay unmerged.
    pub(crate) fn prepare<'a, I>(&self, lists: impl Fn() -> I, work: &mut usize)
    where
        I: Iterator<Item = &'a Arc<Rules>>,
    {
        self.merged.get_or_init(|| match work {
            0 => Merged::No,
            _ => self.merge(lists(), work),
        });
    }

    fn merge<'a>(&self, lists: impl Iterator<Item = &'a Arc<Rules>>, work: &mut usize) -> Merged {
        // Equal rules share an allocation, so that addresses identify them.
        let mut lists: Vec<_> = lists.filter(|rules| !rules.list.is_empty()).collect();
        *work = work.saturating_sub(lists.len());
        lists.sort_unstable_by_key(|rules| Arc::as_ptr(rules));
        lists.dedup_by_key(|rules| Arc::as_ptr(rules));
        if lists.len() <= 1 {
            return Merged::One(lists.first().map(|&rules| rules.clone()));
        }
        let all: Vec<_> = lists.iter().map(|rules| &rules.access).collect();
        let entries = all.iter().map(|access| access.entries()).sum();
        let Some(lease) = Lease::take(&self.taken, entries, MERGED) else {
            return Merged::No;
        };
        *work = work.saturating_sub(entries);
        Merged::All {
            access: Box::new(Access::merged(&all)),
            _lease: lease,
        }
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
