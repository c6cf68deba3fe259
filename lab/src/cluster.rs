//! A cluster of network namespaces: nodes behind a fabric, pods routed to their node, Services by
//! DNAT on every node, and a host outside.
//!
//! ```text
//!  pod eth0 --- node 0 eth0 --+
//!  pod eth0 ---/              +-- fabric (a bridge, and a router) --- outside eth0
//!  pod eth0 --- node 1 eth0 --+
//! ```
//!
//! Owns the namespaces; all is gone when the [`Cluster`] is dropped. Knows no policies.

mod build;
mod error;
pub(crate) mod host;
mod manifests;
mod plan;
mod services;
mod spec;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use serde_json::Value;

pub use build::Builder;
pub use error::ClusterError;
pub use host::Host;
pub use spec::{Gateway, NodeRef, PodSpec, Protocol, RpFilter, ServiceSpec};

use crate::netns::Netns;
use crate::tools;
use crate::wait::wait_until;
use manifests::Running;
use plan::NodePlan;
use services::Forward;

/// How long links may take to come up. They take milliseconds.
const LINKS_UP: Duration = Duration::from_secs(10);
/// How many pods have room in a node's IPv4 pod CIDR.
const MAX_PODS: usize = 253;

/// A running cluster. Dropping it ends its servers and takes its namespaces away.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Node>,
    outside: Host,
    fabric: Netns,
    namespaces: BTreeMap<String, BTreeMap<String, String>>,
    pods: BTreeMap<String, Pod>,
    services: BTreeMap<String, ServiceState>,
    gateway: Gateway,
    /// How many pods there ever were; names links and uids.
    links: u32,
}

#[derive(Debug)]
struct Node {
    host: Host,
    plan: NodePlan,
}

#[derive(Debug)]
struct Pod {
    spec: PodSpec,
    host: Host,
    node: usize,
    /// The node's side of the link; none for a pod with `hostNetwork`.
    link: Option<String>,
    uid: String,
    started: String,
}

#[derive(Debug)]
struct ServiceState {
    spec: ServiceSpec,
    service: Service,
}

/// A Service's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Service {
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

impl Service {
    /// A port at the IPv4 ClusterIP.
    #[must_use]
    pub fn addr_v4(&self, port: u16) -> SocketAddr {
        (self.v4, port).into()
    }

    /// A port at the IPv6 ClusterIP.
    #[must_use]
    pub fn addr_v6(&self, port: u16) -> SocketAddr {
        (self.v6, port).into()
    }

    /// A port at both addresses, IPv4 first.
    #[must_use]
    pub fn addrs(&self, port: u16) -> [SocketAddr; 2] {
        [self.addr_v4(port), self.addr_v6(port)]
    }
}

impl Cluster {
    /// Describes a cluster; [`Builder::build`] makes it.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The pod `namespace/name`.
    ///
    /// # Panics
    /// If there is none, naming those there are; see [`Cluster::find_pod`].
    #[must_use]
    pub fn pod(&self, key: &str) -> Host {
        match self.find_pod(key) {
            Some(pod) => pod,
            None => panic!("there is no pod {key}; pods are {}", self.pod_names()),
        }
    }

    /// The pod `namespace/name`, if there is one.
    #[must_use]
    pub fn find_pod(&self, key: &str) -> Option<Host> {
        self.pods.get(key).map(|pod| pod.host.clone())
    }

    /// All pods, sorted by `namespace/name`.
    pub fn pods(&self) -> impl Iterator<Item = Host> {
        self.pods.values().map(|pod| pod.host.clone())
    }

    /// The node at a place, from 0.
    ///
    /// # Panics
    /// If there are fewer nodes.
    #[must_use]
    pub fn node(&self, index: usize) -> Host {
        match self.nodes.get(index) {
            Some(node) => node.host.clone(),
            None => panic!(
                "there is no node {index}; there are {} from 0 on",
                self.nodes.len()
            ),
        }
    }

    /// All nodes.
    pub fn nodes(&self) -> impl Iterator<Item = Host> {
        self.nodes.iter().map(|node| node.host.clone())
    }

    /// The node that a pod runs on.
    ///
    /// # Panics
    /// If there is no such pod.
    #[must_use]
    pub fn node_of(&self, key: &str) -> Host {
        match self.pods.get(key) {
            Some(pod) => self.node(pod.node),
            None => panic!("there is no pod {key}; pods are {}", self.pod_names()),
        }
    }

    /// The node's interface that a pod hangs on; `None` with `hostNetwork` or without such a pod.
    #[must_use]
    pub fn link_of(&self, key: &str) -> Option<String> {
        self.pods.get(key)?.link.clone()
    }

