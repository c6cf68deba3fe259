//! The state that all parts of the data path share: policy table, connections, limits, metrics.
mod entering;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use controller::{Decision, Holder, Severance, Table};
use kernel::marks::Marks;
use policy::{Endpoint, Protocol};
use tokio::sync::Notify;

use crate::kernel_flows::{KernelFlows, Listed};
use crate::limits::{Asking, ConnectionLimits, Party, Pending, Place, ShareUsedUp, Source};
use crate::tcp::connections::{Connection, ConnectionKey, ConnectionTable, StageName};
use crate::tcp::unread::Unread;
use crate::telemetry::decision::DataPath;
use crate::telemetry::metrics::{DropReason, Metrics};
use crate::telemetry::record::{Outcome, Subject};
use crate::telemetry::recorder::Recorder;

/// How denied connections are answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Deny {
    /// No answer: the client times out.
    #[default]
    Drop,
    /// A TCP reset at once; ICMP administratively prohibited for other protocols.
    Reject,
}

/// A packet that waits until an address is known.
pub(crate) struct Waiting {
    gave_way: Arc<Notify>,
    _place: Place<Arc<Notify>>,
}

impl Waiting {
    /// Waits until the packet has to make room for another one.
    pub(crate) async fn gives_way(&self) {
        self.gave_way.notified().await;
    }
}

/// One node's enforcement, shared by all its workers.
pub(crate) struct Enforcer {
    /// `metadata.name` of the Node.
    pub(crate) node: Arc<str>,
    pub(crate) table: Arc<Table>,
    pub(crate) connections: ConnectionTable,
    pub(crate) kernel_flows: KernelFlows,
    /// All connections.
    pub(crate) limits: Arc<ConnectionLimits>,
    /// Allowed connections whose client has not completed its handshake.
    pub(crate) half_open: Arc<Pending<Weak<Connection>>>,
    /// Packets that wait until an address is known; one that has to make room is notified.
    pub(crate) waiting: Arc<Pending<Arc<Notify>>>,
    pub(crate) unread: Unread,
    pub(crate) marks: Marks,
    pub(crate) deny: Deny,
    /// How long a first packet waits for a pod that is not known yet.
    pub(crate) hold: Duration,
    pub(crate) metrics: Metrics,
    /// Numbers of our NFQUEUEs.
    pub(crate) queues: Range<u16>,
    pub(crate) recorder: Recorder,
    /// Whether this daemon hands its connections over to another one.
    pub(crate) draining: Draining,
}

/// Set once; read by every worker.
#[derive(Debug, Default)]
pub(crate) struct Draining(AtomicBool);

