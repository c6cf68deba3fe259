//! The kernel flows that this daemon allowed, each with its endpoints and its
//! decision.
//!
//! The flows themselves are in conntrack; this list finds, without a dump, those that a change
//! concerns, and has the data of their records. Knows neither packets nor netlink;
//! `node/conntrack.rs` keeps both in step.
mod backlog;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use controller::{Decision, Severance};
use dashmap::DashMap;
use dashmap::mapref::entry::Entry as Place;
use kernel::conntrack::{Entry, FlowId};
use parking_lot::Mutex;
use policy::Protocol;

use crate::limits::Source;
use crate::tcp::connections::{ByAddress, Ends};
use crate::telemetry::decision::DataPath;
use crate::telemetry::record::{Outcome, Subject};

use backlog::Backlog;

/// Maximum number of listed flows; a flow beyond is allowed too, and found by a dump of conntrack.
const MOST: usize = 65_536;
/// Flows of one source in the list.
const SHARE: usize = 4096;
/// How long a flow may take from its verdict to conntrack's table.
pub(crate) const ON_ITS_WAY: Duration = Duration::from_millis(100);

/// All listed flows.
pub(crate) struct KernelFlows {
    most: usize,
    share: usize,
    by_id: DashMap<FlowId, Arc<KernelFlow>, ahash::RandomState>,
    by_address: ByAddress<KernelFlow>,
    by_source: DashMap<Source, usize, ahash::RandomState>,
    next: AtomicU64,
    /// How often the list was compared with conntrack.
    round: AtomicU64,
    /// More than 0 if conntrack may have flows of ours that are not listed: at the start, and after
    /// each that did not fit.
    unlisted: AtomicU64,
    /// When a flow last did not fit, in milliseconds after `began`.
    no_room: AtomicU64,
    began: Instant,
    /// Severed TCP connections that are still in conntrack, and since when.
    awaiting_delete: Mutex<Vec<(Instant, Entry)>>,
    /// Addresses whose unlisted flows have to be evaluated again.
    pub(crate) backlog: Backlog,
}

/// A flow that was allowed at its first packet.
pub(crate) struct KernelFlow {
    number: u64,
    pub(crate) id: FlowId,
    /// The source whose share it counts against, even if the table has another pod at the address by now.
    source: Source,
    /// When its first packet came.
    opened: SystemTime,
    pub(crate) entered: Instant,
    decision: Mutex<Arc<Decision>>,
    sent: AtomicU64,
    received: AtomicU64,
    /// Conntrack has seen no reply, but possibly a reset.
    unanswered: AtomicBool,
    /// The round in which conntrack was last known to have it.
    seen: AtomicU64,
    /// How often its first packet came again: there may be as many other conntrack entries between the same ends.
    again: AtomicU32,
    severance: Mutex<Option<Severance>>,
}

/// One comparison of the list with conntrack.
pub(crate) struct Round {
    number: u64,
    unlisted: u64,
    began: Instant,
}

/// The result of entering a flow into the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Listed {
    New,
    /// It was there already.
    Again,
    /// There is no room for it.
    Full,
}

impl Default for KernelFlows {
    fn default() -> Self {
        Self::with_room_for(MOST, SHARE)
    }
}

impl KernelFlows {
    fn with_room_for(most: usize, share: usize) -> Self {
        Self {
            most,
            share,
            by_id: DashMap::default(),
            by_address: ByAddress::default(),
            by_source: DashMap::default(),
            next: AtomicU64::new(0),
            round: AtomicU64::new(0),
            unlisted: AtomicU64::new(1),
            no_room: AtomicU64::new(0),
            began: Instant::now(),
            awaiting_delete: Mutex::default(),
            backlog: Backlog::default(),
        }
    }

    /// Stores severed connections for [`Self::due_for_delete`].
    pub(crate) fn await_delete(&self, entries: impl IntoIterator<Item = Entry>) {
        let now = Instant::now();
        let mut awaiting_delete = self.awaiting_delete.lock();
        awaiting_delete.extend(entries.into_iter().map(|entry| (now, entry)));
    }

    /// Takes those that were severed longer ago than this.
    pub(crate) fn due_for_delete(&self, ago: Duration) -> Vec<Entry> {
        let mut awaiting_delete = self.awaiting_delete.lock();
        let gone = awaiting_delete.extract_if(.., |(since, _)| since.elapsed() >= ago);
        gone.map(|(_, entry)| entry).collect()
    }

