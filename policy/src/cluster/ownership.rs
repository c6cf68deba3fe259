//! Who owns which address, and what stands for an address that several pods claim.
//!
//! An address is given to another pod only after its holder's sandbox is gone. So while both are
//! still told of, in whatever order, a terminating pod yields to one that is not, and an older one
//! to the one that started after it. Where that does not decide, the address is contested: it gets
//! only what all claimants have in common, and is closed in every direction in which any of them
//! is isolated: whoever answers there gains nothing by the other's grants.
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::Touched;
use super::pod_state::PodState;
use crate::endpoint::{Endpoint, Isolation};
use crate::model::{Direction, PodKey, PolicyKey};

#[derive(Debug, Default)]
pub(super) struct Ownership {
    slots: BTreeMap<IpAddr, Slot>,
    contested: BTreeSet<IpAddr>,
    /// Changes whenever another address is contested, or by others.
    pub(super) disputes: u64,
}

#[derive(Debug)]
struct Slot {
    /// Sorted; never empty.
    claimants: Vec<PodKey>,
    endpoint: Arc<Endpoint>,
}

impl Ownership {
    pub(super) fn endpoint(&self, address: IpAddr) -> Option<&Arc<Endpoint>> {
        self.slots.get(&address).map(|slot| &slot.endpoint)
    }

    pub(super) fn endpoints(&self) -> impl Iterator<Item = (IpAddr, &Arc<Endpoint>)> {
        self.slots
            .iter()
            .map(|(&address, slot)| (address, &slot.endpoint))
    }

    pub(super) fn contested(&self) -> Vec<(IpAddr, Vec<PodKey>)> {
        let claimants = |address: &IpAddr| Some(self.slots.get(address)?.claimants.clone());
        self.contested
            .iter()
            .filter_map(|address| Some((*address, claimants(address)?)))
            .collect()
    }

    /// Brings `addresses`, which `key` owns or owned, in line with `pods`.
    pub(super) fn settle(
        &mut self,
        key: &PodKey,
        addresses: &BTreeSet<IpAddr>,
        pods: &BTreeMap<PodKey, PodState>,
        touched: &mut Touched,
    ) {
        let owned = pods
            .get(key)
            .map_or(&[][..], |state| state.pod.owned_addresses());
        for &address in addresses {
            if self.settle_one(key, address, owned.contains(&address), pods) {
                touched.addresses.insert(address);
            }
        }
    }

    /// Whether the endpoint at `address` changed.
    fn settle_one(
        &mut self,
        key: &PodKey,
        address: IpAddr,
        claims: bool,
        pods: &BTreeMap<PodKey, PodState>,
    ) -> bool {
        let slot = self.slots.get(&address);
        let mut claimants = slot.map_or_else(Vec::new, |slot| slot.claimants.clone());
        match (claimants.binary_search(key), claims) {
            (Err(index), true) => claimants.insert(index, key.clone()),
            (Ok(index), false) => drop(claimants.remove(index)),
            _ => {}
        }
        let states = claimants.iter().filter_map(|key| pods.get(key)).collect();
        let holders = holders(states);
        let was_contested = if holders.len() > 1 {
            !self.contested.insert(address)
        } else {
            self.contested.remove(&address)
        };
        self.disputes += u64::from(was_contested || holders.len() > 1);
        let endpoint = match holders[..] {
            [] => return self.slots.remove(&address).is_some(),
            [owner] => owner.endpoint.clone(),
            [first, ref others @ ..] => Arc::new(common(first, others)),
        };
        let changed = slot.is_none_or(|slot| slot.endpoint != endpoint);
        self.slots.insert(
            address,
            Slot {
                claimants,
                endpoint,
            },
        );
        changed
    }
}

/// Those of `claimants` that may hold the address now: one, unless it cannot be told who.
fn holders(mut claimants: Vec<&PodState>) -> Vec<&PodState> {
    if claimants.iter().any(|state| !state.pod.terminating) {
        claimants.retain(|state| !state.pod.terminating);
    }
    let starts = || claimants.iter().map(|state| &state.pod.started);
    // Who does not say when it started may have done so at any time.
    if let Some(latest) = starts().max().cloned()
        && starts().all(|start| !start.is_empty())
    {
        claimants.retain(|state| state.pod.started == latest);
    }
    claimants
}

/// What stands for an address that all of these claim.
fn common(first: &PodState, others: &[&PodState]) -> Endpoint {
    let claimants = || std::iter::once(first).chain(others.iter().copied());
    let endpoints = || claimants().map(|state| &*state.endpoint);
    let start = |state: &PodState| (state.pod.started.clone(), state.pod.key.clone());
    let latest = claimants()
        .max_by_key(|state| start(state))
        .unwrap_or(first);
    let matches = first.endpoint.matches.iter().copied();
    let matches = matches.filter(|id| endpoints().all(|it| it.matches.binary_search(id).is_ok()));
    let named = first.endpoint.named_ports.iter();
    let named = named.filter(|port| endpoints().all(|it| it.named_ports.contains(port)));
    let own_node = first.endpoint.own_node.clone();
    Endpoint {
        identity: latest.endpoint.identity.clone(),
        matches: matches.collect(),
        named_ports: named.cloned().collect(),
        own_node: own_node.filter(|node| endpoints().all(|it| it.own_node.as_ref() == Some(node))),
        egress: closed(endpoints(), Direction::Egress),
        ingress: closed(endpoints(), Direction::Ingress),
        contested: true,
    }
}

/// Isolation by all policies of all claimants, which nothing opens.
fn closed<'a>(
    claimants: impl Iterator<Item = &'a Endpoint>,
    direction: Direction,
) -> Option<Arc<Isolation>> {
    let policies: BTreeSet<&PolicyKey> = claimants
        .flat_map(|endpoint| endpoint.isolating(direction))
        .collect();
    let policies: Box<[PolicyKey]> = policies.into_iter().cloned().collect();
    let isolation = Isolation {
        policies,
        rules: [].into(),
        distinct: [].into(),
    };
    (!isolation.policies.is_empty()).then(|| Arc::new(isolation))
}
