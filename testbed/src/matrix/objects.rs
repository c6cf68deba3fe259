//! The state of a case as Kubernetes objects.
use serde_json::{Value, json};

use crate::cases::world::{self, World};

/// The state of a case as Kubernetes objects.
pub fn objects(nodes: &[Value], world: &World) -> Vec<Value> {
    let mut items = nodes.to_vec();
    items.extend(world.namespaces.iter().map(|(name, labels)| {
        json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": labels } })
    }));
    items.extend(world.pods.values().map(manifest));
    items.extend(world.policies.values().map(policy_object));
    items
}

/// A policy of a case as it is written to the API.
pub fn policy_object(policy: &Value) -> Value {
    let (namespace, _) = world::policy_key(policy);
    let mut policy = policy.clone();
    policy["apiVersion"] = "networking.k8s.io/v1".into();
    policy["kind"] = "NetworkPolicy".into();
    policy["metadata"]["namespace"] = namespace.into();
    policy
}

fn manifest(pod: &world::Pod) -> Value {
    let ports: Vec<Value> = pod
        .ports
        .iter()
        .map(|port| {
            let mut object = json!({ "containerPort": port.number, "protocol": port.protocol });
            if let Some(name) = &port.name {
                object["name"] = name.as_str().into();
            }
            object
        })
        .collect();
    let addresses: Vec<Value> = pod.addresses.iter().map(|ip| json!({ "ip": ip })).collect();
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": pod.namespace, "name": pod.name, "labels": pod.labels,
            "uid": format!("uid-of-{}-{}", pod.namespace, pod.name),
        },
        "spec": { "nodeName": pod.node, "containers": [{ "name": "main", "image": "lab", "ports": ports }] },
        "status": {
            "phase": "Running", "podIP": pod.addresses[0], "podIPs": addresses, "startTime": pod.started,
        },
    })
}
