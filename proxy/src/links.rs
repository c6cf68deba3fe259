//! Tells the kernel which links pods hang on, as soon as a route to a pod comes or goes: what comes
//! in on one must come from an address that is routed to it. The table hears which addresses among
//! the pods' are the host's own.
//!
//! A pod's route is made before the pod runs, so its first packet finds the set filled.
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use controller::Table;
use ipnet::IpNet;
use iptables_init::links::{self, Links};
use iptables_init::sets;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tracing::warn;

use crate::sys;

/// Multicast groups of rtnetlink(7): links, IPv4 routes, IPv6 routes.
const ROUTES: u32 = 0x1 | 0x40 | 0x400;
/// Links, IPv4 addresses, IPv6 addresses.
const ADDRESSES: u32 = 0x1 | 0x10 | 0x100;
/// The first change is looked at at once, those that follow together after this.
const PAUSE: Duration = Duration::from_millis(100);
/// How soon what was refused is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// The sets of pods' links as the kernel has them.
pub(crate) struct PodLinks {
    table: Arc<Table>,
    node: Arc<str>,
    /// `--pod-cidr`; empty: the Node object's.
    pod_cidrs: Vec<IpNet>,
    changes: Changes,
    loaded: Option<Loaded>,
}

/// What was loaded, and for what.
#[derive(PartialEq)]
struct Loaded {
    pods: Vec<IpNet>,
    node: Vec<IpAddr>,
    links: Links,
}

/// Notices of links, and of routes or addresses, that come or go; what they say is not read.
pub(crate) struct Changes {
    notices: AsyncFd<OwnedFd>,
    everywhere: bool,
}

impl PodLinks {
    /// Fills the set for the first time, and hears of changes from then on.
    ///
    /// # Errors
    /// What `ip` or `nft` say.
    pub(crate) fn new(
        table: Arc<Table>,
        node: Arc<str>,
        pod_cidrs: Vec<IpNet>,
    ) -> anyhow::Result<Self> {
        let mut links = Self {
            table,
            node,
            pod_cidrs,
            changes: Changes::listen(ROUTES)
                .context("cannot hear of changes of routes (rtnetlink)")?,
            loaded: None,
        };
        links.sync(true)?;
        Ok(links)
    }

    /// Keeps the set in step without end; fills it again when the kernel's tables are `renewed`.
    pub(crate) async fn follow(mut self, mut renewed: watch::Receiver<()>) {
        let mut table = self.table.changed();
        let mut retry = false;
        loop {
            let routes = tokio::select! {
                () = tokio::time::sleep(RETRY), if retry => true,
                changed = self.changes.next() => changed.is_ok(),
                Ok(()) = renewed.changed() => {
                    self.loaded = None;
                    true
                }
                changed = table.changed() => match changed {
                    Ok(()) => false,
                    Err(_) => return,
                },
            };
            let step = tokio::task::spawn_blocking(move || {
                let refused = self.sync(routes || retry).err();
                (self, refused)
            });
            // If it panicked it took everything with it; the runtime has said where.
            let Ok((next, refused)) = step.await else {
                return;
            };
            self = next;
            retry = refused.is_some();
            if let Some(error) = refused {
                warn!("pods' links in the kernel are behind the routes: {error:#}");
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Looks at the routes if they have changed or others count now.
    fn sync(&mut self, routes_changed: bool) -> anyhow::Result<()> {
        let pods = match self.pod_cidrs.as_slice() {
            [] => self.table.node_pod_cidrs(&self.node),
            given => given.to_vec(),
        };
        let node = self.table.node_addresses(&self.node);
        let same = |loaded: &Loaded| loaded.pods == pods && loaded.node == node;
        if !routes_changed && self.loaded.as_ref().is_some_and(same) {
            return Ok(());
        }
        let links = links::of_pods(&pods, &node)?;
        let wanted = Loaded { pods, node, links };
        if self.loaded.as_ref().map(|loaded| &loaded.links) != Some(&wanted.links) {
            self.loaded = None;
            self.table.set_gateways(wanted.links.gateways.clone());
            sets::load(&sets::pod_links_script(&wanted.links))?;
        }
        self.loaded = Some(wanted);
        Ok(())
    }
}

impl Changes {
    /// Listens from now on for links and addresses; if `CAP_NET_BROADCAST` lets us, for those of pods
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

    /// Waits for a change, and takes all that there are.
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