    /// Enters a flow whose first packet is allowed.
    pub(crate) fn enter(&self, id: FlowId, opened: SystemTime, decision: &Arc<Decision>) -> Listed {
        if let Some(known) = self.by_id.get(&id) {
            known.again.fetch_add(1, Ordering::Relaxed);
            return Listed::Again;
        }
        let source = Source::behind(decision.from.as_deref(), id.client.ip());
        if !self.has_room(&source) {
            self.no_room
                .fetch_max(self.time(Instant::now()), Ordering::Relaxed);
            self.pass_over();
            return Listed::Full;
        }
        let flow = Arc::new(KernelFlow {
            number: self.next.fetch_add(1, Ordering::Relaxed),
            id,
            source: source.clone(),
            opened,
            entered: Instant::now(),
            decision: Mutex::new(Arc::clone(decision)),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            unanswered: AtomicBool::new(false),
            seen: AtomicU64::new(self.round.load(Ordering::Relaxed)),
            again: AtomicU32::new(0),
            severance: Mutex::new(None),
        });
        // First, since from the next step on it may be taken out again.
        self.by_address.insert(&flow);
        match self.by_id.entry(id) {
            Place::Occupied(_) => {
                self.by_address.remove(&flow);
                Listed::Again
            }
            Place::Vacant(place) => {
                place.insert(flow);
                *self.by_source.entry(source).or_insert(0) += 1;
                Listed::New
            }
        }
    }

    /// Whether one more flow of a source would be listed. Concurrent entries can exceed the bound a little.
    pub(crate) fn has_room(&self, source: &Source) -> bool {
        let has = self.by_source.get(source).map_or(0, |count| *count);
        has < self.share && self.by_id.len() < self.most
    }

    /// Notes that conntrack has, or will soon have, an allowed flow that is not listed.
    pub(crate) fn pass_over(&self) {
        self.unlisted.fetch_add(1, Ordering::Release);
    }

    /// Whether a flow that did not fit before `now` may not have been in conntrack by then.
    pub(crate) fn has_unlisted_on_its_way(&self, now: Instant) -> bool {
        let last = self.no_room.load(Ordering::Relaxed);
        last > 0 && self.time(now) <= last.saturating_add(millis(ON_ITS_WAY))
    }

    /// A time as `no_room` has it: never 0.
    fn time(&self, at: Instant) -> u64 {
        1 + millis(at.saturating_duration_since(self.began))
    }

    /// Removes a flow; only one caller gets it.
    pub(crate) fn remove(&self, id: &FlowId) -> Option<Arc<KernelFlow>> {
        self.remove_if(id, |_| true)
    }

    /// Removes a flow if `over`, which is asked while no packet can enter the flow.
    fn remove_if(
        &self,
        id: &FlowId,
        over: impl FnOnce(&KernelFlow) -> bool,
    ) -> Option<Arc<KernelFlow>> {
        let (_, flow) = self.by_id.remove_if(id, |_, flow| over(flow))?;
        self.by_address.remove(&flow);
        self.by_source.remove_if_mut(&flow.source, |_, count| {
            *count = count.saturating_sub(1);
            *count == 0
        });
        Some(flow)
    }

    /// Frees memory after a flood.
    pub(crate) fn shrink(&self) {
        if self.by_id.capacity() > 4 * self.by_id.len().max(1024) {
            self.by_id.shrink_to_fit();
            self.by_source.shrink_to_fit();
            self.by_address.shrink();
        }
    }

    /// Removes the flow whose conntrack entry was deleted or is closed, unless there may be another one between
    /// the same endpoints: then the next comparisons with conntrack find out.
    pub(crate) fn ended(&self, entry: &Entry) -> Option<Arc<KernelFlow>> {
        self.remove_if(&entry.flow, |flow| {
            flow.note(entry);
            let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
            let another = |again: u32| again.checked_sub(1);
            flow.again.fetch_update(set, fetch, another).is_err()
        })
    }

    /// The flow of this name.
    pub(crate) fn get(&self, id: &FlowId) -> Option<Arc<KernelFlow>> {
        self.by_id.get(id).map(|flow| Arc::clone(&flow))
    }

    /// Every flow with an end among these addresses, in no order.
    pub(crate) fn of(&self, addresses: &BTreeSet<IpAddr>) -> Vec<Arc<KernelFlow>> {
        self.by_address.of(addresses)
    }

