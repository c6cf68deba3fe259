//! Decides packets while many wait: users take turns, and the gate takes turns with the other tasks of its thread.
use std::io;
use std::net::IpAddr;
use std::rc::Rc;

use controller::Holder;
use kernel::nfqueue::Queued;

use super::backlog::{Backlog, User};
use super::packet::Packet;
use super::{Gate, QueuedPacket};
use crate::limits::{LONGEST_WAITING, Source};
use crate::telemetry::metrics::DropReason;

/// Messages that are read from the kernel's queue at once.
const BATCH: usize = 128;

/// Packets that are decided before the kernel's queue is read again: each can start a connection, and new packets wait
/// for as many decisions.
const AT_ONCE: usize = 4;

impl Gate {
    /// Decides one packet of each user in turn until none waits. Listener and relays get their turns meanwhile.
    pub(super) async fn serve_in_turns(self: &Rc<Self>, buffer: &mut [u8]) -> io::Result<()> {
        let mut backlog = Backlog::new();
        loop {
            tokio::task::yield_now().await;
            let wait =
                |queued: Queued<'_>| self.wait_for_turn(&mut backlog, QueuedPacket::of(&queued));
            self.queue.receive_waiting(buffer, BATCH, wait)?;
            for _ in 0..AT_ONCE {
                if let Some(packet) = backlog.pop() {
                    self.decide(packet);
                }
            }
            self.flush();
            if backlog.is_empty() {
                return Ok(());
            }
        }
    }

    fn wait_for_turn(self: &Rc<Self>, backlog: &mut Backlog<QueuedPacket>, packet: QueuedPacket) {
        let (client, server) = match &packet.parsed {
            Packet::Syn(syn) => (syn.client, syn.server),
            Packet::Reset(reset) => (reset.from, reset.to),
            Packet::Other(flow) => (flow.client, flow.server),
            Packet::Invalid | Packet::Malformed => return self.decide(packet),
        };
        let user = self.user(client.ip(), server.ip());
        let is_long = packet.length > LONGEST_WAITING;
        if let Err(packet) = backlog.push(user, packet, is_long) {
            self.refuse(packet.id, DropReason::Crowded);
        }
    }

    fn user(&self, client: IpAddr, server: IpAddr) -> User {
        match self.enforcer.table.holder(client) {
            Holder::Pod(pod) if self.enforcer.is_local(&pod) => User::Asks(Source::of(&pod)),
            Holder::Unknown => User::Nobody,
            _ => match self.enforcer.table.holder(server) {
                Holder::Pod(pod) => User::Asked(Source::of(&pod)),
                _ => User::Nobody,
            },
        }
    }
}