    /// The host beyond the nodes: pods reach it behind their node's address, it reaches pods by
    /// theirs.
    #[must_use]
    pub fn outside(&self) -> Host {
        self.outside.clone()
    }

    /// A Service's addresses.
    ///
    /// # Panics
    /// If there is none of that name (`namespace/name`), naming those there are.
    #[must_use]
    pub fn service(&self, name: &str) -> Service {
        match self.services.get(name) {
            Some(state) => state.service,
            None => panic!(
                "there is no Service {name}; Services are {}",
                self.services.keys().cloned().collect::<Vec<_>>().join(", ")
            ),
        }
    }

    /// Addresses behind the fabric for which it answers by ICMP "host unreachable"
    /// (`EHOSTUNREACH`) and by ICMPv6 "no route" (`ENETUNREACH`), IPv4 first.
    #[must_use]
    pub fn unreachable(&self, port: u16) -> [SocketAddr; 2] {
        plan::UNREACHABLE_HOSTS.map(|host| (host, port).into())
    }

    /// Addresses behind the fabric that swallow everything, IPv4 first.
    #[must_use]
    pub fn blackhole(&self, port: u16) -> [SocketAddr; 2] {
        plan::BLACKHOLE_HOSTS.map(|host| (host, port).into())
    }

    /// Adds a pod to the running cluster, and to the Services that select it.
    ///
    /// # Errors
    /// [`ClusterError`]; the cluster is as before then.
    pub fn add_pod(&mut self, spec: PodSpec) -> Result<Host, ClusterError> {
        let key = self.admit(spec)?;
        if let Err(error) = self.link(std::slice::from_ref(&key)) {
            self.pods.remove(&key);
            return Err(error);
        }
        self.update_services()?;
        Ok(self.pod(&key))
    }

    /// Takes a pod away at once: its link, its servers, its place behind Services.
    ///
    /// A `Host` of it that is still held is cut off.
    ///
    /// # Errors
    /// [`ClusterError::UnknownPod`], or what `ip` or `nft` say.
    pub fn remove_pod(&mut self, key: &str) -> Result<(), ClusterError> {
        let Some(pod) = self.pods.remove(key) else {
            return Err(ClusterError::UnknownPod {
                pod: key.into(),
                known: self.pod_names(),
            });
        };
        pod.host.stop_serving();
        if let Some(link) = &pod.link {
            let node = self.nodes[pod.node].host.netns();
            tools::ip(node, &format!("link del {link}\n"))?;
        }
        self.update_services()
    }

    /// Gives a pod other labels, in the manifests and for the Services.
    ///
    /// # Errors
    /// [`ClusterError::UnknownPod`], or what `nft` says.
    pub fn relabel_pod<K: Into<String>, V: Into<String>>(
        &mut self,
        key: &str,
        labels: impl IntoIterator<Item = (K, V)>,
    ) -> Result<(), ClusterError> {
        let known = self.pod_names();
        let pod = self.pods.get_mut(key);
        let pod = pod.ok_or_else(|| ClusterError::UnknownPod {
            pod: key.into(),
            known,
        })?;
        let labels = labels
            .into_iter()
            .map(|(key, value)| (key.into(), value.into()));
        pod.spec.labels = labels.collect();
        self.update_services()
    }

    /// Gives a namespace other labels, in the manifests.
    pub fn relabel_namespace<K: Into<String>, V: Into<String>>(
        &mut self,
        name: &str,
        labels: impl IntoIterator<Item = (K, V)>,
    ) {
        let labels = labels
            .into_iter()
            .map(|(key, value)| (key.into(), value.into()));
        self.namespaces.insert(name.into(), labels.collect());
    }

    /// The cluster as a Kubernetes `List`: Namespaces, Nodes, Pods and Services as they are now.
    #[must_use]
    pub fn manifests(&self) -> Value {
        let mut namespaces = self.namespaces.clone();
        for pod in self.pods.values() {
            namespaces.entry(pod.spec.namespace.clone()).or_default();
        }
        let mut items: Vec<Value> = namespaces
            .iter()
            .map(|(name, labels)| manifests::namespace(name, labels))
            .collect();
        let nodes = self
            .nodes
            .iter()
            .map(|node| manifests::node(node.host.name(), &node.plan));
        items.extend(nodes);
        items.extend(self.pods.values().map(|pod| self.manifest_of(pod)));
        let services = self.services.values();
        items.extend(services.map(|s| manifests::service(&s.spec, s.service.v4, s.service.v6)));
        manifests::list(&items)
    }

    /// Writes [`Cluster::manifests`] to a JSON file, which is whole at any time.
    ///
    /// # Errors
    /// What the file system answers.
    pub fn write_manifests(&self, file: &Path) -> io::Result<()> {
        let mut new = file.as_os_str().to_owned();
        new.push(".new");
        fs::write(&new, serde_json::to_vec_pretty(&self.manifests())?)?;
        fs::rename(&new, file)
    }

