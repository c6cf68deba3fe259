//! The events that every source of cluster state sends to the index.
//!
//! Knows nothing of where objects come from: manifests or the API server.
use std::fmt;
use std::sync::Arc;

use policy::{PodKey, PolicyKey};

use crate::Problem;

/// An object that policy uses. A source keeps what it has sent; numerous objects are
/// shared with it, not copied.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// `v1` Namespace.
    Namespace(policy::Namespace),
    /// `v1` Pod.
    Pod(Arc<policy::Pod>),
    /// `v1` Node.
    Node(policy::Node),
    /// `networking.k8s.io/v1` NetworkPolicy.
    NetworkPolicy(Arc<policy::NetworkPolicy>),
}

impl From<policy::Pod> for Object {
    fn from(pod: policy::Pod) -> Self {
        Self::Pod(Arc::new(pod))
    }
}

impl From<policy::NetworkPolicy> for Object {
    fn from(policy: policy::NetworkPolicy) -> Self {
        Self::NetworkPolicy(Arc::new(policy))
    }
}

impl Object {
    /// The key of the object.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        match self {
            Self::Namespace(namespace) => ObjectKey::Namespace(Arc::clone(namespace.name())),
            Self::Pod(pod) => ObjectKey::Pod(pod.key.clone()),
            Self::Node(node) => ObjectKey::Node(Arc::clone(&node.name)),
            Self::NetworkPolicy(policy) => ObjectKey::NetworkPolicy(policy.key().clone()),
        }
    }
}

/// Identifies an object: its kind, and its name within its namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKey {
    /// A node by name.
    Node(Arc<str>),
    /// A namespace by name.
    Namespace(Arc<str>),
    /// A policy by namespace and name.
    NetworkPolicy(PolicyKey),
    /// A pod by namespace and name.
    Pod(PodKey),
}

/// `NetworkPolicy x/deny`, `Node n1`.
impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(name) => write!(f, "Node {name}"),
            Self::Namespace(name) => write!(f, "Namespace {name}"),
            Self::NetworkPolicy(key) => write!(f, "NetworkPolicy {key}"),
            Self::Pod(key) => write!(f, "Pod {key}"),
        }
    }
}

/// One change of the cluster's state.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The object is new, or has changed to this.
    Upsert(Object),
    /// The object is gone.
    Delete(ObjectKey),
}

/// Changes that are applied together.
///
/// The first batch of a source is its full state.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// The changes, without objects that stayed the same.
    pub events: Vec<Event>,
    /// All present problems, not only new ones.
    pub problems: Arc<Vec<Problem>>,
}