    /// Every flow, in no order.
    pub(crate) fn all(&self) -> Vec<Arc<KernelFlow>> {
        self.by_id.iter().map(|flow| Arc::clone(&flow)).collect()
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether conntrack may have flows of ours that are not listed.
    pub(crate) fn is_incomplete(&self) -> bool {
        self.unlisted.load(Ordering::Relaxed) > 0
    }

    /// Begins a comparison with conntrack, before conntrack is read.
    pub(crate) fn begin_round(&self, now: Instant) -> Round {
        Round {
            number: self.round.fetch_add(1, Ordering::Relaxed) + 1,
            unlisted: self.unlisted.load(Ordering::Acquire),
            began: now,
        }
    }

    /// Ends it, after all conntrack entries were entered. Returns the flows that conntrack did not
    /// have in two consecutive rounds: in one round a flow may not be there yet, or the kernel may have
    /// moved it during the dump.
    pub(crate) fn end_round(&self, round: Round) -> Vec<Arc<KernelFlow>> {
        // If another did not fit meanwhile, or so shortly before that conntrack did not have it yet, the list stays
        // incomplete.
        if !self.has_unlisted_on_its_way(round.began) {
            let relaxed = Ordering::Relaxed;
            let _ = self
                .unlisted
                .compare_exchange(round.unlisted, 0, relaxed, relaxed);
        }
        let lost = |flow: &KernelFlow| flow.seen.load(Ordering::Relaxed) + 2 <= round.number;
        self.all().into_iter().filter(|flow| lost(flow)).collect()
    }
}

impl Ends for KernelFlow {
    fn id(&self) -> u64 {
        self.number
    }

