//! Bounds the memory of unread bytes: of the streams of one source, and of all streams.
//!
//! A direction is busy (it "presses") if its source sends much or its receiver reads nothing. Its bytes are in the
//! buffers of two sockets and in the relay, and the kernel lets such buffers grow to tens of megabytes. So the more
//! directions of one source are busy, the smaller is the share of each, and beyond the bounds streams are reset (they
//! "give way"). Knows neither flows nor policy: the caller measures and resets.
use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use dashmap::DashMap;
use kernel::sys;
use nix::sys::socket::{setsockopt, sockopt};
use parking_lot::Mutex;

use crate::limits::Source;

/// Busy directions of one source up to which the kernel sizes the buffers.
const FREE: usize = 4;
/// Connections of one source up to which the kernel sizes the receive buffers of a new stream.
pub(crate) const CROWD: usize = 8;
/// Bytes of a new receive buffer (`tcp_rmem`, its default).
const SMALL: usize = 128 << 10;
/// Bytes that are left to each of a direction's buffers.
const LEAST: usize = 64 << 10;
/// Bytes up to which a receive buffer keeps its size even if its share is smaller.
const KEPT: usize = 2 << 20;
/// A peer is near if the round-trip time is below this.
const NEAR: Duration = Duration::from_millis(5);
/// Bytes of a receive buffer that are enough for a near peer: 50 MB/s at the longest round trip, 500 at the usual half
/// millisecond.
const ENOUGH_NEAR: usize = 256 << 10;
/// A source is big if it uses more than this part of all: one in so many.
const BIG: usize = 8;
/// Bytes that the relay reads from a side at a time: a full pipe.
const MOST_RELAYED: usize = 1 << 20;

/// The bounds, and the accounts of sources with relayed streams.
pub(crate) struct Unread {
    /// Bytes of one source.
    per_source: usize,
    /// Bytes in all.
    total: usize,
    accounts: DashMap<Source, Weak<Account>, ahash::RandomState>,
    /// Directions that press.
    pressing: AtomicUsize,
}

/// The counter of one source.
#[derive(Debug, Default)]
pub(crate) struct Account {
    /// Directions that press.
    pressing: AtomicUsize,
}

/// The state of one stream.
#[derive(Debug, Default)]
pub(crate) struct Holding {
    account: OnceLock<Arc<Account>>,
    /// Bytes in the relay by direction: at least 1 while the direction is busy, 0 while it is not.
    held: [AtomicUsize; 2],
    /// Whether the buffers are reduced to a share.
    reduced: AtomicBool,
    /// Whether the receive buffers are fixed at their initial size.
    small: AtomicBool,
    /// A number that changes when bytes move, and since when it has been the same.
    still: Mutex<Option<(u64, Instant)>>,
    gave_way: AtomicBool,
}

/// The memory of a stream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Use {
    /// The number of its source.
    pub(crate) source: usize,
    pub(crate) server: IpAddr,
    pub(crate) bytes: usize,
    /// For how long nothing has moved.
    pub(crate) stalled: Duration,
}

impl Unread {
    /// Bounds of this many bytes in all, and half of them for one source.
    pub(crate) fn new(total: usize) -> Self {
        Self {
            per_source: total / 2,
            total,
            accounts: DashMap::default(),
            pressing: AtomicUsize::new(0),
        }
    }

    /// Counts a direction as busy, with this many bytes in the relay. Returns its share in bytes, if its source has
    /// many busy directions and its buffers are not reduced yet.
    pub(crate) fn presses(
        &self,
        stream: &Holding,
        source: impl FnOnce() -> Source,
        direction: usize,
        bytes: usize,
    ) -> Option<usize> {
        let account = stream.account.get_or_init(|| self.account(source()));
        if stream.held[direction].swap(bytes.max(1), Ordering::Relaxed) > 0 {
            return None;
        }
        self.pressing.fetch_add(1, Ordering::Relaxed);
        account.pressing.fetch_add(1, Ordering::Relaxed);
        let reduced = stream.reduced.load(Ordering::Relaxed);
        self.share_of(account).filter(|_| !reduced)
    }

