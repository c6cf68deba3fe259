//! The addresses that are known not to be a pod's, and the networks of pods.
use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use policy::Cluster;

use super::TableSettings;

/// The networks of pods, and the addresses of nodes.
#[derive(Debug, Default)]
pub(super) struct ClusterNetworks {
    /// The cluster's CIDRs, aggregated.
    cidrs: Arc<[IpNet]>,
    cluster: Ranges,
    nodes: HashSet<IpAddr, ahash::RandomState>,
}

/// First and last addresses of networks, disjoint and sorted.
#[derive(Debug, Default)]
struct Ranges(Vec<(IpAddr, IpAddr)>);

impl Ranges {
    /// Of networks that do not overlap.
    fn new(cidrs: &[IpNet]) -> Self {
        let ranges = cidrs.iter().map(|it| (it.network(), it.broadcast()));
        let mut ranges: Vec<_> = ranges.collect();
        ranges.sort_unstable();
        Self(ranges)
    }

    fn contain(&self, address: IpAddr) -> bool {
        let after = self.0.partition_point(|(first, _)| *first <= address);
        let within = after.checked_sub(1).and_then(|at| self.0.get(at));
        within.is_some_and(|(_, last)| address <= *last)
    }
}

impl ClusterNetworks {
    pub(super) fn new(settings: &TableSettings, cluster: &Cluster) -> Self {
        let of_nodes = IpNet::aggregate(&cluster.pod_cidrs());
        let cidrs: Arc<[IpNet]> = match settings.cluster_cidrs.as_slice() {
            [] => of_nodes.as_slice().into(),
            given => IpNet::aggregate(&given.to_vec()).into(),
        };
        // A Node object cannot claim an address from another node's pod CIDRs.
        let pods = Ranges::new(&of_nodes);
        let pods = &pods;
        let nodes = cluster.nodes().flat_map(|node| {
            let own = |address: &IpAddr| node.pod_cidrs.iter().any(|it| it.contains(address));
            let addresses = node.addresses.iter().copied();
            addresses.filter(move |address| own(address) || !pods.contain(*address))
        });
        Self {
            nodes: nodes.collect(),
            cluster: Ranges::new(&cidrs),
            cidrs,
        }
    }

    pub(super) fn cidrs(&self) -> Arc<[IpNet]> {
        Arc::clone(&self.cidrs)
    }

    /// Whether a node has it.
    pub(super) fn is_node(&self, address: IpAddr) -> bool {
        self.nodes.contains(&address)
    }

    /// Whether it must be a pod's, although no known pod has it.
    pub(super) fn is_unexplained(&self, address: IpAddr) -> bool {
        self.cluster.contain(address) && !self.nodes.contains(&address)
    }
}
