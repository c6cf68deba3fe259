//! A cluster of the lab with the redirect and the daemon on its nodes, as tests use it.
//!
//! Owns where manifests lie, how daemons are started, asked and stopped. Knows no single test.
use std::cell::Cell;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::PathBuf;

use lab::{Cluster, wait_for, wait_until};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::admin::{ask, in_force, metric};
use crate::daemon::{Daemon, init_with, tail};
use crate::objects::{marker, small};
use crate::{DEADLINE, portreeve};

/// A cluster and the directory that its daemons watch.
pub struct TestCluster {
    /// Its nodes and pods.
    pub lab: Cluster,
    directory: TempDir,
    daemons: Vec<Option<Daemon>>,
    applied: Cell<u32>,
    variables: Vec<(&'static str, String)>,
}

impl TestCluster {
    /// A cluster without redirect or daemon; its pods serve 80 and 81.
    pub fn bare(cluster: lab::Builder) -> Self {
        let lab = cluster.build().unwrap();
        for pod in lab.pods() {
            pod.serve(&[80, 81]).unwrap();
        }
        Self::of(lab)
    }

    /// A cluster as it is.
    pub fn of(lab: Cluster) -> Self {
        let bed = Self {
            daemons: lab.nodes().map(|_| None).collect(),
            directory: TempDir::new().unwrap(),
            applied: Cell::new(0),
            variables: Vec::new(),
            lab,
        };
        fs::create_dir(bed.manifests()).unwrap();
        bed.write_cluster();
        bed
    }

    /// The small cluster with the redirect and a daemon on each node, and `policies` in force.
    pub fn enforced(flags: &[&str], policies: &[Value]) -> Self {
        let mut bed = Self::bare(small());
        bed.write_policies(policies);
        bed.enforce(flags);
        bed
    }

    /// Installs the redirect and starts a daemon on each node.
    pub fn enforce(&mut self, flags: &[&str]) {
        for node in 0..self.daemons.len() {
            self.install(node, &[]);
            self.start(node, flags);
        }
    }

    /// Runs the init step and daemons from now on with this environment variable.
    pub fn set_env(&mut self, name: &'static str, value: impl Into<String>) {
        self.variables.push((name, value.into()));
    }

    /// The directory that the daemons watch.
    pub fn manifests(&self) -> PathBuf {
        self.directory.path().join("manifests")
    }

    /// A place for a file of the test's own.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs `iptables-init install` on a node; it must succeed.
    pub fn install(&self, node: usize, flags: &[&str]) {
        let said = init_with(&self.lab.node(node), "install", flags, &self.variables);
        assert!(said.status.success(), "install: {said:?}");
    }

    /// Starts the daemon of a node and waits until it enforces.
    pub fn start(&mut self, node: usize, flags: &[&str]) {
        self.start_command(node, self.run_command(node, flags));
    }

    /// Starts `command` as the daemon of a node and waits until it enforces.
    pub fn start_command(&mut self, node: usize, command: lab::Command) {
        let log = self.file(&format!("{}.log", self.lab.node(node).name()));
        self.daemons[node] = Some(self.started(node, command, log, |_| true));
    }

    /// Starts one more daemon on a node, and waits until it enforces and its log says that it has taken over from
    /// the one that runs; returns that.
    pub fn relieve(&mut self, node: usize, flags: &[&str]) -> Daemon {
        self.relieve_by(node, self.run_command(node, flags))
    }

    /// The same with the command of the new daemon.
    pub fn relieve_by(&mut self, node: usize, command: lab::Command) -> Daemon {
        let log = self.file(&format!("relief-{}.log", self.mark()));
        let took_over = |log: &str| log.contains("took over") && log.contains("policy applied");
        let relief = self.started(node, command, log, took_over);
        self.daemons[node].replace(relief).unwrap()
    }

    /// Registers a spawned daemon as the one of a node.
    pub fn adopt(&mut self, node: usize, daemon: Daemon) {
        self.daemons[node] = Some(daemon);
    }

    /// Starts a daemon that need not enforce.
    pub fn spawn(&self, command: lab::Command) -> Daemon {
        self.logging(command, self.file(&format!("{}.log", self.mark())))
    }

    fn logging(&self, mut command: lab::Command, log: PathBuf) -> Daemon {
        let mut options = File::options();
        let written = options.create(true).append(true).open(&log).unwrap();
        command.stdout(written.try_clone().unwrap()).stderr(written);
        let child = command.spawn().unwrap();
        Daemon { child, log }
    }

