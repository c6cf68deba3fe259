//! Names and numbers by which the kernel knows what is ours.
use std::ops::RangeInclusive;

/// Name of our tables.
pub const TABLE: &str = "portreeve";

/// The families of our tables.
pub const FAMILIES: [&str; 2] = ["inet", BRIDGE];

/// The family of the table for pods on Linux bridges.
pub const BRIDGE: &str = "bridge";

/// The source ports that upstream connections have. By them an error that this host itself sends is
/// told from one for the pod.
pub const UPSTREAM_PORTS: RangeInclusive<u16> = 2048..=29999;
