//! How connections leave the table, and how half-open ones make room for new ones.
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Instant;

use controller::Severance;

use super::stage::Stage;
use super::{Connection, ConnectionKey, ConnectionTable, StageName};
use crate::telemetry::record::Outcome;

impl ConnectionTable {
    /// Removes a connection that has ended from the table.
    pub(crate) fn remove(&self, flow: &Arc<Connection>) {
        let stage = std::mem::replace(&mut *flow.stage(), Stage::Closed);
        self.removed(flow, stage);
    }

    /// Removes a connection that has ended at `stage` from the table.
    fn removed(&self, flow: &Arc<Connection>, stage: Stage) {
        if let Stage::Admitted { upstream, .. } = stage {
            drop(upstream);
            self.handshakes.forget(flow);
        }
        flow.closed.notify_one();
        self.no_longer_held(flow);
        self.by_key
            .remove_if(&flow.key, |_, held| Arc::ptr_eq(held, flow));
        self.by_address.remove(flow);
    }

    /// Forgets the SYN of a connection that is past it.
    pub(super) fn no_longer_held(&self, flow: &Connection) {
        self.attempts
            .remove_if(&(flow.key.client, flow.sequence), |_, key| *key == flow.key);
    }

    /// Ends a half-open connection so that another can begin. Returns its last stage: a held one is recorded
    /// by the task that connects. `None` if it is live or has ended already: then nothing happens to it.
    pub(crate) fn give_way(&self, flow: &Arc<Connection>) -> Option<StageName> {
        let mut stage = flow.stage();
        let name = stage.name();
        match *stage {
            Stage::Held(_) => {
                flow.gave_way.store(true, Ordering::Relaxed);
                flow.is_closing.store(true, Ordering::Relaxed);
                flow.close.notify_one();
            }
            Stage::Admitted { .. } => {
                flow.gave_way.store(true, Ordering::Relaxed);
                let admitted = std::mem::replace(&mut *stage, Stage::Closed);
                drop(stage);
                self.removed(flow, admitted);
            }
            Stage::Live(_) | Stage::Closed => return None,
        }
        Some(name)
    }

    /// Ends the half-open connection whose client has answered the SYN-ACK with a reset of this sequence number.
    /// `None` if there is none, or if the number does not match the handshake: anybody can guess addresses and ports.
    pub(crate) fn reset_by_client(
        &self,
        key: &ConnectionKey,
        sequence: u32,
    ) -> Option<Arc<Connection>> {
        let flow = self.get(key)?;
        let mut stage = flow.stage();
        if sequence != flow.sequence.wrapping_add(1) || !matches!(*stage, Stage::Admitted { .. }) {
            return None;
        }
        flow.was_reset.store(true, Ordering::Relaxed);
        let admitted = std::mem::replace(&mut *stage, Stage::Closed);
        drop(stage);
        self.removed(&flow, admitted);
        Some(flow)
    }

    /// Ends abandoned connections: attempts whose client no longer retransmits its SYN, and
    /// admitted connections whose client never completed the handshake. Returns how many.
    pub(crate) fn expire(&self, now: Instant) -> usize {
        let abandoned = self.all().into_iter().filter(|flow| flow.abandoned(now));
        abandoned.map(|flow| self.end(&flow)).count()
    }

    /// Ends a connection that a change denies.
    pub(crate) fn sever(&self, flow: &Arc<Connection>, severance: Severance) {
        *flow.severance.lock() = Some(severance);
        self.end(flow);
    }

    /// Ends every connection.
    pub(crate) fn end_all(&self) {
        for flow in self.all() {
            self.end(&flow);
        }
    }

    /// Notifies the connection's task to end it; an admitted one has no task and is removed here.
    fn end(&self, flow: &Arc<Connection>) {
        flow.close();
        if flow.stage_name() == StageName::Admitted {
            self.remove(flow);
        }
    }
}

impl Connection {
    /// Ends the connection at any stage: the held SYN is dropped, live legs are reset at once, even if
    /// their worker is busy.
    pub(crate) fn close(&self) {
        // This comes first, so that the relay knows why its sockets break.
        self.close.notify_one();
        let stage = self.stage();
        self.is_closing.store(true, Ordering::Relaxed);
        let legs = stage.legs();
        drop(stage);
        if let Some(legs) = legs {
            legs.reset();
        }
    }

    /// Why an allowed connection was not established, for its record.
    pub(crate) fn why_unanswered(&self) -> Outcome {
        let [gave_way, was_reset] =
            [&self.gave_way, &self.was_reset].map(|it| it.load(Ordering::Relaxed));
        Outcome::Unanswered(String::from(match (gave_way, was_reset) {
            (true, _) => "too many connections were half-open",
            (_, true) => "the client reset it during the handshake",
            _ => "the server did not answer",
        }))
    }

    /// Whether it is closing, even if its task has not noticed yet.
    pub(super) fn is_closing(&self) -> bool {
        self.is_closing.load(Ordering::Relaxed)
    }

    /// Whether a SYN between its ends reaches its socket, or the listener that has answered its first SYN. If the
    /// connection is closing, or the client has reset it, the socket is closed before its task knows, and the listener
    /// would answer without regard to policies.
    pub(crate) fn takes_syn(&self) -> bool {
        let stage = self.stage();
        !self.is_closing()
            && match &*stage {
                Stage::Admitted { .. } => true,
                // Its task is about to lend them.
                Stage::Live(legs) if legs.ptr_eq(&Weak::new()) => true,
                Stage::Live(legs) => legs.upgrade().is_some_and(|legs| legs.has_client()),
                Stage::Held(_) | Stage::Closed => false,
            }
    }
}