    /// The namespace between the nodes, for tests that break the network.
    #[must_use]
    pub fn fabric(&self) -> &Netns {
        &self.fabric
    }

    fn manifest_of(&self, pod: &Pod) -> Value {
        let node = &self.nodes[pod.node];
        let running = Running {
            node: node.host.name(),
            host: &node.plan,
            v4: pod.host.ipv4(),
            v6: pod.host.ipv6(),
            uid: &pod.uid,
            started: &pod.started,
        };
        manifests::pod(&pod.spec, &running)
    }

    fn pod_names(&self) -> String {
        self.pods.keys().cloned().collect::<Vec<_>>().join(", ")
    }

    /// Finds a pod its place and addresses and makes its namespace; it has no link yet.
    fn admit(&mut self, spec: PodSpec) -> Result<String, ClusterError> {
        let key = spec.key();
        if self.pods.contains_key(&key) {
            return Err(ClusterError::Duplicate {
                kind: "pod",
                name: key,
            });
        }
        let node = self.place(&spec)?;
        let (host, link) = if spec.host_network {
            let of = &self.nodes[node].host;
            (
                Host::new(&key, of.netns().clone(), of.ipv4(), of.ipv6()),
                None,
            )
        } else {
            let (v4, v6) = self.addresses_for(&spec, node)?;
            let netns = Netns::new()?;
            netns.set_sysctls(&sysctls(false, RpFilter::Off))?;
            (
                Host::new(&key, netns, v4, v6),
                Some(format!("pod{}", self.links)),
            )
        };
        let uid = format!("00000000-0000-4000-8000-{:012x}", self.links);
        let started = manifests::now();
        self.links += 1;
        self.pods.insert(
            key.clone(),
            Pod {
                spec,
                host,
                node,
                link,
                uid,
                started,
            },
        );
        Ok(key)
    }

    fn place(&self, spec: &PodSpec) -> Result<usize, ClusterError> {
        let found = match &spec.node {
            NodeRef::Index(index) => (*index < self.nodes.len()).then_some(*index),
            NodeRef::Name(name) => self.nodes.iter().position(|node| node.host.name() == name),
        };
        found.ok_or_else(|| ClusterError::UnknownNode {
            pod: spec.key(),
            node: spec.node.to_string(),
            known: self
                .nodes
                .iter()
                .map(|node| node.host.name())
                .collect::<Vec<_>>()
                .join(", "),
        })
    }

    /// The addresses asked for, or the first free ones. Pods of two nodes may have the same: that
    /// is a contested address, which a cluster can see for a moment.
    fn addresses_for(
        &self,
        spec: &PodSpec,
        node: usize,
    ) -> Result<(Ipv4Addr, Ipv6Addr), ClusterError> {
        let plan = &self.nodes[node].plan;
        let holder = |address: IpAddr| {
            let of_node = |pod: &&Pod| pod.node == node && pod.link.is_some();
            let holds = |pod: &&Pod| pod.host.addresses().contains(&address);
            self.pods
                .values()
                .filter(of_node)
                .find(holds)
                .map(|pod| pod.spec.key())
        };
        for (address, cluster) in [
            (spec.v4.map(IpAddr::V4), plan::CLUSTER_V4),
            (spec.v6.map(IpAddr::V6), plan::CLUSTER_V6),
        ] {
            let Some(address) = address else { continue };
            let inside = cluster
                .parse()
                .is_ok_and(|net: ipnet::IpNet| net.contains(&address));
            let pod = spec.key();
            if !inside {
                return Err(ClusterError::AddressOutside {
                    pod,
                    address,
                    cluster,
                });
            }
            if let Some(holder) = holder(address) {
                return Err(ClusterError::AddressTaken {
                    pod,
                    address,
                    holder,
                });
            }
        }
        let free = (2..=254)
            .map(|host| plan.pod(host))
            .find(|(v4, v6)| holder((*v4).into()).is_none() && holder((*v6).into()).is_none());
        let what = || format!("pods on {}", self.nodes[node].host.name());
        let full = || ClusterError::Full {
            what: what(),
            most: MAX_PODS,
        };
        match (spec.v4, spec.v6) {
            (Some(v4), Some(v6)) => Ok((v4, v6)),
            (v4, v6) => free
                .map(|free| (v4.unwrap_or(free.0), v6.unwrap_or(free.1)))
                .ok_or_else(full),
        }
    }

