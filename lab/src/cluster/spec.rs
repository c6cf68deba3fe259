//! The description of a cluster: pods and Services as values, before anything exists.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

/// A transport protocol, as `spec.containers[].ports[].protocol` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP, the default of the API.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// As nftables writes it.
    pub(crate) fn keyword(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// A node, by its place in the list of nodes (from 0) or by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeRef {
    /// Its place, from 0.
    Index(usize),
    /// Its name.
    Name(String),
}

impl From<usize> for NodeRef {
    fn from(index: usize) -> Self {
        Self::Index(index)
    }
}

impl From<&str> for NodeRef {
    fn from(name: &str) -> Self {
        Self::Name(name.into())
    }
}

impl From<String> for NodeRef {
    fn from(name: String) -> Self {
        Self::Name(name)
    }
}

impl fmt::Display for NodeRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Index(index) => write!(f, "number {index}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// How pods are attached, and what they have as their gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Gateway {
    /// 169.254.1.1, answered by proxy ARP, as Calico does. The node has no address in the pod CIDR.
    #[default]
    LinkLocal,
    /// The first address of the node's pod CIDR, which is the node's, as kindnet's `ptp` does.
    NodeAddress,
    /// The same address, of the bridge `cni0` that all pods of the node hang on, as flannel, kubenet
    /// and the CNI plugin `bridge` have it. It is made for the node's first pod.
    Bridge {
        /// Whether the bridge may send a frame back out of the port that it came from.
        hairpin: bool,
    },
}

/// How pods' packets come from node to node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Between {
    /// By routes, as kindnet, kubenet and flannel's `host-gw` have it.
    #[default]
    Routes,
    /// In UDP (VXLAN, RFC 7348) between the nodes' own addresses, as flannel and Calico have it.
    Vxlan,
}

/// `net.ipv4.conf.*.rp_filter` of the nodes (ip-sysctl: reverse path filter).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RpFilter {
    /// 0, the kernel's default.
    Off,
    /// 1, the default of RHEL and its relatives.
    Strict,
    /// 2, the default of Debian, Ubuntu and systemd.
    #[default]
    Loose,
}

impl RpFilter {
    pub(crate) fn value(self) -> &'static str {
        match self {
            Self::Off => "0",
            Self::Strict => "1",
            Self::Loose => "2",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ContainerPort {
    pub(crate) name: String,
    pub(crate) number: u16,
    pub(crate) protocol: Protocol,
}

/// A pod to be made. Addresses and node are the lab's choice unless they are given.
#[derive(Debug, Clone)]
pub struct PodSpec {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) ports: Vec<ContainerPort>,
    pub(crate) node: NodeRef,
    pub(crate) host_network: bool,
    pub(crate) v4: Option<Ipv4Addr>,
    pub(crate) v6: Option<Ipv6Addr>,
}

impl PodSpec {
    /// A pod on the first node, without labels or ports.
    #[must_use]
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
            labels: BTreeMap::new(),
            ports: Vec::new(),
            node: NodeRef::Index(0),
            host_network: false,
            v4: None,
            v6: None,
        }
    }

    /// Adds a label.
    #[must_use]
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.insert(key.into(), value.into());
        self
    }

    /// Adds labels.
    #[must_use]
    pub fn labels<K: Into<String>, V: Into<String>>(
        mut self,
        labels: impl IntoIterator<Item = (K, V)>,
    ) -> Self {
        self.labels.extend(
            labels
                .into_iter()
                .map(|(key, value)| (key.into(), value.into())),
        );
        self
    }

    /// Declares a TCP port; nothing listens on it before [`super::Host::serve`]. An empty name is none.
    #[must_use]
    pub fn port(self, name: impl Into<String>, number: u16) -> Self {
        self.port_of(name, number, Protocol::Tcp)
    }

    /// Declares a port of a protocol.
    #[must_use]
    pub fn port_of(mut self, name: impl Into<String>, number: u16, protocol: Protocol) -> Self {
        self.ports.push(ContainerPort {
            name: name.into(),
            number,
            protocol,
        });
        self
    }

    /// Chooses the node.
    #[must_use]
    pub fn node(mut self, node: impl Into<NodeRef>) -> Self {
        self.node = node.into();
        self
    }

    /// Puts the pod into its node's network (`spec.hostNetwork`): it has the node's addresses.
    #[must_use]
    pub fn host_network(mut self) -> Self {
        self.host_network = true;
        self
    }

    /// Chooses the IPv4 address, out of the cluster's pod CIDR.
    #[must_use]
    pub fn ipv4(mut self, address: Ipv4Addr) -> Self {
        self.v4 = Some(address);
        self
    }

    /// Chooses the IPv6 address, out of the cluster's pod CIDR.
    #[must_use]
    pub fn ipv6(mut self, address: Ipv6Addr) -> Self {
        self.v6 = Some(address);
        self
    }

    pub(crate) fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServicePort {
    pub(crate) number: u16,
    pub(crate) target: u16,
    pub(crate) protocol: Protocol,
}

/// A ClusterIP Service to be made; its addresses are the lab's choice.
#[derive(Debug, Clone)]
pub struct ServiceSpec {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) selector: BTreeMap<String, String>,
    pub(crate) ports: Vec<ServicePort>,
}

impl ServiceSpec {
    /// A Service without selector (so without endpoints) and without ports.
    #[must_use]
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
            selector: BTreeMap::new(),
            ports: Vec::new(),
        }
    }

    /// Asks its endpoints, pods of the same namespace, for one more label.
    #[must_use]
    pub fn selects(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.selector.insert(key.into(), value.into());
        self
    }

    /// Forwards TCP `number` to `target` on the endpoints.
    #[must_use]
    pub fn port(self, number: u16, target: u16) -> Self {
        self.port_of(number, target, Protocol::Tcp)
    }

    /// Forwards a port of a protocol.
    #[must_use]
    pub fn port_of(mut self, number: u16, target: u16, protocol: Protocol) -> Self {
        self.ports.push(ServicePort {
            number,
            target,
            protocol,
        });
        self
    }

    /// Whether `pod` is an endpoint. As in the API, no selector selects nothing.
    pub(crate) fn covers(&self, pod: &PodSpec) -> bool {
        !self.selector.is_empty()
            && self.namespace == pod.namespace
            && self
                .selector
                .iter()
                .all(|(key, value)| pod.labels.get(key) == Some(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_selects_namespace_pods_with_all_its_labels() {
        let service = ServiceSpec::new("x", "s")
            .selects("app", "web")
            .selects("tier", "front");
        let pod = |namespace, app, tier| {
            PodSpec::new(namespace, "p")
                .label("app", app)
                .label("tier", tier)
                .label("more", "yes")
        };
        for (pod, expected, why) in [
            (pod("x", "web", "front"), true, "all labels"),
            (pod("x", "web", "back"), false, "one label differs"),
            (pod("y", "web", "front"), false, "another namespace"),
        ] {
            assert_eq!(service.covers(&pod), expected, "{why}");
        }
        assert!(
            !ServiceSpec::new("x", "s").covers(&pod("x", "web", "front")),
            "no selector"
        );
    }
}
