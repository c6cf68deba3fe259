//! Adds pods to a cluster: node, addresses, link, and endpoints of Services.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use nix::ifaddrs::getifaddrs;
use nix::net::if_::{InterfaceFlags, if_nametoindex};

use super::error::ClusterError;
use super::host::Host;
use super::services::{self, Forward};
use super::spec::{Gateway, NodeRef, PodSpec, RpFilter};
use super::{Cluster, Pod, manifests, plan};
use crate::netns::Netns;
use crate::tools;
use crate::wait::wait_until;

/// How long links may take to come up. They take milliseconds.
const LINKS_UP: Duration = Duration::from_secs(10);
/// How many pods have room in a node's IPv4 pod CIDR.
const MAX_PODS: usize = 253;

impl Cluster {
    /// Chooses a pod's node and addresses and makes its namespace; it has no link yet.
    pub(super) fn admit(&mut self, spec: PodSpec) -> Result<String, ClusterError> {
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
    pub(super) fn link(&self, keys: &[String]) -> Result<(), ClusterError> {
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
            if matches!(self.gateway, Gateway::Bridge { .. }) && !has_bridge(node.host.netns())? {
                script.insert_str(0, &plan::bridge(&node.plan));
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
            tools::ip(
                pod.host.netns(),
                &plan::pod(plan, self.gateway, self.between, addresses),
            )?;
        }
        pods().try_for_each(|pod| settle(pod.host.name(), pod.host.netns()))
    }

    pub(super) fn update_services(&self) -> Result<(), ClusterError> {
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

fn has_bridge(node: &Netns) -> Result<bool, ClusterError> {
    Ok(node.run(|| if_nametoindex(plan::BRIDGE).is_ok())?)
}

/// Kernel parameters of a host, to be set before it has links. Duplicate address detection is
/// off: there are no other hosts, and it takes a second.
pub(super) fn sysctls(forwards: bool, rp_filter: RpFilter) -> [(&'static str, &'static str); 12] {
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
pub(super) fn settle(host: &str, netns: &Netns) -> Result<(), ClusterError> {
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
    netns
        .run(|| wait_until(LINKS_UP, "all links to be up", ready))?
        .map_err(|source| ClusterError::NotUp {
            host: host.into(),
            source,
        })
}
