//! Kubernetes objects as JSON: where they are in the API, and those that controllers make.
//!
//! Pure: values in, values out.

use serde_json::{Value, json};

use super::error::KubernetesError;

/// Kinds without a namespace, as far as the lab publishes them.
const CLUSTER_WIDE: [&str; 8] = [
    "Namespace",
    "Node",
    "ClusterRole",
    "ClusterRoleBinding",
    "PriorityClass",
    "CustomResourceDefinition",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
];

/// The API's path of an object, by its kind, namespace and name.
pub(super) fn path(object: &Value) -> Result<String, KubernetesError> {
    let field = |name: &'static str, value: &Value| match value.as_str() {
        Some(text) if !text.is_empty() => Ok(text.to_owned()),
        _ => Err(KubernetesError::Incomplete {
            field: name,
            object: object.to_string(),
        }),
    };
    let version = field("apiVersion", &object["apiVersion"])?;
    let kind = field("kind", &object["kind"])?;
    let name = field("metadata.name", &object["metadata"]["name"])?;
    let root = if version.contains('/') { "apis" } else { "api" };
    let mut path = format!("/{root}/{version}");
    if !CLUSTER_WIDE.contains(&kind.as_str()) {
        let namespace = field("metadata.namespace", &object["metadata"]["namespace"])?;
        path += &format!("/namespaces/{namespace}");
    }
    Ok(format!("{path}/{}/{name}", plural(&kind)))
}

/// A kind's resource, by the rule that the kinds of the lab follow.
fn plural(kind: &str) -> String {
    let lower = kind.to_lowercase();
    if let Some(stem) = lower.strip_suffix('y') {
        return format!("{stem}ies");
    }
    let ending = if lower.ends_with('s') { "es" } else { "s" };
    lower + ending
}

/// A namespace that exists because an object is in it.
pub(super) fn namespace(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } })
}

/// The account that every pod has unless it asks for another.
pub(super) fn default_account(namespace: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": { "namespace": namespace, "name": "default" },
    })
}

/// The EndpointSlices of a Service: one of each family, with the pods that it selects.
pub(super) fn endpoint_slices(service: &Value, pods: &[&Value]) -> Vec<Value> {
    let (metadata, spec) = (&service["metadata"], &service["spec"]);
    let Some(selector) = spec["selector"].as_object().filter(|it| !it.is_empty()) else {
        return Vec::new();
    };
    let selected: Vec<&Value> = pods
        .iter()
        .copied()
        .filter(|pod| pod["metadata"]["namespace"] == metadata["namespace"])
        .filter(|pod| {
            let labels = &pod["metadata"]["labels"];
            selector.iter().all(|(key, value)| labels[key] == *value)
        })
        .collect();
    let name = metadata["name"].as_str().unwrap_or_default();
    ["IPv4", "IPv6"]
        .map(|family| {
            json!({
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "namespace": metadata["namespace"],
                    "name": format!("{name}-{}", family.to_lowercase()),
                    "labels": { "kubernetes.io/service-name": name },
                },
                "addressType": family,
                "ports": ports(spec),
                "endpoints": endpoints(family, &selected),
            })
        })
        .into()
}

fn ports(spec: &Value) -> Vec<Value> {
    let ports = spec["ports"].as_array().into_iter().flatten();
    ports
        .map(|port| {
            json!({
                "name": port["name"].as_str().unwrap_or_default(),
                "protocol": port["protocol"].as_str().unwrap_or("TCP"),
                "port": port.get("targetPort").unwrap_or_else(|| &port["port"]),
            })
        })
        .collect()
}

fn endpoints(family: &str, pods: &[&Value]) -> Vec<Value> {
    pods.iter()
        .filter_map(|pod| {
            let addresses = pod["status"]["podIPs"].as_array()?.iter();
            let address = addresses
                .filter_map(|it| it["ip"].as_str())
                .find(|ip| ip.contains(':') == (family == "IPv6"))?;
            Some(json!({
                "addresses": [address],
                "nodeName": pod["spec"]["nodeName"],
                "conditions": { "ready": true, "serving": true, "terminating": false },
            }))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(version: &str, kind: &str) -> Value {
        json!({
            "apiVersion": version, "kind": kind,
            "metadata": { "namespace": "x", "name": "n" },
        })
    }

    #[test]
    fn object_path_has_kind_namespace_and_name() {
        for (version, kind, expected) in [
            ("v1", "Node", "/api/v1/nodes/n"),
            ("v1", "Pod", "/api/v1/namespaces/x/pods/n"),
            (
                "networking.k8s.io/v1",
                "NetworkPolicy",
                "/apis/networking.k8s.io/v1/namespaces/x/networkpolicies/n",
            ),
            (
                "scheduling.k8s.io/v1",
                "PriorityClass",
                "/apis/scheduling.k8s.io/v1/priorityclasses/n",
            ),
        ] {
            assert_eq!(path(&object(version, kind)).unwrap(), expected);
        }
    }

    #[test]
    fn object_without_a_namespace_is_rejected() {
        let mut pod = object("v1", "Pod");
        pod["metadata"]["namespace"] = Value::Null;
        let error = path(&pod).unwrap_err().to_string();
        assert!(error.contains("has no metadata.namespace"), "{error}");
    }

    #[test]
    fn endpointslices_have_addresses_of_selected_pods() {
        let mut service = object("v1", "Service");
        service["spec"] = json!({
            "selector": { "app": "web" },
            "ports": [{ "name": "http", "port": 80, "targetPort": 8080 }],
        });
        let pod = |app: &str, last: u8| {
            let mut pod = object("v1", "Pod");
            pod["metadata"]["labels"] = json!({ "app": app });
            pod["spec"] = json!({ "nodeName": "node-0" });
            let ips =
                json!([{ "ip": format!("10.0.0.{last}") }, { "ip": format!("fd00::{last}") }]);
            pod["status"] = json!({ "podIPs": ips });
            pod
        };
        let pods = [pod("web", 1), pod("db", 2), pod("web", 3)];
        let slices = endpoint_slices(&service, &pods.iter().collect::<Vec<_>>());
        let addresses = |slice: &Value| -> Vec<Value> {
            let endpoints = slice["endpoints"].as_array().unwrap();
            endpoints
                .iter()
                .map(|it| it["addresses"][0].clone())
                .collect()
        };
        assert_eq!(addresses(&slices[0]), ["10.0.0.1", "10.0.0.3"]);
        assert_eq!(addresses(&slices[1]), ["fd00::1", "fd00::3"]);
        assert_eq!(slices[1]["ports"][0]["port"], 8080);
    }
}
