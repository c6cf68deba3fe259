//! The kernel's side: how the daemon and the init step speak to netfilter, conntrack and rtnetlink, and what the
//! packet marks mean. Knows no policies.
pub mod command;
pub mod marks;
pub mod names;
pub mod netlink;
pub mod nf_tables;
pub mod sysctl;
