//! Decides every new connection while its first packet waits in the kernel.
//!
//! A denied SYN is dropped or answered with a reset. An allowed one that will be proxied waits until the server
//! has answered the upstream connection from the client's address, and gets the same answer: so a client
//! cannot distinguish the gate from the network. Knows nothing of the stream afterwards.
mod backlog;
mod kernel_flow;
mod packet;
mod turns;
mod unreachable;

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use controller::{Decision, Unknown};
use kernel::conntrack::FlowId;
use kernel::marks::Reply;
use kernel::nfqueue::{PacketId, PacketVerdict, Queue, Queued};
use policy::Protocol;

use crate::enforcer::{Deny, Enforcer, Waiting};
use crate::limits::{LONGEST_WAITING, ShareUsedUp};
use crate::tcp::connect::{self, ConnectError, Leg};
use crate::tcp::connections::{Arrival, Connection, ConnectionKey};
use crate::telemetry::metrics::DropReason;
use crate::telemetry::occasional::warn_occasionally;
use crate::telemetry::record::Outcome;
use crate::telemetry::timeline::{Milestone, Timeline};

use packet::{Packet, Reset, Syn};

/// Packets that are decided before their verdicts are sent and other tasks of the thread run: enough to share a system
/// call, few enough to be prompt.
const TURN: usize = 16;
/// How long to wait for the end of a connection whose client already uses its port again.
const PORT_REUSE_WAIT: Duration = Duration::from_millis(250);
/// Bytes for one message of the queue, with room for attributes that newer kernels add.
const MESSAGE: usize = 4096;

/// The gate of one core, on its own queue.
pub(crate) struct Gate {
    queue: Queue,
    enforcer: Arc<Enforcer>,
    /// Number of the core's worker, stored with its upstream connections.
    worker: usize,
}

/// A packet that waits for its decision.
struct QueuedPacket {
    id: PacketId,
    mark: u32,
    length: usize,
    parsed: Packet,
}

impl QueuedPacket {
    fn of(queued: &Queued<'_>) -> Self {
        Self {
            id: queued.id,
            mark: queued.mark,
            length: queued.length,
            parsed: Packet::parse(queued.payload),
        }
    }
}

impl Gate {
    /// A gate that decides what waits in `queue`.
    pub(crate) fn new(queue: Queue, enforcer: Arc<Enforcer>, worker: usize) -> Rc<Self> {
        Rc::new(Self {
            queue,
            enforcer,
            worker,
        })
    }

    /// Decides packets until the queue breaks. Must run inside a `LocalSet`.
    ///
    /// # Errors
    /// What the queue answers.
    pub(crate) async fn serve(self: Rc<Self>) -> io::Result<()> {
        let mut buffer = vec![0; MESSAGE];
        loop {
            let mut received = 0;
            // Most packets come alone: send the verdict before checking for another packet.
            for most in [1, TURN] {
                let decide = |queued: Queued<'_>| self.decide(QueuedPacket::of(&queued));
                received = self.queue.receive(&mut buffer, most, decide).await?;
                self.flush();
            }
            if received == TURN {
                self.serve_in_turns(&mut buffer).await?;
            }
        }
    }

    /// Drops the held packets and returns the queue's number and socket, for another daemon. To be
    /// called after [`Self::serve`] has been dropped.
    ///
    /// # Errors
    /// What the queue answers.
    pub(crate) fn leave(&self) -> io::Result<(u16, OwnedFd)> {
        self.queue.leave()
    }

    fn decide(self: &Rc<Self>, packet: QueuedPacket) {
        let QueuedPacket { id, length, .. } = packet;
        // The flow is evaluated in its own direction.
        let flow = |id: FlowId| match packet.mark & self.enforcer.marks.answering() {
            0 => id,
            _ => id.reversed(),
        };
        match packet.parsed {
            // Only connections that the rules divert to the listener can be proxied; those to this node itself
            // are kernel flows.
            Packet::Syn(syn) if packet.mark & self.enforcer.marks.divert() == 0 => {
                self.kernel_flow(id, length, syn.into());
            }
            // The kernel keeps whole packets while they wait, also for the server.
            Packet::Syn(_) if length > LONGEST_WAITING => self.refuse(id, DropReason::TooLong),
            Packet::Syn(syn) => self.syn(id, syn),
            Packet::Reset(reset) if packet.mark & self.enforcer.marks.divert() != 0 => {
                self.reset(id, reset);
            }
            Packet::Reset(reset) if !reset.acknowledges => self.refuse(id, DropReason::Invalid),
            Packet::Reset(reset) => self.kernel_flow(id, length, flow(reset.into())),
            Packet::Other(other) => self.kernel_flow(id, length, flow(other)),
            Packet::Invalid => self.refuse(id, DropReason::Invalid),
            Packet::Malformed => self.refuse(id, DropReason::Malformed),
        }
    }

