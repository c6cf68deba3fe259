//! The cluster's objects, reduced to what policy looks at.
//!
//! Plain values: knows neither manifests nor what a policy does with them.
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Serialize, Serializer};

/// `metadata.labels`.
pub type Labels = BTreeMap<Arc<str>, Arc<str>>;

/// The label that the API server puts on every namespace; its value is the namespace's name.
const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// A pod's `metadata.namespace` and `metadata.name`; displays and serialises as `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodKey {
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
}

/// A policy's `metadata.namespace` and `metadata.name`; displays and serialises as
/// `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyKey {
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
}

/// Which way a connection goes, seen from the pod that a policy selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// From the pod.
    Egress,
    /// To the pod.
    Ingress,
}

/// The protocol above IP of a connection, a rule or a container port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// IP protocol 6.
    Tcp,
    /// IP protocol 17.
    Udp,
    /// IP protocol 132.
    Sctp,
    /// Any other IP protocol number; no rule with ports matches it.
    Other(u8),
}

/// A protocol name that the Kubernetes API does not know; names are upper case there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown protocol {0:?}: write TCP, UDP or SCTP")]
pub struct UnknownProtocol(
    /// The name as it was given.
    pub String,
);

/// One `containers[].ports[]`, or an init sidecar's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPort {
    /// `name`; only named ports matter to policy.
    pub name: Option<Arc<str>>,
    /// `containerPort`.
    pub number: u16,
    /// `protocol`, TCP where the manifest has none.
    pub protocol: Protocol,
}

/// A `v1` Pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Namespace and name.
    pub key: PodKey,
    /// `metadata.uid`; empty where a manifest has none.
    pub uid: Arc<str>,
    /// `metadata.labels`.
    pub labels: Labels,
    /// `spec.nodeName`; empty while unscheduled.
    pub node: Arc<str>,
    /// `spec.hostNetwork`: the pod has its node's addresses, and owns none.
    pub host_network: bool,
    /// Ports of all containers and init sidecars.
    pub ports: Vec<PodPort>,
    /// `status.podIPs`, else `status.podIP`.
    pub addresses: Vec<IpAddr>,
    /// `status.phase` is Succeeded or Failed: the pod owns no address any more.
    pub finished: bool,
    /// `metadata.deletionTimestamp` is set: the pod keeps policy and address until it is gone, but
    /// not against another that claims the address.
    pub terminating: bool,
    /// `status.startTime`, else `metadata.creationTimestamp`: RFC 3339, which sorts as text; may be
    /// empty.
    pub started: Arc<str>,
    /// It has more than [`Self::LABELS`] labels or [`Self::PORTS`] ports, of which none is kept: it is isolated in both
    /// directions, and nothing is allowed.
    pub oversized: bool,
}

/// A `v1` Namespace; carries its `kubernetes.io/metadata.name` label by construction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    name: Arc<str>,
    labels: Labels,
}

/// A `v1` Node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// `metadata.name`.
    pub name: Arc<str>,
    /// `status.addresses[]` that are IP addresses.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`, else `spec.podCIDR`.
    pub pod_cidrs: Vec<IpNet>,
}

impl fmt::Display for PodKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Display for PolicyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Serialize for PodKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for PolicyKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Protocol {
    /// The protocol of an IPv4 `Protocol` or an IPv6 `Next Header` field (IANA protocol numbers).
    pub fn from_ip_number(number: u8) -> Self {
        match number {
            6 => Self::Tcp,
            17 => Self::Udp,
            132 => Self::Sctp,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp => f.pad("TCP"),
            Self::Udp => f.pad("UDP"),
            Self::Sctp => f.pad("SCTP"),
            Self::Other(number) => number.fmt(f),
        }
    }
}

impl FromStr for Protocol {
    type Err = UnknownProtocol;

    /// Reads the API's names, to the letter: `TCP`, `UDP`, `SCTP`.
    fn from_str(name: &str) -> Result<Self, UnknownProtocol> {
        match name {
            "TCP" => Ok(Self::Tcp),
            "UDP" => Ok(Self::Udp),
            "SCTP" => Ok(Self::Sctp),
            _ => Err(UnknownProtocol(name.to_owned())),
        }
    }
}

impl Pod {
    /// How many labels a pod may have: more than ten times as many as in practice. Each takes 100 bytes or more in every
    /// daemon of the cluster, and an object of the API has room for 100,000.
    pub const LABELS: usize = 256;
    /// How many container ports a pod may have.
    pub const PORTS: usize = 2_000;

    /// This pod without its labels and ports if it has too many.
    #[must_use]
    pub fn bounded(mut self) -> Self {
        self.oversized |= self.labels.len() > Self::LABELS || self.ports.len() > Self::PORTS;
        if self.oversized {
            (self.labels, self.ports) = (Labels::new(), Vec::new());
        }
        self
    }

    /// The addresses that are this pod's own: none for a hostNetwork pod, which is its node, and
    /// none for a finished one, whose address another pod may have.
    pub fn owned_addresses(&self) -> &[IpAddr] {
        if self.is_policed() {
            &self.addresses
        } else {
            &[]
        }
    }

    /// Whether policies apply to this pod: not to hostNetwork pods, nor to finished ones.
    pub(crate) fn is_policed(&self) -> bool {
        !self.host_network && !self.finished
    }
}

impl Namespace {
    /// A namespace with these labels and `kubernetes.io/metadata.name`, whose value is always the
    /// namespace's name, as the API server has it.
    pub fn new(name: impl Into<Arc<str>>, mut labels: Labels) -> Self {
        let name = name.into();
        labels.insert(NAMESPACE_NAME_LABEL.into(), name.clone());
        Self { name, labels }
    }

    /// `metadata.name`.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// `metadata.labels`, `kubernetes.io/metadata.name` among them.
    pub fn labels(&self) -> &Labels {
        &self.labels
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_api_protocol_names_are_valid() {
        for (name, expected) in [
            ("TCP", Protocol::Tcp),
            ("UDP", Protocol::Udp),
            ("SCTP", Protocol::Sctp),
        ] {
            assert_eq!(name.parse(), Ok(expected), "{name}");
            assert_eq!(expected.to_string(), name);
        }
        for name in ["tcp", "", "6", "ICMP", " TCP"] {
            assert_eq!(
                name.parse::<Protocol>(),
                Err(UnknownProtocol(name.to_owned())),
                "{name:?}"
            );
        }
    }

    #[test]
    fn protocol_numbers_match_iana() {
        for (number, expected, shown) in [
            (6, Protocol::Tcp, "TCP"),
            (17, Protocol::Udp, "UDP"),
            (132, Protocol::Sctp, "SCTP"),
            (1, Protocol::Other(1), "1"),
        ] {
            assert_eq!(Protocol::from_ip_number(number), expected);
            assert_eq!(expected.to_string(), shown);
        }
    }

    #[test]
    fn namespace_cannot_override_its_name_label() {
        let labels = Labels::from([(NAMESPACE_NAME_LABEL.into(), "other".into())]);
        let namespace = Namespace::new("x", labels);
        assert_eq!(&*namespace.labels()[NAMESPACE_NAME_LABEL], "x");
    }
}
