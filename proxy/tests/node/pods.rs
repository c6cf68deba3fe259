//! Pods that kubelet starts, and the connections between them.
use lab::kubernetes::BUSYBOX;
use lab::{Host, Outcome, wait_until};
use serde_json::{Value, json};

use crate::room::{PATIENCE, Room};
use testbed::SEVERAL_SYNS;

pub(crate) const PORT: u16 = 8080;

/// Makes a namespace and waits until pods can be made in it.
pub(crate) fn namespace(room: &Room, name: &str) {
    room.apply(&json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } }));
    let path = format!("/api/v1/namespaces/{name}/serviceaccounts/default");
    wait_until(PATIENCE, path.clone(), || {
        room.control.request("GET", &path, None).is_ok()
    })
    .unwrap();
}

/// A pod of one container, which has a shell and the usual programs, and its own name as label `pod`.
pub(crate) fn pod(namespace: &str, name: &str, command: &[&str]) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "namespace": namespace, "name": name, "labels": { "pod": name } },
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": false,
            "containers": [{ "name": "main", "image": BUSYBOX, "command": command }],
        },
    })
}

/// A pod that serves HTTP on [`PORT`] and logs who asks.
pub(crate) fn server(namespace: &str, name: &str) -> Value {
    pod(
        namespace,
        name,
        &["httpd", "-f", "-vv", "-p", "8080", "-h", "/etc"],
    )
}

/// A pod that does nothing, for a test to dial from.
pub(crate) fn idle(namespace: &str, name: &str) -> Value {
    pod(namespace, name, &["sleep", "2147483647"])
}

/// Starts a pod and waits until it is ready.
pub(crate) fn started(room: &Room, pod: &Value) -> Host {
    room.apply(pod);
    ready(room, pod)
}

/// Waits until a pod is ready.
pub(crate) fn ready(room: &Room, pod: &Value) -> Host {
    let metadata = &pod["metadata"];
    let [namespace, name] = ["namespace", "name"].map(|key| metadata[key].as_str().unwrap());
    let pod = room.wait_for_pod((namespace, name), "to be ready", is_ready);
    room.node.pod(&pod).unwrap()
}

pub(crate) fn is_ready(pod: &Value) -> bool {
    let mut conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
    conditions.any(|it| it["type"] == "Ready" && it["status"] == "True")
}

/// A NetworkPolicy that lets those labelled so reach one pod, and nobody else.
pub(crate) fn only(namespace: &str, name: &str, to: &str, from: &Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": { "namespace": namespace, "name": name },
        "spec": {
            "podSelector": { "matchLabels": { "pod": to } },
            "policyTypes": ["Ingress"],
            "ingress": [{ "from": [{ "podSelector": { "matchLabels": from } }] }],
        },
    })
}

/// Both families reach the server.
pub(crate) fn reaches(from: &Host, to: &Host) {
    for to in to.addrs(PORT) {
        let outcome = from.connect(to, SEVERAL_SYNS).unwrap();
        assert!(
            matches!(outcome, Outcome::Connected { .. }),
            "{} to {to}: {outcome}",
            from.name()
        );
    }
}

/// Neither family reaches the server: its client hears nothing.
pub(crate) fn is_kept_from(from: &Host, to: &Host) {
    for outcome in from.connect_all(&to.addrs(PORT), SEVERAL_SYNS).unwrap() {
        assert!(
            matches!(outcome, Outcome::TimedOut),
            "{}: {outcome}",
            from.name()
        );
    }
}