    fn syn(self: &Rc<Self>, id: PacketId, syn: Syn) {
        let key = ConnectionKey {
            client: syn.client,
            server: syn.server,
        };
        let enforcer = &self.enforcer;
        match enforcer.connections.arrive(key, syn.sequence, || {
            let [client, server] = [syn.client, syn.server].map(|end| enforcer.party(end.ip()));
            enforcer.limits.permit(client, server)
        }) {
            Err(full) => self.refuse(id, full.into()),
            Ok(Arrival::Retransmit) => self.queue.decide(id, PacketVerdict::Drop),
            Ok(Arrival::Established) => self.reply(id, Reply::Accept),
            Ok(Arrival::PortReuse(last)) => {
                tokio::task::spawn_local(Rc::clone(self).reuse_port(id, syn, last));
            }
            Ok(Arrival::New(flow)) => {
                if enforcer.recorder.follows() {
                    flow.timeline
                        .get_or_init(|| Timeline::new(flow.started, syn.stamp));
                }
                match self.evaluate(&flow) {
                    Err(Unknown(_)) => self.wait(id, syn, flow),
                    Ok(decision) if !decision.verdict.allowed() => self.deny(id, &flow),
                    Ok(decision) => {
                        if self.opens(id, &flow) {
                            let leg = self.leg_to_server(&decision);
                            let admit = Rc::clone(self).admit(id, syn, flow, leg);
                            tokio::task::spawn_local(admit);
                        }
                    }
                }
            }
        }
    }

    /// Decides a SYN with the addresses and ports of a connection that is live in the table. Its socket may have
    /// closed already without notice (for example, the client reset it): then this is a new attempt, and
    /// without the gate the listener would answer it. Otherwise the socket answers as TCP requires
    /// (RFC 5961, section 4).
    async fn reuse_port(self: Rc<Self>, id: PacketId, syn: Syn, last: Arc<Connection>) {
        let closed = last.closed_within(PORT_REUSE_WAIT).await;
        if closed && self.enforcer.draining.has_begun() {
            // It is dropped with the rest; the client retransmits it to the new daemon.
            return;
        }
        if closed {
            self.syn(id, syn);
        } else if last.takes_syn() {
            self.reply(id, Reply::Accept);
        } else {
            // The connection's task is late. The client repeats its SYN, which is evaluated then.
            self.queue.decide(id, PacketVerdict::Drop);
        }
        self.flush();
    }

    /// Ends the half-open connection whose client answers the SYN-ACK with this reset, and lets the kernel do the same.
    fn reset(&self, id: PacketId, reset: Reset) {
        let key = ConnectionKey {
            client: reset.from,
            server: reset.to,
        };
        if let Some(flow) = self
            .enforcer
            .connections
            .reset_by_client(&key, reset.sequence)
        {
            self.enforcer.ended(&flow, flow.why_unanswered());
        }
        self.reply(id, Reply::Accept);
    }

    /// Evaluates a connection by the newest table and stores the decision on it.
    fn evaluate(&self, flow: &Connection) -> Result<Arc<Decision>, Unknown> {
        let ConnectionKey { client, server } = flow.key;
        let (table, port) = (&self.enforcer.table, Some(server.port()));
        loop {
            let generation = table.generation();
            let decided = table.decide(client.ip(), server.ip(), port, Protocol::Tcp);
            let decided = decided.map(Arc::new);
            if let Ok(decision) = &decided {
                flow.decide(Arc::clone(decision));
            }
            // A change in between may have evaluated flows again before this one had a decision.
            if table.generation() == generation {
                return decided;
            }
        }
    }

    fn leg_to_server(&self, decision: &Decision) -> Leg {
        match &decision.to {
            Some(server) if self.enforcer.is_local(server) => Leg::Local,
            _ => Leg::Remote,
        }
    }

    /// Counts an allowed connection as half-open, before it takes a descriptor. Returns false if its source has used up
    /// its share; then its SYN was dropped.
    fn opens(&self, id: PacketId, flow: &Arc<Connection>) -> bool {
        let opens = self.enforcer.opens(flow);
        if opens.is_err() {
            self.enforcer.connections.remove(flow);
            self.refuse(id, DropReason::HalfOpenLimit);
        }
        opens.is_ok()
    }

    /// Holds a SYN with an unknown end, unless its source has used up its share.
    fn wait(self: &Rc<Self>, id: PacketId, syn: Syn, flow: Arc<Connection>) {
        let ConnectionKey { client, server } = flow.key;
        match self.enforcer.waits(client.ip(), server.ip()) {
            Ok(waiting) => {
                tokio::task::spawn_local(Rc::clone(self).hold(id, syn, flow, waiting));
            }
            Err(ShareUsedUp) => {
                self.enforcer.connections.remove(&flow);
                self.refuse(id, DropReason::WaitingLimit);
            }
        }
    }

