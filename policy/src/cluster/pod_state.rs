//! One pod with the state derived from other objects, and its endpoint.
use std::sync::Arc;

use super::labels::Slot;
use super::selection::Selection;
use crate::compile::CompiledPolicy;
use crate::endpoint::{Endpoint, Identity, NamedPort};
use crate::isolation::Isolation;
use crate::matches::MatchSet;
use crate::model::{Node, Pod, PolicyKey};

#[derive(Debug)]
pub(super) struct PodState {
    pub(super) pod: Arc<Pod>,
    /// Its slot in the index by labels.
    pub(super) slot: Slot,
    identity: Arc<Identity>,
    named_ports: Arc<[NamedPort]>,
    /// Sorted.
    pub(super) matches: Arc<MatchSet>,
    pub(super) selection: Arc<Selection>,
    /// As of the last [`Self::rebuild`].
    pub(super) endpoint: Arc<Endpoint>,
}

impl PodState {
    pub(super) fn new(
        pod: Arc<Pod>,
        slot: Slot,
        node: Option<Arc<Node>>,
        matches: Arc<MatchSet>,
        selection: Arc<Selection>,
    ) -> Self {
        let identity = Arc::new(Identity {
            key: pod.key.clone(),
            uid: pod.uid.clone(),
            node_name: pod.node.clone(),
            node,
        });
        let named_ports: Arc<[NamedPort]> = named_ports(&pod).into();
        let endpoint = Arc::new(endpoint(
            &pod,
            &identity,
            &named_ports,
            &matches,
            &selection,
        ));
        Self {
            pod,
            slot,
            identity,
            named_ports,
            matches,
            selection,
            endpoint,
        }
    }

    /// Takes effect at the next [`Self::rebuild`].
    pub(super) fn set_node(&mut self, node: Option<Arc<Node>>) {
        self.identity = Arc::new(Identity {
            node,
            ..(*self.identity).clone()
        });
    }

    /// Rebuilds the endpoint after a change of the other fields.
    pub(super) fn rebuild(&mut self) {
        let endpoint = endpoint(
            &self.pod,
            &self.identity,
            &self.named_ports,
            &self.matches,
            &self.selection,
        );
        if *self.endpoint != endpoint {
            self.endpoint = Arc::new(endpoint);
        }
    }
}

/// The policies that select a pod but have no effect on it: all of them, if it uses its node's
/// network.
pub(super) fn in_vain<'a>(pod: &Pod, selection: &'a Selection) -> &'a [Arc<CompiledPolicy>] {
    if pod.host_network && !pod.finished {
        selection.policies()
    } else {
        &[]
    }
}

/// The first policy too many on a pod, if there is one.
pub(super) fn surplus<'a>(pod: &Pod, selection: &'a Selection) -> &'a [Arc<CompiledPolicy>] {
    if pod.is_policed() {
        selection.surplus()
    } else {
        &[]
    }
}

fn endpoint(
    pod: &Pod,
    identity: &Arc<Identity>,
    named_ports: &Arc<[NamedPort]>,
    matches: &Arc<MatchSet>,
    selection: &Selection,
) -> Endpoint {
    let closed = pod.oversized.then(|| closed(pod));
    let isolation = |of: &Option<Arc<Isolation>>| closed.clone().flatten().or_else(|| of.clone());
    Endpoint {
        identity: identity.clone(),
        matches: matches.clone(),
        named_ports: named_ports.clone(),
        own_node: identity.node.clone(),
        egress: isolation(&selection.egress),
        ingress: isolation(&selection.ingress),
        contested: false,
    }
}

/// What isolates an oversized pod in each direction: no policy, so the name says why.
fn closed(pod: &Pod) -> Option<Arc<Isolation>> {
    let key = PolicyKey {
        namespace: pod.key.namespace.clone(),
        name: "(too many labels or ports)".into(),
    };
    Isolation::closed([key].into()).map(Arc::new)
}

fn named_ports(pod: &Pod) -> Vec<NamedPort> {
    let named = pod.ports.iter().filter_map(|port| {
        let name = port.name.clone()?;
        Some(NamedPort {
            protocol: port.protocol,
            number: port.number,
            name,
        })
    });
    let mut named: Vec<NamedPort> = named.collect();
    named.sort();
    named.dedup();
    named
}
