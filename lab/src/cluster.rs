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
pub(crate) mod plan;
mod pods;
mod services;
mod spec;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use serde_json::Value;

pub use build::Builder;
pub use error::ClusterError;
pub use host::Host;
pub use spec::{Between, Gateway, NodeRef, PodSpec, Protocol, RpFilter, ServiceSpec};

use crate::netns::Netns;
use crate::tools;
use manifests::Running;
use plan::NodePlan;

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
    between: Between,
    /// How many pods were ever added; numbers links and uids.
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

    /// The node's interface of a pod; `None` with `hostNetwork` or without such a pod.
    #[must_use]
    pub fn link_of(&self, key: &str) -> Option<String> {
        self.pods.get(key)?.link.clone()
    }

    /// The host outside of the cluster: pods reach it with their node's source address, it reaches pods by
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

    /// Addresses behind the fabric that drop everything, IPv4 first.
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
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // A `Host` that somebody still holds must not keep servers running.
        self.pods.values().for_each(|pod| pod.host.stop_serving());
        self.nodes.iter().for_each(|node| node.host.stop_serving());
        self.outside.stop_serving();
    }
}
