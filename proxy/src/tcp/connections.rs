//! The table of connections: held, admitted, live.
//!
//! A connection is in the table before its verdict is acted on, so that a change of policy finds
//! it. Knows no packets and no policy; a connection has its decision as a value.
mod adopted;
mod by_address;
mod ending;
mod handshake;
mod keep_alive;
mod pressed;
mod stage;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant, SystemTime};

use controller::{Decision, Severance};
use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use kernel::marks::Marks;
use parking_lot::{Mutex, MutexGuard};
use policy::Protocol;
use tokio::net::TcpStream;
use tokio::sync::Notify;

use crate::limits::Permit;
use crate::tcp::unread::Holding;
use crate::telemetry::decision::DataPath;
use crate::telemetry::moved::Moved;
use crate::telemetry::record::Subject;
use crate::telemetry::timeline::Timeline;

pub(crate) use adopted::Adopted;
pub(crate) use by_address::{ByAddress, Ends};
pub(crate) use stage::{HalfOpen, Legs, StageName, Upstream};

use handshake::Handshakes;
use stage::Stage;

/// Client and server of a connection, the server after translation of Service addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ConnectionKey {
    pub(crate) client: SocketAddr,
    pub(crate) server: SocketAddr,
}

/// How long the kernel retransmits an unacknowledged SYN-ACK (`tcp_synack_retries` of 5), plus a margin.
const ACCEPT_WITHIN: Duration = Duration::from_secs(70);
/// How late a client may retransmit its SYN.
const REPEAT_SLACK: Duration = Duration::from_secs(4);

/// One TCP connection through this node.
pub(crate) struct Connection {
    pub(crate) id: u64,
    pub(crate) key: ConnectionKey,
    /// Initial sequence number of the client's SYN.
    pub(crate) sequence: u32,
    pub(crate) opened: SystemTime,
    pub(crate) started: Instant,
    pub(crate) moved: Moved,
    pub(crate) holding: Holding,
    /// Kept if the connection is followed for a span.
    pub(crate) timeline: OnceLock<Timeline>,
    decision: Mutex<Option<Arc<Decision>>>,
    /// The later change that ended the connection, if one did.
    severance: Mutex<Option<Severance>>,
    stage: Mutex<Stage>,
    /// Milliseconds from `started` to the last time the client sent its SYN.
    last_syn: AtomicU32,
    close: Notify,
    /// Whether [`Connection::close`] was called; written under the lock of the stage.
    is_closing: AtomicBool,
    gave_way: AtomicBool,
    /// Whether the client reset it during the handshake.
    was_reset: AtomicBool,
    closed: Notify,
    /// Whether an attempt from the same ends waits for the end of this one.
    reused: AtomicBool,
    /// Whether its leg to the server has keep-alive.
    keeps_alive: AtomicBool,
    permit: Permit,
}

/// How a SYN relates to the table.
pub(crate) enum Arrival {
    /// A new attempt, now in the table as held.
    New(Arc<Connection>),
    /// A copy of a SYN while the first one is held, or after its socket was closed: it is dropped.
    Retransmit,
    /// The connection is past its SYN: the packet goes to its socket.
    Established,
    /// A new attempt with the addresses and ports of a live connection, which may be ending.
    PortReuse(Arc<Connection>),
}

/// All connections of the node.
#[derive(Default)]
pub(crate) struct ConnectionTable {
    by_key: DashMap<ConnectionKey, Arc<Connection>, ahash::RandomState>,
    by_address: ByAddress<Connection>,
    /// Held attempts by the fields that DNAT keeps: behind a Service, a retransmitted SYN may be sent
    /// to another pod, because the first one's conntrack entry is not confirmed while it is held.
    attempts: DashMap<(SocketAddr, u32), ConnectionKey, ahash::RandomState>,
    next_id: AtomicU64,
    handshakes: Handshakes,
}

impl ConnectionTable {
    /// An empty table; `marks` are for packets that the daemon sends to this host.
    pub(crate) fn new(marks: Marks) -> Self {
        Self {
            handshakes: Handshakes::of(marks),
            ..Self::default()
        }
    }

