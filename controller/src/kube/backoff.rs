//! Exponential backoff between retries: bounded, and with jitter, so that nodes do not retry together.
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// The waits between tries.
#[derive(Debug)]
pub(super) struct Backoff {
    first: Duration,
    last: Duration,
    tries: u32,
}

impl Backoff {
    /// From `first` up to `last`.
    pub(super) fn new((first, last): (Duration, Duration)) -> Self {
        Self {
            first,
            last,
            tries: 0,
        }
    }

    /// The next wait: a random time between half of the backoff and all of it.
    pub(super) fn next(&mut self) -> Duration {
        let due = self
            .first
            .saturating_mul(1 << self.tries.min(16))
            .min(self.last);
        self.tries = self.tries.saturating_add(1);
        // The standard library's only source of randomness.
        let random = RandomState::new().build_hasher().finish();
        let half = due / 2;
        half + half.mul_f64((random % 1024) as f64 / 1024.0)
    }

    /// Starts again with the first wait, after it has worked for a while.
    pub(super) fn reset(&mut self) {
        self.tries = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_to_its_maximum_and_resets() {
        let (first, last) = (Duration::from_millis(800), Duration::from_secs(30));
        let mut backoff = Backoff::new((first, last));
        for due in [0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0] {
            let wait = backoff.next().as_secs_f64();
            assert!((due / 2.0..=due).contains(&wait), "{wait} of {due}");
        }
        backoff.reset();
        assert!(backoff.next() <= first);
    }
}
