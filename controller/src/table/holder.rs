//! Which pod or node has an address, without a verdict.
use std::net::IpAddr;
use std::sync::Arc;

use policy::Endpoint;

use super::Table;

/// What has an address.
#[derive(Clone, Debug)]
pub enum Holder {
    /// This pod.
    Pod(Arc<Endpoint>),
    /// A node, or this host itself.
    Node,
    /// No pod and no node is known to have the address, and it lies in the cluster's CIDRs, or its holder is uncertain.
    Unknown,
    /// Not in the cluster.
    Outside,
}

impl Table {
    /// What has `address` now, by one generation of the table.
    #[must_use]
    pub fn holder(&self, address: IpAddr) -> Holder {
        self.consistent(|| {
            if let Some(endpoint) = self.get(address) {
                return Holder::Pod(endpoint);
            }
            let cluster_networks = self.cluster_networks.read();
            if cluster_networks.is_node(address) || self.gateways.read().contains(&address) {
                Holder::Node
            } else if cluster_networks.is_unexplained(address)
                || self.uncertain.read().holds(address)
            {
                Holder::Unknown
            } else {
                Holder::Outside
            }
        })
    }
}
