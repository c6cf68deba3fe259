//! Brings every change of the cluster into force: first the table, then relayed connections, then the
//! kernel's sets and what the kernel carries.
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use controller::{Batch, Index};
use tracing::{error, info, warn};

use crate::carried;
use crate::enforcer::Enforcer;
use crate::readiness::Readiness;
use crate::released::Released;

use super::source::Source;

/// How soon what the kernel refused is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// What a change passes through, in this order.
pub(super) struct Follower {
    pub(super) source: Source,
    pub(super) index: Index,
    pub(super) enforcer: Arc<Enforcer>,
    pub(super) released: Released,
    pub(super) readiness: Readiness,
    /// Addresses whose verdicts have changed since the kernel was last in step.
    pub(super) touched: BTreeSet<IpAddr>,
}

/// Says in the log which faults of the cluster's objects stand.
pub(super) fn announce(batch: &Batch) {
    for problem in batch.problems.iter() {
        warn!("{problem}");
    }
}

impl Follower {
    /// Follows the source without end; returns only if this daemon can no longer do so.
    pub(super) async fn follow(mut self) {
        let mut arrived = Instant::now();
        loop {
            let generation = self.enforcer.table.generation();
            let step = tokio::task::spawn_blocking(|| self.bring_kernel_in_step());
            // If it panicked it took everything with it; the runtime has said where.
            let Ok((next, refused)) = step.await else {
                return;
            };
            self = next;
            let batch = match refused {
                None => {
                    self.readiness.ready();
                    self.enforcer.metrics.enforced(generation);
                    self.enforcer.metrics.took_effect(arrived.elapsed());
                    info!(generation, "in force");
                    let batch = self.source.next().await;
                    arrived = Instant::now();
                    batch
                }
                Some(reason) => {
                    error!("{reason}");
                    self.readiness.not_ready(reason);
                    match tokio::time::timeout(RETRY, self.source.next()).await {
                        Ok(batch) => batch,
                        Err(_) => continue,
                    }
                }
            };
            self.apply(batch);
        }
    }

    fn apply(&mut self, batch: Batch) {
        if batch.problems != self.enforcer.table.problems() {
            announce(&batch);
        }
        let touched = self.index.apply(batch);
        self.source.tell(&self.enforcer.table.problems());
        self.enforcer.judge_again(&touched);
        self.touched.extend(touched);
    }

    /// Sets first: what is judged after them cannot be missed among what is carried. Returns why
    /// not, if the kernel refused.
    fn bring_kernel_in_step(mut self) -> (Self, Option<String>) {
        let refused = if let Err(error) = self.released.sync() {
            Some(format!("the kernel's sets are behind the table: {error}"))
        } else if let Err(error) = carried::judge_again(&self.enforcer, &self.touched) {
            Some(format!(
                "flows that the kernel carries could not be judged again: {error}"
            ))
        } else {
            self.touched.clear();
            None
        };
        (self, refused)
    }
}
