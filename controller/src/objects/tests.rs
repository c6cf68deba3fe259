//! The fields that are read of each object.
use policy::{PodPort, Protocol};
use serde_json::json;

use super::*;

fn pod_of(value: Value) -> policy::Pod {
    let key = key_of(Kind::Pod, &value).expect("a name");
    match read(&key, value) {
        Ok(Object::Pod(pod)) => (*pod).clone(),
        other => panic!("not a pod: {other:?}"),
    }
}

#[test]
fn pod_is_read_with_all_fields_policy_needs() {
    let pod = pod_of(json!({
        "metadata": {
            "name": "a", "namespace": "x", "uid": "u1", "labels": {"app": "web"},
            "creationTimestamp": "2024-01-01T00:00:00Z"
        },
        "spec": {
            "nodeName": "n1",
            "containers": [
                {"name": "c", "ports": [
                    {"name": "http", "containerPort": 80},
                    {"containerPort": 53, "protocol": "UDP"}
                ]},
                {"name": "portless", "ports": null}
            ],
            "initContainers": [
                {"name": "proxy", "restartPolicy": "Always", "ports": [{"name": "mesh", "containerPort": 15001}]},
                {"name": "setup", "ports": [{"name": "never", "containerPort": 1}]}
            ]
        },
        "status": {
            "phase": "Running", "podIP": "10.0.0.1",
            "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
            "startTime": "2024-01-02T00:00:00Z"
        }
    }));
    let port = |name: Option<&str>, number, protocol| PodPort {
        name: name.map(Arc::from),
        number,
        protocol,
    };
    assert_eq!(
        pod,
        policy::Pod {
            key: PodKey {
                namespace: "x".into(),
                name: "a".into()
            },
            uid: "u1".into(),
            labels: Labels::from([("app".into(), "web".into())]),
            node: "n1".into(),
            host_network: false,
            ports: vec![
                port(Some("http"), 80, Protocol::Tcp),
                port(None, 53, Protocol::Udp),
                port(Some("mesh"), 15001, Protocol::Tcp),
            ],
            addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            finished: false,
            terminating: false,
            started: "2024-01-02T00:00:00Z".into(),
            oversized: false,
        }
    );
}

#[test]
fn a_pod_with_a_deletion_timestamp_is_terminating() {
    let metadata =
        |deleted: Value| json!({"metadata": {"name": "a", "deletionTimestamp": deleted}});
    assert!(pod_of(metadata(json!("2024-01-03T00:00:00Z"))).terminating);
    assert!(!pod_of(metadata(Value::Null)).terminating);
}

#[test]
fn missing_or_null_pod_fields_have_deproblems() {
    for value in [
        json!({"metadata": {"name": "a"}}),
        json!({"metadata": {"name": "a", "labels": null, "creationTimestamp": null}, "spec": null, "status": null}),
        json!({"metadata": {"name": "a", "namespace": ""}, "spec": {"containers": null}, "status": {"podIP": "", "podIPs": []}}),
    ] {
        let pod = pod_of(value.clone());
        assert_eq!(pod.key.to_string(), "default/a", "{value}");
        assert_eq!(
            (pod.addresses.len(), pod.ports.len(), &*pod.started),
            (0, 0, ""),
            "{value}"
        );
    }
}

#[test]
fn phases_succeeded_and_failed_end_a_pod() {
    for (phase, finished) in [
        ("Pending", false),
        ("Running", false),
        ("Unknown", false),
        ("Succeeded", true),
        ("Failed", true),
    ] {
        let pod = pod_of(json!({"metadata": {"name": "a"}, "status": {"phase": phase}}));
        assert_eq!(pod.finished, finished, "{phase}");
    }
}

