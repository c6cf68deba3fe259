//! Conditions with a deadline: the only way the lab waits for anything.
//!
//! Knows nothing of what is waited for.

use std::thread;
use std::time::{Duration, Instant};

/// How often a condition is looked at. Short against any network timeout, long against a syscall.
const POLL: Duration = Duration::from_millis(2);

/// A condition did not come true in time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("waited {waited:?} in vain for {what}; see what hinders it, or allow more time")]
pub struct WaitTimedOut {
    /// What was waited for, as the caller put it.
    pub what: String,
    /// The time that was allowed.
    pub waited: Duration,
}

/// Waits until `condition` is true, looking every few milliseconds for at most `limit`.
///
/// `what` completes the sentence "waited in vain for ...".
///
/// # Errors
/// [`WaitTimedOut`] if the condition was still false at the deadline.
pub fn wait_until(
    limit: Duration,
    what: impl Into<String>,
    mut condition: impl FnMut() -> bool,
) -> Result<(), WaitTimedOut> {
    wait_for(limit, what, || condition().then_some(()))
}

/// Waits until `probe` has a value, looking every few milliseconds for at most `limit`.
///
/// # Errors
/// [`WaitTimedOut`] if there was none at the deadline.
pub fn wait_for<T>(
    limit: Duration,
    what: impl Into<String>,
    mut probe: impl FnMut() -> Option<T>,
) -> Result<T, WaitTimedOut> {
    let deadline = Instant::now() + limit;
    loop {
        // The deadline is read before the probe: a probe that starts in time counts.
        let late = Instant::now() >= deadline;
        if let Some(value) = probe() {
            return Ok(value);
        }
        if late {
            return Err(WaitTimedOut {
                what: what.into(),
                waited: limit,
            });
        }
        thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_ends_when_its_condition_holds() {
        let mut looks = 0;
        let seen = wait_for(Duration::from_secs(5), "the third look", || {
            looks += 1;
            (looks == 3).then_some(looks)
        });
        assert_eq!(seen, Ok(3));
    }

    #[test]
    fn timed_out_wait_names_its_condition() {
        let error = wait_until(Duration::from_millis(5), "a pig to fly", || false).unwrap_err();
        assert!(
            error.to_string().contains("in vain for a pig to fly"),
            "{error}"
        );
    }
}
