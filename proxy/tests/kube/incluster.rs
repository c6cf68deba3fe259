//! The in-cluster configuration: the API server's address in variables, token and CA
//! in files that kubelet replaces.
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;

use lab::kubernetes::{API_PORT, API_V4};
use lab::wait_until;
use serde_json::json;
use testbed::runner::Test;

use crate::PORTREEVE;
use crate::away::is_kept_from;
use crate::daemons::{Daemons, PATIENCE};
use testbed::account::NAMESPACE;
use testbed::{deny_ingress, in_force};

pub(crate) const TESTS: &[Test] =
    &testbed::tests![in_cluster_configuration_is_found_and_token_reread];

/// Where every pod has its account's files.
const ACCOUNT: &str = "/run/secrets/kubernetes.io/serviceaccount";

fn in_cluster_configuration_is_found_and_token_reread() {
    let daemons = Daemons::prepared(&[deny_ingress("b")]);
    daemons.bed.install(0, &[]);
    let control = &daemons.control;
    let volume = daemons.bed.file("account");
    fs::create_dir(&volume).unwrap();
    let authority = fs::read(control.authority()).unwrap();
    fs::write(volume.join("ca.crt"), authority).unwrap();
    fs::write(volume.join("namespace"), NAMESPACE).unwrap();
    symlink("..data/token", volume.join("token")).unwrap();
    rotate(&volume, "first", "not a token");

    // As a container has it: no home, no kubeconfig, and the volume at its place.
    let log = daemons.bed.file("in-cluster.log");
    let mut pod = daemons.bed.lab.node(0).command("bwrap");
    pod.args([
        "--die-with-parent",
        "--dev-bind",
        "/",
        "/",
        "--tmpfs",
        "/run",
    ]);
    pod.arg("--ro-bind").arg(&volume).arg(ACCOUNT);
    pod.args([
        "--setenv",
        "HOME",
        "/nonexistent",
        "--unsetenv",
        "KUBECONFIG",
    ]);
    let (host, port) = (API_V4.to_string(), API_PORT.to_string());
    pod.args(["--setenv", "KUBERNETES_SERVICE_HOST", &host]);
    pod.args(["--setenv", "KUBERNETES_SERVICE_PORT", &port]);
    pod.args(["--", PORTREEVE, "run", "--node", "node-0", "--state-dir"]);
    pod.arg(daemons.bed.file("state"));
    pod.stderr(File::create(&log).unwrap());
    let _daemon = pod.spawn().unwrap();
    daemons.says(0, 503, &["does not accept our credentials (401"]);

    // A token that ends with its pod, as kubelet's do, and the one that follows it.
    let bound = bound_token(&daemons);
    rotate(&volume, "second", &bound);
    daemons.says(0, 200, &["ready"]);
    let lab = &daemons.bed.lab;
    is_kept_from(&lab.pod("x/a"), &lab.pod("x/b"));
    rotate(
        &volume,
        "third",
        &control.token(NAMESPACE, "portreeve").unwrap(),
    );
    control
        .request("DELETE", POD, Some(&json!({ "gracePeriodSeconds": 0 })))
        .unwrap();
    control.stop_server();
    daemons.says(0, 200, &["the API server is away"]);
    control.start_server().unwrap();
    let mark = daemons.publish(&[deny_ingress("d")]);
    wait_until(PATIENCE, "the next state", || in_force(&lab.node(0), &mark)).unwrap();
    is_kept_from(&lab.pod("x/a"), &lab.pod("x/d"));
    let log = fs::read_to_string(log).unwrap();
    let (_, after) = log.split_once("enforcing").unwrap();
    assert!(!after.contains("credentials"), "{log}");
}

const POD: &str = "/api/v1/namespaces/portreeve-system/pods/portreeve-0";

/// A token of the account that is valid for as long as a pod is there.
fn bound_token(daemons: &Daemons) -> String {
    let control = &daemons.control;
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "namespace": NAMESPACE, "name": "portreeve-0" },
        "spec": {
            "serviceAccountName": "portreeve", "nodeName": "node-0", "hostNetwork": true,
            "containers": [{ "name": "main", "image": "none" }],
        },
    });
    control.create(&[pod]).unwrap();
    let request = json!({
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": { "boundObjectRef": { "apiVersion": "v1", "kind": "Pod", "name": "portreeve-0" } },
    });
    let path = format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/portreeve/token");
    let answer = control.request("POST", &path, Some(&request)).unwrap();
    answer["status"]["token"].as_str().unwrap().into()
}

/// Replaces the token as kubelet does: a new folder, to which a link is turned at once.
fn rotate(volume: &Path, folder: &str, token: &str) {
    let new = volume.join(folder);
    fs::create_dir(&new).unwrap();
    fs::write(new.join("token"), token).unwrap();
    symlink(folder, volume.join("..data_tmp")).unwrap();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
}
