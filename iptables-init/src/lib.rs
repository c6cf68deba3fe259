//! The redirect: the state in the node's kernel that brings pods' packets to the gate.
//!
//! The init step installs and removes it; the daemon changes its sets. Knows no policies.
pub mod arguments;
mod conntrack_acct;
pub mod contents;
pub mod inspect;
mod lookup;
mod nft_table;
pub mod probe;
mod queue_target;
pub mod redirect;
mod routes;
pub mod ruleset;
pub mod settings;
pub mod watch;

pub use inspect::{Finding, inspect, ipvs, without_timestamps};
pub use probe::{probe_kernel, probe_queue_rule};
