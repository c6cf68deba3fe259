//! Keeps the nft table for bridges in sync with the node's interfaces: which are ports of bridges
//! that pods are attached to. Reports what makes pods on a bridge unreachable.
//!
//! Packets of an unknown port are dropped, so a late update opens nothing. Knows no pods, only
//! their networks.
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use controller::LocalPod;
use ipnet::IpNet;
use iptables_init::ruleset::Kernel;
use kernel::bridge_addresses::{self, Owners};
use kernel::bridges::{self, Bridge, BridgeError};
use kernel::command::CommandError;
use kernel::sets::{self, SetsError};
use kernel::veth_peers;
use tokio::sync::watch;
use tokio::time::{Interval, MissedTickBehavior, sleep_until};
use tracing::info;

use super::occupancy::{self, Looker, Occupancy, Vacancies};
use super::pod_links::Changes;
use super::pod_sets::LocalPods;
use super::readiness::Readiness;
use super::reconcile::{Reconcile, reconcile};

/// How often sysctls are read; there is no notification of their changes.
const READ_EVERY: Duration = Duration::from_secs(2);
/// The first change is looked at at once, those that follow together after this.
const PAUSE: Duration = Duration::from_millis(100);
/// How long after a change the pods' addresses are read along with the sysctls: pods get their
/// addresses after their interfaces, and the daemon may not be notified.
const UNSETTLED: Duration = Duration::from_secs(10);
/// How often they are read if nothing has changed. It takes the kernel some 50 microseconds per pod.
const ASK_EVERY: Duration = Duration::from_secs(30);

/// The node's bridges as last seen.
pub(crate) struct Bridges {
    names: Vec<String>,
    pods: LocalPods,
    vacancies: Vacancies,
    kernel: Kernel,
    changes: Changes,
    seen: Seen,
    occupancy: Occupancy,
}

/// The known state of the node and the kernel.
#[derive(Default)]
struct Seen {
    cidrs: Vec<IpNet>,
    /// `None`: to be looked for again.
    bridges: Option<Vec<Bridge>>,
    /// Whether the cluster's state is up to date.
    heard: bool,
    /// When a pod's new port can be confirmed.
    again: Option<Instant>,
    asked: Asked,
    owners: Owners,
    /// The last script that was loaded into the nft table.
    loaded: Option<String>,
    /// Bridges whose sysctls were switched off; if other software switches them on again, this is
    /// reported, not undone.
    prepared: BTreeSet<String>,
}

/// When the pods' addresses were last read.
#[derive(Default)]
struct Asked {
    /// When something changed.
    changed: Option<Instant>,
    /// When the kernel was last in sync with them; `None`: it is not.
    in_step: Option<Instant>,
}

/// Why policies on a bridge cannot be enforced, or why its pods are unreachable.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("cannot list the node's bridges: {0}")]
    Find(#[from] CommandError),
    #[error(transparent)]
    Bridge(#[from] BridgeError),
    #[error(
        "cannot read the addresses of pods at bridge ports ({0}); this needs CAP_NET_ADMIN and Linux 4.20"
    )]
    Ends(#[source] io::Error),
    #[error("cannot load the bridge ports into the nft table: {0}")]
    Ports(#[from] SetsError),
    #[error(
        "sysctl {sysctl} was set to 1, so connections of isolated pods on bridge {bridge} time out; set it to 0 (`sysctl -w {sysctl}=0`), and find out who sets it"
    )]
    SwitchedOn { sysctl: String, bridge: String },
    #[error(
        "bridge {0} itself looks into IP packets, so connections of isolated pods on it time out; run `ip link set {0} type bridge nf_call_iptables 0 nf_call_ip6tables 0`"
    )]
    LooksIntoIp(String),
}

impl Bridges {
    /// Watches the bridges in `names`, and those that overlap with the pods' networks.
    ///
    /// # Errors
    /// If the kernel cannot notify of changes, or `nft` cannot list what the previous daemon knew.
    pub(crate) fn new(
        names: &[String],
        pods: LocalPods,
        vacancies: Vacancies,
        kernel: Kernel,
    ) -> anyhow::Result<Self> {
        let before = match kernel.bridges {
            true => bridge_addresses::ports_before()?,
            false => BTreeMap::new(),
        };
        Ok(Self {
            names: names.to_vec(),
            pods,
            vacancies,
            kernel,
            changes: Changes::of_addresses()?,
            seen: Seen::default(),
            occupancy: Occupancy::resumed(before),
        })
    }

    /// Watches forever; fills the nft tables again when they are `renewed`.
    pub(crate) async fn watch(mut self, readiness: Readiness, renewed: watch::Receiver<()>) {
        let mut every = tokio::time::interval(READ_EVERY);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.seen.asked.again(Instant::now());
        let watched = Watched {
            table: self.pods.changed(),
            bridges: self,
            every,
            renewed,
            readiness: readiness.clone(),
        };
        reconcile(watched, readiness, "watches the node's bridges").await;
    }

    fn look(&mut self) -> Result<(), Fault> {
        let pods = self.pods.pods();
        let cidrs = self.pods.networks(&pods);
        // A deleted Node object removes no bridge.
        if !cidrs.is_empty() && self.seen.cidrs != cidrs {
            self.seen.bridges = None;
            self.seen.cidrs = cidrs;
            self.seen.asked.again(Instant::now());
        }
        let found = match self.seen.bridges.take() {
            Some(bridges) => bridges,
            None => bridges::find(&self.names, &self.seen.cidrs)?,
        };
        self.bring_in_step(&found, &pods)?;
        self.seen.bridges = Some(found);
        Ok(())
    }

