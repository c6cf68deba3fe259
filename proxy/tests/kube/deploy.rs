//! What `deploy/` holds, before a real API server: it takes every object as it is, and the DaemonSet's
//! own account may do what the daemon does and nothing else.
use std::fs::{self, File};
use std::path::PathBuf;

use lab::kubernetes::ControlPlane;
use lab::{Child, PodSpec, wait_until};
use serde_json::{Value, json};
use testbed::runner::Test;

use crate::PORTREEVE;
use crate::control;
use testbed::{DEADLINE, TestCluster, allow_all, ask, small};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    every_manifest_is_accepted_by_the_api_server,
    daemon_needs_exactly_the_permissions_it_has,
    account_may_only_remove_taint_of_own_node,
];

const NAMESPACE: &str = "portreeve-system";
const ACCOUNT: &str = "portreeve";
const TAINT: &str = "portreeve.io/agent-not-ready";
const NODES: &str = "/api/v1/nodes";

fn every_manifest_is_accepted_by_the_api_server() {
    let lab = small().build().unwrap();
    let control = control::joined(&lab);
    // What is to be only tried needs the namespace, and a pod its account.
    control.publish(&built(&control, "base")).unwrap();
    let mut directories = vec!["base".to_owned()];
    for overlay in fs::read_dir(deploy("overlays")).unwrap() {
        let name = overlay.unwrap().file_name();
        directories.push(format!("overlays/{}", name.to_str().unwrap()));
    }
    for directory in &directories {
        for object in built(&control, directory) {
            let pod = pod(&object, "tried");
            tried(&control, directory, &object);
            if pod["spec"].is_object() {
                tried(&control, directory, &pod);
            }
        }
    }
    for recipe in fs::read_dir(deploy("samples/recipes")).unwrap() {
        let path = recipe.unwrap().path();
        let yaml = fs::read_to_string(&path).unwrap();
        tried(&control, path.to_str().unwrap(), &objects(&yaml)[0]);
    }
}

fn daemon_needs_exactly_the_permissions_it_has() {
    let bed = TestCluster::bare(small().pod(PodSpec::new("x", "host").node(0).host_network()));
    bed.install(0, &[]);
    let control = control::joined(&bed.lab);
    let objects = installed(&bed, &control);
    let token = token(&control);
    let permissions = permissions(&objects);
    assert!(permissions.len() > 6, "{permissions:?}");

    // Without one of them the daemon says which. Lists are used where they are not streamed.
    for streamed in [true, false] {
        if !streamed {
            control.stop_server();
            control
                .start_server_with(&["--feature-gates=WatchList=false"])
                .unwrap();
        }
        for missing in permissions
            .iter()
            .filter(|it| (it.verb != "list") == streamed)
        {
            control.publish(&without(&objects, missing)).unwrap();
            taint(&control, "node-0");
            wait_for_permissions(&control, &permissions, Some(missing));
            let daemon = Daemon::start(&bed, &control, &token);
            let complaint = format!("not permitted to {} {}", missing.verb, missing.resource);
            daemon.wait(&complaint, |log| log.contains(&complaint));
        }
        // With all of them it does all that it does, and none is missing.
        control.publish(&objects).unwrap();
        taint(&control, "node-0");
        wait_for_permissions(&control, &permissions, None);
        let daemon = Daemon::start(&bed, &control, &token);
        let ready = || ask(&bed.lab.node(0), "/readyz").is_some_and(|it| it.status == 200);
        daemon.wait("the daemon to be ready", |_| ready());
        daemon.wait("the taint to go", |_| {
            taints(&control, "node-0") == [other_taint()]
        });
        daemon.wait("an Event on the policy", |_| {
            let path = "/apis/events.k8s.io/v1/namespaces/x/events";
            control.request("GET", path, None).unwrap()["items"][0]["regarding"]["name"]
                == "allow-all"
        });
        let log = daemon.log();
        assert!(!log.contains("not permitted"), "{log}");
    }
    control.stop_server();
    control.start_server().unwrap();
}

