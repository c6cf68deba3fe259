//! Converts manifests to a description of the lab's cluster.
//!
//! The addresses of the manifests cannot be used on one machine, so the lab gives every pod new ones;
//! names, labels, namespaces, nodes and ports stay the same. Builds nothing itself.
use std::collections::BTreeSet;

use lab::{Builder, Cluster as Lab, PodSpec, ServiceSpec};
use policy::{Cluster, Pod, Protocol};

use super::error::DemoError;
use super::policies::RawPolicy;

/// The port of a pod that names none.
const DEFAULT_PORT: u16 = 80;
/// Every pod connects to every pod, so the work grows quadratically.
const MAX_PODS: usize = 60;
/// Every node has a daemon of its own.
const MAX_NODES: usize = 16;
/// With more connections than these only the first port of each pod is dialled.
const MAX_CONNECTIONS: usize = 16_000;
/// The label by which a pod's Service selects it; no policy uses this key.
const OWN_LABEL: &str = "demo.portreeve/pod";

/// A cluster to be built, and what goes into it.
pub(super) struct Plan {
    pub(super) lab: Builder,
    pub(super) nodes: Vec<String>,
    pub(super) pods: Vec<Planned>,
    pub(super) policies: Vec<RawPolicy>,
    /// Differences between the lab and the manifests that the report mentions.
    pub(super) notes: Vec<String>,
}

/// A pod of the demo; Services are named as their pods are.
#[derive(Clone, Debug)]
pub(super) struct Planned {
    pub(super) namespace: String,
    pub(super) name: String,
    /// TCP ports that it serves and that are dialled; never empty.
    pub(super) ports: Vec<u16>,
}

