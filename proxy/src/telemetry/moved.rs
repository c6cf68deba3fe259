//! The payload bytes that a connection has moved.
use std::sync::atomic::{AtomicU64, Ordering};

/// Payload bytes moved so far, as others may read them while the connection lives.
#[derive(Debug, Default)]
pub(crate) struct Moved {
    /// From the client to the server.
    pub(crate) sent: AtomicU64,
    /// From the server to the client.
    pub(crate) received: AtomicU64,
    reported: [AtomicU64; 2],
}

impl Moved {
    /// Starts from the bytes sent and received that an earlier daemon has already reported.
    pub(crate) fn resumed(moved: [u64; 2]) -> Self {
        let [sent, received] = moved.map(AtomicU64::new);
        Self {
            sent,
            received,
            reported: moved.map(AtomicU64::new),
        }
    }

    /// Bytes sent and received since the last call: each byte is returned once.
    pub(crate) fn take_new(&self) -> [u64; 2] {
        let mut moved = [&self.sent, &self.received].map(|all| all.load(Ordering::Relaxed));
        for (now, reported) in moved.iter_mut().zip(&self.reported) {
            *now = now.saturating_sub(reported.fetch_max(*now, Ordering::Relaxed));
        }
        moved
    }
}
