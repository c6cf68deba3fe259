//! Keeps the nft set of pod interfaces in sync with the routes to pods: a packet that arrives on such
//! an interface must have a source address that is routed to it. Reports to the policy table which of
//! the pods' addresses are the host's own, and which pods have lost their interfaces. An isolated pod
//! without such an interface makes the node not ready.
//!
//! A pod's route is made before the pod runs, so its first packet finds the set filled.
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::Context;
use controller::LocalPod;
use ipnet::IpNet;
use kernel::pod_links::{self, Links};
use kernel::sets;
use kernel::sys;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::time::sleep_until;
use tracing::warn;

use super::occupancy::{self, Looker, Occupancy, Seen, Vacancies};
use super::pod_sets::{LocalPods, outside};
use super::readiness::Readiness;
use super::reconcile::{Reconcile, reconcile};

/// Multicast groups of rtnetlink(7): links, IPv4 routes, IPv6 routes.
const ROUTES: u32 = 0x1 | 0x40 | 0x400;
/// Links, IPv4 addresses, IPv6 addresses.
const ADDRESSES: u32 = 0x1 | 0x10 | 0x100;
/// The first change is looked at at once, those that follow together after this.
const PAUSE: Duration = Duration::from_millis(100);
/// The pause after an error of `nft`.
const RETRY: Duration = Duration::from_secs(1);

/// How long an isolated pod may have no interface before it is reported: routes and API change at different times.
const SETTLED: Duration = Duration::from_secs(2);

/// The nft sets of pod interfaces.
pub(crate) struct PodLinks {
    pods: LocalPods,
    vacancies: Vacancies,
    changes: Changes,
    loaded: Option<Loaded>,
    occupancy: Occupancy,
    /// When to look again even if nothing changes.
    again: Option<Instant>,
    /// Since when each of these addresses has had no link.
    unreached: BTreeMap<IpAddr, Instant>,
}

/// The loaded sets and their inputs.
#[derive(PartialEq)]
struct Loaded {
    pods: Vec<IpNet>,
    node: Vec<IpAddr>,
    links: Links,
}

/// Notifications of changed interfaces, routes or addresses; their contents are not read.
pub(crate) struct Changes {
    notices: AsyncFd<OwnedFd>,
    everywhere: bool,
}

impl PodLinks {
    /// Fills the set for the first time, and receives changes from then on. `heard` says whether the API's state is up
    /// to date.
    ///
    /// # Errors
    /// The errors of `ip` or `nft`.
    pub(crate) fn new(pods: LocalPods, vacancies: Vacancies, heard: bool) -> anyhow::Result<Self> {
        let mut links = Self {
            pods,
            vacancies,
            changes: Changes::listen(ROUTES)
                .context("cannot subscribe to route changes (rtnetlink)")?,
            loaded: None,
            occupancy: Occupancy::resumed(pod_links::sources_before()?),
            again: None,
            unreached: BTreeMap::new(),
        };
        links.sync(true, heard)?;
        Ok(links)
    }

    /// Keeps the set in sync forever; fills it again when the nft tables are `renewed`.
    pub(crate) async fn follow(self, readiness: Readiness, renewed: watch::Receiver<()>) {
        let followed = Followed {
            table: self.pods.changed(),
            links: self,
            readiness: readiness.clone(),
            renewed,
            routes_changed: false,
        };
        reconcile(followed, readiness, "watches the interfaces of pods").await;
    }

    /// Reads the routes if they have changed, or if the pods have.
    fn sync(&mut self, routes_changed: bool, heard: bool) -> anyhow::Result<()> {
        let local = self.pods.pods();
        let pods = self.pods.networks(&local);
        let node = self.pods.node_addresses();
        let same = |loaded: &Loaded| loaded.pods == pods && loaded.node == node;
        let others = self.occupancy.are_other(&local);
        let now = Instant::now();
        if !routes_changed
            && !others
            && let Some(loaded) = self.loaded.take_if(|loaded| same(loaded))
        {
            self.note_unreached(&local, &loaded.links, now);
            self.loaded = Some(loaded);
            return Ok(());
        }
        let links = pod_links::of_pods(&pods, &node)?;
        self.compare(&local, &links, heard, now);
        self.note_unreached(&local, &links, now);
        let wanted = Loaded { pods, node, links };
        if self.loaded.as_ref().map(|loaded| &loaded.links) != Some(&wanted.links) {
            self.loaded = None;
            let table = self.pods.table();
            table.set_gateways(wanted.links.gateways.clone());
            sets::load(&sets::pod_links_script(&wanted.links))?;
        }
        self.loaded = Some(wanted);
        Ok(())
    }

