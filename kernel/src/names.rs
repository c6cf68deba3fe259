//! Names and numbers by which the kernel knows what is ours.
use std::ops::RangeInclusive;

/// Name of our tables.
pub const TABLE: &str = "portreeve";

/// The families of our tables.
pub const FAMILIES: [&str; 2] = ["inet", BRIDGE];

/// The family of the table for pods on Linux bridges.
pub const BRIDGE: &str = "bridge";

/// The family of that table, as a part that a kernel may lack.
pub const BRIDGE_FAMILY: &str = "nf_tables with the family bridge";

/// The kernel's option for it.
pub const BRIDGE_OPTION: &str = "CONFIG_NF_TABLES_BRIDGE";

/// Where distributions put netfilter modules that their small kernels lack.
pub const MODULE_PACKAGES: &str = "Ubuntu: linux-modules-extra-$(uname -r); Debian: linux-image-amd64 instead of the cloud kernel";

/// The source ports of upstream connections. By them, an error that this host itself sends is
/// distinguished from one for the pod.
pub const UPSTREAM_PORTS: RangeInclusive<u16> = 2048..=29999;

/// Those of connections to pods of this node.
pub const LOCAL_PORTS: RangeInclusive<u16> = 2048..=15999;
/// Those of connections that leave the node.
pub const REMOTE_PORTS: RangeInclusive<u16> = 16000..=29999;
const _: () = assert!(
    *LOCAL_PORTS.start() == *UPSTREAM_PORTS.start() && *REMOTE_PORTS.end() == *UPSTREAM_PORTS.end(),
    "the rules know all of them"
);
