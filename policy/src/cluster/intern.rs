//! One shared copy of each distinct value, for as long as somebody uses it.
use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

/// Values that only the interner still holds are freed when their number may have doubled.
#[derive(Debug)]
pub(super) struct Interner<T> {
    values: HashSet<Arc<T>>,
    collect_at: usize,
}

/// Below this many values nothing is collected.
const FEW: usize = 64;

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Self {
            values: HashSet::new(),
            collect_at: FEW,
        }
    }
}

impl<T: Eq + Hash> Interner<T> {
    pub(super) fn intern(&mut self, value: T) -> Arc<T> {
        match self.values.get(&value) {
            Some(known) => known.clone(),
            None => self.add(Arc::new(value)),
        }
    }

    fn add(&mut self, value: Arc<T>) -> Arc<T> {
        if self.values.len() >= self.collect_at {
            self.values.retain(|value| Arc::strong_count(value) > 1);
            self.collect_at = FEW.max(self.values.len() * 2);
        }
        self.values.insert(value.clone());
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_shared_and_unused_ones_freed() {
        let mut interner = Interner::<Vec<u32>>::default();
        let kept = interner.intern(vec![1, 2]);
        assert!(Arc::ptr_eq(&kept, &interner.intern(vec![1, 2])));
        for value in 0..10_000 {
            interner.intern(vec![value]);
        }
        assert!(
            interner.values.len() <= FEW + 1,
            "{} values stayed",
            interner.values.len()
        );
        assert!(Arc::ptr_eq(&kept, &interner.intern(vec![1, 2])));
    }
}
