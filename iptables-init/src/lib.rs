//! The redirect: the state in the node's kernel that brings pods' packets to the gate.
//!
//! The init step installs and removes it; the daemon changes its sets. Knows no policies.
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
