//! Limits log lines that packets can cause, and counts those that are left out.
//!
//! A sender of packets must not fill the disk, nor hide other lines: each call site has its own bound. Knows no clock
//! and no text.
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Lines of one call site in one [`WINDOW`].
const LINES: u64 = 5;
const WINDOW: Duration = Duration::from_secs(10);

/// The bound of one call site.
pub(crate) struct Occasional {
    state: Mutex<State>,
}

struct State {
    /// When the window began; none before the first line.
    since: Option<Instant>,
    count: u64,
}

/// A line may be written; this many were left out before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) left_out: u64,
}

impl Occasional {
    pub(crate) const fn new() -> Self {
        Self {
            state: Mutex::new(State {
                since: None,
                count: 0,
            }),
        }
    }

    /// Asks for a line.
    pub(crate) fn line(&self, now: Instant) -> Option<Line> {
        let mut state = self.state.lock();
        let runs = |since: Instant| now.saturating_duration_since(since) < WINDOW;
        let mut left_out = 0;
        if !state.since.is_some_and(runs) {
            left_out = state.count.saturating_sub(LINES);
            *state = State {
                since: Some(now),
                count: 0,
            };
        }
        state.count += 1;
        (state.count <= LINES).then_some(Line { left_out })
    }
}

/// Logs a warning, unless this call site has used up its lines: `warn_occasionally!(field = value, "message")`.
macro_rules! warn_occasionally {
    ($($message:tt)+) => {{
        static PLACE: crate::telemetry::occasional::Occasional = crate::telemetry::occasional::Occasional::new();
        if let Some(line) = PLACE.line(std::time::Instant::now()) {
            match line.left_out {
                0 => tracing::warn!($($message)+),
                left_out => tracing::warn!(left_out, $($message)+),
            }
        }
    }};
}
pub(crate) use warn_occasionally;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_call_site_counts_its_suppressed_lines() {
        let (place, now) = (Occasional::new(), Instant::now());
        let lines =
            |place: &Occasional, now| (0..20).filter_map(|_| place.line(now)).count() as u64;
        assert_eq!(lines(&place, now), LINES);
        assert_eq!(lines(&place, now + WINDOW / 2), 0);
        let next = place.line(now + WINDOW);
        assert_eq!(
            next,
            Some(Line {
                left_out: 40 - LINES
            })
        );
        assert_eq!(
            place.line(now + WINDOW),
            Some(Line { left_out: 0 }),
            "reported once"
        );
        assert_eq!(
            lines(&Occasional::new(), now),
            LINES,
            "another place has its own"
        );
    }
}
