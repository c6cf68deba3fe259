//! The published table: which pod has an address, and whether two may connect. Read on the packet path.
//!
//! A verdict reads several entries, which must belong together; a map alone cannot promise that. So
//! a sequence number belongs to the map, odd while entries are being swapped: a reader that saw an
//! odd or a changed number reads again. Writing is map operations only; everything is built before.
//! No guard of the map leaves this module. Knows nothing of sources, files or Kubernetes objects.
mod cluster_networks;
mod holder;
mod policies;
mod uncertain;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::thread;

use dashmap::DashMap;
use ipnet::IpNet;
use parking_lot::{Mutex, MutexGuard, RwLock};
use policy::{Cluster, Direction, Endpoint, Identity, OwnNode, Party, PodKey, Protocol, Touched};
use tokio::sync::watch;

use crate::Problem;
use crate::decision::{Decision, Unknown};
use cluster_networks::ClusterNetworks;
pub use holder::Holder;
pub use policies::PolicyInfo;
pub use uncertain::UncertainAddresses;

/// Lists of rules and entries that one change merges, about 5 ms; a single pod's may exceed it, up
/// to the budget of its namespace.
const MERGED_AT_ONCE: usize = 100_000;

/// The operator's settings of the table.
#[derive(Clone, Debug, Default)]
pub struct TableSettings {
    /// The networks of all pods (`--cluster-cidr`); empty: the pod CIDRs of all nodes.
    pub cluster_cidrs: Vec<IpNet>,
    /// Whether a pod's traffic to its own node needs a verdict (`--own-node`).
    pub own_node: OwnNode,
    /// The node that is enforced on (`--node`).
    pub node: String,
}

/// An address of a pod on some node, for the kernel's sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPod {
    /// The address.
    pub address: IpAddr,
    /// Whether connections to it need a verdict.
    pub ingress_isolated: bool,
    /// Whether connections from it need a verdict.
    pub egress_isolated: bool,
    /// The pod.
    pub identity: Arc<Identity>,
    /// Whether the pod has left its link, see [`UncertainAddresses::vacant`].
    pub vacant: bool,
}

/// The cluster as the packet path sees it. Written by one [`Index`](crate::Index), read by anyone.
#[derive(Debug)]
pub struct Table {
    settings: TableSettings,
    map: DashMap<IpAddr, Arc<Endpoint>, ahash::RandomState>,
    cluster_networks: RwLock<Arc<ClusterNetworks>>,
    gateways: RwLock<Arc<BTreeSet<IpAddr>>>,
    uncertain: RwLock<Arc<UncertainAddresses>>,
    /// Twice the generation; one more while the next one is being swapped in.
    sequence: AtomicU64,
    generation: watch::Sender<u64>,
    problems: RwLock<Arc<Vec<Problem>>>,
    /// Held for the whole of a batch, publishing included: its holder sees the published state.
    cluster: Mutex<Cluster>,
}

impl Table {
    /// An empty table, of generation 0.
    #[must_use]
    pub fn new(settings: TableSettings) -> Arc<Self> {
        let cluster_networks = ClusterNetworks::new(&settings, &Cluster::default());
        Arc::new(Self {
            settings,
            map: DashMap::default(),
            cluster_networks: RwLock::new(Arc::new(cluster_networks)),
            gateways: RwLock::default(),
            uncertain: RwLock::default(),
            sequence: AtomicU64::new(0),
            generation: watch::Sender::new(0),
            problems: RwLock::default(),
            cluster: Mutex::default(),
        })
    }