fn account_may_only_remove_taint_of_own_node() {
    let bed = TestCluster::bare(small());
    let control = control::joined(&bed.lab);
    let objects = installed(&bed, &control);
    wait_for_permissions(&control, &permissions(&objects), None);
    let token = token(&control);
    let patch = |node: &str, patch: &Value| {
        let patch = patch.to_string();
        let args = [
            "--token",
            &token,
            "patch",
            "node",
            node,
            "--type=merge",
            "-p",
            &patch,
        ];
        control
            .kubectl(&args, "")
            .map_err(|error| error.to_string())
    };
    taint(&control, "node-0");
    taint(&control, "node-1");
    let off = json!({ "spec": { "taints": [other_taint()] } });
    // The API server takes a while to heed a new policy; meanwhile nothing is lost but this taint.
    wait_until(DEADLINE, "the admission policy", || {
        let refused = patch("node-1", &off).is_err();
        taint(&control, "node-1");
        refused
    })
    .unwrap();
    // The right change, with one more in it.
    let with = |place: &str, field: &str, value: Value| {
        let mut change = off.clone();
        change[place][field] = value;
        change
    };
    let (elsewhere, others, more) = ("that it runs on", "no other taint", "nothing of a Node but");
    for (node, change, complaint) in [
        ("node-1", off.clone(), elsewhere),
        ("node-0", json!({ "spec": { "taints": [] } }), others),
        ("node-0", with("spec", "unschedulable", json!(true)), more),
        (
            "node-0",
            with("metadata", "labels", json!({ "a": "b" })),
            more,
        ),
        (
            "node-0",
            with("metadata", "annotations", json!({ "a": "b" })),
            more,
        ),
    ] {
        let error = patch(node, &change).unwrap_err();
        assert!(error.contains(complaint), "{change}: {error}");
    }
    patch("node-0", &off).unwrap();
    assert_eq!(taints(&control, "node-0"), [other_taint()]);
}

/// Has the server decode, admit and validate an object, with unknown fields as errors.
fn tried(control: &ControlPlane, of: &str, object: &Value) {
    let tries = ["apply", "--dry-run=server", "--validate=strict"];
    let args = [&tries[..], &["--warnings-as-errors", "-f", "-"]].concat();
    let said = control.kubectl(&args, &object.to_string());
    let said = said.unwrap_or_else(|error| panic!("{of}: {error}\n{object}"));
    assert!(said.contains("(server dry run)"), "{of}: {said}");
}

/// The pod that a controller creates from an object: admission errors go to the controller,
/// not to the user who applies the object.
fn pod(object: &Value, name: &str) -> Value {
    let spec = &object["spec"]["template"]["spec"];
    let metadata = json!({ "namespace": NAMESPACE, "name": name });
    json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec })
}

/// The cluster with Portreeve applied, a daemon's pod on node 0, and a policy with a fault.
fn installed(bed: &TestCluster, control: &ControlPlane) -> Vec<Value> {
    let mut objects = built(control, "overlays/startup-taint");
    let daemonset = objects.iter().find(|it| it["kind"] == "DaemonSet").unwrap();
    let mut pod = pod(daemonset, "portreeve-0");
    pod["spec"]["nodeName"] = "node-0".into();
    objects.extend([pod, allow_all()]);
    objects.extend(bed.lab.manifests()["items"].as_array().unwrap().clone());
    control.publish(&objects).unwrap();
    objects
}

/// A token as kubelet asks for it: of the account, bound to the pod, which names its node.
fn token(control: &ControlPlane) -> String {
    let path = format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{ACCOUNT}/token");
    let pod = json!({ "apiVersion": "v1", "kind": "Pod", "name": "portreeve-0" });
    let request = json!({
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": { "boundObjectRef": pod },
    });
    let answer = control.request("POST", &path, Some(&request)).unwrap();
    answer["status"]["token"].as_str().unwrap().into()
}

/// One verb on one resource.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Permission {
    role: String,
    group: String,
    resource: String,
    verb: String,
}