    /// Starts a daemon, and waits until its log is `so` and it, or another, answers that it is ready.
    fn started(
        &self,
        node: usize,
        command: lab::Command,
        log: PathBuf,
        so: impl Fn(&str) -> bool,
    ) -> Daemon {
        let host = self.lab.node(node);
        let Daemon { mut child, log } = self.logging(command, log);
        let ready = wait_for(DEADLINE, "the daemon to be ready", || {
            let ended = child.try_wait().unwrap();
            let said = fs::read_to_string(&log).unwrap();
            let ready = ended.is_none()
                && so(&said)
                && ask(&host, "/readyz").is_some_and(|it| it.status == 200);
            (ready || ended.is_some()).then_some(ended)
        });
        match ready {
            Ok(None) => {}
            other => panic!("no daemon ({other:?}):\n{}", tail(&log)),
        }
        Daemon { child, log }
    }

    /// `portreeve run` on a node, with its manifests.
    pub fn run_command(&self, node: usize, flags: &[&str]) -> lab::Command {
        let host = self.lab.node(node);
        let mut command = host.command(portreeve());
        command.args(["run", "--node", host.name()]);
        if !flags.contains(&"--cluster") {
            command.args(["--cluster", &format!("dir:{}", self.manifests().display())]);
        }
        command.args(flags);
        command.env_remove("RUST_LOG");
        for (name, value) in &self.variables {
            command.env(name, value);
        }
        command
    }

    /// The running daemon of a node.
    pub fn daemon(&mut self, node: usize) -> &mut Daemon {
        self.daemons[node].as_mut().unwrap()
    }

    /// Ends the daemon of a node at once.
    pub fn kill(&mut self, node: usize) {
        let mut daemon = self.daemons[node].take().unwrap();
        daemon.child.kill();
        daemon.child.wait(DEADLINE).unwrap();
    }

    /// Makes `policies` the only ones, and waits until every daemon has applied them.
    pub fn apply(&self, policies: &[Value]) {
        let mark = self.write_policies(policies);
        self.wait_in_force(&mark);
    }

    /// Writes the policies with one more that selects nothing, whose name is returned.
    pub fn write_policies(&self, policies: &[Value]) -> String {
        let mark = self.mark();
        let mut items = policies.to_vec();
        items.push(marker(&mark));
        self.write(
            "policies.json",
            &json!({ "apiVersion": "v1", "kind": "List", "items": items }),
        );
        mark
    }

    /// A name that was not there before.
    pub fn mark(&self) -> String {
        self.applied.set(self.applied.get() + 1);
        format!("mark-{}", self.applied.get())
    }

    /// Replaces a file of the watched directory in one step.
    pub fn write(&self, name: &str, content: &Value) {
        let new = self.file(&format!("{name}.new"));
        fs::write(&new, content.to_string()).unwrap();
        fs::rename(new, self.manifests().join(name)).unwrap();
    }

    /// Writes the pods, nodes and namespaces as they are now.
    pub fn write_cluster(&self) {
        self.write("cluster.json", &self.lab.manifests());
    }

    /// Waits until every running daemon has the policy `mark` and the kernel's sets are in sync.
    pub fn wait_in_force(&self, mark: &str) {
        for (node, _) in self
            .daemons
            .iter()
            .enumerate()
            .filter(|(_, it)| it.is_some())
        {
            let host = self.lab.node(node);
            let waited = wait_until(DEADLINE, format!("{mark} on {}", host.name()), || {
                in_force(&host, mark)
            });
            if let Err(error) = waited {
                panic!("{error}\n{}", self.logs());
            }
        }
    }

    /// Waits until no daemon has a connection left.
    pub fn wait_for_no_connection(&self) {
        let left = |node| metric(&node, "portreeve_connections");
        wait_until(DEADLINE, "the last connection to end", || {
            self.lab.nodes().all(|node| left(node) == 0)
        })
        .unwrap();
    }

    /// The end of every daemon's log.
    pub fn logs(&self) -> String {
        let running = self.daemons.iter().flatten();
        running.map(|daemon| tail(&daemon.log)).collect()
    }

    /// The ways from a pod on node 0 to a server: same node and across, by address and by Service,
    /// both families.
    pub fn ways(&self, port: u16) -> Vec<Way> {
        let mut ways = Vec::new();
        for (place, name) in [("same node", "b"), ("other node", "c")] {
            let key = format!("x/{name}");
            let addresses = [
                self.lab.pod(&key).addrs(port),
                self.lab.service(&key).addrs(port),
            ];
            for (by, pair) in ["pod IP", "ClusterIP"].iter().zip(addresses) {
                for (family, to) in ["IPv4", "IPv6"].iter().zip(pair) {
                    let what = format!("{place}, by {by}, {family}");
                    ways.push(Way {
                        what,
                        server: key.clone(),
                        to,
                    });
                }
            }
        }
        ways
    }
}

/// A way to a server.
#[derive(Clone, Debug)]
pub struct Way {
    /// In words.
    pub what: String,
    /// Namespace and name of the server.
    pub server: String,
    /// Where to connect to.
    pub to: SocketAddr,
}
