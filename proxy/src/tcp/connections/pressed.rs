//! Finds and ends streams with unread bytes from outside of their relay.
use std::sync::Arc;

use super::{Connection, ConnectionTable, Legs};

impl ConnectionTable {
    /// Every stream with a busy direction or with reduced buffers, in no order.
    pub(crate) fn pressed(&self) -> Vec<Arc<Connection>> {
        let pressed = self
            .by_key
            .iter()
            .filter(|connection| connection.holding.is_pressed());
        pressed.map(|connection| Arc::clone(&connection)).collect()
    }
}

impl Connection {
    /// Its sockets, if it is live.
    pub(crate) fn legs(&self) -> Option<Arc<Legs>> {
        self.stage().legs()
    }

    /// Ends it because of its unread bytes.
    pub(crate) fn give_way(&self) {
        self.holding.gives_way();
        self.close();
    }
}