    /// Holds a SYN until both its ends are known, for as long as `--hold` says.
    async fn hold(self: Rc<Self>, id: PacketId, syn: Syn, flow: Arc<Connection>, waiting: Waiting) {
        let mut changed = self.enforcer.table.changed();
        let deadline = tokio::time::Instant::from_std(flow.started + self.enforcer.hold);
        let cause = loop {
            changed.mark_unchanged();
            match self.evaluate(&flow) {
                Err(Unknown(_)) => {}
                Ok(decision) if !decision.verdict.allowed() => {
                    self.deny(id, &flow);
                    return self.flush();
                }
                Ok(decision) => {
                    drop(waiting);
                    if self.opens(id, &flow) {
                        let leg = self.leg_to_server(&decision);
                        return self.admit(id, syn, flow, leg).await;
                    }
                    return self.flush();
                }
            }
            tokio::select! {
                biased;
                () = flow.close_requested() => break DropReason::UnknownPod,
                () = waiting.gives_way() => break DropReason::WaitingLimit,
                changed = changed.changed() => if changed.is_err() { break DropReason::UnknownPod },
                () = tokio::time::sleep_until(deadline) => break DropReason::UnknownPod,
            }
        };
        self.enforcer.connections.remove(&flow);
        self.refuse(id, cause);
        self.flush();
    }

    /// Connects to the server and passes the result on to the client.
    async fn admit(self: Rc<Self>, id: PacketId, syn: Syn, flow: Arc<Connection>, leg: Leg) {
        let ConnectionKey { client, server } = flow.key;
        let enforcer = &self.enforcer;
        enforcer.allowed(&flow);
        let connected = tokio::select! {
            biased;
            () = flow.close_requested() => None,
            connected = connect::connect(client, server, leg, syn.inherited, enforcer.marks, flow.timeline.get()) => Some(connected),
        };
        enforcer.metrics.connected(flow.started.elapsed());
        match connected {
            Some(Ok(upstream)) => {
                if let Some(timeline) = flow.timeline.get() {
                    timeline.note(Milestone::Connected);
                }
                // First the table, then the kernel: the client may complete its handshake at once.
                if enforcer.connections.admit(&flow, upstream, self.worker) {
                    self.reply(id, Reply::Accept);
                } else {
                    self.not_answered(id, &flow);
                }
            }
            Some(Err(ConnectError::Answered { reply, source, .. })) => {
                if unreachable::send(client, server, flow.sequence, reply) {
                    self.queue.decide(id, PacketVerdict::Drop);
                } else {
                    self.reply(id, reply);
                }
                enforcer.ended(&flow, Outcome::Unanswered(source.to_string()));
            }
            None if enforcer.draining.has_begun() => {
                // The client retransmits its SYN to the new daemon.
                self.queue.decide(id, PacketVerdict::Drop);
                enforcer.connections.remove(&flow);
            }
            Some(Err(ConnectError::Silent { .. })) | None => self.not_answered(id, &flow),
            // A client that uses up its ports causes thousands of these: counted, not logged.
            Some(Err(ConnectError::NoPort { .. })) => {
                enforcer.connections.remove(&flow);
                self.refuse(id, DropReason::NoPort);
            }
            Some(Err(error @ ConnectError::Refused { .. })) => {
                warn_occasionally!(error = %format!("{:#}", anyhow::Error::from(error)), "connection refused");
                enforcer.connections.remove(&flow);
                self.refuse(id, DropReason::Internal);
            }
        }
        self.flush();
    }

    /// Drops the SYN of an allowed connection that gets no answer.
    fn not_answered(&self, id: PacketId, flow: &Arc<Connection>) {
        self.queue.decide(id, PacketVerdict::Drop);
        self.enforcer.ended(flow, flow.why_unanswered());
    }

    fn deny(&self, id: PacketId, flow: &Arc<Connection>) {
        match self.enforcer.deny {
            Deny::Drop => self.queue.decide(id, PacketVerdict::Drop),
            Deny::Reject => self.reply(id, Reply::Reset),
        }
        self.enforcer.denied(flow);
    }

    /// Drops a packet for a reason other than policy, and counts the reason.
    fn refuse(&self, id: PacketId, cause: DropReason) {
        self.queue.decide(id, PacketVerdict::Drop);
        self.enforcer.metrics.dropped(cause);
    }

    /// Clears the marks of other programs: with kube-proxy's, the packet would be masqueraded to this node, and
    /// the next node would evaluate another source.
    fn reply(&self, id: PacketId, reply: Reply) {
        self.queue.decide(
            id,
            PacketVerdict::Repeat {
                mark: self.enforcer.marks.reply(reply),
            },
        );
    }

    fn flush(&self) {
        if let Err(error) = self.queue.flush() {
            warn_occasionally!(%error, "failed to send NFQUEUE verdicts; the packets stay queued");
            self.enforcer.metrics.dropped(DropReason::Internal);
        }
    }
}
