//! The commands besides `run` and `demo`: questions to a cluster's state (`ask`) and to a running daemon (`console`).
pub(crate) mod ask;
pub(crate) mod console;