    /// Whether `from` may open a connection to `port` of `to`. Both ends are read from one generation.
    ///
    /// The addresses are those of the packet after DNAT, IPv4-mapped ones unmapped; `port` is
    /// `None` for protocols without ports.
    ///
    /// # Errors
    /// If an end is not known yet; if neither is, the source is named. Decide again when the table
    /// has [`changed`](Self::changed).
    pub fn decide(
        &self,
        from: IpAddr,
        to: IpAddr,
        port: Option<u16>,
        protocol: Protocol,
    ) -> Result<Decision, Unknown> {
        let (source, destination) = self.consistent(|| {
            let ends = (self.get(from), self.get(to));
            let unexplained = match ends {
                (Some(_), Some(_)) => None,
                _ => {
                    let cluster_networks = self.cluster_networks.read();
                    let bare = [(from, &ends.0), (to, &ends.1)].into_iter();
                    bare.filter(|(_, end)| end.is_none())
                        .map(|(address, _)| address)
                        .find(|address| {
                            cluster_networks.is_unexplained(*address)
                                && !self.gateways.read().contains(address)
                                || self.uncertain.read().holds(*address)
                        })
                }
            };
            unexplained.map_or(Ok(ends), |address| Err(Unknown(address)))
        })?;
        let party = |address, endpoint| Party { address, endpoint };
        Ok(Decision {
            verdict: policy::decide(
                party(from, source.as_deref()),
                party(to, destination.as_deref()),
                port,
                protocol,
                self.settings.own_node,
            ),
            from: source,
            to: destination,
        })
    }

    /// The pod that owns `address` now; none for hostNetwork and finished pods.
    #[must_use]
    pub fn endpoint(&self, address: IpAddr) -> Option<Arc<Endpoint>> {
        self.consistent(|| self.get(address))
    }

    /// How many pod addresses the table holds, and how many policies are in force.
    #[must_use]
    pub fn size(&self) -> (usize, usize) {
        (self.map.len(), self.cluster().policies().len())
    }

    /// How many policies are refused because they exceed the budgets of their namespaces, and how
    /// many are the first one too many for a pod.
    #[must_use]
    pub fn refused(&self) -> usize {
        let cluster = self.cluster();
        cluster.refused().len() + cluster.surplus().count()
    }

