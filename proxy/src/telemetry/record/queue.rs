//! A bounded queue from the workers to a thread that may be slow.
//!
//! Adding an entry never blocks: if the queue is full, the entry is lost and counted. The reader is
//! woken once for many entries, so that a busy node does not pay a wake-up for each. Knows nothing
//! of what it carries.
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

/// A queue with one reader.
pub(crate) struct Queue<T> {
    waiting: Mutex<Waiting<T>>,
    changed: Condvar,
    room: usize,
    batch: usize,
    lost: AtomicU64,
}

struct Waiting<T> {
    entries: Vec<T>,
    closed: bool,
}

impl<T> Queue<T> {
    /// A queue for at most `room` entries, whose reader is woken early when `batch` of them wait.
    pub(crate) fn new(room: usize, batch: usize) -> Self {
        let waiting = Waiting {
            entries: Vec::new(),
            closed: false,
        };
        Self {
            waiting: Mutex::new(waiting),
            changed: Condvar::new(),
            room,
            batch,
            lost: AtomicU64::new(0),
        }
    }

    /// Adds an entry, or loses it if there is no room or no reader.
    pub(crate) fn push(&self, entry: T) {
        let mut waiting = self.waiting();
        if waiting.closed || waiting.entries.len() >= self.room {
            drop(waiting);
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        waiting.entries.push(entry);
        let length = waiting.entries.len();
        drop(waiting);
        // The reader sleeps until there is one, then lingers until there is a batch.
        if length == 1 || length == self.batch {
            self.changed.notify_one();
        }
    }

    /// Counts entries that were taken and could not be used as lost.
    pub(crate) fn lose(&self, entries: u64) {
        self.lost.fetch_add(entries, Ordering::Relaxed);
    }

    /// Waits for `time` at most, and returns whether the queue is closed.
    pub(crate) fn closes_within(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut waiting = self.waiting();
        while !waiting.closed {
            let Some(left) = remaining(Some(deadline)) else {
                return false;
            };
            waiting = self.wait(waiting, left);
        }
        true
    }

    /// Entries that were lost.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Waits for entries and takes them all into `taken`, which is to be empty: at once if a batch
    /// waits, else after `linger`. With `until` it gives up then, empty-handed. False once the
    /// queue is closed and everything has been taken.
    pub(crate) fn take(
        &self,
        taken: &mut Vec<T>,
        linger: Duration,
        until: Option<Instant>,
    ) -> bool {
        let mut waiting = self.waiting();
        while waiting.entries.is_empty() && !waiting.closed {
            let Some(left) = remaining(until) else {
                return true;
            };
            waiting = self.wait(waiting, left);
        }
        let lingered = Instant::now() + linger;
        while waiting.entries.len() < self.batch && !waiting.closed {
            let Some(left) = remaining(Some(lingered)) else {
                break;
            };
            waiting = self.wait(waiting, left);
        }
        std::mem::swap(&mut waiting.entries, taken);
        !(waiting.closed && taken.is_empty())
    }

    /// Accepts no more entries; the reader gets the waiting ones.
    pub(crate) fn close(&self) {
        self.waiting().closed = true;
        self.changed.notify_one();
    }

    fn wait<'a>(
        &self,
        mut waiting: MutexGuard<'a, Waiting<T>>,
        left: Duration,
    ) -> MutexGuard<'a, Waiting<T>> {
        self.changed.wait_for(&mut waiting, left);
        waiting
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting<T>> {
        self.waiting.lock()
    }
}

/// The time left until `deadline`, a long time without one; `None` once it has passed.
fn remaining(deadline: Option<Instant>) -> Option<Duration> {
    const NO_DEADLINE: Duration = Duration::from_secs(3600);
    deadline.map_or(Some(NO_DEADLINE), |deadline| {
        let left = deadline.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const AT_ONCE: Duration = Duration::ZERO;
    /// Longer than any test may take.
    const AGES: Duration = Duration::from_secs(600);

    fn taken(queue: &Queue<u32>, linger: Duration) -> Vec<u32> {
        let mut taken = Vec::new();
        queue.take(&mut taken, linger, None);
        taken
    }

    #[test]
    fn full_queue_counts_losses_and_keeps_entries() {
        let queue = Queue::new(2, 2);
        (1..=5).for_each(|entry| queue.push(entry));
        assert_eq!(queue.lost(), 3);
        assert_eq!(taken(&queue, AT_ONCE), [1, 2]);
        queue.push(6);
        assert_eq!(taken(&queue, AT_ONCE), [6], "there is room again");
    }

    #[test]
    fn a_full_batch_does_not_linger() {
        let queue = Arc::new(Queue::new(10, 3));
        let reader = {
            let queue = Arc::clone(&queue);
            std::thread::spawn(move || taken(&queue, AGES))
        };
        (1..=3).for_each(|entry| queue.push(entry));
        assert_eq!(reader.join().unwrap(), [1, 2, 3]);
    }

    #[test]
    fn closed_queue_is_drained_before_it_ends() {
        let queue = Queue::new(10, 10);
        queue.push(1);
        queue.close();
        queue.push(2);
        let mut out = Vec::new();
        assert!(queue.take(&mut out, AGES, None), "there was something");
        assert_eq!(out, [1]);
        out.clear();
        assert!(!queue.take(&mut out, AGES, None));
        assert_eq!(queue.lost(), 1, "what came too late");
    }

    #[test]
    fn closing_wakes_waiters_and_keeps_later_entries() {
        let queue = Queue::new(10, 10);
        assert!(!queue.closes_within(AT_ONCE));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                queue.push(1);
                queue.close();
            });
            assert!(queue.closes_within(AGES));
        });
        queue.lose(3);
        assert_eq!((taken(&queue, AT_ONCE), queue.lost()), (vec![1], 3));
    }

    #[test]
    fn queue_read_returns_at_its_deadline() {
        let queue = Queue::<u32>::new(10, 10);
        let mut out = Vec::new();
        assert!(queue.take(&mut out, AGES, Some(Instant::now())));
        assert!(out.is_empty());
    }
}
