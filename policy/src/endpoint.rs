//! What stands behind a pod's address: who it is, which selectors it matches, what isolates it.
//!
//! An endpoint is immutable; [`crate::Cluster`] makes a new one when something changes. Knows
//! nothing of how selectors and rules came to be, nor of verdicts.
use std::sync::Arc;

use crate::compile::{Rules, SelectorId};
use crate::model::{Direction, Node, PodKey, PolicyKey, Protocol};

/// The pod at an address, as traces and people know it.
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
    pub(crate) matches: Arc<[SelectorId]>,
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

/// The policies that isolate a pod in one direction; never without any.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Isolation {
    /// Sorted and without duplicates.
    pub(crate) policies: Box<[PolicyKey]>,
    /// Of the policy at the same place; empty for a contested address, which no rule may open.
    pub(crate) rules: Box<[Arc<Rules>]>,
    /// `rules` without repetitions: policies that say the same are asked once.
    pub(crate) distinct: Box<[Arc<Rules>]>,
}

impl Identity {
    /// Whether both are one and the same pod: another uid is another pod, whatever its name.
    pub fn is_same_pod(&self, other: &Self) -> bool {
        self.uid == other.uid && self.key == other.key
    }
}

impl Endpoint {
    /// One of which nothing is known but whose it is: to be named, not to be judged.
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

    /// Whether any policy isolates the pod in `direction`.
    pub fn isolated(&self, direction: Direction) -> bool {
        self.isolation(direction).is_some()
    }

    /// The policies that isolate the pod in `direction`; sorted.
    pub fn isolating(&self, direction: Direction) -> &[PolicyKey] {
        self.isolation(direction)
            .map_or(&[], |isolation| &isolation.policies)
    }

    /// Whether more than one running pod claims the address and it cannot be told which of them
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

    /// The named ports with this protocol and number.
    pub(crate) fn port_names(&self, protocol: Protocol, number: u16) -> &[NamedPort] {
        let wanted = (protocol, number);
        let of = |port: &NamedPort| (port.protocol, port.number);
        let first = self.named_ports.partition_point(|port| of(port) < wanted);
        let tail = &self.named_ports[first..];
        &tail[..tail.partition_point(|port| of(port) == wanted)]
    }
}
