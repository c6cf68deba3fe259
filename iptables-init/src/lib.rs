//! The redirect: what the node's kernel must hold so that pods' packets come to the gate.
//!
//! The init step puts it in and takes it out; the daemon changes its sets. Knows no policies.
mod accounting;
pub mod arguments;
pub mod contents;
pub mod inspect;
mod lookup;
pub mod probe;
mod queue_target;
pub mod redirect;
mod routes;
pub mod ruleset;
pub mod settings;
mod table;
pub mod watch;

pub use inspect::{Finding, inspect, ipvs, without_timestamps};
pub use probe::{probe_kernel, probe_queue_rule};
