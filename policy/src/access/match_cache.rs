//! A cache of the keys that sets of selectors have in common with an [`Access`](super::Access).
//!
//! Used only if both sides are large. A set is identified by its number, which no other set ever
//! has, so the cache keeps no set alive.
use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use super::{Key, meet};

/// Sets in the cache, at most.
const SETS: usize = 4096;
/// Keys of all sets in the cache together, at most (256 KiB).
const KEYS: usize = 65_536;

#[derive(Debug, Default)]
pub(super) struct MatchCache(RwLock<Sets>);

#[derive(Debug, Default)]
struct Sets {
    by_number: HashMap<u64, Box<[Key]>>,
    keys: usize,
}

impl MatchCache {
    /// Whether a set has any of the `asked` keys; `keys` computes all that it has, sorted. A set
    /// with number 0 is computed each time.
    pub(super) fn meet(
        &self,
        number: u64,
        asked: &[Key],
        keys: impl FnOnce() -> Box<[Key]>,
    ) -> bool {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(keys) = known.by_number.get(&number) {
            return meet(keys, asked);
        }
        drop(known);
        let keys = keys();
        let answer = meet(&keys, asked);
        if number != 0 {
            let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
            known.add(number, keys);
        }
        answer
    }
}

impl Sets {
    fn add(&mut self, number: u64, keys: Box<[Key]>) {
        if self.by_number.len() >= SETS || self.keys + keys.len() > KEYS {
            *self = Self::default();
        }
        self.keys += keys.len();
        if let Some(same) = self.by_number.insert(number, keys) {
            self.keys -= same.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_set_is_evaluated_once_within_bounded_memory() {
        let cache = MatchCache::default();
        let mut worked_out = 0;
        let mut meet = |number: u64, asked: Key| {
            cache.meet(number, &[asked], || {
                worked_out += 1;
                [1, 5].into()
            })
        };
        assert!(meet(7, 5) && meet(7, 1) && !meet(7, 2));
        assert!(meet(0, 5) && meet(0, 5), "without a number");
        assert_eq!(worked_out, 3);
        for number in 1..40_000 {
            cache.meet(number, &[1], || vec![1; 100].into());
        }
        let sets = cache.0.read().unwrap();
        assert!(sets.by_number.len() <= SETS && sets.keys <= KEYS);
        let kept: usize = sets.by_number.values().map(|keys| keys.len()).sum();
        assert_eq!(kept, sets.keys);
    }
}
