//! Connections in a handover: the old daemon releases them, and the new one enters
//! them into its table.
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Instant, SystemTime};

use parking_lot::Mutex;

use super::{Connection, ConnectionKey, ConnectionTable, Stage, StageName};
use crate::limits::Permit;
use crate::telemetry::moved::Moved;
use crate::telemetry::timeline::Timeline;

/// A connection that the old daemon allowed.
pub(crate) struct Adopted {
    pub(crate) key: ConnectionKey,
    /// Initial sequence number of the client's SYN.
    pub(crate) sequence: u32,
    pub(crate) opened: SystemTime,
    pub(crate) started: Instant,
    pub(crate) moved: Moved,
    pub(crate) timeline: Option<Timeline>,
}

impl ConnectionTable {
    /// Enters a connection as live.
    pub(crate) fn adopt(&self, adopted: Adopted, permit: Permit) -> Arc<Connection> {
        let Adopted {
            key,
            sequence,
            opened,
            started,
            moved,
            timeline,
        } = adopted;
        let id = self
            .next_id
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let connection = Arc::new(Connection {
            opened,
            started,
            moved,
            timeline: timeline.map_or_else(OnceLock::new, OnceLock::from),
            stage: Mutex::new(Stage::Live(Weak::new())),
            ..Connection::held(id, key, sequence, permit)
        });
        self.by_address.insert(&connection);
        self.by_key.insert(key, Arc::clone(&connection));
        connection
    }

    /// Stops the task of every connection; one that waits for its client to complete its
    /// handshake stays.
    pub(crate) fn let_go(&self) {
        for connection in self.all() {
            if connection.stage_name() != StageName::Admitted {
                connection.close.notify_one();
            }
        }
    }

    /// Whether there is a connection at one of these stages.
    pub(crate) fn has_any(&self, stages: &[StageName]) -> bool {
        let mut connections = self.by_key.iter();
        connections.any(|connection| stages.contains(&connection.stage_name()))
    }
}
