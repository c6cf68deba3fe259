//! Values at stable indices; free indices are reused.
use std::ops::{Index, IndexMut};

/// A list of such values.
pub(super) struct Slab<V> {
    values: Vec<Option<V>>,
    free: Vec<u32>,
}

impl<V> Slab<V> {
    pub(super) fn new() -> Self {
        Self {
            values: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Stores a value and returns its index.
    ///
    /// # Panics
    /// With more than `u32::MAX` values.
    pub(super) fn insert(&mut self, value: V) -> u32 {
        match self.free.pop() {
            Some(at) => {
                self.values[at as usize] = Some(value);
                at
            }
            None => {
                let at = u32::try_from(self.values.len()).expect("fewer values than u32 counts");
                self.values.push(Some(value));
                at
            }
        }
    }

    pub(super) fn get(&self, at: u32) -> Option<&V> {
        self.values.get(at as usize)?.as_ref()
    }

    /// Takes out the value at an index.
    ///
    /// # Panics
    /// If there is none.
    pub(super) fn remove(&mut self, at: u32) -> V {
        let value = self.values[at as usize].take();
        self.free.push(at);
        value.expect("a value is there")
    }
}

impl<V> Index<u32> for Slab<V> {
    type Output = V;

    fn index(&self, at: u32) -> &V {
        self.get(at).expect("a value is there")
    }
}

impl<V> IndexMut<u32> for Slab<V> {
    fn index_mut(&mut self, at: u32) -> &mut V {
        self.values[at as usize].as_mut().expect("a value is there")
    }
}
