//! What the tests of several crates share: clusters of the lab under enforcement, the cases of the
//! policy crate and their replay on real connections, and other projects' programs.
//!
//! A failure is a panic, as in a test. Knows no single test.
#![expect(clippy::unwrap_used, reason = "a panic is how a test helper fails")]
pub mod account;
mod admin;
pub mod browser;
pub mod cases;
pub mod certificates;
mod connections;
mod daemon;
pub mod dials;
pub mod jaeger;
pub mod matrix;
mod network_state;
mod objects;
pub mod runner;
pub mod streams;
pub mod terminating;
mod test_cluster;

use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

pub use admin::{Answer, ask, ask_as, ask_by, counter, counter_of, in_force, metric};
pub use connections::{connected, echoes, greeted};
pub use daemon::{Daemon, init};
pub use network_state::network_state;
pub use objects::{allow_all, allow_ingress, deny_egress, deny_ingress, marker, policy, small};
pub use test_cluster::{TestCluster, Way};

/// Longer than a round trip in the lab by far, shorter than a SYN's first retransmit.
pub const SOON: Duration = Duration::from_millis(900);
/// The time within which every expected event happens.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// A SYN and some retransmits fall within it, and its end is far from any of them: after 1, 2, 3
/// and 4 seconds since Linux 6.5 (`tcp_syn_linear_timeouts`), after 1, 3 and 7 before (RFC 6298).
pub const SEVERAL_SYNS: Duration = Duration::from_millis(3500);

static PORTREEVE: OnceLock<&str> = OnceLock::new();

/// Prepares a run of tests: the path of the `portreeve` to test, with `iptables-init` beside it, and descriptors for
/// thousands of sockets. To be called first.
pub fn set_up(portreeve: &'static str) {
    PORTREEVE.get_or_init(|| portreeve);
    raise_descriptor_limit();
}

/// The program under test.
fn portreeve() -> &'static str {
    PORTREEVE.get().expect("`testbed::set_up` comes first")
}

fn raise_descriptor_limit() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}