    /// Connects admitted pods with their nodes and waits until they are up.
    fn link(&self, keys: &[String]) -> Result<(), ClusterError> {
        let pods = || keys.iter().filter_map(|key| self.pods.get(key));
        for (at, node) in self.nodes.iter().enumerate() {
            let mut script = String::new();
            let mut links = Vec::new();
            for pod in pods().filter(|pod| pod.node == at) {
                let Some(link) = &pod.link else { continue };
                let addresses = (pod.host.ipv4(), pod.host.ipv6());
                let netns = pod.host.netns().path();
                script += &plan::pod_on_node(&node.plan, self.gateway, link, &netns, addresses);
                links.push(format!("ipv4/conf/{link}/proxy_arp"));
            }
            if links.is_empty() {
                continue;
            }
            tools::ip(node.host.netns(), &script)?;
            if self.gateway == Gateway::LinkLocal {
                let on: Vec<_> = links.iter().map(|link| (link.as_str(), "1")).collect();
                node.host.netns().set_sysctls(&on)?;
            }
        }
        for pod in pods().filter(|pod| pod.link.is_some()) {
            let addresses = (pod.host.ipv4(), pod.host.ipv6());
            let plan = &self.nodes[pod.node].plan;
            tools::ip(pod.host.netns(), &plan::pod(plan, self.gateway, addresses))?;
        }
        pods().try_for_each(|pod| settle(&pod.host))
    }

    fn update_services(&self) -> Result<(), ClusterError> {
        if self.services.is_empty() {
            return Ok(());
        }
        let mut forwards = Vec::new();
        for (name, state) in &self.services {
            let behind: Vec<_> = self
                .pods
                .values()
                .filter(|pod| state.spec.covers(&pod.spec))
                .collect();
            forwards.extend(state.spec.ports.iter().map(|port| Forward {
                service: name.clone(),
                v4: state.service.v4,
                v6: state.service.v6,
                port: port.number,
                target: port.target,
                protocol: port.protocol,
                endpoints_v4: behind.iter().map(|pod| pod.host.ipv4()).collect(),
                endpoints_v6: behind.iter().map(|pod| pod.host.ipv6()).collect(),
            }));
        }
        let ruleset = services::ruleset(&forwards);
        self.nodes
            .iter()
            .try_for_each(|node| Ok(tools::nft(node.host.netns(), &ruleset)?))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // A `Host` that somebody still holds must not keep servers running.
        self.pods.values().for_each(|pod| pod.host.stop_serving());
        self.nodes.iter().for_each(|node| node.host.stop_serving());
        self.outside.stop_serving();
    }
}

/// Kernel parameters of a host, to be set before it has links. Duplicate address detection is
/// off: there is nobody to ask, and it takes a second.
fn sysctls(forwards: bool, rp_filter: RpFilter) -> [(&'static str, &'static str); 12] {
    let forwarding = if forwards { "1" } else { "0" };
    let rp_filter = rp_filter.value();
    [
        // First: a change of forwarding resets others.
        ("ipv4/ip_forward", forwarding),
        ("ipv6/conf/all/disable_ipv6", "0"),
        ("ipv6/conf/default/disable_ipv6", "0"),
        ("ipv6/conf/all/forwarding", forwarding),
        ("ipv6/conf/default/forwarding", forwarding),
        ("ipv6/conf/all/accept_dad", "0"),
        ("ipv6/conf/default/accept_dad", "0"),
        ("ipv6/conf/default/accept_ra", "0"),
        ("ipv6/conf/default/router_solicitations", "0"),
        ("ipv6/conf/default/mldv2_unsolicited_report_interval", "10"),
        ("ipv4/conf/all/rp_filter", rp_filter),
        ("ipv4/conf/default/rp_filter", rp_filter),
    ]
}

/// Waits until every link of a host is operational and no address is tentative. Before that a
/// first packet can be lost, and a SYN's retransmit takes a second.
fn settle(host: &Host) -> Result<(), ClusterError> {
    let ready = || {
        let Ok(mut interfaces) = getifaddrs() else {
            return false;
        };
        let running = InterfaceFlags::IFF_UP | InterfaceFlags::IFF_RUNNING;
        let up = interfaces.all(|interface| interface.flags.contains(running));
        up && !fs::read_to_string("/proc/thread-self/net/if_inet6").is_ok_and(|addresses| {
            // The fifth column is the flags; 0x40 is IFA_F_TENTATIVE.
            let flags = |line: &str| u8::from_str_radix(line.split_whitespace().nth(4)?, 16).ok();
            addresses
                .lines()
                .filter_map(flags)
                .any(|flags| flags & 0x40 != 0)
        })
    };
    host.run(|| wait_until(LINKS_UP, "all links to be up", ready))?
        .map_err(|source| ClusterError::NotUp {
            host: host.name().into(),
            source,
        })
}
