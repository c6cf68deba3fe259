//! Applies every change of the cluster: first to the policy table, then to the flows that were
//! allowed, then to the nft sets, then to the flows that began before their pods were isolated.
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::bail;
use controller::{Batch, Index, Problem};
use tokio::sync::watch;
use tracing::{debug, error, info, warn};

use crate::enforcer::Enforcer;
use crate::node::conntrack;
use crate::node::occupancy::Vacancies;
use crate::node::pod_sets::{LocalPods, PodSets};
use crate::node::readiness::Readiness;
use crate::node::reconcile::Reconcile;

use super::source::Source;

/// The pause after an error of the kernel.
const RETRY: Duration = Duration::from_secs(1);

/// The parts to which a change is applied, in this order.
pub(super) struct Follower {
    pub(super) source: Source,
    pub(super) index: Index,
    pub(super) enforcer: Arc<Enforcer>,
    pub(super) pod_sets: PodSets,
    pub(super) readiness: Readiness,
    /// Addresses whose verdicts have changed since the kernel was last in sync.
    pub(super) touched: BTreeSet<IpAddr>,
    /// Pods that lost their interfaces before the API reports it.
    pub(super) vacancies: Vacancies,
    /// When the kernel's tables are to be filled again.
    pub(super) renewed: watch::Receiver<()>,
    /// Stops between two changes, before a handover.
    pub(super) stopped: watch::Receiver<bool>,
    pub(super) progress: Progress,
}

/// How far the kernel follows the table.
pub(super) struct Progress {
    /// Newly isolated addresses whose earlier flows are still to be evaluated.
    isolated: BTreeSet<IpAddr>,
    /// When the change came that is being applied.
    arrived: Instant,
    /// The table's generation at the last sync.
    generation: u64,
    /// Whether the last sync failed, or there was none.
    behind: bool,
}

impl Progress {
    /// Nothing is applied yet.
    pub(super) fn begin() -> Self {
        Self {
            isolated: BTreeSet::new(),
            arrived: Instant::now(),
            generation: 0,
            behind: true,
        }
    }
}

/// Logs new diagnostics of the cluster's objects.
pub(super) fn announce(before: &[Problem], now: &[Problem]) {
    let before: BTreeSet<&Problem> = before.iter().collect();
    for problem in now.iter().filter(|problem| !before.contains(problem)) {
        warn!("{problem}");
    }
}

/// Waits for a full state with this node's object, or for any full state if `--pod-cidr` is given; until then nothing
/// gets a verdict and no pod is non-isolated. Returns the addresses whose verdicts have changed.
///
/// # Errors
/// If the manifests do not have the node. With the API server this waits for it.
pub(super) async fn first_state(
    source: &mut Source,
    index: &mut Index,
    pods: &LocalPods,
    readiness: &Readiness,
    enforcer: &Enforcer,
) -> anyhow::Result<BTreeSet<IpAddr>> {
    let mut touched = BTreeSet::new();
    let mut said = false;
    loop {
        let batch: Batch = source.next().await;
        let before = enforcer.table.problems();
        touched.extend(index.apply(batch));
        let problems = enforcer.table.problems();
        announce(&before, &problems);
        source.report(&problems);
        if pods.are_known() {
            return Ok(touched);
        }
        let reason = format!(
            "the pod addresses of node {} are not known: there is no Node object of that name; name the node by --node, or give --pod-cidr",
            enforcer.node
        );
        if matches!(source, Source::Manifests { .. }) {
            bail!(reason);
        }
        if !said {
            warn!("{reason}");
            said = true;
        }
        readiness.not_ready(reason);
    }
}

impl Follower {
    fn apply(&mut self, batch: Batch) {
        let before = self.enforcer.table.problems();
        let touched = self.index.apply(batch);
        let problems = self.enforcer.table.problems();
        if !Arc::ptr_eq(&before, &problems) {
            announce(&before, &problems);
        }
        self.source.report(&problems);
        self.enforcer.evaluate_again(&touched);
        self.touched.extend(touched);
    }

    /// Severs the flows of pods that have lost their interfaces.
    fn vacate(&mut self) {
        let touched = self.vacancies.take();
        self.enforcer.evaluate_again(&touched);
        self.touched.extend(touched);
    }

    /// Measures from now on until the kernel is in sync; if it is behind, it has been measured since an earlier change.
    fn begin_change(&mut self) {
        if !self.progress.behind {
            self.progress.arrived = Instant::now();
        }
    }

    /// Reports that the table's state of the last sync is applied.
    fn applied(&mut self) {
        let generation = self.progress.generation;
        self.readiness.ready();
        self.enforcer.metrics.enforced(generation);
        self.enforcer
            .metrics
            .took_effect(self.progress.arrived.elapsed());
        if std::mem::take(&mut self.progress.behind) {
            info!(generation, "policy applied");
        } else {
            debug!(generation, "policy applied");
        }
    }
}

impl Reconcile for Follower {
    type Synced = Result<(), String>;

    /// Allowed flows are evaluated at once. Flows of newly isolated addresses are evaluated after the
    /// sets are in sync: from then on no more of them bypass the gate.
    fn sync(&mut self) -> Result<(), String> {
        self.progress.generation = self.enforcer.table.generation();
        let behind =
            |error| format!("kernel flows could not be evaluated again after a change: {error}");
        conntrack::evaluate_again(&self.enforcer, &self.touched).map_err(behind)?;
        let isolated = self
            .pod_sets
            .sync(&self.touched)
            .map_err(|error| format!("the nft sets are behind the policy table: {error}"))?;
        self.touched.clear();
        self.progress.isolated.extend(isolated);
        conntrack::evaluate_unmarked(&self.enforcer, &self.progress.isolated).map_err(behind)?;
        self.progress.isolated.clear();
        Ok(())
    }

    /// Ends when this daemon is stopped.
    async fn until_due(&mut self, synced: Self::Synced) -> ControlFlow<()> {
        match synced {
            Ok(()) => self.applied(),
            Err(reason) => {
                self.progress.behind = true;
                error!("{reason}");
                self.readiness.not_ready(reason);
            }
        }
        let mut stopped = self.stopped.clone();
        tokio::select! {
            _ = stopped.wait_for(|stopped| *stopped) => return ControlFlow::Break(()),
            batch = self.source.next() => {
                self.begin_change();
                self.apply(batch);
            }
            () = self.vacancies.changed() => {
                self.begin_change();
                self.vacate();
            }
            Ok(()) = self.renewed.changed(), if !self.progress.behind => {
                self.begin_change();
                self.pod_sets.forget();
            }
            () = tokio::time::sleep(RETRY), if self.progress.behind => {}
        }
        ControlFlow::Continue(())
    }
}
