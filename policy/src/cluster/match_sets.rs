//! One shared copy of each distinct set of selectors that a pod matches.
use std::borrow::Borrow;
use std::collections::HashSet;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use crate::compile::SelectorId;
use crate::matches::MatchSet;

/// All sets in use.
#[derive(Debug, Default)]
pub(super) struct MatchSets {
    known: HashSet<ByIds>,
    collect_at: usize,
    last: u64,
}

/// A set that is hashed by its members.
#[derive(Debug, PartialEq, Eq)]
struct ByIds(Arc<MatchSet>);

impl Hash for ByIds {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0[..].hash(state);
    }
}

impl Borrow<[SelectorId]> for ByIds {
    fn borrow(&self) -> &[SelectorId] {
        &self.0
    }
}

/// Below this many sets, unused ones are not freed.
const FEW: usize = 64;

impl MatchSets {
    /// The shared set of these sorted ids.
    pub(super) fn intern(&mut self, ids: Vec<SelectorId>) -> Arc<MatchSet> {
        if let Some(ByIds(known)) = self.known.get(ids.as_slice()) {
            return known.clone();
        }
        if self.known.len() >= self.collect_at {
            self.known.retain(|ByIds(set)| Arc::strong_count(set) > 1);
            self.collect_at = FEW.max(self.known.len() * 2);
        }
        self.last += 1;
        let set = Arc::new(MatchSet::new(self.last, ids.into()));
        self.known.insert(ByIds(set.clone()));
        set
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
        assert!(sets.known.len() <= FEW + 1, "{} stayed", sets.known.len());
        assert!(Arc::ptr_eq(&kept, &sets.intern(vec![1, 2])));
    }
}