impl Planned {
    /// `namespace/name`.
    pub(super) fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

impl Plan {
    /// Makes a plan of a cluster's manifests.
    ///
    /// # Errors
    /// If no pod is left, or there are more than one machine can show in a minute.
    pub(super) fn of(cluster: &Cluster, policies: Vec<RawPolicy>) -> Result<Self, DemoError> {
        let (pods, mut notes) = chosen(cluster);
        let nodes = nodes(&pods);
        within_bounds(pods.len(), nodes.len())?;
        let homeless = pods.iter().filter(|pod| pod.node.is_empty()).count();
        if homeless > 0 {
            let pods = counted(homeless, "pod");
            notes.push(format!(
                "{pods} without spec.nodeName: spread over the nodes"
            ));
        }
        // By address and by Service, IPv4 and IPv6.
        let ports: usize = pods.iter().map(|pod| tcp_ports(pod).len()).sum();
        let one_port = pods.len() * ports * 4 > MAX_CONNECTIONS;
        if one_port {
            let note = "so many connections: of each pod only the lowest port is dialled";
            notes.push(note.to_owned());
        }
        let mut lab = empty(cluster, &nodes);
        let mut planned = Vec::new();
        for (number, pod) in pods.iter().enumerate() {
            let node = if pod.node.is_empty() {
                nodes[number % nodes.len()].clone()
            } else {
                pod.node.to_string()
            };
            let mut ports = tcp_ports(pod);
            ports.truncate(if one_port { 1 } else { ports.len() });
            lab = lab
                .pod(pod_spec(pod, node, number))
                .service(service_spec(pod, &ports, number));
            planned.push(Planned {
                namespace: pod.key.namespace.to_string(),
                name: pod.key.name.to_string(),
                ports,
            });
        }
        Ok(Self {
            lab,
            nodes,
            pods: planned,
            policies,
            notes,
        })
    }
}

fn within_bounds(pods: usize, nodes: usize) -> Result<(), DemoError> {
    if pods == 0 {
        return Err(DemoError::NoPods);
    }
    for (what, count, most) in [("pods", pods, MAX_PODS), ("nodes", nodes, MAX_NODES)] {
        if count > most {
            return Err(DemoError::TooMany { what, count, most });
        }
    }
    Ok(())
}

/// Nodes and namespaces without pods.
fn empty(cluster: &Cluster, nodes: &[String]) -> Builder {
    let mut lab = Lab::builder();
    for node in nodes {
        lab = lab.node(node.as_str());
    }
    for namespace in cluster.namespaces() {
        let labels = namespace.labels().iter();
        let labels = labels.map(|(key, value)| (key.to_string(), value.to_string()));
        lab = lab.namespace(&**namespace.name(), labels);
    }
    lab
}

/// The pods that can be built, and why others are left out.
fn chosen(cluster: &Cluster) -> (Vec<&Pod>, Vec<String>) {
    let mut notes = Vec::new();
    let mut leave_out = |why: &str, which: &dyn Fn(&Pod) -> bool| {
        let names: Vec<_> = cluster
            .pods()
            .filter(|pod| which(pod))
            .map(|pod| pod.key.to_string())
            .collect();
        if !names.is_empty() {
            notes.push(format!("left out, {why}: {}", shortened(&names, " ", 6)));
        }
    };
    leave_out("ended pods own no address", &|pod| pod.finished);
    leave_out(
        "on the host network, where no policy selects a pod",
        &|pod| !pod.finished && pod.host_network,
    );
    let pods = cluster
        .pods()
        .filter(|pod| !pod.finished && !pod.host_network)
        .collect();
    (pods, notes)
}

/// The nodes that the pods name, or two where they name none.
fn nodes(pods: &[&Pod]) -> Vec<String> {
    let named: BTreeSet<_> = pods
        .iter()
        .filter(|pod| !pod.node.is_empty())
        .map(|pod| pod.node.to_string())
        .collect();
    if named.is_empty() {
        return vec!["node-0".to_owned(), "node-1".to_owned()];
    }
    named.into_iter().collect()
}

fn tcp_ports(pod: &Pod) -> Vec<u16> {
    let tcp = pod
        .ports
        .iter()
        .filter(|port| port.protocol == Protocol::Tcp && port.number > 0);
    let mut ports: Vec<_> = tcp.map(|port| port.number).collect();
    ports.sort_unstable();
    ports.dedup();
    if ports.is_empty() {
        ports.push(DEFAULT_PORT);
    }
    ports
}

fn pod_spec(pod: &Pod, node: String, number: usize) -> PodSpec {
    let labels = pod.labels.iter();
    let mut spec = PodSpec::new(&*pod.key.namespace, &*pod.key.name)
        .node(node)
        .labels(labels.map(|(key, value)| (key.to_string(), value.to_string())))
        .label(OWN_LABEL, number.to_string());
    for port in &pod.ports {
        let protocol = match port.protocol {
            Protocol::Udp => lab::Protocol::Udp,
            Protocol::Sctp => lab::Protocol::Sctp,
            Protocol::Tcp | Protocol::Other(_) => lab::Protocol::Tcp,
        };
        spec = spec.port_of(
            port.name.as_deref().unwrap_or_default(),
            port.number,
            protocol,
        );
    }
    spec
}

fn service_spec(pod: &Pod, ports: &[u16], number: usize) -> ServiceSpec {
    let service = ServiceSpec::new(&*pod.key.namespace, &*pod.key.name)
        .selects(OWN_LABEL, number.to_string());
    ports
        .iter()
        .fold(service, |service, port| service.port(*port, *port))
}

/// `1 pod`, `2 pods`.
pub(super) fn counted(count: usize, what: &str) -> String {
    let (stem, plural) = match what.strip_suffix('y') {
        Some(stem) if count != 1 => (stem, "ies"),
        _ if count == 1 => (what, ""),
        _ => (what, "s"),
    };
    format!("{count} {stem}{plural}")
}

/// The first `most` names, and how many there are besides.
pub(super) fn shortened(names: &[String], between: &str, most: usize) -> String {
    let mut text = names[..names.len().min(most)].join(between);
    if names.len() > most {
        text.push_str(&format!(" and {} more", names.len() - most));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn things_are_counted_in_english() {
        for (count, what, expected) in [
            (1, "pod", "1 pod"),
            (2, "pod", "2 pods"),
            (0, "policy", "0 policies"),
            (1, "policy", "1 policy"),
        ] {
            assert_eq!(counted(count, what), expected);
        }
    }

    #[test]
    fn shortened_list_says_how_many_it_omits() {
        let names: Vec<_> = ["a", "b", "c"].map(String::from).into();
        assert_eq!(shortened(&names, ", ", 3), "a, b, c");
        assert_eq!(shortened(&names, ", ", 1), "a and 2 more");
    }
}
