//! A cluster whose daemons follow the real API server, with the rights of the DaemonSet and no more.
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lab::kubernetes::ControlPlane;
use lab::{Child, wait_until};
use serde_json::Value;

use crate::api::items;
use crate::control;
use testbed::account;
use testbed::{TestCluster, ask, marker, small};

/// The longest wait between two tries of the daemon, and what follows it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(45);

/// The small cluster, its control plane, and a kubeconfig of the DaemonSet's account.
pub(crate) struct Daemons {
    pub(crate) bed: TestCluster,
    pub(crate) control: Arc<ControlPlane>,
    pub(crate) kubeconfig: PathBuf,
}

impl Daemons {
    /// Everything but the daemons: `policies` and the lab's objects are in the API.
    pub(crate) fn prepared(policies: &[Value]) -> Self {
        Self::prepared_on(TestCluster::bare(small()), policies)
    }

    fn prepared_on(bed: TestCluster, policies: &[Value]) -> Self {
        let control = control::joined(&bed.lab);
        publish(&bed, &control, policies);
        let kubeconfig = account::kubeconfig(&control).unwrap();
        Self {
            bed,
            control,
            kubeconfig,
        }
    }

    /// The same with the redirect and a daemon on each node, and `policies` in force.
    pub(crate) fn enforced(policies: &[Value]) -> Self {
        Self::enforced_on(TestCluster::bare(small()), policies)
    }

    /// The same on a bed of the test's own.
    pub(crate) fn enforced_on(bed: TestCluster, policies: &[Value]) -> Self {
        let mut daemons = Self::prepared_on(bed, policies);
        for node in 0..daemons.bed.lab.nodes().count() {
            daemons.bed.install(node, &[]);
            daemons.start(node);
        }
        daemons
    }

    /// `portreeve run` on a node, following the API server.
    pub(crate) fn command(&self, node: usize, flags: &[&str]) -> lab::Command {
        let state = self.state(node);
        let state = state.parent().unwrap().to_str().unwrap();
        let flags = [&["--cluster", "kube", "--state-dir", state], flags].concat();
        let mut command = self.bed.run_command(node, &flags);
        command.env("KUBECONFIG", &self.kubeconfig);
        command
    }

    /// Starts a node's daemon and waits until it enforces.
    pub(crate) fn start(&mut self, node: usize) {
        let command = self.command(node, &[]);
        self.bed.start_command(node, command);
    }

    /// Starts a node's daemon that cannot enforce yet, and waits until it reports all of `words`.
    pub(crate) fn start_waiting(&self, node: usize, words: &[&str]) -> Waiting {
        self.start_waiting_with(node, &[], words)
    }

    /// The same with more flags.
    pub(crate) fn start_waiting_with(
        &self,
        node: usize,
        flags: &[&str],
        words: &[&str],
    ) -> Waiting {
        let log = self.bed.file(&format!("waiting-{node}.log"));
        let mut command = self.command(node, flags);
        command.stderr(File::create(&log).unwrap());
        let child = command.spawn().unwrap();
        self.says(node, 503, words);
        Waiting { _child: child, log }
    }

    /// Waits until a node's daemon answers so to `/readyz`.
    pub(crate) fn says(&self, node: usize, status: u16, words: &[&str]) {
        let host = self.bed.lab.node(node);
        let mut last = None;
        let waited = wait_until(PATIENCE, format!("{status} {words:?}"), || {
            last = ask(&host, "/readyz");
            last.as_ref().is_some_and(|it| {
                it.status == status && words.iter().all(|word| it.body.contains(word))
            })
        });
        if let Err(error) = waited {
            panic!("{error}: {last:?}\n{}", self.bed.logs());
        }
    }

    /// Publishes `policies` and the lab's present objects, and waits until every daemon
    /// has applied them.
    pub(crate) fn apply(&self, policies: &[Value]) {
        let mark = self.publish(policies);
        let named = format!("{mark}\"");
        for node in self.bed.lab.nodes() {
            let waited = wait_until(PATIENCE, format!("{mark} on {}", node.name()), || {
                ask(&node, "/policies").is_some_and(|it| it.body.contains(&named))
            });
            if let Err(error) = waited {
                panic!("{error}\n{}", self.bed.logs());
            }
        }
        self.bed.wait_in_force(&mark);
    }

    /// Publishes `policies` and the lab's present objects; returns a policy that was published with
    /// them.
    pub(crate) fn publish(&self, policies: &[Value]) -> String {
        publish(&self.bed, &self.control, policies)
    }

    /// The file in which a node's daemon keeps its state.
    pub(crate) fn state(&self, node: usize) -> PathBuf {
        self.bed.file(&format!("state-{node}")).join("state.yaml")
    }
}

/// A daemon that waits for its first state; it ends with the value.
pub(crate) struct Waiting {
    _child: Child,
    pub(crate) log: PathBuf,
}

fn publish(bed: &TestCluster, control: &ControlPlane, policies: &[Value]) -> String {
    let mark = bed.mark();
    let mut objects = items(&bed.lab.manifests());
    objects.extend_from_slice(policies);
    objects.push(marker(&mark));
    control.publish(&objects).unwrap();
    mark
}