    /// How many batches have been applied; 0 before the first.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.sequence.load(Ordering::Acquire) / 2
    }

    /// Follows the generation: a new value arrives after its entries can be read.
    #[must_use]
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// The pod addresses of `node`, sorted; each once, also if contested.
    #[must_use]
    pub fn local(&self, node: &str) -> Vec<LocalPod> {
        let cluster = self.cluster();
        let uncertain = self.uncertain();
        let mut local = BTreeMap::new();
        for (address, endpoint) in cluster.endpoints_on(node) {
            local.entry(address).or_insert_with(|| LocalPod {
                address,
                ingress_isolated: endpoint.isolated(Direction::Ingress),
                egress_isolated: endpoint.isolated(Direction::Egress),
                identity: Arc::clone(&endpoint.identity),
                vacant: uncertain.has_left(address, endpoint),
            });
        }
        local.into_values().collect()
    }

    /// The pod CIDRs of `node`'s Node object; none if there is no such node.
    #[must_use]
    pub fn node_pod_cidrs(&self, node: &str) -> Vec<IpNet> {
        let cluster = self.cluster();
        let found = cluster.node(node);
        found.map(|node| node.pod_cidrs.clone()).unwrap_or_default()
    }

    /// The networks of all pods: as few CIDRs as possible, in no order.
    #[must_use]
    pub fn cluster_cidrs(&self) -> Arc<[IpNet]> {
        self.cluster_networks.read().cidrs()
    }

    /// The pod of this key, whatever its state.
    #[must_use]
    pub fn pod(&self, key: &PodKey) -> Option<policy::Pod> {
        self.cluster().pod(key).cloned()
    }

    /// Whether there is a Node object of that name.
    #[must_use]
    pub fn has_node(&self, node: &str) -> bool {
        self.cluster().node(node).is_some()
    }

    /// The addresses whose holder is uncertain.
    #[must_use]
    pub fn uncertain(&self) -> Arc<UncertainAddresses> {
        Arc::clone(&self.uncertain.read())
    }

    /// The node's addresses (`status.addresses`); none if there is no such node.
    #[must_use]
    pub fn node_addresses(&self, node: &str) -> Vec<IpAddr> {
        let cluster = self.cluster();
        let found = cluster.node(node);
        found.map(|node| node.addresses.clone()).unwrap_or_default()
    }

    /// Calls `look` with the cluster of the published table. Changes wait meanwhile.
    pub fn with_cluster<T>(&self, look: impl FnOnce(&Cluster) -> T) -> T {
        look(&self.cluster())
    }

    /// The settings of the table.
    #[must_use]
    pub fn settings(&self) -> &TableSettings {
        &self.settings
    }

    /// All present problems.
    #[must_use]
    pub fn problems(&self) -> Arc<Vec<Problem>> {
        Arc::clone(&self.problems.read())
    }

    /// The cluster that is published; the index alone writes to it.
    pub(crate) fn cluster(&self) -> MutexGuard<'_, Cluster> {
        self.cluster.lock()
    }

    /// Sets which addresses in the cluster's CIDRs belong to this host, and so to no pod.
    pub fn set_gateways(&self, gateways: BTreeSet<IpAddr>) {
        *self.gateways.write() = Arc::new(gateways);
    }

    pub(crate) fn set_problems(&self, problems: Vec<Problem>) {
        *self.problems.write() = Arc::new(problems);
    }

    /// Sets the addresses whose holder is uncertain, as one generation, and returns those that this changes.
    pub fn set_uncertain(&self, uncertain: UncertainAddresses) -> BTreeSet<IpAddr> {
        let cluster = self.cluster();
        let touched = self.uncertain().difference(&uncertain);
        if !touched.is_empty() {
            self.swap(&cluster, &touched, None, Some(Arc::new(uncertain)));
        }
        touched
    }

    /// Swaps in what `cluster` has at the touched addresses, and its nodes if they changed, as one
    /// generation. Only the holder of the cluster's lock may call this.
    pub(crate) fn publish(&self, cluster: &Cluster, touched: &Touched, nodes: bool) {
        let cluster_networks =
            nodes.then(|| Arc::new(ClusterNetworks::new(&self.settings, cluster)));
        self.swap(cluster, &touched.addresses, cluster_networks, None);
    }

    fn swap(
        &self,
        cluster: &Cluster,
        touched: &BTreeSet<IpAddr>,
        cluster_networks: Option<Arc<ClusterNetworks>>,
        uncertain: Option<Arc<UncertainAddresses>>,
    ) {
        let first = self.generation() == 0;
        cluster.prepare(touched, if first { usize::MAX } else { MERGED_AT_ONCE });
        let now = uncertain.clone().unwrap_or_else(|| self.uncertain());
        let changes: Vec<(IpAddr, Option<Arc<Endpoint>>)> = touched
            .iter()
            .map(|&address| {
                let is_a_nodes = cluster.is_a_nodes_for(&self.settings.node, address);
                let endpoint = (!is_a_nodes).then(|| cluster.endpoint(address)).flatten();
                (address, now.shown(address, endpoint))
            })
            .collect();

        // What is replaced is freed after the swap: readers wait while the sequence is odd.
        let mut replaced = Vec::with_capacity(changes.len());

        let before = self.sequence.fetch_add(1, Ordering::AcqRel);
        fence(Ordering::Release);
        for (address, endpoint) in changes {
            replaced.push(match endpoint {
                Some(endpoint) => self.map.insert(address, endpoint),
                None => self.map.remove(&address).map(|(_, endpoint)| endpoint),
            });
        }
        if let Some(cluster_networks) = cluster_networks {
            *self.cluster_networks.write() = cluster_networks;
        }
        if let Some(uncertain) = uncertain {
            *self.uncertain.write() = uncertain;
        }
        self.sequence.store(before + 2, Ordering::Release);
        self.generation.send_replace((before + 2) / 2);
    }

    /// Runs `read` until no generation was swapped in meanwhile.
    fn consistent<T>(&self, read: impl Fn() -> T) -> T {
        const SPINS: u32 = 64;
        let mut tries = 0_u32;
        loop {
            let before = self.sequence.load(Ordering::Acquire);
            if before.is_multiple_of(2) {
                let value = read();
                fence(Ordering::Acquire);
                if self.sequence.load(Ordering::Relaxed) == before {
                    return value;
                }
            }
            tries = tries.saturating_add(1);
            if tries < SPINS {
                std::hint::spin_loop();
            } else {
                thread::yield_now();
            }
        }
    }

    /// The one place that touches the map's guards on the read side.
    fn get(&self, address: IpAddr) -> Option<Arc<Endpoint>> {
        self.map.get(&address).map(|entry| Arc::clone(&entry))
    }
}

#[cfg(test)]
mod tests;
