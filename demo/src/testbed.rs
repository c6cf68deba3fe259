//! The running cluster: the lab's nodes and pods, the real init step and a real daemon on each node.
//!
//! All files are in a memory file system that only this process has mounted, and
//! daemons die with this process: nothing can be left behind. Knows nothing of verdicts.
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use controller::manifest;
use lab::{Child, Host};
use policy::Cluster;

use super::error::DemoError;
use super::plan::{Plan, Planned};
use super::policies::RawPolicy;
use super::span_proxy::SpanProxy;

/// Only this process sees what is here: [`lab::enter`] has mounted an empty `/run`.
const DIR: &str = "/run/portreeve-demo";
/// Where a daemon's admin port is, in its node's namespace.
pub(super) const ADMIN: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15020);
/// How long a daemon may take until it enforces; it takes a fraction of a second.
const READY: Duration = Duration::from_secs(20);
/// How long a daemon may take to stop; then it is killed.
const STOP: Duration = Duration::from_secs(3);

/// The running daemons, to be stopped at the end of the demo or by a signal.
#[derive(Clone, Default)]
pub(super) struct Daemons(Arc<Mutex<Vec<Child>>>);

impl Daemons {
    /// Asks all to stop, waits for them, and kills those that do not.
    pub(super) fn stop(&self) {
        let mut children = std::mem::take(&mut *self.lock());
        children.iter_mut().for_each(Child::terminate);
        for child in &mut children {
            let _killed_on_drop = child.wait(STOP);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Child>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The executables that the demo runs.
pub(super) struct Programs {
    portreeve: PathBuf,
    init: PathBuf,
}

impl Programs {
    /// This program, and `iptables-init` beside it.
    ///
    /// # Errors
    /// [`DemoError::NoInit`] if it is not there.
    pub(super) fn find() -> Result<Self, DemoError> {
        let portreeve = std::env::current_exe().map_err(DemoError::OwnPath)?;
        let init = portreeve.with_file_name("iptables-init");
        if !init.is_file() {
            return Err(DemoError::NoInit { expected: init });
        }
        Ok(Self { portreeve, init })
    }
}

/// A cluster under policy.
pub(super) struct Testbed {
    pub(super) lab: lab::Cluster,
    pub(super) pods: Vec<Planned>,
    policies: Vec<RawPolicy>,
    programs: Programs,
    daemons: Daemons,
    span_proxy: Option<Arc<SpanProxy>>,
}

impl Testbed {
    /// Builds nodes, pods and Services; every pod serves its ports.
    ///
    /// # Errors
    /// The error of the lab.
    pub(super) fn build(
        plan: Plan,
        programs: Programs,
        daemons: Daemons,
        span_proxy: Option<Arc<SpanProxy>>,
    ) -> Result<Self, DemoError> {
        let lab = plan.lab.build()?;
        for pod in &plan.pods {
            let served = lab.pod(&pod.key()).serve(&pod.ports);
            served.map_err(|source| DemoError::Serve {
                pod: pod.key(),
                source,
            })?;
        }
        let testbed = Self {
            lab,
            pods: plan.pods,
            policies: plan.policies,
            programs,
            daemons,
            span_proxy,
        };
        testbed.write().map_err(DemoError::State)?;
        Ok(testbed)
    }

    /// Runs `iptables-init install` on every node.
    ///
    /// # Errors
    /// [`DemoError::Init`] with its output.
    pub(super) fn install(&self) -> Result<(), DemoError> {
        for node in self.lab.nodes() {
            let mut command = node.command(&self.programs.init);
            without_settings(&mut command).arg("install");
            let output = command.output()?;
            if !output.status.success() {
                return Err(DemoError::Init {
                    node: node.name().to_owned(),
                    said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
                });
            }
        }
        Ok(())
    }

    /// Starts `portreeve run` on every node and waits until all are ready.
    ///
    /// # Errors
    /// [`DemoError::Daemon`] with the end of its log.
    pub(super) fn start(&self) -> Result<(), DemoError> {
        let collector = self.span_proxy.as_ref();
        let collector = collector.map(|span_proxy| span_proxy.serve(&self.lab.outside()));
        let collector = collector.transpose().map_err(DemoError::SpanProxy)?;
        for node in self.lab.nodes() {
            let mut command = node.command(&self.programs.portreeve);
            without_settings(&mut command)
                .arg("run")
                .arg("--cluster")
                .arg(format!(
                    "dir:{}",
                    seen_by_all(&self.cluster_dir()).display()
                ))
                .args(["--node", node.name()])
                .args(["--admin", &ADMIN.to_string()])
                .arg("--trace-file")
                .arg(seen_by_all(&records_of(&node)));
            if let Some(collector) = &collector {
                command.args(["--otlp-endpoint", collector]);
            }
            let log = File::create(log_of(&node)).map_err(DemoError::State)?;
            command.stdout(log.try_clone().map_err(DemoError::State)?);
            command.stderr(log);
            let daemon = command.spawn()?;
            self.daemons.lock().push(daemon);
        }
        let nodes = self.lab.nodes().enumerate();
        nodes
            .into_iter()
            .try_for_each(|(at, node)| self.ready(at, &node))
    }

    /// The current state, as the daemons read it.
    ///
    /// # Errors
    /// What is wrong with the manifests.
    pub(super) fn cluster(&self) -> Result<Cluster, DemoError> {
        Ok(manifest::load(&self.cluster_dir())?.cluster)
    }

    /// The directory with the current manifests.
    pub(super) fn cluster_dir(&self) -> PathBuf {
        Path::new(DIR).join("cluster")
    }

    /// Removes a policy's manifest.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn remove_policy(&self, key: &str) -> Result<(), DemoError> {
        let file = self.policy_file(key);
        file.map_or(Ok(()), |(file, _)| fs::remove_file(file))
            .map_err(DemoError::State)
    }

    /// Puts a policy's manifest back.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn put_policy(&self, key: &str) -> Result<(), DemoError> {
        let file = self.policy_file(key);
        file.map_or(Ok(()), |(file, policy)| write_whole(&file, policy))
            .map_err(DemoError::State)
    }

    /// The files of records, one per node.
    pub(super) fn records(&self) -> Vec<PathBuf> {
        self.lab.nodes().map(|node| records_of(&node)).collect()
    }

    /// Stops the daemons.
    pub(super) fn stop(&self) {
        self.daemons.stop();
    }

    fn write(&self) -> io::Result<()> {
        let dir = self.cluster_dir();
        fs::create_dir_all(&dir)?;
        self.lab.write_manifests(&dir.join("cluster.json"))?;
        for policy in &self.policies {
            if let Some((file, policy)) = self.policy_file(&policy.key) {
                write_whole(&file, policy)?;
            }
        }
        Ok(())
    }

    fn policy_file(&self, key: &str) -> Option<(PathBuf, &RawPolicy)> {
        let at = self.policies.iter().position(|policy| policy.key == key)?;
        // The number keeps names apart where they are too long for a file.
        let mut name = format!("policy-{at:03}-{}", key.replace('/', "-"));
        name.truncate(200);
        let file = self.cluster_dir().join(name + ".json");
        Some((file, &self.policies[at]))
    }

    fn ready(&self, at: usize, node: &Host) -> Result<(), DemoError> {
        let mut last = String::new();
        let ended = lab::wait_for(READY, "the daemon to be ready", || {
            let ended = match self.daemons.lock().get_mut(at).map(Child::try_wait) {
                Some(Ok(Some(status))) => Some(format!("it ended with {status}")),
                Some(Err(error)) => Some(error.to_string()),
                Some(Ok(None)) => None,
                None => Some("it was stopped".to_owned()),
            };
            if ended.is_some() {
                return ended.map(Err);
            }
            match get(node, "/readyz") {
                Ok((200, _)) => Some(Ok(())),
                Ok((_, body)) => {
                    last = body;
                    None
                }
                Err(error) => {
                    last = error.to_string();
                    None
                }
            }
        });
        let what = match ended {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(what)) => what,
            Err(late) => format!("{late}: {}", last.trim()),
        };
        let log = fs::read_to_string(log_of(node)).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        Err(DemoError::Daemon {
            node: node.name().to_owned(),
            what,
            log: lines[lines.len().saturating_sub(12)..].join("\n  "),
        })
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Asks a daemon's admin port: the status and the body.
fn get(node: &Host, path: &str) -> io::Result<(u16, String)> {
    const PATIENCE: Duration = Duration::from_secs(2);
    let connected = node.run(|| TcpStream::connect_timeout(&ADMIN, PATIENCE));
    let mut stream = connected.map_err(io::Error::other)??;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {ADMIN}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    let status = status.ok_or(io::ErrorKind::InvalidData)?;
    Ok((status, body.to_owned()))
}

/// Removes Portreeve's environment variables, which belong to the calling shell.
fn without_settings(command: &mut lab::Command) -> &mut lab::Command {
    for (name, _) in std::env::vars_os() {
        let ours = name
            .to_str()
            .is_some_and(|name| name.starts_with("PORTREEVE_") || name.starts_with("OTEL_"));
        if ours || name == "NODE_NAME" {
            command.env_remove(&name);
        }
    }
    command
}

fn records_of(node: &Host) -> PathBuf {
    Path::new(DIR).join(format!("{}.records.jsonl", node.name()))
}

fn log_of(node: &Host) -> PathBuf {
    Path::new(DIR).join(format!("{}.log", node.name()))
}

/// Makes a path of this process valid for processes with other mounts.
pub(super) fn seen_by_all(path: &Path) -> PathBuf {
    PathBuf::from(format!(
        "/proc/{}/root{}",
        std::process::id(),
        path.display()
    ))
}

/// Writes a policy so that a reader never sees half of it.
fn write_whole(file: &Path, policy: &RawPolicy) -> io::Result<()> {
    let new = file.with_extension("new");
    fs::write(&new, serde_json::to_vec_pretty(&policy.object)?)?;
    fs::rename(&new, file)
}
