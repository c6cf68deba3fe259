//! The peer selectors that a pod matches.
use std::ops::Deref;

use crate::compile::SelectorId;

/// Sorted ids, and a number that identifies the set.
#[derive(Debug, Default)]
pub(crate) struct MatchSet {
    number: u64,
    ids: Box<[SelectorId]>,
}

impl MatchSet {
    /// `number` must be unique; 0 means none, and any set may have it.
    pub(crate) fn new(number: u64, ids: Box<[SelectorId]>) -> Self {
        Self { number, ids }
    }

    /// A number that no set with other members has; 0 if it has none.
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
