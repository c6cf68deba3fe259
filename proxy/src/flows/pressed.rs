//! Streams whose receivers do not keep up: found, measured and ended from outside of their relay.
use std::sync::Arc;

use super::{Flow, Flows, Legs};

impl Flows {
    /// Every stream of which a direction presses, or whose buffers are reduced, in no order.
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

    /// Ends it for what its receivers leave unread.
    pub(crate) fn give_way(&self) {
        self.holding.gives_way();
        self.cut();
    }
}
