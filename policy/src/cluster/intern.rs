//! One shared copy of each distinct value, for as long as it is in use.
use std::collections::HashMap;
use std::sync::Arc;

/// Values that nothing else uses are freed when their number may have doubled.
#[derive(Debug)]
pub(super) struct Interner<T> {
    /// By a hash that the caller computes, once for each value.
    values: HashMap<u64, Vec<Arc<T>>>,
    count: usize,
    collect_at: usize,
}

/// Below this many values nothing is freed.
const FEW: usize = 64;

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Self {
            values: HashMap::new(),
            count: 0,
            collect_at: FEW,
        }
    }
}

impl<T> Interner<T> {
    /// The value with this hash that is `wanted`.
    pub(super) fn find(&self, hash: u64, wanted: impl Fn(&T) -> bool) -> Option<Arc<T>> {
        let mut alike = self.values.get(&hash).into_iter().flatten();
        alike.find(|value| wanted(value)).cloned()
    }

    /// Adds a value that [`Self::find`] does not find.
    pub(super) fn add(&mut self, hash: u64, value: T) -> Arc<T> {
        if self.count >= self.collect_at {
            self.collect();
            self.collect_at = FEW.max(self.count * 2);
        }
        let value = Arc::new(value);
        let alike = self.values.entry(hash).or_default();
        alike.push(value.clone());
        self.count += 1;
        value
    }

    /// Frees the values that nothing else uses.
    pub(super) fn collect(&mut self) {
        self.count = 0;
        self.values.retain(|_, alike| {
            alike.retain(|value| Arc::strong_count(value) > 1);
            self.count += alike.len();
            !alike.is_empty()
        });
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_shared_and_unused_ones_freed() {
        let mut interner = Interner::<Vec<u32>>::default();
        let mut shared = |hash: u64, value: Vec<u32>| {
            let found = interner.find(hash, |known| *known == value);
            let shared = found.unwrap_or_else(|| interner.add(hash, value));
            (shared, interner.len())
        };
        let (kept, _) = shared(7, vec![1, 2]);
        let (other, _) = shared(7, vec![1]);
        assert_ne!(kept, other, "the hash alone does not identify a value");
        for value in 0..10_000 {
            let (_, stayed) = shared(value.into(), vec![value]);
            assert!(stayed <= FEW + 3, "{stayed} values stayed");
        }
        assert!(Arc::ptr_eq(&kept, &shared(7, vec![1, 2]).0));
    }
}
