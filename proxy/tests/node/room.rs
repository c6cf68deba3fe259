//! The one node of all tests, with Portreeve on it as `deploy/base` has it: made by the first test.
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{fs, thread};

use lab::kubernetes::{ControlPlane, Controllers, Image, Node, ProxyMode};
use lab::{Child, Cluster, wait_for, wait_until};
use serde_json::Value;
use tempfile::TempDir;

use testbed::in_force;

pub(crate) const NAMESPACE: &str = "portreeve-system";
/// How long kubelet, scheduler and controllers may take on two busy cores.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

/// A cluster of one real node.
pub(crate) struct Room {
    // In the order in which they are ended.
    _proxy: Child,
    pub(crate) node: Node,
    _controllers: Controllers,
    pub(crate) control: ControlPlane,
    pub(crate) lab: Cluster,
    _directory: TempDir,
}

static ROOM: Mutex<Option<Arc<Room>>> = Mutex::new(None);

/// The node, with a daemon that is ready.
pub(crate) fn room() -> Arc<Room> {
    let room =
        Arc::clone(shared().get_or_insert_with(|| {
            Arc::new(Room::make().unwrap_or_else(|error| panic!("{error}")))
        }));
    room.rolled_out();
    room
}

/// Ends it; a static value is never dropped.
pub(crate) fn close() {
    drop(shared().take());
}

fn shared() -> MutexGuard<'static, Option<Arc<Room>>> {
    ROOM.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Room {
    fn make() -> Result<Self, Box<dyn std::error::Error>> {
        let directory = TempDir::new()?;
        let lab = Cluster::builder().nodes(2).build()?;
        let control = ControlPlane::start(directory.path())?;
        control.join(&lab)?;
        let controllers = control.controllers()?;
        let node = control.node(&lab)?;
        // By its rules the API server is at its Service's address.
        let proxy = control.kube_proxy(&lab.node(0), ProxyMode::Iptables)?;
        import(&node)?;
        let room = Self {
            _proxy: proxy,
            node,
            _controllers: controllers,
            control,
            lab,
            _directory: directory,
        };
        room.install("base");
        Ok(room)
    }

    /// Applies a directory of `deploy/`.
    pub(crate) fn install(&self, directory: &str) {
        self.kubectl(&["apply", "-k", deploy(directory).to_str().unwrap()]);
    }

    /// Runs `kubectl`; it must succeed.
    pub(crate) fn kubectl(&self, args: &[&str]) -> String {
        let said = self.control.kubectl(args, "");
        said.unwrap_or_else(|error| panic!("{error}"))
    }

    /// Creates or updates objects.
    pub(crate) fn apply(&self, object: &Value) {
        let said = self
            .control
            .kubectl(&["apply", "-f", "-"], &object.to_string());
        said.unwrap_or_else(|error| panic!("{error}"));
    }

    /// Waits until the DaemonSet's rollout is complete.
    pub(crate) fn rolled_out(&self) {
        let limit = format!("--timeout={}s", PATIENCE.as_secs());
        let args = [
            "-n",
            NAMESPACE,
            "rollout",
            "status",
            "daemonset/portreeve",
            &limit,
        ];
        if let Err(error) = self.control.kubectl(&args, "") {
            panic!("{error}\n{}", self.diagnostics());
        }
    }

    /// The daemon's pod; there must be one.
    pub(crate) fn daemon(&self) -> Value {
        let pods = self.pods(NAMESPACE);
        assert_eq!(pods.len(), 1, "{pods:?}");
        pods[0].clone()
    }

    /// The pods of a namespace.
    pub(crate) fn pods(&self, namespace: &str) -> Vec<Value> {
        let path = format!("/api/v1/namespaces/{namespace}/pods");
        let list = self.control.request("GET", &path, None).unwrap();
        list["items"].as_array().unwrap().clone()
    }

    /// Waits until a pod's object is `so`.
    pub(crate) fn wait_for_pod(
        &self,
        (namespace, name): (&str, &str),
        what: &str,
        so: impl Fn(&Value) -> bool,
    ) -> Value {
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}");
        let found = wait_for(PATIENCE, format!("{namespace}/{name} {what}"), || {
            let pod = self.control.request("GET", &path, None).ok()?;
            so(&pod).then_some(pod)
        });
        found.unwrap_or_else(|error| panic!("{error}\n{}", self.diagnostics()))
    }

    /// Waits until the daemon and the kernel have a policy in force.
    pub(crate) fn in_force(&self, policy: &str) {
        let host = self.lab.node(0);
        wait_until(PATIENCE, format!("{policy} in force"), || {
            in_force(&host, policy)
        })
        .unwrap_or_else(|error| panic!("{error}\n{}", self.diagnostics()));
    }

    /// What the daemon has logged.
    pub(crate) fn log(&self) -> String {
        self.kubectl(&[
            "-n",
            NAMESPACE,
            "logs",
            "daemonset/portreeve",
            "-c",
            "portreeve",
        ])
    }

    /// What a program says on the node.
    pub(crate) fn said(&self, call: &str) -> String {
        let mut words = call.split(' ');
        let mut command = self.lab.node(0).command(words.next().unwrap());
        command.args(words);
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    }

    /// Diagnostics for a wait that failed.
    pub(crate) fn diagnostics(&self) -> String {
        let say = |args: &[&str]| match self.control.kubectl(args, "") {
            Ok(said) => said,
            Err(error) => error.to_string(),
        };
        [
            say(&["get", "pods", "-A", "-o", "wide"]),
            say(&["get", "events", "-A", "--sort-by=.lastTimestamp"]),
            say(&[
                "-n",
                NAMESPACE,
                "logs",
                "daemonset/portreeve",
                "--all-containers",
                "--tail=30",
            ]),
            self.node.log(),
        ]
        .join("\n")
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.diagnostics());
        }
    }
}

/// Gives the node the image, as the Containerfile's last stage makes it, with the programs under test.
fn import(node: &Node) -> Result<(), Box<dyn std::error::Error>> {
    let recipe = fs::read_to_string(deploy("image/Containerfile"))?;
    let environment: Vec<_> = recipe
        .lines()
        .filter_map(|it| it.strip_prefix("ENV "))
        .collect();
    let root = TempDir::new()?;
    let portreeve = Path::new(env!("CARGO_BIN_EXE_portreeve"));
    let mut rootfs = Command::new(deploy("image/rootfs"));
    rootfs.arg(root.path()).arg(portreeve);
    let said = rootfs
        .arg(portreeve.with_file_name("iptables-init"))
        .output()?;
    assert!(said.status.success(), "{said:?}");
    node.import(&Image {
        name: "docker.io/library/portreeve:0.1.0",
        root: root.path(),
        environment: &environment,
        command: &["portreeve", "run"],
    })?;
    Ok(())
}

fn deploy(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy")
        .join(path)
}
