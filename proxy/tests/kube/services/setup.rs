//! Services, kube-proxies and routes of the tests' clusters.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use lab::kubernetes::{ControlPlane, ProxyMode};
use lab::{Child, Cluster, Host, wait_until};
use serde_json::{Value, json};
use testbed::{DEADLINE, policy};

use crate::api::items;

use super::{
    EXTERNALS, External, PROTOCOLS, ROUTED_TO_OTHER_NODE, ROUTED_TO_SERVERS_NODE, Traffic,
};

/// The chosen ClusterIPs: IPv4, IPv6.
pub(crate) fn cluster_ips(host: u8) -> [IpAddr; 2] {
    [
        Ipv4Addr::new(10, 96, 0, host).into(),
        Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, host.into()).into(),
    ]
}

/// A Service in front of the pods with the label `app`, by every way there is.
pub(crate) fn service(traffic: Traffic, app: &str) -> Value {
    let addresses = |kind| -> Vec<IpAddr> {
        let nodes = [ROUTED_TO_SERVERS_NODE, ROUTED_TO_OTHER_NODE];
        nodes
            .into_iter()
            .flat_map(|node| traffic.address(kind, node))
            .collect()
    };
    let ingress: Vec<_> = addresses(External::LoadBalancer)
        .iter()
        .map(|ip| json!({ "ip": ip }))
        .collect();
    let ips = cluster_ips(traffic.cluster_ip());
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "namespace": "x", "name": traffic.name() },
        "spec": {
            "type": "LoadBalancer",
            "externalTrafficPolicy": format!("{traffic:?}"),
            "clusterIP": ips[0],
            "clusterIPs": ips,
            "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "RequireDualStack",
            "externalIPs": addresses(External::ExternalIp),
            "selector": { "app": app },
            "ports": PROTOCOLS.map(|protocol| json!({
                "name": protocol.to_string().to_lowercase(), "protocol": protocol.to_string(),
                "port": 80, "targetPort": 8080, "nodePort": traffic.node_port(),
            })),
        },
        "status": { "loadBalancer": { "ingress": ingress } },
    })
}

/// The fabric sends the Services' addresses outside of the cluster to the nodes.
pub(crate) fn route_externals(lab: &Cluster) {
    for traffic in [Traffic::Cluster, Traffic::Local] {
        for kind in EXTERNALS {
            for (routed_to, node) in [(ROUTED_TO_SERVERS_NODE, 0), (ROUTED_TO_OTHER_NODE, 1)] {
                let vias = lab.node(node).addresses();
                for (address, via) in traffic.address(kind, routed_to).into_iter().zip(vias) {
                    let mut ip = lab.fabric().command("ip");
                    ip.args([
                        "route",
                        "add",
                        &address.to_string(),
                        "via",
                        &via.to_string(),
                    ]);
                    let said = ip.output().unwrap();
                    assert!(said.status.success(), "{said:?}");
                }
            }
        }
    }
}

/// Publishes the cluster with `services` and starts kube-proxy on every node; waits for its rules.
pub(crate) fn start_kube_proxies(
    control: &ControlPlane,
    lab: &Cluster,
    mode: ProxyMode,
    services: &[Value],
) -> Vec<Child> {
    let mut objects = items(&lab.manifests());
    objects.extend_from_slice(services);
    control.publish(&objects).unwrap();
    let proxies: Vec<_> = lab
        .nodes()
        .map(|node| control.kube_proxy(&node, mode).unwrap())
        .collect();
    for node in lab.nodes() {
        // Its first rules are those of all Services that there were when it began.
        for ip in services
            .iter()
            .flat_map(|it| it["spec"]["clusterIPs"].as_array().unwrap())
        {
            let ip = ip.as_str().unwrap();
            wait_until(
                DEADLINE,
                format!("kube-proxy's rules for {ip} on {}", node.name()),
                || rules(&node, mode).contains(ip),
            )
            .unwrap();
        }
    }
    proxies
}

fn rules(node: &Host, mode: ProxyMode) -> String {
    let dump = |program: &str, args: &[&str]| {
        let mut command = node.command(program);
        command.args(args);
        String::from_utf8_lossy(&command.output().unwrap().stdout).into_owned()
    };
    match mode {
        ProxyMode::Iptables => dump("iptables-save", &[]) + &dump("ip6tables-save", &[]),
        ProxyMode::Nftables => {
            dump("nft", &["list", "table", "ip", "kube-proxy"])
                + &dump("nft", &["list", "table", "ip6", "kube-proxy"])
        }
    }
}

/// Allows nothing but `source`'s addresses to the server.
pub(crate) fn only_from(source: &Host) -> Value {
    let blocks = source.addresses().map(|ip| {
        let length = if ip.is_ipv4() { 32 } else { 128 };
        json!({ "ipBlock": { "cidr": format!("{ip}/{length}") } })
    });
    policy(
        "only-one-source",
        &json!({
            "podSelector": { "matchLabels": { "app": "server" } },
            "policyTypes": ["Ingress"],
            "ingress": [{ "from": blocks }],
        }),
    )
}
