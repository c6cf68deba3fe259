//! The stage of a connection, with the sockets of that stage. Knows no table.
use std::sync::{Arc, Weak};
use std::time::Instant;

use tokio::net::TcpStream;

use super::Connection;
use crate::limits::Place;

use kernel::sys;

/// The place of a connection among the half-open ones; its value leads to the connection.
pub(crate) type HalfOpen = Place<Weak<Connection>>;

/// The stage of a connection.
pub(super) enum Stage {
    /// The SYN waits for its verdict, or for the server: then it is half-open.
    Held(Option<HalfOpen>),
    /// The server has answered; the client has not yet completed its handshake.
    Admitted {
        upstream: Upstream,
        since: Instant,
        place: Option<HalfOpen>,
    },
    /// Both legs are connected. The relay owns them; before it gives access to them there are none.
    Live(Weak<Legs>),
    /// Ended, and no longer in the table.
    Closed,
}

/// The name of a [`Stage`], for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum StageName {
    Held,
    Admitted,
    Live,
    Closed,
}

impl Stage {
    /// Both legs, if they are connected and accessible.
    pub(super) fn legs(&self) -> Option<Arc<Legs>> {
        match self {
            Self::Live(legs) => legs.upgrade(),
            _ => None,
        }
    }

    pub(super) fn name(&self) -> StageName {
        match self {
            Self::Held(_) => StageName::Held,
            Self::Admitted { .. } => StageName::Admitted,
            Self::Live(_) => StageName::Live,
            Self::Closed => StageName::Closed,
        }
    }
}

/// A connection to the server, and the worker whose reactor watches it. Dropping it resets the connection, since a FIN
/// would make the stream look complete to the server.
#[derive(Debug)]
pub(crate) struct Upstream {
    pub(crate) stream: TcpStream,
    pub(crate) worker: usize,
}

/// The two sockets of a live connection.
pub(crate) struct Legs {
    pub(crate) server: TcpStream,
    pub(crate) client: TcpStream,
}

impl Legs {
    /// The sockets that a direction reads from and writes to: 0 is the direction to the server, 1 that to the client.
    pub(crate) fn of(&self, direction: usize) -> [&TcpStream; 2] {
        match direction {
            0 => [&self.client, &self.server],
            _ => [&self.server, &self.client],
        }
    }

    /// Resets both sides at once, from any thread; the relay then gets socket errors.
    pub(super) fn reset(&self) {
        for leg in [&self.server, &self.client] {
            // This can fail under a seccomp filter: the relay is notified as well, and resets what is left.
            let _ = sys::disconnect(leg);
        }
    }

    /// Whether the kernel still has the client's connection, so that a SYN between its ends reaches this socket.
    pub(super) fn has_client(&self) -> bool {
        // ENOTCONN after a reset, from either side.
        self.client.peer_addr().is_ok()
    }
}
