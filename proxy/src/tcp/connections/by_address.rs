//! Finds flows by their addresses, so that a change has to visit only the flows of changed addresses
//! and not all flows.
//!
//! Knows only the id and the addresses of a flow.
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use dashmap::DashMap;

/// A flow that can be found by its addresses.
pub(crate) trait Ends {
    /// Unique within an index.
    fn id(&self) -> u64;
    /// Client and server.
    fn ends(&self) -> [IpAddr; 2];
}

/// Flows under both their addresses.
pub(crate) struct ByAddress<T> {
    flows: DashMap<IpAddr, HashMap<u64, Arc<T>, ahash::RandomState>, ahash::RandomState>,
}

impl<T> Default for ByAddress<T> {
    fn default() -> Self {
        Self {
            flows: DashMap::default(),
        }
    }
}

impl<T: Ends> ByAddress<T> {
    /// Enters a flow.
    pub(crate) fn insert(&self, flow: &Arc<T>) {
        for end in flow.ends() {
            let mut flows = self.flows.entry(end).or_default();
            flows.insert(flow.id(), Arc::clone(flow));
        }
    }

    /// Removes a flow, if it is in the index.
    pub(crate) fn remove(&self, flow: &T) {
        for end in flow.ends() {
            self.flows.remove_if_mut(&end, |_, flows| {
                flows.remove(&flow.id());
                flows.is_empty()
            });
        }
    }

    /// Frees memory that more flows have needed.
    pub(crate) fn shrink(&self) {
        self.flows.shrink_to_fit();
    }

    /// The flows with an end among `addresses`, each once, in no order.
    pub(crate) fn of(&self, addresses: &BTreeSet<IpAddr>) -> Vec<Arc<T>> {
        let mut found = Vec::new();
        for address in addresses {
            let Some(flows) = self.flows.get(address) else {
                continue;
            };
            // A flow with both addresses among them is found by its client.
            let new = flows.values().filter(|flow| {
                let [client, _] = flow.ends();
                client == *address || !addresses.contains(&client)
            });
            found.extend(new.cloned());
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Pair(u64, [IpAddr; 2]);

    impl Ends for Pair {
        fn id(&self) -> u64 {
            self.0
        }

        fn ends(&self) -> [IpAddr; 2] {
            self.1
        }
    }

    fn address(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    fn ids(index: &ByAddress<Pair>, addresses: &[u8]) -> Vec<u64> {
        let addresses = addresses.iter().map(|last| address(*last)).collect();
        let mut ids: Vec<_> = index.of(&addresses).iter().map(|flow| flow.0).collect();
        ids.sort_unstable();
        ids
    }

    #[test]
    fn flow_is_found_once_by_either_address() {
        let index = ByAddress::default();
        let flows: Vec<_> = [(1, 2), (1, 3), (3, 1), (4, 4)]
            .into_iter()
            .zip(0..)
            .map(|((client, server), id)| Arc::new(Pair(id, [address(client), address(server)])))
            .collect();
        flows.iter().for_each(|flow| index.insert(flow));
        for (addresses, expected, why) in [
            (&[2][..], &[0][..], "the server of one"),
            (&[3], &[1, 2], "server of one and client of another"),
            (&[1, 2, 3], &[0, 1, 2], "both ends"),
            (&[4], &[3], "to itself"),
            (&[9], &[], "nobody"),
        ] {
            assert_eq!(ids(&index, addresses), expected, "{why}");
        }
        flows.iter().for_each(|flow| index.remove(flow));
        flows.iter().for_each(|flow| index.remove(flow));
        assert!(index.flows.is_empty(), "nothing is left behind");
    }
}
