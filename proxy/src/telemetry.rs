//! What the daemon tells of its work: records and spans of connections, recent decisions, metrics, limited log lines.
pub(crate) mod decision;
pub(crate) mod metrics;
pub(crate) mod moved;
pub(crate) mod occasional;
pub(crate) mod recent;
pub(crate) mod record;
pub(crate) mod recorder;
pub(crate) mod spans;
pub(crate) mod timeline;