    /// Counts the direction as no longer busy.
    pub(crate) fn eases(&self, stream: &Holding, direction: usize) {
        if stream.held[direction].swap(0, Ordering::Relaxed) == 0 {
            return;
        }
        self.pressing.fetch_sub(1, Ordering::Relaxed);
        if let Some(account) = stream.account.get() {
            account.pressing.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// The share of each direction of a stream's source, in bytes; `None` while few of them are busy.
    pub(crate) fn share(&self, stream: &Holding) -> Option<usize> {
        self.share_of(stream.account.get()?)
    }

    /// Bytes that the relay may read from one side of the stream before it writes them to the other.
    pub(crate) fn most_relayed(&self, stream: &Holding) -> usize {
        let share = self.share(stream);
        share.map_or(MOST_RELAYED, |share| (share / 8).clamp(LEAST, MOST_RELAYED))
    }

    fn share_of(&self, account: &Account) -> Option<usize> {
        let pressing = account.pressing.load(Ordering::Relaxed);
        (pressing > FREE).then(|| self.per_source / pressing)
    }

    /// Whether no direction is busy.
    pub(crate) fn is_idle(&self) -> bool {
        self.pressing.load(Ordering::Relaxed) == 0
    }

    /// Selects the streams to reset so that each source and all together keep to their bounds: those of the source that
    /// uses most to the server for which it uses most, first the ones that have stalled for longest, and among these the
    /// largest. A server that keeps its streams moving cannot have those of the source's other servers reset. If all
    /// together use too much and no source is big, many sources act together: then those of the server that uses most.
    pub(crate) fn give_way(&self, uses: &[Use]) -> Vec<usize> {
        let (mut sources, mut servers) = (HashMap::new(), HashMap::new());
        let mut pairs = HashMap::new();
        for it in uses {
            *pairs.entry((it.source, it.server)).or_insert(0) += it.bytes;
            *sources.entry(it.source).or_insert(0) += it.bytes;
            *servers.entry(it.server).or_insert(0) += it.bytes;
        }
        let mut order: Vec<_> = (0..uses.len()).collect();
        // Streams are taken from the end.
        order.sort_by_key(|at| (uses[*at].stalled, uses[*at].bytes));
        let mut all: usize = sources.values().sum();
        let mut gone = Vec::new();
        while let (Some((source, bytes)), Some((server, _))) = (most(&sources), most(&servers)) {
            if bytes <= self.per_source && all <= self.total {
                break;
            }
            let its_own = pairs.iter().filter(|(pair, _)| pair.0 == source);
            let most_of_its = match bytes > self.total / BIG {
                true => most(its_own).map(|(pair, _)| pair),
                false => None,
            };
            let is_its = |it: &Use| match most_of_its {
                Some(pair) => (it.source, it.server) == pair,
                None => it.server == server,
            };
            let Some(place) = order.iter().rposition(|at| is_its(&uses[*at])) else {
                break;
            };
            let it = &uses[order[place]];
            all -= it.bytes;
            let pair = pairs.entry((it.source, it.server));
            pair.and_modify(|all| *all -= it.bytes);
            sources.entry(it.source).and_modify(|all| *all -= it.bytes);
            servers.entry(it.server).and_modify(|all| *all -= it.bytes);
            gone.push(order.remove(place));
        }
        gone
    }

    /// Forgets the sources whose last stream has ended.
    pub(crate) fn forget_gone(&self) {
        self.accounts
            .retain(|_, account| account.strong_count() > 0);
    }

    fn account(&self, source: Source) -> Arc<Account> {
        let mut entry = self.accounts.entry(source).or_default();
        entry.upgrade().unwrap_or_else(|| {
            let account = Arc::default();
            *entry = Arc::downgrade(&account);
            account
        })
    }
}

impl Holding {
    /// Whether the stream has a busy direction or reduced buffers.
    pub(crate) fn is_pressed(&self) -> bool {
        self.pressing() != [false; 2] || self.reduced.load(Ordering::Relaxed)
    }

    /// Which directions are busy.
    pub(crate) fn pressing(&self) -> [bool; 2] {
        self.held
            .each_ref()
            .map(|held| held.load(Ordering::Relaxed) > 0)
    }

    /// The number of its source, and its bytes in the relay.
    pub(crate) fn source_and_bytes(&self) -> Option<(usize, usize)> {
        let account = Arc::as_ptr(self.account.get()?).addr();
        let held = self.held.iter().map(|held| held.load(Ordering::Relaxed));
        Some((account, held.sum()))
    }

    /// For how long `sign`, which changes when bytes move, has been the same.
    pub(crate) fn stalled(&self, sign: u64, now: Instant) -> Duration {
        let mut still = self.still.lock();
        match *still {
            Some((last, since)) if last == sign => now.saturating_duration_since(since),
            _ => {
                *still = Some((sign, now));
                Duration::ZERO
            }
        }
    }

    /// Fixes the receive buffer of a direction at its initial size: the first large read would make it ten times as
    /// large. A buffer that is enlarged already, as after a handover, keeps its size: the kernel would drop segments
    /// that its advertised window has allowed.
    pub(crate) fn keep_small(&self, from: impl AsFd) {
        if sys::socket_memory(&from).is_ok_and(|now| now.receive_buffer <= 2 * SMALL) {
            self.small.store(true, Ordering::Relaxed);
            set_receive_buffer(from, SMALL);
        }
    }

    /// Assumes small buffers for a stream of another daemon, which may have fixed them.
    pub(crate) fn is_taken_over(&self) {
        self.small.store(true, Ordering::Relaxed);
    }

    /// Reduces the buffers of a direction to its share: a quarter for the receive buffer, and a quarter for the send
    /// buffer.
    pub(crate) fn reduce(&self, from: impl AsFd, to: impl AsFd, share: usize) {
        let (Ok(now), Ok(later)) = (sys::socket_memory(&from), sys::socket_memory(&to)) else {
            return;
        };
        self.reduced.store(true, Ordering::Relaxed);
        let quarter = (share / 4).max(LEAST);
        let near = sys::round_trip(&from).is_ok_and(|time| time < NEAR);
        let received = if near {
            quarter.min(ENOUGH_NEAR)
        } else {
            quarter
        };
        // An advertised window cannot be taken back: segments in it that are dropped are retransmitted seconds later.
        let buffer = now.receive_buffer.min(KEPT).max(received);
        set_receive_buffer(&from, buffer);
        if later.send_buffer > quarter
            && setsockopt(&to, sockopt::SndBufForce, &(quarter / 2)).is_err()
        {
            let _ = setsockopt(&to, sockopt::SndBuf, &(quarter / 2));
        }
    }

    /// Whether a direction with this receive buffer has to be reduced again, because more directions of its source are
    /// busy now.
    pub(crate) fn is_outgrown(receive_buffer: usize, share: usize) -> bool {
        receive_buffer > (share / 4).max(KEPT)
    }

    /// Ends the reduction. The buffers change only when the stream is busy again.
    pub(crate) fn restore(&self) {
        if self.reduced.swap(false, Ordering::Relaxed) {
            self.small.store(true, Ordering::Relaxed);
        }
    }

    /// Lets the kernel size the buffers again while few directions are busy. Before Linux 5.14 they keep their size.
    pub(crate) fn free(&self, legs: [impl AsFd; 2]) {
        if self.small.swap(false, Ordering::Relaxed) {
            for leg in legs {
                let _ = sys::unlock_buffers(&leg);
            }
        }
    }

    /// Notes that the stream ends because of its unread bytes.
    pub(crate) fn gives_way(&self) {
        self.gave_way.store(true, Ordering::Relaxed);
    }

    /// Whether it ended because of that.
    pub(crate) fn gave_way(&self) -> bool {
        self.gave_way.load(Ordering::Relaxed)
    }
}

/// The key with the highest number of bytes.
fn most<'a, K: Copy + Ord + 'a>(
    taken: impl IntoIterator<Item = (&'a K, &'a usize)>,
) -> Option<(K, usize)> {
    let most = taken.into_iter().max_by_key(|it| (*it.1, *it.0));
    most.map(|(who, bytes)| (*who, *bytes))
}

/// Sets the size of a receive buffer in bytes.
fn set_receive_buffer(socket: impl AsFd, bytes: usize) {
    // The kernel doubles the value (socket(7)); without the right to force it, the system's limit applies.
    if setsockopt(&socket, sockopt::RcvBufForce, &(bytes / 2)).is_err() {
        let _ = setsockopt(&socket, sockopt::RcvBuf, &(bytes / 2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(uid: &str) -> Source {
        Source::Pod(uid.into())
    }

    #[test]
    fn a_share_shrinks_as_more_directions_press() {
        let unread = Unread::new(2 << 20);
        let streams: Vec<_> = (0..FREE).map(|_| Holding::default()).collect();
        for stream in &streams {
            for direction in [0, 0] {
                let buffers = unread.presses(stream, || source("a"), direction, 7);
                assert_eq!(buffers, None);
            }
        }
        let (one, other) = (Holding::default(), Holding::default());
        let buffers = unread.presses(&other, || source("b"), 1, 0);
        assert_eq!(buffers, None, "another's");
        let share = (1 << 20) / (FREE + 1);
        let buffers = unread.presses(&one, || source("a"), 1, 7);
        assert_eq!(buffers, Some(share));
        assert_eq!(unread.share(&streams[0]), Some(share));
        assert_eq!(one.pressing(), [false, true]);
        for _ in 0..2 {
            unread.eases(&one, 1);
            assert_eq!(unread.share(&one), None, "few press");
        }
        streams.iter().for_each(|it| unread.eases(it, 0));
        assert!(!unread.is_idle() && !one.is_pressed());
        unread.eases(&other, 1);
        assert!(unread.is_idle());
        drop((streams, one));
        unread.forget_gone();
        assert_eq!(unread.accounts.len(), 1);
    }

    #[test]
    fn enlarged_receive_buffers_keep_their_size() {
        let open =
            || socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        let size = |socket: &socket2::Socket| sys::socket_memory(socket).unwrap().receive_buffer;
        let (enlarged, small) = (open(), open());
        setsockopt(&enlarged, sockopt::RcvBuf, &(2 * SMALL)).unwrap();
        let before = size(&enlarged);
        assert!(before > 2 * SMALL, "{before}");
        let stream = Holding::default();
        stream.keep_small(&enlarged);
        assert_eq!(size(&enlarged), before);
        setsockopt(&small, sockopt::RcvBuf, &(SMALL / 4)).unwrap();
        stream.keep_small(&small);
        assert_eq!(size(&small), SMALL);
    }

    #[test]
    fn the_biggest_sources_longest_stalled_streams_give_way() {
        let of = |source, bytes, stalled| Use {
            source,
            server: [10, 0, 0, 1].into(),
            bytes,
            stalled: Duration::from_secs(stalled),
        };
        let unread = Unread::new(100);
        for (uses, gone, why) in [
            (
                vec![of(1, 50, 9), of(2, 50, 9)],
                vec![],
                "within the bounds",
            ),
            (
                vec![of(1, 20, 1), of(1, 20, 3), of(1, 11, 2), of(2, 49, 9)],
                vec![1],
                "over a source's bound its own",
            ),
            (
                vec![of(1, 20, 3), of(1, 21, 3), of(1, 10, 3)],
                vec![1],
                "the largest of those",
            ),
            (
                vec![of(1, 40, 1), of(2, 45, 0), of(3, 30, 9)],
                vec![1],
                "over the bound in all the biggest",
            ),
            (vec![of(1, 200, 0)], vec![0], "one alone"),
        ] {
            assert_eq!(unread.give_way(&uses), gone, "{why}");
        }
    }

    #[test]
    fn server_with_most_unread_bytes_loses_streams_first() {
        let of = |last: u8, bytes, stalled| Use {
            source: 1,
            server: [10, 0, 0, last].into(),
            bytes,
            stalled: Duration::from_secs(stalled),
        };
        let uses = [of(1, 10, 9), of(2, 20, 0), of(2, 25, 1)];
        assert_eq!(Unread::new(100).give_way(&uses), [2]);
        let uses = [of(1, 21, 9), of(2, 20, 0), of(2, 25, 1)];
        assert_eq!(Unread::new(100).give_way(&uses), [2]);
        // When one server no longer has most, it is another's turn.
        let uses = [of(1, 21, 9), of(2, 20, 0), of(3, 25, 0)];
        assert_eq!(Unread::new(80).give_way(&uses), [2, 0]);
    }

    #[test]
    fn small_sources_end_no_stream_of_another_server() {
        let of = |source, last: u8, bytes| Use {
            source,
            server: [10, 0, 0, last].into(),
            bytes,
            stalled: Duration::from_secs(source as u64),
        };
        let mut uses: Vec<_> = (1..=15).map(|source| of(source, 1, 7)).collect();
        uses.push(of(20, 2, 11));
        let gone = Unread::new(100).give_way(&uses);
        assert_eq!(gone, [14, 13, 12], "those of the server that they ask");
    }

    #[test]
    fn a_stream_is_stalled_since_its_last_move() {
        let (stream, now) = (Holding::default(), Instant::now());
        let later = |seconds| now + Duration::from_secs(seconds);
        assert_eq!(stream.stalled(1, now), Duration::ZERO);
        assert_eq!(stream.stalled(1, later(5)), Duration::from_secs(5));
        assert_eq!(stream.stalled(2, later(6)), Duration::ZERO);
        assert_eq!(stream.stalled(2, later(7)), Duration::from_secs(1));
    }
}