    fn ends(&self) -> [IpAddr; 2] {
        [self.id.client.ip(), self.id.server.ip()]
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// An unlisted flow, for a record.
pub(crate) fn unlisted(entry: &Entry) -> Subject {
    Subject {
        client: entry.flow.client,
        server: entry.flow.server,
        protocol: entry.flow.protocol,
        path: DataPath::Kernel,
        sent: entry.sent,
        received: entry.received,
        opened: entry.began.unwrap_or_else(SystemTime::now),
        attempt: 0,
        seen: None,
    }
}

impl KernelFlow {
    /// The flow as a record shows it.
    pub(crate) fn subject(&self) -> Subject {
        Subject {
            client: self.id.client,
            server: self.id.server,
            protocol: self.id.protocol,
            path: DataPath::Kernel,
            sent: self.sent.load(Ordering::Relaxed),
            received: self.received.load(Ordering::Relaxed),
            opened: self.opened,
            attempt: 0,
            seen: None,
        }
    }

    /// The decision that allows it.
    pub(crate) fn decision(&self) -> Arc<Decision> {
        Arc::clone(&self.decision.lock())
    }

    /// Replaces the decision that allows it.
    pub(crate) fn decide(&self, decision: Decision) {
        *self.decision.lock() = Arc::new(decision);
    }

    /// Which later change ended it, if one did.
    pub(crate) fn severance(&self) -> Option<Severance> {
        self.severance.lock().clone()
    }

    pub(crate) fn sever(&self, severance: Severance) {
        *self.severance.lock() = Some(severance);
    }

    /// How it ended, if no change severed it.
    pub(crate) fn outcome(&self) -> Outcome {
        if self.id.protocol == Protocol::Tcp && self.unanswered.load(Ordering::Relaxed) {
            return Outcome::Unanswered("the server refused it or did not answer".into());
        }
        Outcome::Closed
    }

    /// Copies what conntrack counts.
    pub(crate) fn note(&self, entry: &Entry) {
        self.sent.store(entry.sent, Ordering::Relaxed);
        self.received.store(entry.received, Ordering::Relaxed);
        self.unanswered.store(entry.unanswered, Ordering::Relaxed);
    }

    pub(crate) fn seen_in(&self, round: &Round, entry: &Entry) {
        self.note(entry);
        self.seen.store(round.number, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use kernel::netlink::{self, Header, Message};
    use policy::{Decided, DecidedSide};

    use super::*;

    fn id(client: u16) -> FlowId {
        FlowId {
            protocol: Protocol::Udp,
            client: ([10, 0, 0, 1], client).into(),
            server: ([10, 0, 0, 2], 53).into(),
            identifier: 0,
        }
    }

    fn allowed() -> Arc<Decision> {
        let side = DecidedSide {
            allowed: true,
            ..DecidedSide::default()
        };
        let verdict = Decided::of(side, side);
        Arc::new(Decision {
            verdict,
            from: None,
            to: None,
        })
    }

    /// The conntrack entry of a flow that has sent this many bytes.
    fn entry(client: u16, sent: u64) -> Entry {
        let mut message = Vec::new();
        netlink::write(&mut message, Header::default(), |m| {
            for (kind, address, port) in [(1, [10, 0, 0, 1], client), (2, [10, 0, 0, 2], 53)] {
                m.nested(kind, |tuple| {
                    tuple.nested(1, |ip| ip.bytes(1, &address));
                    tuple.nested(2, |transport| {
                        transport.bytes(1, &[17]);
                        transport.bytes(2, &port.to_be_bytes());
                    });
                });
            }
            m.nested(9, |counters| counters.bytes(2, &sent.to_be_bytes()));
            m.bytes(12, &[0; 4]);
        });
        let (message, _) = Message::split(&message).unwrap();
        Entry::read(&message).unwrap()
    }

    fn enter(flows: &KernelFlows, client: u16) -> Listed {
        flows.enter(id(client), SystemTime::now(), &allowed())
    }

    fn addresses(last: u8) -> BTreeSet<IpAddr> {
        [IpAddr::from([10, 0, 0, last])].into()
    }

    #[test]
    fn kernel_flow_is_found_until_it_ends() {
        let flows = KernelFlows::default();
        assert_eq!(enter(&flows, 1), Listed::New);
        assert_eq!(flows.of(&addresses(2)).len(), 1);
        let flow = flows.ended(&entry(1, 100)).unwrap();
        assert_eq!(flow.subject().sent, 100);
        assert_eq!(flows.of(&addresses(2)).len() + flows.len(), 0);
        assert!(flows.ended(&entry(1, 100)).is_none(), "only once");
    }

    #[test]
    fn flow_is_listed_until_its_last_entry_ends() {
        let flows = KernelFlows::default();
        enter(&flows, 1);
        for _ in 0..2 {
            assert_eq!(enter(&flows, 1), Listed::Again);
        }
        for sent in [100, 200] {
            assert!(flows.ended(&entry(1, sent)).is_none());
            let found = flows.of(&addresses(1)).len();
            assert_eq!(found, 1, "a change still finds it");
        }
        assert!(flows.ended(&entry(1, 300)).is_some());
    }

    #[test]
    fn flow_missing_from_two_dumps_has_ended() {
        let flows = KernelFlows::default();
        enter(&flows, 1);
        enter(&flows, 2);
        for expected in [vec![], vec![2]] {
            let round = flows.begin_round(Instant::now());
            flows.get(&id(1)).unwrap().seen_in(&round, &entry(1, 7));
            let lost = flows.end_round(round);
            let lost: Vec<_> = lost.iter().map(|flow| flow.id.client.port()).collect();
            assert_eq!(lost, expected);
        }
    }

    #[test]
    fn full_flow_list_is_marked_incomplete() {
        let flows = KernelFlows::with_room_for(1, 1);
        assert!(flows.is_incomplete(), "at the start conntrack is not read");
        let round = flows.begin_round(Instant::now());
        assert_eq!(enter(&flows, 1), Listed::New);
        flows.end_round(round);
        assert!(!flows.is_incomplete());
        let round = flows.begin_round(Instant::now());
        assert_eq!(enter(&flows, 2), Listed::Full);
        flows.end_round(round);
        assert!(flows.is_incomplete(), "one found no room meanwhile");
        let round = flows.begin_round(Instant::now());
        flows.end_round(round);
        assert!(flows.is_incomplete(), "conntrack may not have it yet");
        let round = flows.begin_round(Instant::now() + 2 * ON_ITS_WAY);
        flows.end_round(round);
        assert!(!flows.is_incomplete());
    }

    #[test]
    fn a_source_over_its_share_leaves_room() {
        let flows = KernelFlows::with_room_for(3, 2);
        let listed: Vec<_> = (1..=3).map(|port| enter(&flows, port)).collect();
        assert_eq!(listed, [Listed::New, Listed::New, Listed::Full]);
        let mut other = id(1);
        other.client.set_ip([10, 0, 0, 9].into());
        let enter_other = || flows.enter(other, SystemTime::now(), &allowed());
        assert_eq!(enter_other(), Listed::New);
        flows.remove(&id(1));
        flows.remove(&other);
        assert_eq!(enter(&flows, 4), Listed::New, "its share is given back");
        assert_eq!(enter_other(), Listed::New);
        for id in [id(2), id(4), other] {
            assert!(flows.remove(&id).is_some());
        }
        assert!(flows.by_source.is_empty());
    }
}
