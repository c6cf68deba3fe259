//! The small cluster of most tests, and NetworkPolicies for it.
use lab::{Cluster, PodSpec, Protocol, ServiceSpec};
use serde_json::{Value, json};

/// Pods x/a, x/b and x/d on node 0 and x/c on node 1, all serving 80 and 81, and a Service in front
/// of each server.
pub fn small() -> lab::Builder {
    let pod = |name: &str, node: usize| {
        PodSpec::new("x", name)
            .node(node)
            .label("pod", name)
            .port("http", 80)
    };
    let service = |name: &str| {
        ServiceSpec::new("x", name)
            .selects("pod", name)
            .port(80, 80)
            .port(81, 81)
            .port(82, 82)
            .port(83, 83)
            .port_of(53, 53, Protocol::Udp)
            .port_of(54, 54, Protocol::Udp)
            .port_of(55, 55, Protocol::Udp)
    };
    Cluster::builder()
        .nodes(2)
        .pods([pod("a", 0), pod("b", 0), pod("d", 0), pod("c", 1)])
        .services([service("b"), service("c")])
}

/// A NetworkPolicy object.
pub fn policy(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": { "namespace": "x", "name": name },
        "spec": spec,
    })
}

/// Isolates every pod of namespace x both ways and allows everything: all goes through
/// the proxy.
pub fn allow_all() -> Value {
    let spec = json!({ "podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [{}], "egress": [{}] });
    policy("allow-all", &spec)
}

/// Denies all ingress of one pod.
pub fn deny_ingress(pod: &str) -> Value {
    let spec =
        json!({ "podSelector": { "matchLabels": { "pod": pod } }, "policyTypes": ["Ingress"] });
    policy(&format!("deny-ingress-{pod}"), &spec)
}

/// Denies all egress of one pod.
pub fn deny_egress(pod: &str) -> Value {
    let spec =
        json!({ "podSelector": { "matchLabels": { "pod": pod } }, "policyTypes": ["Egress"] });
    policy(&format!("deny-egress-{pod}"), &spec)
}

/// Allows all ingress of one pod, through the proxy.
pub fn allow_ingress(pod: &str) -> Value {
    let spec = json!({ "podSelector": { "matchLabels": { "pod": pod } }, "policyTypes": ["Ingress"], "ingress": [{}] });
    policy(&format!("allow-ingress-{pod}"), &spec)
}

/// A policy that selects no pod: a stamp on the state that it comes with.
pub fn marker(mark: &str) -> Value {
    let mut marker = policy(
        mark,
        &json!({ "podSelector": {}, "policyTypes": ["Ingress"] }),
    );
    marker["metadata"]["namespace"] = "marks".into();
    marker
}
