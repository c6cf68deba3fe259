//! Watches the node: interfaces and bridges for the nft sets, and changes by others that would let packets bypass
//! the redirect.
pub(crate) mod bridges;
pub(crate) mod conntrack;
pub(crate) mod occupancy;
pub(crate) mod pod_links;
pub(crate) mod pod_sets;
pub(crate) mod readiness;
pub(crate) mod reconcile;
pub(crate) mod redirect;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use crate::enforcer::Enforcer;

use bridges::Bridges;
use pod_links::PodLinks;
use readiness::Readiness;
use redirect::Redirect;

/// How often. There is no notification, and it costs two calls.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Watches links, bridges, the redirect and others, each in an endless task. Returns a receiver that is notified
/// when the kernel's sets have to be filled again.
pub(crate) fn watch(
    tasks: &mut JoinSet<()>,
    readiness: &Readiness,
    enforcer: &Arc<Enforcer>,
    (links, bridges, redirect): (PodLinks, Bridges, Redirect),
) -> watch::Receiver<()> {
    let renewed = redirect.renewed();
    tasks.spawn(links.follow(readiness.of_links(), redirect.renewed()));
    tasks.spawn(bridges.watch(readiness.of_bridges(), redirect.renewed()));
    let enforcer = Arc::clone(enforcer);
    tasks.spawn(redirect.watch(readiness.of_redirect(), enforcer));
    tasks.spawn(watch_others(readiness.of_node()));
    renewed
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
