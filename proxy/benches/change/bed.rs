//! A cluster under enforcement whose state is a directory with one file for each object, so that a
//! change costs the daemons one file.
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::{Child, Cluster, Host, wait_until};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};
use tempfile::TempDir;

const PORTREEVE: &str = env!("CARGO_BIN_EXE_portreeve");
const ADMIN: u16 = 15020;
/// A large state takes its time to be read.
const READY_WITHIN: Duration = Duration::from_secs(30);

pub(crate) struct Bed {
    // Before the cluster: the daemons end first.
    pub(crate) daemons: Vec<Child>,
    pub(crate) lab: Cluster,
    directory: TempDir,
}

/// Every flow costs us some descriptors.
pub(crate) fn raise_descriptor_limit() -> anyhow::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

/// A NetworkPolicy of namespace `bench`.
pub(crate) fn policy(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": { "namespace": "bench", "name": name },
        "spec": spec,
    })
}

impl Bed {
    /// The cluster with all its objects but those of pods that `told` leaves out, and a directory
    /// for its state; nothing is enforced yet.
    pub(crate) fn new(lab: Cluster, told: impl Fn(&str) -> bool) -> anyhow::Result<Self> {
        let bed = Self {
            daemons: Vec::new(),
            lab,
            directory: TempDir::new()?,
        };
        fs::create_dir(bed.manifests())?;
        for object in bed.objects() {
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            if object["kind"] != "Pod" || told(name) {
                bed.write(&object)?;
            }
        }
        Ok(bed)
    }

    /// Every object of the cluster as it is.
    pub(crate) fn objects(&self) -> Vec<Value> {
        match self.lab.manifests()["items"].take() {
            Value::Array(objects) => objects,
            _ => Vec::new(),
        }
    }

    /// The object of a pod.
    pub(crate) fn pod(&self, name: &str) -> anyhow::Result<Value> {
        let named = |it: &Value| it["kind"] == "Pod" && it["metadata"]["name"] == name;
        let found = self.objects().into_iter().find(named);
        found.with_context(|| format!("there is no pod {name}"))
    }

    /// Tells the daemons of an object, and says when it could be seen.
    pub(crate) fn write(&self, object: &Value) -> anyhow::Result<Instant> {
        let file = self.file_of(object);
        let new = self.directory.path().join("new");
        fs::write(&new, object.to_string())?;
        let at = Instant::now();
        fs::rename(new, file)?;
        Ok(at)
    }

    /// Tells the daemons that an object is gone.
    pub(crate) fn remove(&self, object: &Value) -> anyhow::Result<Instant> {
        let at = Instant::now();
        fs::remove_file(self.file_of(object))?;
        Ok(at)
    }

    /// Installs the redirect and starts a daemon on each node.
    pub(crate) fn enforce(&mut self, flags: &[&str]) -> anyhow::Result<()> {
        let init = PathBuf::from(PORTREEVE).with_file_name("iptables-init");
        let nodes: Vec<Host> = self.lab.nodes().collect();
        for node in &nodes {
            let mut install = node.command(&init);
            install.arg("install");
            let said = install.output()?;
            ensure!(
                said.status.success(),
                "install on {}: {said:?}",
                node.name()
            );
            let log = fs::File::create(self.directory.path().join(node.name()))?;
            let mut daemon = node.command(PORTREEVE);
            daemon
                .args(["run", "--node", node.name()])
                .args(["--cluster", &format!("dir:{}", self.manifests().display())])
                .args(flags)
                .stdout(log.try_clone()?)
                .stderr(log);
            self.daemons.push(daemon.spawn()?);
        }
        for node in &nodes {
            let ready =
                || ask(node, "/readyz").is_some_and(|answer| answer.starts_with("HTTP/1.1 200"));
            let log = self.directory.path().join(node.name());
            wait_until(READY_WITHIN, "the daemon to be ready", ready)
                .with_context(|| fs::read_to_string(log).unwrap_or_default())?;
        }
        Ok(())
    }

    /// Waits until every daemon has in force what the files say.
    pub(crate) fn settle(&self, mark: &str) -> anyhow::Result<()> {
        // A policy that selects nothing: a stamp on the state that it comes with.
        let stamp = policy(
            mark,
            &json!({ "podSelector": { "matchLabels": { "no": "pod" } } }),
        );
        self.write(&stamp)?;
        for node in self.lab.nodes() {
            let named = format!("{mark}\"");
            wait_until(READY_WITHIN, format!("{mark} on {}", node.name()), || {
                ask(&node, "/policies").is_some_and(|answer| answer.contains(&named))
                    && in_step(&node)
            })?;
        }
        self.remove(&stamp)?;
        Ok(())
    }

    /// CPU time that the daemons have used so far.
    pub(crate) fn busy(&self) -> anyhow::Result<Duration> {
        let mut nanoseconds = 0;
        for daemon in &self.daemons {
            for task in fs::read_dir(format!("/proc/{}/task", daemon.id()))? {
                // proc(5): time on the CPU comes first. A thread may end meanwhile.
                let stat = fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
                let on_cpu = stat.split(' ').next().and_then(|time| time.parse().ok());
                nanoseconds += on_cpu.unwrap_or(0);
            }
        }
        Ok(Duration::from_nanos(nanoseconds))
    }

    fn manifests(&self) -> PathBuf {
        self.directory.path().join("manifests")
    }

    fn file_of(&self, object: &Value) -> PathBuf {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_lowercase();
        let metadata = &object["metadata"];
        let name = format!(
            "{}-{}-{}.json",
            text(&object["kind"]),
            text(&metadata["namespace"]),
            text(&metadata["name"])
        );
        self.manifests().join(name)
    }
}

/// Whether the kernel has what the table has.
fn in_step(node: &Host) -> bool {
    let Some(metrics) = ask(node, "/metrics") else {
        return false;
    };
    let value = |name: &str| {
        let line = metrics.lines().find(|line| line.starts_with(name))?;
        line.rsplit(' ').next()?.parse::<u64>().ok()
    };
    value("portreeve_enforced_generation ") >= value("portreeve_table_generation ")
}

/// What the admin port of a node's daemon says.
fn ask(node: &Host, path: &str) -> Option<String> {
    let connect = || TcpStream::connect((Ipv4Addr::LOCALHOST, ADMIN));
    let mut stream = node.run(connect).ok()?.ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}
