//! Decides kernel flows: UDP, SCTP, ICMP and other protocols, the TCP connections that `--tcp` leaves to the kernel, and
//! streams that began before their pod was isolated.
//!
//! Their first packet is evaluated like a SYN; if it is allowed, the conntrack mark says so for the flow.
use std::rc::Rc;
use std::time::{Instant, SystemTime};

use kernel::conntrack::FlowId;
use kernel::marks::Reply;
use kernel::nfqueue::{PacketId, PacketVerdict};
use policy::Protocol;

use super::{Deny, Gate};
use crate::enforcer::Waiting;
use crate::limits::{LONGEST_WAITING, ShareUsedUp};
use crate::telemetry::decision::DataPath;
use crate::telemetry::metrics::DropReason;
use crate::telemetry::record::Subject;

impl Gate {
    /// Decides a packet at once, or holds it until both its ends are known, unless it is long or its source has used up
    /// its share.
    pub(super) fn kernel_flow(self: &Rc<Self>, id: PacketId, length: usize, packet: FlowId) {
        let arrived = Instant::now();
        if self.try_decide(id, &packet, arrived) {
            return;
        }
        if length > LONGEST_WAITING {
            return self.refuse(id, DropReason::TooLong);
        }
        match self.enforcer.waits(packet.client.ip(), packet.server.ip()) {
            Err(ShareUsedUp) => self.refuse(id, DropReason::WaitingLimit),
            Ok(waiting) => {
                let gate = Rc::clone(self);
                tokio::task::spawn_local(async move {
                    gate.wait_and_decide(id, packet, arrived, waiting).await;
                });
            }
        }
    }

    /// Decides as soon as the table knows both endpoints; after `--hold` the packet is dropped.
    async fn wait_and_decide(
        &self,
        id: PacketId,
        packet: FlowId,
        arrived: Instant,
        waiting: Waiting,
    ) {
        let mut changed = self.enforcer.table.changed();
        let known = async {
            loop {
                changed.mark_unchanged();
                if self.try_decide(id, &packet, arrived) || changed.changed().await.is_err() {
                    break;
                }
            }
        };
        let refused = tokio::select! {
            biased;
            () = waiting.gives_way() => Some(DropReason::WaitingLimit),
            known = tokio::time::timeout(self.enforcer.hold, known) => known.err().map(|_| DropReason::UnknownPod),
        };
        if let Some(cause) = refused {
            self.refuse(id, cause);
        }
        self.flush();
    }

    /// Decides a packet; false if an end of it is unknown.
    fn try_decide(&self, id: PacketId, packet: &FlowId, arrived: Instant) -> bool {
        let opened = SystemTime::now() - arrived.elapsed();
        let Ok((decision, listed)) = self.enforcer.enter_kernel_flow(*packet, opened) else {
            return false;
        };
        if decision.verdict.allowed() {
            self.reply(id, Reply::AcceptFlow);
        } else {
            match (self.enforcer.deny, packet.protocol) {
                (Deny::Drop, _) => self.queue.decide(id, PacketVerdict::Drop),
                (Deny::Reject, Protocol::Tcp) => self.reply(id, Reply::Reset),
                (Deny::Reject, _) => self.reply(id, Reply::Prohibited),
            }
        }
        let subject = subject(packet, opened);
        self.enforcer
            .decided(subject, &decision, listed, arrived.elapsed());
        true
    }
}

/// The record data of a flow at its first packet, before any bytes are counted.
fn subject(packet: &FlowId, opened: SystemTime) -> Subject {
    Subject {
        client: packet.client,
        server: packet.server,
        protocol: packet.protocol,
        path: DataPath::Kernel,
        sent: 0,
        received: 0,
        opened,
        attempt: 0,
        seen: None,
    }
}
