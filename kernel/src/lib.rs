//! The kernel's side: how the daemon and the init step speak to netfilter, conntrack and rtnetlink, and what the
//! packet marks mean. Knows no policies.
pub mod bridge_addresses;
pub mod bridges;
pub mod checksum;
pub mod command;
pub mod conntrack;
pub mod counters;
pub mod elements;
pub mod marks;
pub mod names;
pub mod netlink;
pub mod nf_tables;
pub mod nfqueue;
pub mod pod_links;
pub mod sets;
pub mod sys;
pub mod sysctl;
pub mod veth_peers;
