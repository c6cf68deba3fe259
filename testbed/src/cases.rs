//! The case files of the policy crate: their format, and the clusters that they describe.
mod case;
mod grid;
pub mod world;

pub use case::{Case, Family, Probe, Step};
pub use grid::Grid;
