//! The peer selectors that a pod matches.
use std::ops::Deref;

use crate::compile::SelectorId;

/// Ids, sorted, and a number by which the set is known.
#[derive(Debug, Default)]
pub(crate) struct MatchSet {
    number: u64,
    ids: Box<[SelectorId]>,
}

impl MatchSet {
    /// `number` is no other set's; 0 is no number, and any set may have it.
    pub(crate) fn new(number: u64, ids: Box<[SelectorId]>) -> Self {
        Self { number, ids }
    }

    /// A number that no set with other members has; 0 if there is none.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }
}

impl Deref for MatchSet {
    type Target = [SelectorId];

    fn deref(&self) -> &[SelectorId] {
        &self.ids
    }
}

impl PartialEq for MatchSet {
    fn eq(&self, other: &Self) -> bool {
        self.ids == other.ids
    }
}

impl Eq for MatchSet {}
