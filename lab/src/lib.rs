//! Clusters made of network namespaces: nodes, pods, Services and the world outside, in one process.
//!
//! Used by `portreeve demo`, by tests and by benches. The lab knows Kubernetes only as far as
//! a network goes: who runs where with which address. It must not know what a NetworkPolicy means,
//! nor depend on the crates that enforce one; they depend on it.
//!
//! Nothing is named and nothing is left behind: namespaces are held by descriptor, processes die
//! with the process that started them, and [`enter`] moves the whole program into namespaces of its
//! own before anything is built.
//!
//! Depends on `ip` (iproute2), `nft` (nftables) and `setpriv` (util-linux); [`kubernetes`] on the
//! programs of `make tools` too.
//!
//! ```no_run
//! use std::time::Duration;
//! use lab::{Cluster, PodSpec};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     lab::enter()?;
//!     let cluster = Cluster::builder()
//!         .nodes(2)
//!         .pod(PodSpec::new("x", "a").node(0).label("app", "web").port("http", 80))
//!         .pod(PodSpec::new("x", "b").node(1))
//!         .build()?;
//!     let (a, b) = (cluster.pod("x/a"), cluster.pod("x/b"));
//!     a.serve(&[80])?;
//!     let outcome = b.connect(a.addr_v4(80), Duration::from_secs(1))?;
//!     println!("{outcome}");
//!     Ok(())
//! }
//! ```

mod cluster;
pub mod kubernetes;
mod netns;
mod privilege;
mod process;
mod tools;
pub mod traffic;
mod wait;

pub use cluster::{
    Between, Builder, Cluster, ClusterError, Gateway, Host, NodeRef, PodSpec, Protocol, RpFilter,
    Service, ServiceSpec,
};
pub use netns::{Netns, NetnsError};
pub use privilege::{Entered, PrivilegeError, enter};
pub use process::{Child, Command, ProcessError};
pub use tools::{NotBuilt, ToolError, built};
pub use traffic::{Capture, Dial, Kind, Outcome, Packet, Serve};
pub use wait::{WaitTimedOut, wait_for, wait_until};
