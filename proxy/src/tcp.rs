//! TCP connections through this node: their table, the leg to the server, the relay, and the memory of unread bytes.
pub(crate) mod connect;
pub(crate) mod connections;
pub(crate) mod relay;
pub(crate) mod unread;
