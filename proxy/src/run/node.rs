//! Watches what others may do on the node that would let packets pass by the redirect.
use std::time::Duration;

use tokio::time::MissedTickBehavior;
use tracing::error;

use crate::readiness::Readiness;

/// How often. Nobody tells of it, and it costs two calls.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Watches without end.
pub(super) async fn watch(readiness: Readiness) {
    let mut every = tokio::time::interval(LOOK_EVERY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = None;
    loop {
        every.tick().await;
        let found = iptables_init::ipvs();
        match &found {
            None => readiness.ready(),
            Some(finding) => {
                let reason = format!("{}; {}", finding.problem, finding.remedy);
                if found != last {
                    error!("{reason}");
                }
                readiness.not_ready(reason);
            }
        }
        last = found;
    }
}
