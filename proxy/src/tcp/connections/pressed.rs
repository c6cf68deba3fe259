//! Finds and ends streams with unread bytes from outside of their relay.
use std::sync::Arc;

use super::{Flow, Flows, Legs};

impl Flows {
    /// Every stream with a busy direction or with reduced buffers, in no order.
    pub(crate) fn pressed(&self) -> Vec<Arc<Flow>> {
        let pressed = self.by_key.iter().filter(|flow| flow.holding.is_pressed());
        pressed.map(|flow| Arc::clone(&flow)).collect()
    }
}

impl Flow {
    /// Its sockets, if it is live.
    pub(crate) fn legs(&self) -> Option<Arc<Legs>> {
        self.stage().legs()
    }

    /// Ends it because of its unread bytes.
    pub(crate) fn give_way(&self) {
        self.holding.gives_way();
        self.cut();
    }
}
