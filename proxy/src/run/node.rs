//! Watches the node: what the kernel has to be told of it, and what others may do there that would let packets pass by
//! the redirect.
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use crate::bridges::Bridges;
use crate::links::PodLinks;
use crate::readiness::Readiness;
use crate::tables::Tables;

/// How often. Nobody tells of it, and it costs two calls.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Watches links, bridges, tables and others, each as a task without end.
pub(super) fn watch(
    tasks: &mut JoinSet<()>,
    readiness: &Readiness,
    (links, bridges, tables): (PodLinks, Bridges, Tables),
) {
    tasks.spawn(links.follow(tables.renewed()));
    tasks.spawn(bridges.watch(readiness.of_bridges(), tables.renewed()));
    tasks.spawn(tables.watch(readiness.of_tables()));
    tasks.spawn(watch_others(readiness.of_node()));
}

async fn watch_others(readiness: Readiness) {
    let mut every = tokio::time::interval(LOOK_EVERY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        let found = iptables_init::ipvs();
        readiness.found(found.map(|it| format!("{}; {}", it.problem, it.remedy)));
    }
}
