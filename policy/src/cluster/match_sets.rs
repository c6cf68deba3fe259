//! One shared copy of each distinct set of selectors that a pod matches.
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use super::intern::Interner;
use crate::compile::SelectorId;
use crate::matches::MatchSet;

/// All sets in use.
#[derive(Debug, Default)]
pub(super) struct MatchSets {
    sets: Interner<MatchSet>,
    hasher: RandomState,
    last: u64,
}

impl MatchSets {
    /// The shared set of these sorted ids.
    pub(super) fn intern(&mut self, ids: Vec<SelectorId>) -> Arc<MatchSet> {
        let hash = self.hasher.hash_one(&ids);
        if let Some(known) = self.sets.find(hash, |set| **set == *ids) {
            return known;
        }
        self.last += 1;
        self.sets.add(hash, MatchSet::new(self.last, ids.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_sets_are_shared_and_unused_freed() {
        let mut sets = MatchSets::default();
        let kept = sets.intern(vec![1, 2]);
        assert!(Arc::ptr_eq(&kept, &sets.intern(vec![1, 2])));
        let mut last = kept.number();
        for id in 0..10_000 {
            let number = sets.intern(vec![id]).number();
            assert!(number > last, "a number is never given twice");
            last = number;
        }
        assert!(sets.sets.len() < 100, "{} stayed", sets.sets.len());
        assert!(Arc::ptr_eq(&kept, &sets.intern(vec![1, 2])));
    }
}