/// All that the roles among `objects` grant.
fn permissions(objects: &[Value]) -> Vec<Permission> {
    let mut all = Vec::new();
    for role in objects.iter().filter(|it| it["kind"] == "ClusterRole") {
        let strings = |list: &Value| serde_json::from_value::<Vec<String>>(list.clone()).unwrap();
        for rule in role["rules"].as_array().unwrap() {
            for group in strings(&rule["apiGroups"]) {
                for resource in strings(&rule["resources"]) {
                    all.extend(strings(&rule["verbs"]).into_iter().map(|verb| Permission {
                        role: role["metadata"]["name"].as_str().unwrap().into(),
                        group: group.clone(),
                        resource: resource.clone(),
                        verb,
                    }));
                }
            }
        }
    }
    all
}

/// The objects with one permission taken out of its role.
fn without(objects: &[Value], missing: &Permission) -> Vec<Value> {
    let granted = permissions(objects);
    let mut objects = objects.to_vec();
    for role in objects.iter_mut().filter(|it| it["kind"] == "ClusterRole") {
        let name = role["metadata"]["name"].clone();
        let kept = granted
            .iter()
            .filter(|it| name == it.role && *it != missing);
        let rule = |it: &Permission| json!({ "apiGroups": [it.group], "resources": [it.resource], "verbs": [it.verb] });
        role["rules"] = kept.map(rule).collect();
    }
    objects
}

/// Waits until the API server applies the present roles.
fn wait_for_permissions(control: &ControlPlane, all: &[Permission], missing: Option<&Permission>) {
    for permission in all {
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
            "spec": {
                "user": format!("system:serviceaccount:{NAMESPACE}:{ACCOUNT}"),
                "resourceAttributes": {
                    "group": permission.group, "resource": permission.resource, "verb": permission.verb,
                },
            },
        });
        let path = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
        wait_until(DEADLINE, format!("{permission:?}"), || {
            let answer = control.request("POST", path, Some(&review)).unwrap();
            answer["status"]["allowed"] == (Some(permission) != missing)
        })
        .unwrap();
    }
}

fn other_taint() -> Value {
    json!({ "key": "example.org/other", "effect": "NoSchedule" })
}

/// Taints a Node as its kubelet does, beside another taint.
fn taint(control: &ControlPlane, node: &str) {
    let ours = json!({ "key": TAINT, "value": "true", "effect": "NoSchedule" });
    let patch = json!({ "spec": { "taints": [ours, other_taint()] } });
    control
        .request("PATCH", &format!("{NODES}/{node}"), Some(&patch))
        .unwrap();
}

fn taints(control: &ControlPlane, node: &str) -> Vec<Value> {
    let node = control
        .request("GET", &format!("{NODES}/{node}"), None)
        .unwrap();
    node["spec"]["taints"]
        .as_array()
        .cloned()
        .unwrap_or_default()
}

/// A daemon on node 0 with the account's token; it ends with this value.
struct Daemon {
    _child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts it without saved state from an earlier daemon.
    fn start(bed: &TestCluster, control: &ControlPlane, token: &str) -> Self {
        let mark = bed.mark();
        let log = bed.file(&format!("{mark}.log"));
        let written = File::create(&log).unwrap();
        let mut command = bed.lab.node(0).command(PORTREEVE);
        command.args(["run", "--node", "node-0", "--startup-taint", TAINT]);
        command.arg("--state-dir").arg(bed.file(&mark));
        command.env("KUBECONFIG", control.kubeconfig(ACCOUNT, token).unwrap());
        command.stdout(written.try_clone().unwrap()).stderr(written);
        let child = command.spawn().unwrap();
        Self { _child: child, log }
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until a condition holds, which may read the log.
    fn wait(&self, what: &str, so: impl Fn(&str) -> bool) {
        let waited = wait_until(DEADLINE, what, || so(&self.log()));
        waited.unwrap_or_else(|error| panic!("{error}\n{}", self.log()));
    }
}

fn built(control: &ControlPlane, directory: &str) -> Vec<Value> {
    let path = deploy(directory);
    let args = ["kustomize", path.to_str().unwrap()];
    objects(&control.kubectl(&args, "").unwrap())
}

fn objects(yaml: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(yaml).unwrap()
}

fn deploy(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy")
        .join(path)
}
