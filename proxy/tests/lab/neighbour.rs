//! Measures the connects of an attack's neighbour, before the attack and during it.
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lab::{Host, Outcome, wait_until};

use testbed::DEADLINE;
use testbed::streams::StopOnDrop;

/// A connect that takes longer has failed: its SYN and a repeat of it were lost.
const FAILED_AFTER: Duration = Duration::from_secs(2);
/// What p99 may be during an attack however short it was before: a machine of two cores that runs other things
/// lets a connect wait that long, and one lost SYN costs a whole second.
const FLOOR: Duration = Duration::from_millis(250);
/// After this many failures the rest is not tried.
const ENOUGH: usize = 3;
/// Between two connects of a neighbour.
const EVERY: Duration = Duration::from_millis(5);

/// Connects of one client, one after the other.
pub(crate) struct Connects {
    what: String,
    failed: Vec<String>,
    /// Of those that did not fail, shortest first.
    times: Vec<Duration>,
}

impl Connects {
    /// Makes `count` connects, unless some fail; each is closed at once.
    pub(crate) fn measure(from: &Host, to: SocketAddr, count: usize) -> Self {
        let (mut failed, mut times) = (Vec::new(), Vec::new());
        for _ in 0..count {
            match from.connect(to, FAILED_AFTER).unwrap() {
                Outcome::Connected { latency, .. } => times.push(latency),
                other => failed.push(other.to_string()),
            }
            if failed.len() == ENOUGH {
                break;
            }
            thread::sleep(EVERY);
        }
        times.sort_unstable();
        Self {
            what: format!("{} to {to}", from.name()),
            failed,
            times,
        }
    }

    /// The time within which this percentage succeeded.
    fn percentile(&self, percent: usize) -> Duration {
        let last = self.times.len().saturating_sub(1);
        let at = self.times.get((self.times.len() * percent / 100).min(last));
        at.copied().unwrap_or_default()
    }

    /// Asserts that none failed, and that p99 is under twice that of `before`, or under [`FLOOR`].
    #[track_caller]
    pub(crate) fn are_as_good_as(&self, before: &Self) {
        let most = (2 * before.percentile(99)).max(FLOOR);
        assert!(
            self.failed.is_empty() && self.percentile(99) < most,
            "before: {before}\nduring: {self}"
        );
    }
}

impl fmt::Display for Connects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            what,
            failed,
            times,
        } = self;
        let all = failed.len() + times.len();
        write!(f, "{what}: {} of {all} failed", failed.len())?;
        if let Some(first) = failed.first() {
            write!(f, " ({first})")?;
        }
        let (half, most) = (self.percentile(50), self.percentile(99));
        write!(f, ", p50 {half:?}, p99 {most:?}")
    }
}

/// Measures connects between these pairs, with `count` each, before `attack` runs and while it does, from when
/// `is_felt` says so on; none may be harmed. The attack is to end soon after its flag is set.
pub(crate) fn are_unharmed(
    pairs: &[(&Host, SocketAddr)],
    count: usize,
    attack: impl FnOnce(&AtomicBool) + Send,
    is_felt: impl Fn() -> bool,
) {
    let measure = || -> Vec<_> {
        let each = |&(from, to): &(&Host, SocketAddr)| Connects::measure(from, to, count);
        pairs.iter().map(each).collect()
    };
    let before = measure();
    during(attack, is_felt, || {
        for (&(from, to), before) in pairs.iter().zip(&before) {
            let during = Connects::measure(from, to, count);
            println!("before: {before}\nduring: {during}");
            during.are_as_good_as(before);
        }
    });
}

/// Does `work` while `attack` goes on and `is_felt`.
pub(crate) fn during<T>(
    attack: impl FnOnce(&AtomicBool) + Send,
    is_felt: impl Fn() -> bool,
    work: impl FnOnce() -> T,
) -> T {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| attack(&stop));
        // Also when an assertion fails: the attack must end for the scope to end.
        let _stopped = StopOnDrop(&stop);
        wait_until(DEADLINE, "the attack to be felt", is_felt).unwrap();
        work()
    })
}

/// Calls `send` with ever new numbers, so often a second, until `stop`.
pub(crate) fn at_rate(per_second: u32, stop: &AtomicBool, send: impl FnMut(u32)) {
    in_bursts(1, per_second, stop, send);
}

/// Calls `send` with ever new numbers, `burst` of them without a pause, so often a second on average, until `stop`.
/// A burst outruns a daemon of any speed that takes longer for a packet than its sender does.
pub(crate) fn in_bursts(burst: u32, per_second: u32, stop: &AtomicBool, mut send: impl FnMut(u32)) {
    let began = Instant::now();
    for number in 0.. {
        let due = began + Duration::from_secs((number / burst * burst).into()) / per_second;
        while Instant::now() < due {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            thread::sleep(due.saturating_duration_since(Instant::now()).min(EVERY));
        }
        if stop.load(Ordering::Relaxed) {
            return;
        }
        send(number);
    }
}
