//! Upstream's cases with real connections, through the real API server: pods by the kubelet's way,
//! policies and labels by `kubectl`, in the course of a case too.
use std::path::PathBuf;
use std::sync::Arc;

use lab::kubernetes::ControlPlane;
use lab::{Host, wait_until};
use serde_json::{Value, json};
use testbed::runner::Test;

use crate::api::items;
use crate::control;
use testbed::account;
use testbed::cases::world::{Change, Labels, World};
use testbed::matrix::{self, MatrixCluster, Source};
use testbed::{DEADLINE, TestCluster, ask, metric};

pub(crate) const TESTS: &[Test] =
    &testbed::tests![upstream_cases_pass_through_api_server_and_kubectl];

fn upstream_cases_pass_through_api_server_and_kubectl() {
    let cases = matrix::cases("upstream", 48);
    let mut cluster = MatrixCluster::new(&cases, |bed| ApiServer::new(bed));
    cluster.play_all(&cases);
}

/// The API server as a case's source.
struct ApiServer {
    control: Arc<ControlPlane>,
    kubeconfig: PathBuf,
    /// What the lab has in the API: the Nodes, and a case's cluster as it begins.
    published: Vec<Value>,
    /// The state with all that `kubectl` has done to it since.
    world: World,
    steps: u16,
}

impl ApiServer {
    fn new(bed: &TestCluster) -> Self {
        let control = control::joined(&bed.lab);
        let mut published = items(&bed.lab.manifests());
        published.retain(|object| object["kind"] == "Node");
        Self {
            kubeconfig: account::kubeconfig(&control).unwrap(),
            control,
            published,
            world: World::default(),
            steps: 0,
        }
    }

    fn kubectl(&self, args: &[&str], input: &str) {
        self.control
            .kubectl(args, input)
            .unwrap_or_else(|error| panic!("{error}"));
    }

    fn change(&self, change: &Change) {
        match change {
            Change::Policy(policy) => {
                let object = matrix::policy_object(policy).to_string();
                self.kubectl(&["apply", "-f", "-"], &object);
            }
            Change::NoPolicy((namespace, name)) => {
                self.kubectl(&["-n", namespace, "delete", "networkpolicy", name], "");
            }
            Change::Namespace(name, labels) => {
                let labels = changed(self.world.namespaces.get(name), labels);
                self.label(&["label", "namespace", name], &labels);
            }
            Change::Pod(pod) => {
                let before = self.world.pods.get(&pod.key()).map(|pod| &pod.labels);
                let labels = changed(before, &pod.labels);
                self.label(&["-n", &pod.namespace, "label", "pod", &pod.name], &labels);
            }
            other => panic!("upstream's cases do not do this in the course of a case: {other:?}"),
        }
    }

    fn label(&self, command: &[&str], labels: &[String]) {
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        self.kubectl(&[command, &["--overwrite"], &labels].concat(), "");
    }

    /// The objects of the case, those that are published, and a new [`mark`].
    fn publish(&mut self) {
        self.steps += 1;
        let objects = [&*self.published, &mark(self.steps)].concat();
        self.control
            .publish(&objects)
            .unwrap_or_else(|error| panic!("{error}"));
    }

    fn is_in_force(&self, node: &Host) -> bool {
        let question = format!(
            "/explain?from=marks/asker&to=marks/asked&port={}&protocol=TCP",
            self.steps
        );
        if !ask(node, &question)
            .is_some_and(|it| it.status == 200 && it.json()["verdict"] == "allow")
        {
            return false;
        }
        let table = metric(node, "portreeve_table_generation");
        wait_until(DEADLINE, "the kernel's sets", || {
            metric(node, "portreeve_enforced_generation") >= table
        })
        .is_ok()
    }
}

impl Source for ApiServer {
    fn start(&self, bed: &mut TestCluster, node: usize) {
        let state = bed.file(&format!("state-{node}"));
        let flags = ["--cluster", "kube", "--state-dir", state.to_str().unwrap()];
        let mut command = bed.run_command(node, &flags);
        command.env("KUBECONFIG", &self.kubeconfig);
        bed.start_command(node, command);
    }

    fn begin(&mut self, _: &TestCluster, nodes: &[Value], world: &World) {
        // What kubectl made is not the lab's to take back.
        for namespace in self.world.namespaces.keys() {
            let path = format!("/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies");
            self.control.request("DELETE", &path, None).unwrap();
        }
        self.published = nodes.to_vec();
        self.publish();
        self.published = matrix::objects(nodes, world);
        self.publish();
        self.world = world.clone();
    }

    fn step(&mut self, bed: &TestCluster, _: &[Value], world: &World, changes: &[Change]) {
        for change in changes {
            self.change(change);
            self.world.apply(change);
        }
        assert_eq!(self.world, *world, "what kubectl did is what the case says");
        self.publish();
        if self.steps == 1 {
            return; // No daemon runs yet.
        }
        for node in bed.lab.nodes().skip(1) {
            let what = format!("step {} on {}", self.steps, node.name());
            let waited = wait_until(DEADLINE, what, || self.is_in_force(&node));
            waited.unwrap_or_else(|error| panic!("{error}\n{}", bed.logs()));
        }
    }
}

/// A Namespace, Pods and a NetworkPolicy that only together allow a connection, which no step before
/// this one allowed: a daemon that allows it has received all earlier changes of every kind. They are never
/// deleted, as without the policy everything is allowed.
fn mark(step: u16) -> Vec<Value> {
    let label = step.to_string();
    let namespace = json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": { "name": "marks", "labels": { "mark": label } },
    });
    // On the node without a daemon.
    let [asker, asked] = [("asker", 250), ("asked", 251)].map(|(name, host)| {
        let ip = format!("10.244.0.{host}");
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "namespace": "marks", "name": name, "labels": { "mark": label } },
            "spec": { "nodeName": "node-0", "containers": [{ "name": "main", "image": "lab" }] },
            "status": { "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }] },
        })
    });
    let marked = json!({ "matchLabels": { "mark": label } });
    let policy = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": { "namespace": "marks", "name": "mark" },
        "spec": {
            "podSelector": {},
            "policyTypes": ["Ingress"],
            "ingress": [{
                "from": [{ "namespaceSelector": marked, "podSelector": marked }],
                "ports": [{ "port": step }],
            }],
        },
    });
    vec![namespace, asker, asked, policy]
}

/// `key=value` for each label that has changed.
fn changed(before: Option<&Labels>, after: &Labels) -> Vec<String> {
    let known = |key: &String| before.and_then(|labels| labels.get(key));
    let new = after
        .iter()
        .filter(|(key, value)| known(key) != Some(value));
    new.map(|(key, value)| format!("{key}={value}")).collect()
}
