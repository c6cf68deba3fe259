//! The lab's cluster in the real API: what the API server makes of it, and what `kubectl` can do.
use lab::kubernetes::{API_PORT, API_V4, KubernetesError};
use serde_json::{Value, json};
use testbed::runner::Test;

use crate::control;
use testbed::{DEADLINE, deny_ingress, small};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    lab_objects_are_in_api_and_kubectl_editable,
    unpublished_objects_are_deleted_from_the_api,
    service_account_has_only_its_rbac_permissions,
    restarted_api_server_keeps_its_state,
];

fn lab_objects_are_in_api_and_kubectl_editable() {
    let lab = small().build().unwrap();
    let control = control::joined(&lab);
    control.publish(&items(&lab.manifests())).unwrap();
    let pod = control
        .request("GET", "/api/v1/namespaces/x/pods/a", None)
        .unwrap();
    assert_eq!(
        pod["status"]["podIPs"][1]["ip"],
        lab.pod("x/a").ipv6().to_string()
    );
    assert_eq!(pod["spec"]["nodeName"], "node-0");
    let node = control
        .request("GET", "/api/v1/nodes/node-1", None)
        .unwrap();
    assert_eq!(
        node["status"]["addresses"][0]["address"],
        lab.node(1).ipv4().to_string()
    );
    // The server's own work on it: defaults, and the projected token of the account.
    assert_eq!(pod["spec"]["restartPolicy"], "Always");
    assert!(pod["spec"]["volumes"][0]["projected"].is_object(), "{pod}");

    control
        .kubectl(&["-n", "x", "label", "pod", "a", "tier=front"], "")
        .unwrap();
    control
        .kubectl(&["label", "namespace", "x", "team=red"], "")
        .unwrap();
    let policy = deny_ingress("a").to_string();
    control.kubectl(&["apply", "-f", "-"], &policy).unwrap();
    let labels =
        |path: &str| control.request("GET", path, None).unwrap()["metadata"]["labels"].clone();
    assert_eq!(labels("/api/v1/namespaces/x/pods/a")["tier"], "front");
    assert_eq!(labels("/api/v1/namespaces/x")["team"], "red");
    let wide = control
        .kubectl(&["-n", "x", "get", "networkpolicies", "-o", "name"], "")
        .unwrap();
    assert_eq!(
        wide.trim(),
        "networkpolicy.networking.k8s.io/deny-ingress-a"
    );
    control
        .kubectl(
            &["-n", "x", "delete", "networkpolicy", "deny-ingress-a"],
            "",
        )
        .unwrap();
    // From a node, as the daemon reaches it.
    let server = lab
        .node(1)
        .connect((API_V4, API_PORT).into(), DEADLINE)
        .unwrap();
    assert!(server.is_connected(), "{server}");
}

fn unpublished_objects_are_deleted_from_the_api() {
    let mut lab = small().build().unwrap();
    let control = control::joined(&lab);
    control.publish(&items(&lab.manifests())).unwrap();
    let uid = |name: &str| {
        let path = format!("/api/v1/namespaces/x/pods/{name}");
        let pod = control.request("GET", &path, None)?;
        Ok::<_, KubernetesError>(pod["metadata"]["uid"].clone())
    };
    let first = uid("a").unwrap();
    lab.remove_pod("x/b").unwrap();
    lab.relabel_pod("x/a", [("pod", "a"), ("tier", "front")])
        .unwrap();
    control.publish(&items(&lab.manifests())).unwrap();
    assert!(matches!(
        uid("b"),
        Err(KubernetesError::Refused { status: 404, .. })
    ));
    assert_eq!(
        uid("a").unwrap(),
        first,
        "a pod with other labels is the same pod"
    );
    control.publish(&[]).unwrap();
    let left = control.request("GET", "/api/v1/namespaces", None).unwrap();
    let names: Vec<_> = left["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| &it["metadata"]["name"])
        .collect();
    assert!(!names.contains(&&json!("x")), "{names:?}");
}

fn service_account_has_only_its_rbac_permissions() {
    let lab = small().build().unwrap();
    let control = control::joined(&lab);
    let role = |kind: &str, extra: Value| {
        let mut role = json!({ "apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": { "name": "reader" } });
        role.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        role
    };
    let mut objects = items(&lab.manifests());
    objects.push(role(
        "ClusterRole",
        json!({
            "rules": [{ "apiGroups": [""], "resources": ["pods"], "verbs": ["list"] }],
        }),
    ));
    objects.push(role("ClusterRoleBinding", json!({
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "reader" },
        "subjects": [{ "kind": "ServiceAccount", "namespace": "x", "name": "default" }],
    })));
    control.publish(&objects).unwrap();
    let token = control.token("x", "default").unwrap();
    let as_account = |args: &[&str]| control.kubectl(&[&["--token", &token], args].concat(), "");
    let pods = as_account(&["-n", "x", "get", "pods", "-o", "name"]).unwrap();
    assert_eq!(pods.lines().count(), 4, "{pods}");
    let error = as_account(&["get", "nodes"]).unwrap_err().to_string();
    assert!(error.contains("system:serviceaccount:x:default"), "{error}");
}

fn restarted_api_server_keeps_its_state() {
    let lab = small().build().unwrap();
    let control = control::joined(&lab);
    control.publish(&items(&lab.manifests())).unwrap();
    control.stop_server();
    let away = lab
        .node(0)
        .connect((API_V4, API_PORT).into(), DEADLINE)
        .unwrap();
    assert!(!away.is_connected());
    control.start_server().unwrap();
    control
        .request("GET", "/api/v1/namespaces/x/pods/a", None)
        .unwrap();
}

/// The objects of a List.
pub(crate) fn items(list: &Value) -> Vec<Value> {
    list["items"].as_array().unwrap().clone()
}
