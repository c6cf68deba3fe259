//! An object of the `policy` crate back in the API's form: the reverse of reading.
//!
//! What is written here is read as the same object again. The rules of a policy are not kept in the
//! form in which they were written, so its `spec` is for the caller to add.
use policy::{Labels, Node, Pod, PodPort};
use serde_json::{Map, Value, json};

use super::Kind;
use crate::Object;

/// `object` as JSON, with `apiVersion` and `kind`.
pub(crate) fn to_json(object: &Object) -> Value {
    let (kind, mut value) = match object {
        Object::Namespace(namespace) => (
            Kind::Namespace,
            json!({"metadata": {"name": &**namespace.name(), "labels": labels(namespace.labels())}}),
        ),
        Object::Node(node) => (Kind::Node, self::node(node)),
        Object::Pod(pod) => (Kind::Pod, self::pod(pod)),
        Object::NetworkPolicy(policy) => {
            let (name, namespace) = (&*policy.key().name, &*policy.key().namespace);
            let metadata = json!({"name": name, "namespace": namespace});
            (Kind::NetworkPolicy, json!({ "metadata": metadata }))
        }
    };
    value["apiVersion"] = kind.api_version().into();
    value["kind"] = kind.name().into();
    value
}

fn labels(labels: &Labels) -> Map<String, Value> {
    labels
        .iter()
        .map(|(key, value)| ((**key).to_owned(), (**value).into()))
        .collect()
}

fn node(node: &Node) -> Value {
    let address = |address| json!({"type": "InternalIP", "address": address});
    json!({
        "metadata": {"name": &*node.name},
        "spec": {"podCIDRs": node.pod_cidrs},
        "status": {"addresses": node.addresses.iter().map(address).collect::<Vec<_>>()},
    })
}

fn pod(pod: &Pod) -> Value {
    let port = |port: &PodPort| {
        json!({
            "name": port.name.as_deref(),
            "containerPort": port.number,
            "protocol": port.protocol.to_string(),
        })
    };
    let addresses = pod.addresses.iter().map(|ip| json!({ "ip": ip }));
    let ports: Vec<Value> = pod.ports.iter().map(port).collect();
    json!({
        "metadata": {
            "name": &*pod.key.name,
            "namespace": &*pod.key.namespace,
            "uid": &*pod.uid,
            "labels": labels(&pod.labels),
            // Only whether there is one is read.
            "deletionTimestamp": pod.terminating.then_some("1970-01-01T00:00:00Z"),
        },
        "spec": {
            "nodeName": &*pod.node,
            "hostNetwork": pod.host_network,
            "portreeveOversized": pod.oversized,
            "containers": [{ "ports": ports }],
        },
        "status": {
            "phase": if pod.finished { "Succeeded" } else { "Running" },
            "podIPs": addresses.collect::<Vec<_>>(),
            "startTime": &*pod.started,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::super::{key_of, read};
    use super::*;

    #[test]
    fn written_object_reads_back_the_same() {
        let pod = json!({
            "metadata": {"name": "a", "namespace": "x", "uid": "1", "labels": {"app": "a"},
                "deletionTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"nodeName": "n1", "hostNetwork": true, "containers": [
                {"ports": [{"containerPort": 80, "name": "http"}, {"containerPort": 53, "protocol": "UDP"}]}
            ]},
            "status": {"phase": "Failed", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
                "startTime": "2026-01-01T00:00:00Z"}
        });
        let bare = json!({"metadata": {"name": "b", "namespace": "x"}});
        let labels: Map<String, Value> = (0..=Pod::LABELS)
            .map(|number| (format!("k{number}"), "v".into()))
            .collect();
        let oversized = json!({"metadata": {"name": "c", "namespace": "x", "labels": labels}});
        let namespace = json!({"metadata": {"name": "x", "labels": {"team": "a"}}});
        let node = json!({
            "metadata": {"name": "n1"},
            "spec": {"podCIDRs": ["10.0.0.0/24", "fd00::/64"]},
            "status": {"addresses": [{"type": "ExternalIP", "address": "192.168.0.1"}]}
        });
        for (kind, value) in [
            (Kind::Pod, pod),
            (Kind::Pod, bare),
            (Kind::Pod, oversized),
            (Kind::Namespace, namespace),
            (Kind::Node, node),
        ] {
            let key = key_of(kind, &value).expect("a name");
            let object = read(&key, value).expect("valid");
            let written = to_json(&object);
            assert_eq!(key_of(kind, &written).expect("a name"), key);
            assert_eq!(read(&key, written).expect("valid"), object);
        }
    }
}