impl Draining {
    /// From now on what stops is handed over.
    pub(crate) fn begin(&self) {
        self.0.store(true, Ordering::Release);
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl Enforcer {
    /// Whether the pod runs on this node.
    pub(crate) fn is_local(&self, endpoint: &Endpoint) -> bool {
        endpoint
            .identity
            .node
            .as_ref()
            .is_some_and(|node| node.name == self.node)
    }

    /// The source whose share packets from or to `address` count against.
    pub(crate) fn source_of(&self, address: IpAddr) -> Source {
        Source::new(address, &self.table.holder(address))
    }

    /// The same, with the namespace.
    pub(crate) fn party(&self, address: IpAddr) -> Party {
        Party::new(address, &self.table.holder(address))
    }

    /// The same for a client. It is bound by its share if it is a pod of this node: nobody else can send from its
    /// address.
    pub(crate) fn asking(&self, address: IpAddr) -> Asking {
        let holder = self.table.holder(address);
        Asking {
            source: Source::new(address, &holder),
            is_bound: matches!(&holder, Holder::Pod(pod) if self.is_local(pod)),
        }
    }

    /// Counts an allowed connection as half-open until it is live or over, and ends the one that has to make room for
    /// it.
    ///
    /// # Errors
    /// If its source has its share.
    pub(crate) fn opens(&self, flow: &Arc<Connection>) -> Result<(), ShareUsedUp> {
        let ConnectionKey { client, server } = flow.key;
        let (asking, asked) = (self.asking(client.ip()), self.source_of(server.ip()));
        let now = Instant::now();
        let (place, gave_way) = self
            .half_open
            .enter(asking, asked, Arc::downgrade(flow), now)?;
        flow.takes(place);
        if let Some(other) = gave_way.and_then(|other| other.upgrade())
            && let Some(stage) = self.connections.give_way(&other)
        {
            self.metrics.dropped(DropReason::HalfOpenGaveWay);
            if stage == StageName::Admitted {
                self.ended(&other, other.why_unanswered());
            }
        }
        Ok(())
    }

    /// Counts a packet that waits until the pod at `client` or `server` is known.
    ///
    /// # Errors
    /// If its source has its share.
    pub(crate) fn waits(&self, client: IpAddr, server: IpAddr) -> Result<Waiting, ShareUsedUp> {
        let gave_way = Arc::new(Notify::new());
        let (asking, asked) = (self.asking(client), self.source_of(server));
        let (value, now) = (Arc::clone(&gave_way), Instant::now());
        let (place, other) = self.waiting.enter(asking, asked, value, now)?;
        if let Some(other) = other {
            other.notify_one();
        }
        Ok(Waiting {
            gave_way,
            _place: place,
        })
    }

    /// Evaluates every connection of these addresses again and severs those that are now denied, or one
    /// of whose pods has lost its address.
    ///
    /// Call this after the table has changed: later connections are evaluated by the new table, and
    /// earlier ones are in the connection table already.
    pub(crate) fn evaluate_again(&self, touched: &BTreeSet<IpAddr>) {
        for flow in self.connections.of(touched) {
            let Some(rests_on) = flow.decision().filter(|it| it.verdict.allowed()) else {
                continue;
            };
            let ConnectionKey { client, server } = flow.key;
            let (client, server, port) = (client.ip(), server.ip(), Some(server.port()));
            let now = self.table.decide(client, server, port, Protocol::Tcp);
            if let Some(severance) = rests_on.overturned(client, server, &now) {
                self.metrics.severed(&severance.decision, DataPath::Spliced);
                self.connections.sever(&flow, severance);
            } else if let Ok(now) = now {
                // From now on this decision allows it, and the old policies are not kept in memory.
                flow.decide(Arc::new(now));
            }
        }
    }

    /// Takes a denied connection out of the table, counts it and records it.
    pub(crate) fn denied(&self, flow: &Arc<Connection>) {
        self.connections.remove(flow);
        if let Some(decision) = flow.decision() {
            let waited = flow.started.elapsed();
            self.metrics.decided(&decision, DataPath::Spliced, waited);
            self.recorder.denied(flow.subject(), &decision);
        }
    }

    /// Counts a flow that was decided at its first packet and needs no relay, `waited` after that
    /// packet came. It is recorded at its end if it is `listed`, else now.
    pub(crate) fn decided(
        &self,
        subject: Subject,
        decision: &Arc<Decision>,
        listed: Option<Listed>,
        waited: Duration,
    ) {
        self.metrics.decided(decision, subject.path, waited);
        match listed {
            None => self.recorder.denied(subject, decision),
            Some(Listed::New) => self.recorder.allowed(&subject, decision),
            Some(Listed::Again) => {}
            Some(Listed::Full) => {
                self.recorder.allowed(&subject, decision);
                self.recorder.ended(subject, decision, Outcome::KernelFlows);
            }
        }
    }

    /// Counts and records a kernel flow that is now denied.
    pub(crate) fn severed(&self, subject: Subject, severance: Severance) {
        self.metrics.severed(&severance.decision, subject.path);
        self.recorder.severed(subject, severance);
    }

    /// Counts a connection that policy allows.
    pub(crate) fn allowed(&self, flow: &Connection) {
        if let Some(decision) = flow.decision() {
            let waited = flow.started.elapsed();
            self.metrics.decided(&decision, DataPath::Spliced, waited);
            self.recorder.allowed(&flow.subject(), &decision);
        }
    }

    /// Removes an allowed connection that has ended from the table, counts it and records it.
    pub(crate) fn ended(&self, flow: &Arc<Connection>, outcome: Outcome) {
        self.connections.remove(flow);
        if let Some(decision) = flow.decision() {
            self.metrics.moved(&flow.moved);
            match flow.severance() {
                Some(severance) => self.recorder.severed(flow.subject(), severance),
                None => self.recorder.ended(flow.subject(), &decision, outcome),
            }
        }
    }
}
