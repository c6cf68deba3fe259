//! The cluster as Kubernetes objects, in the JSON shape of the API (`v1`).
//!
//! Pure: values in, JSON out.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::plan::NodePlan;
use super::spec::{PodSpec, ServiceSpec};

pub(super) fn namespace(name: &str, labels: &BTreeMap<String, String>) -> Value {
    let mut labels = labels.clone();
    labels.insert("kubernetes.io/metadata.name".into(), name.into());
    json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": { "name": name, "labels": labels },
        "status": { "phase": "Active" },
    })
}

pub(super) fn node(name: &str, plan: &NodePlan) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": name, "labels": { "kubernetes.io/hostname": name } },
        "spec": { "podCIDR": plan.pods_v4, "podCIDRs": [plan.pods_v4, plan.pods_v6] },
        "status": { "addresses": [
            { "type": "InternalIP", "address": plan.v4 },
            { "type": "InternalIP", "address": plan.v6 },
            { "type": "Hostname", "address": name },
        ] },
    })
}

/// What a pod's object says beyond its description.
pub(super) struct Running<'a> {
    pub(super) node: &'a str,
    pub(super) host: &'a NodePlan,
    pub(super) v4: Ipv4Addr,
    pub(super) v6: Ipv6Addr,
    pub(super) uid: &'a str,
    pub(super) started: &'a str,
}

pub(super) fn pod(spec: &PodSpec, running: &Running<'_>) -> Value {
    let ports: Vec<Value> = spec
        .ports
        .iter()
        .map(|port| {
            let mut object = json!({
                "containerPort": port.number,
                "protocol": port.protocol.to_string(),
            });
            if !port.name.is_empty() {
                object["name"] = json!(port.name);
            }
            object
        })
        .collect();
    let mut object = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": spec.namespace,
            "name": spec.name,
            "uid": running.uid,
            "labels": spec.labels,
        },
        "spec": {
            "nodeName": running.node,
            "containers": [{ "name": "main", "image": "lab", "ports": ports }],
        },
        "status": {
            "phase": "Running",
            "hostIP": running.host.v4,
            "hostIPs": [{ "ip": running.host.v4 }, { "ip": running.host.v6 }],
            "podIP": running.v4,
            "podIPs": [{ "ip": running.v4 }, { "ip": running.v6 }],
            "startTime": running.started,
        },
    });
    if spec.host_network {
        object["spec"]["hostNetwork"] = json!(true);
    }
    object
}

pub(super) fn service(spec: &ServiceSpec, v4: Ipv4Addr, v6: Ipv6Addr) -> Value {
    let ports: Vec<Value> = spec
        .ports
        .iter()
        .map(|port| {
            json!({
                "name": format!("{}-{}", port.protocol.keyword(), port.number),
                "port": port.number,
                "targetPort": port.target,
                "protocol": port.protocol.to_string(),
            })
        })
        .collect();
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "namespace": spec.namespace, "name": spec.name },
        "spec": {
            "type": "ClusterIP",
            "clusterIP": v4,
            "clusterIPs": [v4, v6],
            "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "RequireDualStack",
            "selector": spec.selector,
            "ports": ports,
        },
    })
}

pub(super) fn list(items: &[Value]) -> Value {
    json!({ "apiVersion": "v1", "kind": "List", "items": items })
}

/// Now, in the API's form of a time (RFC 3339, UTC, whole seconds).
pub(super) fn now() -> String {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    rfc3339(since.as_secs())
}

/// The proleptic Gregorian date of a Unix time, by Howard Hinnant's `civil_from_days`.
fn rfc3339(seconds: u64) -> String {
    let (days, of_day) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_in_api_format() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_795_384_800, "2026-11-22T22:00:00Z"),
        ] {
            assert_eq!(rfc3339(seconds), expected);
        }
    }

    #[test]
    fn pod_object_has_all_fields_policy_needs() {
        let plan = NodePlan::new(0);
        let spec = PodSpec::new("x", "a")
            .label("app", "web")
            .port("http", 80)
            .host_network();
        let running = Running {
            node: "node-0",
            host: &plan,
            v4: plan.v4,
            v6: plan.v6,
            uid: "u",
            started: "2026-01-01T00:00:00Z",
        };
        let object = pod(&spec, &running);
        assert_eq!(object["spec"]["containers"][0]["ports"][0]["name"], "http");
        assert_eq!(object["spec"]["hostNetwork"], true);
        assert_eq!(object["status"]["podIPs"][1]["ip"], "fd00:172:18::a");
    }
}
