//! Builds a cluster out of its description.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;

use super::error::ClusterError;
use super::host::Host;
use super::plan::{self, MAX_NODES, NodePlan};
use super::pods::{settle, sysctls};
use super::spec::{Between, Gateway, PodSpec, RpFilter, ServiceSpec};
use super::{Cluster, Node, Service, ServiceState};
use crate::netns::Netns;
use crate::tools;

/// How many Services a cluster has room for.
const MAX_SERVICES: usize = 60_000;

/// The description of a cluster, see [`Cluster::builder`].
#[derive(Debug, Clone, Default)]
pub struct Builder {
    nodes: Vec<String>,
    namespaces: BTreeMap<String, BTreeMap<String, String>>,
    pods: Vec<PodSpec>,
    services: Vec<ServiceSpec>,
    gateway: Gateway,
    between: Between,
    rp_filter: RpFilter,
}

impl Builder {
    /// Adds `count` nodes, named `node-0` and so on.
    #[must_use]
    pub fn nodes(mut self, count: usize) -> Self {
        let first = self.nodes.len();
        self.nodes
            .extend((first..first + count).map(|at| format!("node-{at}")));
        self
    }

    /// Adds a node with a name.
    #[must_use]
    pub fn node(mut self, name: impl Into<String>) -> Self {
        self.nodes.push(name.into());
        self
    }

    /// Adds labels to a namespace. One that only a pod names exists as well.
    #[must_use]
    pub fn namespace<K: Into<String>, V: Into<String>>(
        mut self,
        name: impl Into<String>,
        labels: impl IntoIterator<Item = (K, V)>,
    ) -> Self {
        let labels = labels
            .into_iter()
            .map(|(key, value)| (key.into(), value.into()));
        self.namespaces
            .entry(name.into())
            .or_default()
            .extend(labels);
        self
    }

    /// Adds a pod.
    #[must_use]
    pub fn pod(mut self, pod: PodSpec) -> Self {
        self.pods.push(pod);
        self
    }

    /// Adds pods.
    #[must_use]
    pub fn pods(mut self, pods: impl IntoIterator<Item = PodSpec>) -> Self {
        self.pods.extend(pods);
        self
    }

    /// Adds a Service.
    #[must_use]
    pub fn service(mut self, service: ServiceSpec) -> Self {
        self.services.push(service);
        self
    }

    /// Adds Services.
    #[must_use]
    pub fn services(mut self, services: impl IntoIterator<Item = ServiceSpec>) -> Self {
        self.services.extend(services);
        self
    }

    /// How pods are attached, and their gateway (default [`Gateway::LinkLocal`]).
    #[must_use]
    pub fn gateway(mut self, gateway: Gateway) -> Self {
        self.gateway = gateway;
        self
    }

    /// How pods' packets come from node to node (default [`Between::Routes`]).
    #[must_use]
    pub fn between(mut self, between: Between) -> Self {
        self.between = between;
        self
    }

    /// The nodes' reverse path filter (default [`RpFilter::Loose`]).
    #[must_use]
    pub fn rp_filter(mut self, rp_filter: RpFilter) -> Self {
        self.rp_filter = rp_filter;
        self
    }

    /// Builds it all and waits until every link is up and every address usable.
    ///
    /// # Errors
    /// [`ClusterError`]; nothing is left of the cluster then.
    pub fn build(self) -> Result<Cluster, ClusterError> {
        let nodes = make_nodes(&self.nodes)?;
        let fabric = Netns::new()?;
        let outside = Host::new("outside", Netns::new()?, plan::OUTSIDE_V4, plan::OUTSIDE_V6);
        underlay(&fabric, &nodes, &outside, self.rp_filter)?;
        ways_to_pods(&nodes, self.gateway, self.between)?;
        let mut cluster = Cluster {
            nodes,
            outside,
            fabric,
            namespaces: self.namespaces,
            pods: BTreeMap::new(),
            services: make_services(self.services)?,
            gateway: self.gateway,
            between: self.between,
            links: 0,
        };
        let mut added = Vec::new();
        for pod in self.pods {
            added.push(cluster.admit(pod)?);
        }
        cluster.link(&added)?;
        for host in cluster.nodes().chain([cluster.outside()]) {
            settle(host.name(), host.netns())?;
        }
        settle("the fabric", &cluster.fabric)?;
        for node in &cluster.nodes {
            tools::nft(node.host.netns(), &plan::masquerade())?;
        }
        cluster.update_services()?;
        Ok(cluster)
    }
}

