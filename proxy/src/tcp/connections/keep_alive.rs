//! Keep-alive of the legs to servers, set a moment after they are live: most connections end before, and are spared
//! the system calls. Accepted sockets inherit it from their listener.
use std::sync::Arc;
use std::sync::atomic::Ordering;

use socket2::SockRef;

use super::{Connection, ConnectionTable};
use crate::tcp::connect::keepalive;

impl ConnectionTable {
    /// Sets keep-alive for every live connection that does not have it yet.
    pub(crate) fn keep_alive(&self) {
        let all = self.by_key.iter();
        let new = all.filter(|connection| !connection.keeps_alive.load(Ordering::Relaxed));
        let new: Vec<Arc<Connection>> = new.map(|connection| Arc::clone(&connection)).collect();
        for connection in new {
            let Some(legs) = connection.legs() else {
                continue;
            };
            // It fails only if this is no socket of TCP.
            let _ = SockRef::from(&legs.server).set_tcp_keepalive(&keepalive());
            connection.keeps_alive.store(true, Ordering::Relaxed);
        }
    }
}