    /// Finds the pods that have left their addresses, and addresses that have a link but no known pod.
    fn compare(&mut self, local: &[LocalPod], links: &Links, heard: bool, now: Instant) {
        let at = links
            .link_sources
            .iter()
            .map(|(index, address)| (*address, *index));
        let seen = Seen {
            at: at.collect(),
            exists: &occupancy::exists,
            heard,
            ending: &|pod| self.pods.is_ending(pod),
        };
        let look = self.occupancy.look(local, &seen, now);
        self.again = look.again;
        self.vacancies.left(Looker::Routes, look.vacant);
        let come = !links.others.is_empty() && self.pods.are_elsewhere();
        self.vacancies.awaited(if come {
            links.others.clone()
        } else {
            BTreeSet::new()
        });
    }

    /// Notes the isolated pods outside of the CIDRs whose packets bypass the rules.
    fn note_unreached(&mut self, local: &[LocalPod], links: &Links, now: Instant) {
        let outside = outside(&self.pods.cidrs(), local.iter().map(|pod| pod.address));
        let unseen = local.iter().filter(|pod| {
            (pod.egress_isolated || pod.ingress_isolated)
                && !pod.vacant
                && outside.contains(&pod.address)
                && (links.own.contains(&pod.address) || !links.reached.contains(&pod.address))
        });
        let since = |address| *self.unreached.get(&address).unwrap_or(&now);
        self.unreached = unseen
            .map(|pod| (pod.address, since(pod.address)))
            .collect();
        let due = self.unreached.values().map(|since| *since + SETTLED);
        let due = due.filter(|due| *due > now);
        self.again = self.again.into_iter().chain(due).min();
    }

    /// Why policies cannot be enforced on a pod of this node, if there is one.
    fn unpoliced(&self, now: Instant) -> Option<String> {
        let settled = self
            .unreached
            .iter()
            .find(|(_, since)| now >= **since + SETTLED);
        let (address, _) = settled?;
        let local = self.pods.pods();
        let pod = &local
            .iter()
            .find(|pod| pod.address == *address)?
            .identity
            .key;
        let own = self
            .loaded
            .as_ref()
            .is_some_and(|it| it.links.own.contains(address));
        Some(if own {
            format!(
                "policies select pod {pod}, but its address {address} is this node's own address, so its packets cannot be distinguished from the node's; give the pod an address of its own, or set spec.hostNetwork and do not count on policies for it"
            )
        } else {
            format!(
                "policies select pod {pod}, but no route of this node leads to its address {address} through an interface of its own, so its packets bypass the rules; use a network plugin that routes pods through the node (not macvlan, ipvlan or SR-IOV), or correct status.podIPs"
            )
        })
    }
}

/// The set with the notifications of its sources.
struct Followed {
    links: PodLinks,
    table: watch::Receiver<u64>,
    renewed: watch::Receiver<()>,
    readiness: Readiness,
    /// Whether the routes must be read even if the pods are the same.
    routes_changed: bool,
}

impl Reconcile for Followed {
    type Synced = anyhow::Result<()>;

    fn sync(&mut self) -> Self::Synced {
        let heard = self.readiness.is_heard();
        self.links.sync(self.routes_changed, heard)
    }

    async fn until_due(&mut self, synced: Self::Synced) -> ControlFlow<()> {
        let retry = synced.is_err();
        match synced {
            Err(error) => warn!("failed to update the nft set pod_links; retrying: {error:#}"),
            Ok(()) => self.readiness.found(self.links.unpoliced(Instant::now())),
        }
        tokio::time::sleep(PAUSE).await;
        let due = self.links.again;
        let routes_changed = tokio::select! {
            () = tokio::time::sleep(RETRY), if retry => true,
            () = sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => true,
            changed = self.links.changes.next() => changed.is_ok(),
            Ok(()) = self.renewed.changed() => {
                self.links.loaded = None;
                true
            }
            changed = self.table.changed() => match changed {
                Ok(()) => false,
                Err(_) => return ControlFlow::Break(()),
            },
        };
        self.routes_changed = routes_changed || retry;
        ControlFlow::Continue(())
    }
}

impl Changes {
    /// Listens for changed interfaces and addresses; with `CAP_NET_BROADCAST`, for those of pods
    /// too.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn of_addresses() -> io::Result<Self> {
        let mut changes = Self::listen(ADDRESSES)?;
        changes.everywhere = sys::listen_everywhere(&changes.notices).is_ok();
        Ok(changes)
    }

    /// Whether they come from pods' network namespaces too.
    pub(crate) fn are_from_everywhere(&self) -> bool {
        self.everywhere
    }

    fn listen(groups: u32) -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkRoute,
        )?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        Ok(Self {
            notices: sys::watch(fd)?,
            everywhere: false,
        })
    }

    /// Waits for a change, and reads all pending ones.
    pub(crate) async fn next(&self) -> io::Result<()> {
        let mut ready = self.notices.readable().await?;
        let mut buffer = [0; 4096];
        loop {
            match recv(self.notices.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                // Some were lost: there were changes.
                Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    ready.clear_ready();
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}