fn make_nodes(names: &[String]) -> Result<Vec<Node>, ClusterError> {
    if names.is_empty() {
        return Err(ClusterError::NoNode);
    }
    let full = || ClusterError::Full {
        what: "nodes".into(),
        most: MAX_NODES,
    };
    let mut nodes: Vec<Node> = Vec::new();
    for (index, name) in names.iter().enumerate() {
        if nodes.iter().any(|node| node.host.name() == name) {
            return Err(ClusterError::Duplicate {
                kind: "node",
                name: name.clone(),
            });
        }
        let index = u8::try_from(index)
            .ok()
            .filter(|at| usize::from(*at) < MAX_NODES);
        let plan = NodePlan::new(index.ok_or_else(full)?);
        let host = Host::new(name, Netns::new()?, plan.v4, plan.v6);
        nodes.push(Node { host, plan });
    }
    Ok(nodes)
}

fn underlay(
    fabric: &Netns,
    nodes: &[Node],
    outside: &Host,
    rp_filter: RpFilter,
) -> Result<(), ClusterError> {
    for netns in nodes.iter().map(|node| node.host.netns()) {
        netns.set_sysctls(&sysctls(true, rp_filter))?;
    }
    fabric.set_sysctls(&sysctls(true, RpFilter::Off))?;
    outside
        .netns()
        .set_sysctls(&sysctls(false, RpFilter::Off))?;
    let paths: Vec<_> = nodes
        .iter()
        .map(|node| (node.plan, node.host.netns().path()))
        .collect();
    let peers: Vec<_> = paths
        .iter()
        .map(|(plan, path)| (*plan, Path::new(path)))
        .collect();
    tools::ip(fabric, &plan::fabric(&peers, &outside.netns().path()))?;
    tools::ip(outside.netns(), &plan::outside())?;
    for node in nodes {
        tools::ip(node.host.netns(), &plan::node(&node.plan))?;
    }
    Ok(())
}

/// Each node's way to the pods of the others.
fn ways_to_pods(nodes: &[Node], gateway: Gateway, between: Between) -> Result<(), ClusterError> {
    let plans: Vec<_> = nodes.iter().map(|node| node.plan).collect();
    for node in nodes {
        let others: Vec<_> = plans.iter().filter(|other| **other != node.plan).collect();
        tools::ip(node.host.netns(), &plan::own_pods(&node.plan, gateway))?;
        match between {
            Between::Routes => tools::ip(node.host.netns(), &plan::routes(&others))?,
            Between::Vxlan => {
                tools::ip(node.host.netns(), &plan::tunnel(&node.plan, &others))?;
                tools::bridge(node.host.netns(), &plan::tunnel_ends(&others))?;
            }
        }
    }
    Ok(())
}

fn make_services(specs: Vec<ServiceSpec>) -> Result<BTreeMap<String, ServiceState>, ClusterError> {
    let full = || ClusterError::Full {
        what: "Services".into(),
        most: MAX_SERVICES,
    };
    let mut services = BTreeMap::new();
    for (at, spec) in specs.into_iter().enumerate() {
        let name = format!("{}/{}", spec.namespace, spec.name);
        let host = u16::try_from(at + 10).map_err(|_| full())?;
        let [high, low] = host.to_be_bytes();
        let service = Service {
            v4: Ipv4Addr::new(10, 96, high, low),
            v6: Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, host),
        };
        if services
            .insert(name.clone(), ServiceState { spec, service })
            .is_some()
        {
            return Err(ClusterError::Duplicate {
                kind: "Service",
                name,
            });
        }
    }
    Ok(services)
}