    /// Enters a SYN. `permit` is called only for a new attempt.
    ///
    /// # Errors
    /// That of `permit`.
    pub(crate) fn arrive<E>(
        &self,
        key: ConnectionKey,
        sequence: u32,
        permit: impl FnOnce() -> Result<Permit, E>,
    ) -> Result<Arrival, E> {
        if let Some(known) = self.get(&key) {
            match known.repeat(sequence) {
                Some(Arrival::Established) if known.is_reused_by(sequence) => {
                    return Ok(if known.reused.swap(true, Ordering::Relaxed) {
                        Arrival::Retransmit
                    } else {
                        Arrival::PortReuse(known)
                    });
                }
                Some(Arrival::Established) if !known.takes_syn() => return Ok(Arrival::Retransmit),
                Some(arrival) => return Ok(arrival),
                // The client gave that attempt up and took the same port again.
                None => {
                    known.close();
                    self.remove(&known);
                }
            }
        }
        let attempt = (key.client, sequence);
        if let Some(other) = self.attempts.get(&attempt).map(|entry| *entry)
            && let Some(first) = self.get(&other)
        {
            first.note_syn();
            return Ok(Arrival::Retransmit);
        }
        let permit = permit()?;
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection::held(id, key, sequence, permit));
        // First, since from the next step on it may be taken out again.
        self.by_address.insert(&connection);
        match self.by_key.entry(key) {
            // Another core has just entered the same SYN.
            Entry::Occupied(_) => {
                self.by_address.remove(&connection);
                return Ok(Arrival::Retransmit);
            }
            Entry::Vacant(place) => {
                place.insert(Arc::clone(&connection));
            }
        }
        self.attempts.insert(attempt, key);
        Ok(Arrival::New(connection))
    }

    /// The upstream that waits for this connection's client, if there is one; it is live from now on.
    pub(crate) fn pair(&self, key: &ConnectionKey) -> Option<(Arc<Connection>, Upstream)> {
        let connection = self.get(key)?;
        let mut stage = connection.stage();
        match std::mem::replace(&mut *stage, Stage::Live(Weak::new())) {
            Stage::Admitted { upstream, .. } => {
                drop(stage);
                Some((connection, upstream))
            }
            other => {
                *stage = other;
                None
            }
        }
    }

    /// The connection between these two, whatever its stage.
    pub(crate) fn get(&self, key: &ConnectionKey) -> Option<Arc<Connection>> {
        self.by_key.get(key).map(|entry| Arc::clone(&entry))
    }

    /// Marks a connection as admitted; from now on a repeated SYN goes to the socket. False if it is closing
    /// meanwhile: its SYN must not be answered, and the upstream is reset.
    #[must_use]
    pub(crate) fn admit(&self, connection: &Connection, stream: TcpStream, worker: usize) -> bool {
        let upstream = Upstream { stream, worker };
        let mut stage = connection.stage();
        if connection.is_closing() || matches!(*stage, Stage::Closed) {
            drop(stage);
            drop(upstream);
            return false;
        }
        let place = match &mut *stage {
            Stage::Held(place) => place.take(),
            _ => None,
        };
        *stage = Stage::Admitted {
            upstream,
            since: Instant::now(),
            place,
        };
        drop(stage);
        self.no_longer_held(connection);
        true
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Every connection, in no order.
    pub(crate) fn all(&self) -> Vec<Arc<Connection>> {
        self.by_key.iter().map(|entry| Arc::clone(&entry)).collect()
    }

    /// Every connection with an end among these addresses, in no order.
    pub(crate) fn of(&self, addresses: &BTreeSet<IpAddr>) -> Vec<Arc<Connection>> {
        self.by_address.of(addresses)
    }
}

impl Ends for Connection {
    fn id(&self) -> u64 {
        self.id
    }

    fn ends(&self) -> [IpAddr; 2] {
        [self.key.client.ip(), self.key.server.ip()]
    }
}

impl Connection {
    /// A connection whose SYN has just arrived.
    /// The number of connections that its source has now.
    pub(crate) fn connections_of_source(&self) -> usize {
        self.permit.connections_of_source()
    }

    fn held(id: u64, key: ConnectionKey, sequence: u32, permit: Permit) -> Self {
        Self {
            id,
            key,
            sequence,
            opened: SystemTime::now(),
            started: Instant::now(),
            moved: Moved::default(),
            holding: Holding::default(),
            timeline: OnceLock::new(),
            decision: Mutex::new(None),
            severance: Mutex::new(None),
            stage: Mutex::new(Stage::Held(None)),
            last_syn: AtomicU32::new(0),
            close: Notify::new(),
            is_closing: AtomicBool::new(false),
            gave_way: AtomicBool::new(false),
            was_reset: AtomicBool::new(false),
            closed: Notify::new(),
            reused: AtomicBool::new(false),
            keeps_alive: AtomicBool::new(false),
            permit,
        }
    }

