//! The pod at an address: its identity, the selectors that it matches, the policies that isolate it.
//!
//! An endpoint is immutable; [`crate::Cluster`] makes a new one when something changes. Knows
//! nothing of how selectors and rules came to be, nor of verdicts.
use std::sync::Arc;

use crate::access::NAMES_OF_A_PORT;
use crate::isolation::Isolation;
use crate::matches::MatchSet;
use crate::model::{Direction, Node, PodKey, PolicyKey, Protocol};

/// The pod at an address, as traces and logs name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Namespace and name.
    pub key: PodKey,
    /// `metadata.uid`; may be empty.
    pub uid: Arc<str>,
    /// `spec.nodeName`; may be empty.
    pub node_name: Arc<str>,
    /// The node of that name, if it is known.
    pub node: Option<Arc<Node>>,
}

/// A pod address under policy: everything that a verdict needs to know of one end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The pod; of a contested address one of the claimants.
    pub identity: Arc<Identity>,
    /// Ids of the peer selectors that the pod matches; sorted.
    pub(crate) matches: Arc<MatchSet>,
    /// Sorted.
    pub(crate) named_ports: Arc<[NamedPort]>,
    /// The node whose traffic with this address is exempt; none if claimants run on several.
    pub(crate) own_node: Option<Arc<Node>>,
    pub(crate) egress: Option<Arc<Isolation>>,
    pub(crate) ingress: Option<Arc<Isolation>>,
    pub(crate) contested: bool,
}

/// A named container port; the order groups those of one protocol and number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct NamedPort {
    pub(crate) protocol: Protocol,
    pub(crate) number: u16,
    pub(crate) name: Arc<str>,
}

impl Identity {
    /// Whether both are the same pod: with another uid it is another pod, whatever its name.
    pub fn is_same_pod(&self, other: &Self) -> bool {
        self.uid == other.uid && self.key == other.key
    }
}

impl Endpoint {
    /// An endpoint of which only the identity is known: for names, not for verdicts.
    pub fn bare(identity: Identity) -> Self {
        Self {
            own_node: identity.node.clone(),
            identity: Arc::new(identity),
            matches: Arc::default(),
            named_ports: Arc::default(),
            egress: None,
            ingress: None,
            contested: false,
        }
    }

    /// The same pod with the names of the policies that isolate it, but without their rules: enough
    /// to explain a denial, and small enough to keep.
    #[must_use]
    pub fn without_rules(&self) -> Self {
        let named = |isolation: &Option<Arc<Isolation>>| {
            let names = isolation.as_ref()?.names().clone();
            Isolation::closed(names).map(Arc::new)
        };
        Self {
            identity: self.identity.clone(),
            matches: Arc::default(),
            named_ports: Arc::default(),
            own_node: self.own_node.clone(),
            egress: named(&self.egress),
            ingress: named(&self.ingress),
            contested: self.contested,
        }
    }

    /// Merges its policies, so that no verdict has to, while `work` is left.
    pub(crate) fn prepare(&self, work: &mut usize) {
        let isolations = [&self.egress, &self.ingress].into_iter().flatten();
        isolations.for_each(|isolation| isolation.prepare(work));
    }

    /// Whether any policy isolates the pod in `direction`.
    pub fn isolated(&self, direction: Direction) -> bool {
        self.isolation(direction).is_some()
    }

    /// The policies that isolate the pod in `direction`; sorted.
    pub fn isolating(&self, direction: Direction) -> &[PolicyKey] {
        self.isolation(direction)
            .map_or(&[], |isolation| isolation.names())
    }

    /// Whether more than one running pod claims the address and it is unknown which of them
    /// holds it. Nothing is allowed then in a direction in which any claimant is isolated, and no
    /// rule but one for all claimants matches the address as a peer.
    pub fn contested(&self) -> bool {
        self.contested
    }

    pub(crate) fn isolation(&self, direction: Direction) -> Option<&Isolation> {
        match direction {
            Direction::Egress => self.egress.as_deref(),
            Direction::Ingress => self.ingress.as_deref(),
        }
    }

    /// The named ports with this protocol and number, sixteen at most.
    pub(crate) fn port_names(&self, protocol: Protocol, number: u16) -> &[NamedPort] {
        let wanted = (protocol, number);
        let of = |port: &NamedPort| (port.protocol, port.number);
        let first = self.named_ports.partition_point(|port| of(port) < wanted);
        let tail = &self.named_ports[first..];
        let named = tail.partition_point(|port| of(port) == wanted);
        &tail[..named.min(NAMES_OF_A_PORT)]
    }
}
