//! A cluster under enforcement, and what its daemons cost.
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

use crate::source::{Kind, Source};

const PORTREEVE: &str = env!("CARGO_BIN_EXE_portreeve");
const ADMIN: u16 = 15020;
/// A large state takes its time to be read.
const READY_WITHIN: Duration = Duration::from_secs(60);

pub(crate) struct TestCluster {
    // In the order in which they end: the daemons first.
    pub(crate) daemons: Vec<Child>,
    pub(crate) source: Source,
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

impl TestCluster {
    /// The cluster with all its objects but those of pods that `known` leaves out, and files for its
    /// state; nothing is enforced yet.
    pub(crate) fn new(lab: Cluster, known: impl Fn(&str) -> bool) -> anyhow::Result<Self> {
        let bed = Self::empty(lab, Kind::Files)?;
        for object in bed.objects() {
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            if object["kind"] != "Pod" || known(name) {
                bed.write(&object)?;
            }
        }
        Ok(bed)
    }

    /// The cluster and a source that knows nothing of it; nothing is enforced yet.
    pub(crate) fn empty(lab: Cluster, source: Kind) -> anyhow::Result<Self> {
        let directory = TempDir::new()?;
        Ok(Self {
            daemons: Vec::new(),
            source: Source::new(source, directory.path(), &lab)?,
            lab,
            directory,
        })
    }

    /// Every object of the cluster as it is.
    pub(crate) fn objects(&self) -> Vec<Value> {
        match self.lab.manifests()["items"].take() {
            Value::Array(objects) => objects,
            _ => Vec::new(),
        }
    }

    /// An object of the cluster as it is.
    pub(crate) fn object(&self, kind: &str, name: &str) -> anyhow::Result<Value> {
        let named = |it: &Value| it["kind"] == kind && it["metadata"]["name"] == name;
        let found = self.objects().into_iter().find(named);
        found.with_context(|| format!("there is no {kind} {name}"))
    }

    /// Tells the daemons of an object, and says when they could see it at the earliest.
    pub(crate) fn write(&self, object: &Value) -> anyhow::Result<Instant> {
        self.source.write(object)
    }

    /// Tells the daemons that an object is gone.
    pub(crate) fn remove(&self, object: &Value) -> anyhow::Result<Instant> {
        self.source.remove(object)
    }

    /// Installs the redirect and starts a daemon on each node; returns how long they took from their
    /// start until the last was ready.
    pub(crate) fn enforce(&mut self, flags: &[&str]) -> anyhow::Result<Duration> {
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
        }
        let begun = Instant::now();
        for node in &nodes {
            let log = fs::File::create(self.directory.path().join(node.name()))?;
            let mut daemon = node.command(PORTREEVE);
            daemon.args(["run", "--node", node.name()]).args(flags);
            daemon.stdout(log.try_clone()?).stderr(log);
            self.source.follow(node.name(), &mut daemon);
            self.daemons.push(daemon.spawn()?);
        }
        for (node, daemon) in nodes.iter().zip(&mut self.daemons) {
            let mut ready = false;
            let waited = wait_until(READY_WITHIN, "the daemon to be ready", || {
                ready = ask(node, "/readyz").is_some_and(|it| it.starts_with("HTTP/1.1 200"));
                ready || !matches!(daemon.try_wait(), Ok(None))
            });
            let log = self.directory.path().join(node.name());
            let log = || fs::read_to_string(&log).unwrap_or_default();
            waited.with_context(log)?;
            ensure!(ready, "the daemon has ended: {}", log());
        }
        Ok(begun.elapsed())
    }

    /// Waits until every daemon has in force what the source says.
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

    /// Waits until a node's daemon lets a pod talk to another on port 80. Costs it little, however large
    /// the cluster.
    pub(crate) fn allows(&self, node: &Host, from: &str, to: &str) -> anyhow::Result<()> {
        let question = format!("/explain?from={from}&to={to}&port=80");
        let allowed =
            || ask(node, &question).is_some_and(|answer| answer.contains("\"verdict\":\"allow\""));
        Ok(wait_until(READY_WITHIN, question.clone(), allowed)?)
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

    /// The memory of the first daemon in kB: `VmRSS` now, `VmHWM` at most so far (proc(5)).
    pub(crate) fn memory(&self, field: &str) -> anyhow::Result<u64> {
        number(&self.of_first_daemon("status")?, field)
    }

    /// Bytes that the first daemon has written to disks so far.
    pub(crate) fn written(&self) -> anyhow::Result<u64> {
        number(&self.of_first_daemon("io")?, "write_bytes")
    }

    fn of_first_daemon(&self, file: &str) -> anyhow::Result<String> {
        let daemon = self.daemons.first().context("no daemon runs")?;
        Ok(fs::read_to_string(format!("/proc/{}/{file}", daemon.id()))?)
    }
}

/// The number after `field:` on a line of its own.
fn number(text: &str, field: &str) -> anyhow::Result<u64> {
    let value = |line: &str| {
        let rest = line.strip_prefix(field)?.strip_prefix(':')?;
        rest.split_whitespace().next()?.parse().ok()
    };
    let found = text.lines().find_map(value);
    found.with_context(|| format!("no {field} in {text}"))
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
