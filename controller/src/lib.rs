//! The cluster's state: from a source, through one stream of events and one index with one owner,
//! to the table that the packet path reads.
//!
//! ```text
//! manifest::ManifestSource --Batch--> Index --publish--> Table <--decide-- gate workers
//! kube::KubeSource ---------'
//! ```
//!
//! A source turns what it watches into [`Batch`]es and reports what it cannot use as [`Problem`]s;
//! it never widens access because of them. Knows nothing of the kernel, sockets or packets.
mod decision;
mod event;
mod index;
pub mod kube;
mod loaded;
pub mod manifest;
mod objects;
mod problem_list;
mod table;
#[cfg(test)]
mod testing;

pub use decision::{DecidedBy, Decision, Reason, Severance, Unknown};
pub use event::{Batch, Event, Object, ObjectKey};
pub use index::Index;
pub use loaded::Loaded;
pub use policy::{Problem, Severity};
pub use table::{Holder, LocalPod, PolicyInfo, Table, TableSettings, UncertainAddresses};