#[test]
fn node_has_its_addresses_and_pod_cidrs() {
    for (value, addresses, cidrs) in [
        (
            json!({
                "metadata": {"name": "n"},
                "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "fd00:1::/64"]},
                "status": {"addresses": [
                    {"type": "InternalIP", "address": "192.168.0.1"},
                    {"type": "Hostname", "address": "n"},
                    {"type": "ExternalIP", "address": "2001:db8::1"}
                ]}
            }),
            vec!["192.168.0.1", "2001:db8::1"],
            vec!["10.1.0.0/24", "fd00:1::/64"],
        ),
        (
            json!({"metadata": {"name": "n"}, "spec": {"podCIDR": "10.1.0.7/24"}}),
            vec![],
            vec!["10.1.0.0/24"],
        ),
        (
            json!({"metadata": {"name": "n"}, "spec": {}, "status": {}}),
            vec![],
            vec![],
        ),
    ] {
        let key = key_of(Kind::Node, &value).expect("a name");
        let Ok(Object::Node(node)) = read(&key, value.clone()) else {
            panic!("{value}")
        };
        let texts = |list: Vec<String>| list;
        assert_eq!(
            texts(node.addresses.iter().map(ToString::to_string).collect()),
            addresses
        );
        assert_eq!(
            texts(node.pod_cidrs.iter().map(ToString::to_string).collect()),
            cidrs
        );
    }
}

#[test]
fn all_problems_of_an_object_are_reported_together() {
    let value = json!({
        "metadata": {"name": "a"},
        "spec": {"containers": [{"ports": [{"containerPort": 70000}, {"containerPort": -1}]}]},
        "status": {"podIP": "10.0.0.256"}
    });
    let key = key_of(Kind::Pod, &value).expect("a name");
    let problems = read(&key, value).expect_err("three problems");
    let fields: Vec<_> = problems
        .iter()
        .filter_map(|problem| problem.field.as_deref())
        .collect();
    assert_eq!(
        fields,
        [
            "status.podIP",
            "spec.containers[0].ports[0].containerPort",
            "spec.containers[0].ports[1].containerPort"
        ]
    );
}

#[test]
fn a_pod_has_one_address_of_each_family() {
    let pod = |status: Value| {
        let value = json!({"metadata": {"name": "a", "namespace": "x"}, "status": status});
        let key = key_of(Kind::Pod, &value).expect("a name");
        read(&key, value)
    };
    for (status, expected) in [
        (
            json!({"podIP": "10.0.0.1", "podIPs": [{"ip": "fd00::1"}]}),
            &["fd00::1", "10.0.0.1"][..],
        ),
        (
            json!({"podIP": "10.0.0.1", "podIPs": [{"ip": "::ffff:10.0.0.1"}]}),
            &["10.0.0.1"],
        ),
        (
            json!({"podIPs": [{"ip": "10.0.0.1"}, {"ip": ""}, {}]}),
            &["10.0.0.1"],
        ),
    ] {
        let Ok(Object::Pod(pod)) = pod(status.clone()) else {
            panic!("{status}")
        };
        let expected = expected.iter().map(|ip| ip.parse().expect("an address"));
        assert_eq!(pod.addresses, expected.collect::<Vec<IpAddr>>(), "{status}");
    }
    for (status, field) in [
        (
            json!({"podIPs": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}]}),
            "status.podIPs[1].ip",
        ),
        (
            json!({"podIP": "10.0.0.2", "podIPs": [{"ip": "10.0.0.1"}]}),
            "status.podIP",
        ),
        (
            json!({"podIPs": [{"ip": "fd00::1"}, {"ip": "10.0.0.1"}, {"ip": "fd00::2"}]}),
            "status.podIPs[2].ip",
        ),
        (json!({"podIP": "0.0.0.0"}), "status.podIP"),
        (json!({"podIP": "::ffff:127.0.0.1"}), "status.podIP"),
        (json!({"podIP": "ff02::1"}), "status.podIP"),
        (json!({"podIP": "255.255.255.255"}), "status.podIP"),
    ] {
        let problems = pod(status.clone()).expect_err("refused");
        let fields: Vec<_> = problems
            .iter()
            .filter_map(|problem| problem.field.as_deref())
            .collect();
        assert_eq!(fields, [field], "{status}");
    }
}
