//! A cluster that was read once, for questions about it.
use policy::Cluster;

use crate::index::{apply_to, findings};
use crate::{Batch, Problem};

/// A cluster as its source describes it, with the problems found.
#[derive(Debug)]
pub struct Loaded {
    /// The cluster.
    pub cluster: Cluster,
    /// Duplicates, contested addresses and the like; from an API server also objects that cannot be
    /// taken as they are.
    pub problems: Vec<Problem>,
}

impl Loaded {
    /// The cluster of a first batch.
    pub(crate) fn of(full: Batch) -> Self {
        let mut cluster = Cluster::default();
        let _touched = apply_to(&mut cluster, full.events);
        let mut problems = full.problems.to_vec();
        problems.extend(findings(&cluster));
        Self { cluster, problems }
    }
}
