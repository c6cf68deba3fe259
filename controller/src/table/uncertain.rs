//! Addresses whose holder is uncertain, although the API may name one.
//!
//! Knows no links: the callers find these addresses.
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use policy::{Endpoint, Identity};

/// Addresses that are unknown until the API names another pod for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UncertainAddresses {
    /// These pods have left their link, among them the one that the API names here. Neither it nor the next pod at this
    /// address has rights there until the API names another pod.
    pub vacant: BTreeMap<IpAddr, Vec<Arc<Identity>>>,
    /// A link leads to this address, which lies in no pod CIDR, and the API names no pod for it.
    pub awaited: BTreeSet<IpAddr>,
}

impl UncertainAddresses {
    /// The endpoint at an address for which the API says `endpoint`.
    pub(super) fn shown(
        &self,
        address: IpAddr,
        endpoint: Option<Arc<Endpoint>>,
    ) -> Option<Arc<Endpoint>> {
        endpoint.filter(|endpoint| !self.has_left(address, endpoint))
    }

    /// Whether this pod has left the address.
    pub(super) fn has_left(&self, address: IpAddr, endpoint: &Endpoint) -> bool {
        let mut left = self.vacant.get(&address).into_iter().flatten();
        left.any(|left| left.is_same_pod(&endpoint.identity))
    }

    /// Whether a packet of this address has to wait if no pod is known there.
    pub(super) fn holds(&self, address: IpAddr) -> bool {
        self.vacant.contains_key(&address) || self.awaited.contains(&address)
    }

    /// The addresses at which the two differ.
    pub(super) fn difference(&self, other: &Self) -> BTreeSet<IpAddr> {
        let addresses = self.vacant.keys().chain(other.vacant.keys());
        let vacant = addresses.filter(|it| self.vacant.get(it) != other.vacant.get(it));
        let awaited = self.awaited.symmetric_difference(&other.awaited);
        vacant.chain(awaited).copied().collect()
    }
}