    /// The decision, once there is one.
    pub(crate) fn decision(&self) -> Option<Arc<Decision>> {
        self.decision.lock().clone()
    }

    /// Sets the decision on the connection.
    pub(crate) fn decide(&self, decision: Arc<Decision>) {
        *self.decision.lock() = Some(decision);
    }

    /// Which later change ended it, if one did.
    pub(crate) fn severance(&self) -> Option<Severance> {
        self.severance.lock().clone()
    }

    /// Keeps its place among the half-open connections until it is live or over.
    pub(crate) fn takes(&self, place: HalfOpen) {
        match &mut *self.stage() {
            Stage::Held(none) | Stage::Admitted { place: none, .. } => *none = Some(place),
            Stage::Live(_) | Stage::Closed => {}
        }
    }

    /// Gives access to its legs, so that others can reset them. Call this before [`Self::close_requested`] is awaited.
    pub(crate) fn lend(&self, legs: &Arc<Legs>) {
        if let Stage::Live(lent) = &mut *self.stage() {
            *lent = Arc::downgrade(legs);
        }
    }

    /// Waits for [`Self::close`]; one that came before is not missed.
    pub(crate) async fn close_requested(&self) {
        self.close.notified().await;
    }

    /// The connection as a record shows it.
    pub(crate) fn subject(&self) -> Subject {
        Subject {
            client: self.key.client,
            server: self.key.server,
            protocol: Protocol::Tcp,
            path: DataPath::Spliced,
            sent: self.moved.sent.load(Ordering::Relaxed),
            received: self.moved.received.load(Ordering::Relaxed),
            opened: self.opened,
            attempt: self.sequence,
            seen: self.timeline.get().map(Timeline::seen),
        }
    }

    /// Waits for the end of the connection for at most `limit`, and returns whether it ended. Called by
    /// the task that got the [`Arrival::PortReuse`].
    pub(crate) async fn closed_within(&self, limit: Duration) -> bool {
        // One that came before is not missed.
        let closed = tokio::time::timeout(limit, self.closed.notified())
            .await
            .is_ok();
        self.reused.store(false, Ordering::Relaxed);
        closed
    }

    /// The name of its stage.
    pub(crate) fn stage_name(&self) -> StageName {
        self.stage().name()
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock()
    }

    /// How a SYN with `sequence` relates to this connection; `None`: it is another attempt.
    fn repeat(&self, sequence: u32) -> Option<Arrival> {
        let same = sequence == self.sequence;
        match *self.stage() {
            Stage::Held(_) if same => {
                self.note_syn();
                Some(Arrival::Retransmit)
            }
            Stage::Admitted { .. } if same => Some(Arrival::Established),
            // The kernel's own socket answers as TCP wants it (RFC 5961, section 4).
            Stage::Live(_) => Some(Arrival::Established),
            Stage::Held(_) | Stage::Admitted { .. } | Stage::Closed => None,
        }
    }

    /// Whether a SYN with `sequence` is a new attempt although this connection is live.
    fn is_reused_by(&self, sequence: u32) -> bool {
        sequence != self.sequence && matches!(*self.stage(), Stage::Live(_))
    }

    fn note_syn(&self) {
        let elapsed = u32::try_from(self.started.elapsed().as_millis()).unwrap_or(u32::MAX);
        self.last_syn.store(elapsed, Ordering::Relaxed);
    }

    /// A client repeats its SYN after 1, 3, 7, ... seconds (RFC 6298; Linux 6.5 and later every second
    /// at first): a client that is late has given up.
    fn abandoned(&self, now: Instant) -> bool {
        match *self.stage() {
            Stage::Held(_) => {
                let last = Duration::from_millis(self.last_syn.load(Ordering::Relaxed).into());
                now.saturating_duration_since(self.started) > last * 2 + REPEAT_SLACK
            }
            Stage::Admitted { since, .. } => now.saturating_duration_since(since) > ACCEPT_WITHIN,
            Stage::Live(_) | Stage::Closed => false,
        }
    }
}

#[cfg(test)]
mod tests;
