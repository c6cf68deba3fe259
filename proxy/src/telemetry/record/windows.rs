//! An expiring map: a bounded number of time windows of one length, each with a
//! state of its own. Knows no clock.
use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Windows by key.
pub(crate) struct Windows<K, T> {
    length: Duration,
    room: usize,
    states: HashMap<K, T, ahash::RandomState>,
    /// The end of each window, in order.
    ends: VecDeque<(Instant, K)>,
}

impl<K: Clone + Eq + Hash, T: Default> Windows<K, T> {
    /// An empty map. Beyond `room` windows the oldest ends early.
    pub(crate) fn new(length: Duration, room: usize) -> Self {
        Self {
            length,
            room,
            states: HashMap::default(),
            ends: VecDeque::new(),
        }
    }

    /// The state of the window that runs for `key`, if one does.
    pub(crate) fn running(&mut self, key: &K) -> Option<&mut T> {
        self.states.get_mut(key)
    }

    /// Begins a window for `key`, for which none runs. Returns what had to make room for it.
    pub(crate) fn begin(&mut self, key: K, now: Instant) -> Option<(K, T)> {
        let pushed_out = (self.states.len() >= self.room)
            .then(|| self.ends.pop_front())
            .flatten()
            .and_then(|(_, oldest)| self.states.remove_entry(&oldest));
        self.states.insert(key.clone(), T::default());
        self.ends.push_back((now + self.length, key));
        pushed_out
    }

    /// Takes out the windows that have ended.
    pub(crate) fn ended(&mut self, now: Instant) -> Vec<(K, T)> {
        let number = self.ends.partition_point(|(end, _)| *end <= now);
        let keys = self.ends.drain(..number);
        keys.filter_map(|(_, key)| self.states.remove_entry(&key))
            .collect()
    }

    /// When the next one ends.
    pub(crate) fn next_end(&self) -> Option<Instant> {
        self.ends.front().map(|(end, _)| *end)
    }

    /// Takes all out, in no order.
    pub(crate) fn rest(&mut self) -> impl Iterator<Item = (K, T)> {
        self.ends.clear();
        self.states.drain()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: Duration = Duration::from_secs(10);

    #[test]
    fn window_ends_once_after_its_length() {
        let (mut windows, now) = (Windows::<_, u32>::new(LENGTH, 8), Instant::now());
        assert_eq!(windows.begin("a", now), None);
        *windows.running(&"a").unwrap() += 1;
        windows.begin("b", now + LENGTH / 2);
        assert_eq!(windows.next_end(), Some(now + LENGTH));
        assert_eq!(windows.ended(now + LENGTH / 2), []);
        assert_eq!(windows.ended(now + LENGTH), [("a", 1)]);
        assert!(windows.running(&"a").is_none() && windows.running(&"b").is_some());
        assert_eq!(windows.ended(now + LENGTH * 2), [("b", 0)]);
        assert_eq!(windows.next_end(), None);
    }

    #[test]
    fn full_window_table_ends_the_oldest_early() {
        let (mut windows, now) = (Windows::<_, u32>::new(LENGTH, 2), Instant::now());
        let pushed_out: Vec<_> = (0..5).map(|key| windows.begin(key, now)).collect();
        assert_eq!(
            pushed_out,
            [None, None, Some((0, 0)), Some((1, 0)), Some((2, 0))]
        );
        assert_eq!(windows.ends.len(), 2);
        assert_eq!(windows.rest().count(), 2);
    }
}
