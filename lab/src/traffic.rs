//! Traffic between hosts, and what they observe of it.
//!
//! Sockets are made inside a host's namespace and used from anywhere. The outcome of a dial keeps
//! what the kernel said, so that dropped, refused and unreachable stay apart.

pub mod bulk;
pub mod capture;
pub mod craft;
mod dial;
mod inject;
pub mod sctp;
pub(crate) mod server;
pub(crate) mod udp;

pub use capture::{Capture, Flags, Packet, Way};
pub use dial::{Dial, Greeting, Kind, Outcome, connect_all, greeting};
pub use inject::Injector;
pub use server::{Serve, Server, introduce};
pub use udp::UdpOutcome;