    /// Until it succeeds, everything is read again.
    fn bring_in_step(&mut self, found: &[Bridge], pods: &[LocalPod]) -> Result<(), Fault> {
        if !self.kernel.bridges {
            return if found.is_empty() {
                Ok(())
            } else {
                Err(BridgeError::NoFamily.into())
            };
        }
        let names: BTreeSet<_> = found.iter().map(|bridge| bridge.name.clone()).collect();
        if !names.is_subset(&self.seen.prepared) {
            info!(bridges = ?names, "pods are attached to bridges");
            if !self.changes.are_from_everywhere() {
                info!(
                    "without CAP_NET_BROADCAST a pod's new address may be recognized two seconds late"
                );
            }
            bridges::switch_off()?;
            for bridge in found.iter().filter(|bridge| bridge.learns_unseen) {
                bridges::keep_from_learning(bridge)?;
            }
        }
        self.seen.prepared = names;
        self.ask(found, pods)?;
        let Some(bridge) = found.first() else {
            return Ok(());
        };
        if let Some(sysctl) = bridges::switched_on().pop() {
            let bridge = bridge.name.clone();
            return Err(Fault::SwitchedOn { sysctl, bridge });
        }
        match found.iter().find(|bridge| bridge.looks_into_ip) {
            Some(bridge) => Err(Fault::LooksIntoIp(bridge.name.clone())),
            None => Ok(()),
        }
    }

    /// Reads the pods' addresses, if that is due, and loads them into the nft table.
    fn ask(&mut self, found: &[Bridge], pods: &[LocalPod]) -> Result<(), Fault> {
        let now = Instant::now();
        if !self.seen.asked.is_due(now) {
            return Ok(());
        }
        // Until the kernel has said yes we know nothing.
        self.seen.asked.in_step = None;
        let ends = veth_peers::of(found).map_err(Fault::Ends)?;
        self.seen.owners = self.seen.owners.now(found, &ends);
        self.compare(found, pods, now);
        let script = bridges::ports_script(found) + &self.seen.owners.script();
        if self.seen.loaded.take().as_ref() != Some(&script) {
            sets::load(&script)?;
        }
        self.seen.loaded = Some(script);
        self.seen.asked.in_step = Some(now);
        Ok(())
    }
}

impl Bridges {
    /// Finds the pods that have left their ports.
    fn compare(&mut self, found: &[Bridge], pods: &[LocalPod], now: Instant) {
        let ports = found.iter().flat_map(|bridge| &bridge.ports);
        let ports: BTreeMap<&str, u32> = ports.map(|port| (&*port.name, port.index)).collect();
        let owners = self.seen.owners.ports();
        let at = owners.filter_map(|(address, port)| Some((address, *ports.get(port)?)));
        let seen = occupancy::Seen {
            at: at.collect(),
            exists: &occupancy::exists,
            heard: self.seen.heard,
            ending: &|pod| self.pods.is_ending(pod),
        };
        let look = self.occupancy.look(pods, &seen, now);
        self.seen.again = look.again;
        self.vacancies.left(Looker::Bridges, look.vacant);
    }
}

/// The bridges with the notifications of their sources.
struct Watched {
    bridges: Bridges,
    every: Interval,
    table: watch::Receiver<u64>,
    renewed: watch::Receiver<()>,
    readiness: Readiness,
}

impl Reconcile for Watched {
    type Synced = Result<(), Fault>;

    fn sync(&mut self) -> Self::Synced {
        self.bridges.seen.heard = self.readiness.is_heard();
        self.bridges.look()
    }

    async fn until_due(&mut self, synced: Self::Synced) -> ControlFlow<()> {
        self.readiness
            .found(synced.err().map(|fault| fault.to_string()));
        tokio::time::sleep(PAUSE).await;
        let Bridges {
            seen,
            changes,
            occupancy,
            pods,
            ..
        } = &mut self.bridges;
        loop {
            let due = seen.again;
            tokio::select! {
                _ = self.every.tick() => break,
                () = sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => {}
                _ = changes.next() => seen.bridges = None,
                Ok(()) = self.renewed.changed() => seen.loaded = None,
                Ok(()) = self.table.changed() => {
                    if !occupancy.are_other(&pods.pods()) {
                        continue;
                    }
                }
            }
            seen.asked.again(Instant::now());
            break;
        }
        ControlFlow::Continue(())
    }
}

impl Asked {
    /// Something has changed.
    fn again(&mut self, now: Instant) {
        *self = Self {
            changed: Some(now),
            in_step: None,
        };
    }

    fn is_due(&self, now: Instant) -> bool {
        let within = |since: Option<Instant>, time| since.is_some_and(|since| now < since + time);
        within(self.changed, UNSETTLED) || !within(self.in_step, ASK_EVERY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pod_addresses_are_polled_often_after_a_change() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut asked = Asked::default();
        assert!(asked.is_due(start), "never asked");
        asked.again(start);
        for (second, due, why) in [
            (0, true, "a change"),
            (2, true, "its addresses may come now"),
            (8, true, "or now"),
            (10, false, "settled"),
            (28, false, "asked at 8"),
            (38, true, "long ago"),
            (40, false, "asked just now"),
        ] {
            assert_eq!(asked.is_due(at(second)), due, "{why}");
            if due {
                asked.in_step = Some(at(second));
            }
        }
        asked.in_step = None;
        assert!(asked.is_due(at(41)), "the kernel refused it");
    }
}
