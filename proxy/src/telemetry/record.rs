//! The record of a connection, whose keys users rely on, and the queue to a thread that
//! reads records.
//!
//! Workers only collect values; the thread that writes a record formats them.
mod fields;
mod queue;
mod sink;
#[cfg(test)]
pub(crate) mod testing;
mod windows;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use controller::Decision;
use policy::Protocol;

use crate::telemetry::decision::DataPath;
use crate::telemetry::timeline::Seen;

pub(crate) use fields::{Field, shown, timestamp};
pub(crate) use queue::Queue;
pub(crate) use sink::Sink;
pub(crate) use windows::Windows;

/// The connection that a record is about.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    pub(crate) client: SocketAddr,
    pub(crate) server: SocketAddr,
    pub(crate) protocol: Protocol,
    pub(crate) path: DataPath,
    /// Payload bytes from the client.
    pub(crate) sent: u64,
    /// Payload bytes to the client.
    pub(crate) received: u64,
    pub(crate) opened: SystemTime,
    /// Distinguishes a repeat of the first packet from a new attempt.
    pub(crate) attempt: u32,
    /// Additional data for a span, if the connection is sampled.
    pub(crate) seen: Option<Seen>,
}

/// How an allowed connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Both sides closed.
    Closed,
    /// A side was reset or gone; the other was reset in turn.
    Broken(io::ErrorKind),
    /// The daemon ended it.
    Stopped,
    /// The daemon reset it because of its unread bytes.
    Unread,
    /// It continues as a kernel flow; this is its first packet.
    KernelFlows,
    /// The connection to the server failed; the client got the same answer.
    Unanswered(String),
}

/// The end of a connection.
#[derive(Clone, Debug)]
pub(crate) enum Fate {
    /// Never connected.
    Denied,
    /// Allowed, and over or handed to the kernel.
    Allowed(Outcome),
    /// Allowed at first, and severed by a later change.
    Severed {
        /// If not by policy: what happened to the pod of an endpoint.
        replaced: Option<String>,
    },
}

/// A connection and what became of it.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) subject: Subject,
    pub(crate) fate: Fate,
    /// The decision on it; for a severed one, the decision that ended it.
    pub(crate) decision: Arc<Decision>,
    pub(crate) ended: SystemTime,
}

impl Record {
    /// The reason in sentences: that of the verdict, and how an allowed connection ended.
    pub(crate) fn reason(&self) -> String {
        let reason = || self.decision.reason();
        let (reason, outcome) = match &self.fate {
            Fate::Severed {
                replaced: Some(replaced),
            } => return replaced.clone(),
            Fate::Denied | Fate::Severed { .. } => return reason(),
            Fate::Allowed(outcome) => (reason(), outcome),
        };
        match outcome {
            Outcome::Closed | Outcome::KernelFlows => reason,
            Outcome::Broken(kind) => format!("{reason} Broken off: {kind}."),
            Outcome::Unread => {
                format!("{reason} Reset: its source has more unread bytes than its share.")
            }
            Outcome::Stopped => format!("{reason} Ended by the daemon."),
            Outcome::Unanswered(why) => format!("{reason} Not connected: {why}."),
        }
    }
}
