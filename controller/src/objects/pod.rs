//! The part of a `v1` Pod that policy looks at: who it is, where it runs, its addresses and ports.
//!
//! Knows nothing of the other kinds.
use std::net::IpAddr;
use std::sync::Arc;

use policy::{PodKey, PodPort, Protocol};
use serde::Deserialize;
use serde_json::Value;

use super::{Metadata, problem_at, push_address, typed};
use crate::{Object, Problem};

#[derive(Deserialize)]
struct PodLite {
    #[serde(default)]
    metadata: Metadata,
    spec: Option<PodSpec>,
    status: Option<PodStatus>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct PodSpec {
    node_name: Option<String>,
    host_network: Option<bool>,
    containers: Option<Vec<Container>>,
    init_containers: Option<Vec<Container>>,
    /// Written by us alone ([`super::write`]), for a pod whose labels and ports are not kept.
    #[serde(rename = "portreeveOversized")]
    oversized: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Container {
    restart_policy: Option<String>,
    ports: Option<Vec<ContainerPort>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    name: Option<String>,
    container_port: i64,
    protocol: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct PodStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<PodIp>>,
    start_time: Option<String>,
}

#[derive(Deserialize)]
struct PodIp {
    ip: Option<String>,
}

pub(super) fn read(key: &PodKey, value: Value) -> Result<Object, Vec<Problem>> {
    let mut raw: PodLite = typed("pod", "", value).map_err(|problem| vec![*problem])?;
    let (spec, status) = (raw.spec.unwrap_or_default(), raw.status.unwrap_or_default());
    let mut problems = Vec::new();
    let addresses = pod_addresses(&status, &mut problems);
    let ports = pod_ports(&spec, &mut problems);
    if !problems.is_empty() {
        return Err(problems);
    }
    let created = raw.metadata.creation_timestamp.take();
    let deleted = raw.metadata.deletion_timestamp.take();
    let pod = policy::Pod {
        key: key.clone(),
        uid: raw.metadata.uid.take().unwrap_or_default().into(),
        node: spec.node_name.unwrap_or_default().into(),
        host_network: spec.host_network.unwrap_or(false),
        ports,
        addresses,
        finished: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
        terminating: deleted.is_some(),
        started: status.start_time.or(created).unwrap_or_default().into(),
        labels: raw.metadata.labels(),
        oversized: spec.oversized.unwrap_or(false),
    };
    Ok(Object::from(pod.bounded()))
}

/// `status.podIPs` and `status.podIP`; both are empty until the pod has an address. A pod has at most one address of
/// each family (Kubernetes API reference, PodStatus `podIPs`); otherwise it could claim a whole network.
fn pod_addresses(status: &PodStatus, problems: &mut Vec<Problem>) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    let listed = status.pod_ips.iter().flatten().enumerate();
    let listed = listed.map(|(index, entry)| (format!("status.podIPs[{index}].ip"), &entry.ip));
    let single = [("status.podIP".to_owned(), &status.pod_ip)];
    for (field, ip) in listed.chain(single) {
        let Some(ip) = ip.as_deref().filter(|ip| !ip.is_empty()) else {
            continue;
        };
        let known = addresses.len();
        push_address(&mut addresses, problems, field.clone(), ip);
        let Some(&new) = addresses.get(known) else {
            continue;
        };
        let problem = if is_unassignable(new) {
            format!("a pod cannot have the address {new}")
        } else if addresses[..known]
            .iter()
            .any(|it| it.is_ipv4() == new.is_ipv4())
        {
            let family = if new.is_ipv4() { "IPv4" } else { "IPv6" };
            format!("{new} is a second {family} address")
        } else {
            continue;
        };
        let remedy = "a pod has at most one IPv4 and one IPv6 address: correct the pod's status";
        problems.push(Problem::error(problem, remedy).at(field));
        return Vec::new();
    }
    addresses
}

fn is_unassignable(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    broadcast || address.is_unspecified() || address.is_loopback() || address.is_multicast()
}

/// The ports of the containers, and of those init containers that keep running beside them
/// (sidecars: `restartPolicy: Always`); another init container is gone before the pod serves.
fn pod_ports(spec: &PodSpec, problems: &mut Vec<Problem>) -> Vec<PodPort> {
    let main = spec
        .containers
        .iter()
        .flatten()
        .enumerate()
        .map(|at| ("containers", at));
    let sidecars = spec
        .init_containers
        .iter()
        .flatten()
        .enumerate()
        .filter(|(_, container)| container.restart_policy.as_deref() == Some("Always"))
        .map(|at| ("initContainers", at));
    let mut ports = Vec::new();
    for (list, (at, container)) in main.chain(sidecars) {
        for (index, port) in container.ports.iter().flatten().enumerate() {
            let field = format!("spec.{list}[{at}].ports[{index}]");
            match pod_port(&field, port) {
                Ok(port) => ports.push(port),
                Err(problem) => problems.push(*problem),
            }
        }
    }
    ports
}

fn pod_port(field: &str, port: &ContainerPort) -> Result<PodPort, Box<Problem>> {
    let number = u16::try_from(port.container_port)
        .ok()
        .filter(|number| *number != 0);
    let number = number.ok_or_else(|| {
        let problem = format!("{} is not a port", port.container_port);
        problem_at(
            format!("{field}.containerPort"),
            problem,
            "use a number from 1 to 65535",
        )
    })?;
    let protocol = match port.protocol.as_deref() {
        None | Some("") => Protocol::Tcp,
        Some(text) => text.parse().map_err(|_| {
            let problem = format!("{text:?} is not a protocol");
            problem_at(format!("{field}.protocol"), problem, "use TCP, UDP or SCTP")
        })?,
    };
    let name = port
        .name
        .as_deref()
        .filter(|name| !name.is_empty())
        .map(Arc::from);
    Ok(PodPort {
        name,
        number,
        protocol,
    })
}
