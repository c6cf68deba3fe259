//! Decides whether any rule of the policies that isolate a pod allows a connection: by one merged
//! structure, while the namespace's merged entries are within their bound.
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use crate::access::Access;
use crate::compile::{Question, Rules};

/// Merged entries that a namespace may have at one time (16 bytes each at most, 40 for IPv6).
/// Beyond it, further sets of policies are evaluated policy by policy.
const MERGED: usize = 1_200_000;

/// Evaluates distinct lists of rules.
#[derive(Debug, Default)]
pub(crate) struct Decider {
    distinct: Box<[Arc<Rules>]>,
    /// The number of merged entries of the namespace.
    taken: Arc<AtomicUsize>,
    /// `None` if the bound leaves no room for another copy.
    merged: OnceLock<Option<Merged>>,
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
    /// A decider for `rules`, of a namespace that has `taken` merged entries now.
    pub(crate) fn new(mut rules: Vec<Arc<Rules>>, taken: Arc<AtomicUsize>) -> Self {
        // Equal rules share an allocation, so that addresses identify them.
        rules.sort_by_key(Arc::as_ptr);
        rules.dedup_by_key(|rules| Arc::as_ptr(rules));
        rules.retain(|rules| !rules.list.is_empty());
        Self {
            distinct: rules.into(),
            taken,
            merged: OnceLock::new(),
        }
    }

    /// How many lists it evaluates.
    #[cfg(test)]
    pub(crate) fn lists(&self) -> usize {
        self.distinct.len()
    }

    /// Whether any rule allows the connection.
    pub(crate) fn allows(&self, question: Question<'_>) -> bool {
        if let [rules] = &*self.distinct {
            return rules.access.allows(question);
        }
        match self.merged() {
            Some(merged) => merged.access.allows(question),
            None => self.distinct.iter().any(|it| it.access.allows(question)),
        }
    }

    /// Builds the merged structure, so that the first lookup does not wait for it.
    pub(crate) fn prepare(&self) {
        self.merged();
    }

    fn merged(&self) -> Option<&Merged> {
        if self.distinct.len() < 2 {
            return None;
        }
        let merged = self.merged.get_or_init(|| {
            let all: Vec<_> = self.distinct.iter().map(|rules| &rules.access).collect();
            let entries = all.iter().map(|access| access.entries()).sum();
            let _lease = Lease::take(&self.taken, entries, MERGED)?;
            let access = Access::merged(&all);
            Some(Merged { access, _lease })
        });
        merged.as_ref()
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
