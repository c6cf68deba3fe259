//! A cluster of the lab with the redirect and the daemon on its nodes, as tests use it.
//!
//! Owns where manifests lie, how daemons are started, asked and stopped. Knows no single test.
use std::cell::Cell;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use lab::traffic::{Greeting, greeting};
use lab::{Child, Cluster, Host, PodSpec, Protocol, ServiceSpec, wait_for, wait_until};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};
use tempfile::TempDir;

pub(crate) const PORTREEVE: &str = env!("CARGO_BIN_EXE_portreeve");
/// Longer than a round trip in the lab by far, shorter than a SYN's first retransmit.
pub(crate) const SOON: Duration = Duration::from_millis(900);
/// The time within which every expected event happens.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);
/// A SYN and some retransmits fall within it, and its end is far from any of them: after 1, 2, 3
/// and 4 seconds since Linux 6.5 (`tcp_syn_linear_timeouts`), after 1, 3 and 7 before (RFC 6298).
pub(crate) const SEVERAL_SYNS: Duration = Duration::from_millis(3500);
const ADMIN: u16 = 15020;

/// A cluster and the directory that its daemons watch.
pub(crate) struct Bed {
    pub(crate) lab: Cluster,
    directory: TempDir,
    daemons: Vec<Option<Daemon>>,
    applied: Cell<u32>,
    variables: Vec<(&'static str, String)>,
}

pub(crate) struct Daemon {
    pub(crate) child: Child,
    log: PathBuf,
}

/// Tests hold thousands of sockets.
pub(crate) fn raise_descriptor_limit() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

/// Pods x/a, x/b and x/d on node 0 and x/c on node 1, all serving 80 and 81, and a Service in front
/// of each server.
pub(crate) fn small() -> lab::Builder {
    let pod = |name: &str, node: usize| {
        PodSpec::new("x", name)
            .node(node)
            .label("pod", name)
            .port("http", 80)
    };
    let service = |name: &str| {
        ServiceSpec::new("x", name)
            .selects("pod", name)
            .port(80, 80)
            .port(81, 81)
            .port(82, 82)
            .port(83, 83)
            .port_of(53, 53, Protocol::Udp)
            .port_of(54, 54, Protocol::Udp)
            .port_of(55, 55, Protocol::Udp)
    };
    Cluster::builder()
        .nodes(2)
        .pods([pod("a", 0), pod("b", 0), pod("d", 0), pod("c", 1)])
        .services([service("b"), service("c")])
}

/// A NetworkPolicy object.
pub(crate) fn policy(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": { "namespace": "x", "name": name },
        "spec": spec,
    })
}

/// Isolates every pod of namespace x both ways and allows everything: all goes through
/// the proxy.
pub(crate) fn allow_all() -> Value {
    let spec = json!({ "podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [{}], "egress": [{}] });
    policy("allow-all", &spec)
}

/// Denies all ingress of one pod.
pub(crate) fn deny_ingress(pod: &str) -> Value {
    let spec =
        json!({ "podSelector": { "matchLabels": { "pod": pod } }, "policyTypes": ["Ingress"] });
    policy(&format!("deny-ingress-{pod}"), &spec)
}

/// Denies all egress of one pod.
pub(crate) fn deny_egress(pod: &str) -> Value {
    let spec =
        json!({ "podSelector": { "matchLabels": { "pod": pod } }, "policyTypes": ["Egress"] });
    policy(&format!("deny-egress-{pod}"), &spec)
}

/// Allows all ingress of one pod, through the proxy.
pub(crate) fn allow_ingress(pod: &str) -> Value {
    let spec = json!({ "podSelector": { "matchLabels": { "pod": pod } }, "policyTypes": ["Ingress"], "ingress": [{}] });
    policy(&format!("allow-ingress-{pod}"), &spec)
}

impl Bed {
    /// A cluster without redirect or daemon; its pods serve 80 and 81.
    pub(crate) fn bare(cluster: lab::Builder) -> Self {
        let lab = cluster.build().unwrap();
        for pod in lab.pods() {
            pod.serve(&[80, 81]).unwrap();
        }
        Self::of(lab)
    }

    /// A cluster as it is.
    pub(crate) fn of(lab: Cluster) -> Self {
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
    pub(crate) fn enforced(flags: &[&str], policies: &[Value]) -> Self {
        let mut bed = Self::bare(small());
        bed.write_policies(policies);
        bed.enforce(flags);
        bed
    }

    /// Installs the redirect and starts a daemon on each node.
    pub(crate) fn enforce(&mut self, flags: &[&str]) {
        for node in 0..self.daemons.len() {
            self.install(node, &[]);
            self.start(node, flags);
        }
    }

    /// Starts daemons from now on with this environment variable.
    pub(crate) fn set_env(&mut self, name: &'static str, value: impl Into<String>) {
        self.variables.push((name, value.into()));
    }

    /// The directory that the daemons watch.
    pub(crate) fn manifests(&self) -> PathBuf {
        self.directory.path().join("manifests")
    }

    /// A place for a file of the test's own.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn install(&self, node: usize, flags: &[&str]) {
        let said = init(&self.lab.node(node), "install", flags);
        assert!(said.status.success(), "install: {said:?}");
    }

    /// Starts the daemon of a node and waits until it enforces.
    pub(crate) fn start(&mut self, node: usize, flags: &[&str]) {
        self.start_command(node, self.run_command(node, flags));
    }

    /// Starts `command` as the daemon of a node and waits until it enforces.
    pub(crate) fn start_command(&mut self, node: usize, command: lab::Command) {
        let log = self.file(&format!("{}.log", self.lab.node(node).name()));
        self.daemons[node] = Some(self.started(node, command, log, |_| true));
    }

    /// Starts one more daemon on a node, and waits until it enforces and its log says that it has taken over from
    /// the one that runs; returns that.
    pub(crate) fn relieve(&mut self, node: usize, flags: &[&str]) -> Daemon {
        self.relieve_by(node, self.run_command(node, flags))
    }

    /// The same with the command of the new daemon.
    pub(crate) fn relieve_by(&mut self, node: usize, command: lab::Command) -> Daemon {
        let log = self.file(&format!("relief-{}.log", self.mark()));
        let took_over = |log: &str| log.contains("took over") && log.contains("policy applied");
        let relief = self.started(node, command, log, took_over);
        self.daemons[node].replace(relief).unwrap()
    }

    /// Registers a spawned daemon as the one of a node.
    pub(crate) fn adopt(&mut self, node: usize, daemon: Daemon) {
        self.daemons[node] = Some(daemon);
    }

    /// Starts a daemon that need not enforce.
    pub(crate) fn spawn(&self, command: lab::Command) -> Daemon {
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
    pub(crate) fn run_command(&self, node: usize, flags: &[&str]) -> lab::Command {
        let host = self.lab.node(node);
        let mut command = host.command(PORTREEVE);
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
    pub(crate) fn daemon(&mut self, node: usize) -> &mut Daemon {
        self.daemons[node].as_mut().unwrap()
    }

    /// Ends the daemon of a node at once.
    pub(crate) fn kill(&mut self, node: usize) {
        let mut daemon = self.daemons[node].take().unwrap();
        daemon.child.kill();
        daemon.child.wait(DEADLINE).unwrap();
    }

    /// Makes `policies` the only ones, and waits until every daemon has applied them.
    pub(crate) fn apply(&self, policies: &[Value]) {
        let mark = self.write_policies(policies);
        self.wait_in_force(&mark);
    }

    /// Writes the policies with one more that selects nothing, whose name is returned.
    pub(crate) fn write_policies(&self, policies: &[Value]) -> String {
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
    pub(crate) fn mark(&self) -> String {
        self.applied.set(self.applied.get() + 1);
        format!("mark-{}", self.applied.get())
    }

    /// Replaces a file of the watched directory in one step.
    pub(crate) fn write(&self, name: &str, content: &Value) {
        let new = self.file(&format!("{name}.new"));
        fs::write(&new, content.to_string()).unwrap();
        fs::rename(new, self.manifests().join(name)).unwrap();
    }

    /// Writes the pods, nodes and namespaces as they are now.
    pub(crate) fn write_cluster(&self) {
        self.write("cluster.json", &self.lab.manifests());
    }

    /// Waits until every running daemon has the policy `mark` and the kernel's sets are in sync.
    pub(crate) fn wait_in_force(&self, mark: &str) {
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
    pub(crate) fn wait_for_no_connection(&self) {
        let left = |node| metric(&node, "portreeve_connections");
        wait_until(DEADLINE, "the last connection to end", || {
            self.lab.nodes().all(|node| left(node) == 0)
        })
        .unwrap();
    }

    /// The end of every daemon's log.
    pub(crate) fn logs(&self) -> String {
        let running = self.daemons.iter().flatten();
        running.map(|daemon| tail(&daemon.log)).collect()
    }

    /// The ways from a pod on node 0 to a server: same node and across, by address and by Service,
    /// both families.
    pub(crate) fn ways(&self, port: u16) -> Vec<Way> {
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
pub(crate) struct Way {
    pub(crate) what: String,
    pub(crate) server: String,
    pub(crate) to: SocketAddr,
}

impl Daemon {
    /// How many descriptors the process has open.
    pub(crate) fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id()))
            .unwrap()
            .count()
    }

    /// The most memory that the process has had, in bytes (`VmHWM`, proc_pid_status(5)).
    pub(crate) fn peak_memory(&self) -> usize {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmHWM:"))
            .unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<usize>()
            .unwrap()
            << 10
    }

    /// Waits until its log has this.
    pub(crate) fn says(&self, text: &str) {
        let said = wait_until(DEADLINE, text, || self.log().contains(text));
        said.unwrap_or_else(|error| panic!("{error}\n{}", self.log()));
    }

    /// Stops it as Kubernetes stops a pod; it must exit with success.
    pub(crate) fn terminate(&mut self) {
        self.child.terminate();
        let status = self.child.wait(DEADLINE).unwrap();
        assert!(status.success(), "{status}\n{}", self.log());
    }

    /// What it has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }
}

/// Runs `iptables-init` on a node.
pub(crate) fn init(node: &Host, call: &str, flags: &[&str]) -> Output {
    let program = Path::new(PORTREEVE).with_file_name("iptables-init");
    assert!(
        program.is_file(),
        "{} is not built; run `cargo build --workspace` in the same profile",
        program.display()
    );
    let mut command = node.command(program);
    command.arg(call).args(flags);
    command.output().unwrap()
}

/// A policy that selects no pod: a stamp on the state that it comes with.
pub(crate) fn marker(mark: &str) -> Value {
    let mut marker = policy(
        mark,
        &json!({ "podSelector": {}, "policyTypes": ["Ingress"] }),
    );
    marker["metadata"]["namespace"] = "marks".into();
    marker
}

/// Whether a daemon has the policy `mark`, and the kernel's sets match its table.
pub(crate) fn in_force(node: &Host, mark: &str) -> bool {
    let named = format!("{mark}\"");
    let Some(policies) = ask(node, "/policies").filter(|it| it.body.contains(&named)) else {
        return false;
    };
    assert_eq!(policies.status, 200, "{policies:?}");
    // The policy is in the table by now; what counts then is that the kernel is in step.
    let table = metric(node, "portreeve_table_generation");
    wait_until(DEADLINE, "the kernel's sets", || {
        metric(node, "portreeve_enforced_generation") >= table
    })
    .is_ok()
}

/// An answer of the admin port.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Asks the admin port of a node's daemon; `None` without one.
pub(crate) fn ask(node: &Host, path: &str) -> Option<Answer> {
    ask_by(node, "GET", path)
}

pub(crate) fn ask_by(node: &Host, method: &str, path: &str) -> Option<Answer> {
    ask_as(node, "localhost", method, path)
}

/// Sends a request with another Host header.
pub(crate) fn ask_as(node: &Host, host: &str, method: &str, path: &str) -> Option<Answer> {
    let connect = || TcpStream::connect((Ipv4Addr::LOCALHOST, ADMIN));
    let mut stream = node.run(connect).unwrap().ok()?;
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let request = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some(Answer {
        status,
        head: head.to_lowercase(),
        body: body.to_owned(),
    })
}

/// The sum of a metric's series that have all the labels of `name`, other labels or not; 0 if there
/// is none yet.
pub(crate) fn metric(node: &Host, name: &str) -> u64 {
    let (name, labels) = split_labels(name);
    let answer = ask(node, "/metrics").unwrap();
    let series = answer.body.lines().filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let (its_name, its_labels) = split_labels(series);
        let matches = its_name == name && labels.iter().all(|label| its_labels.contains(label));
        matches.then(|| value.parse::<u64>().unwrap())
    });
    series.sum()
}

/// How many packets a counter of the redirect has seen.
pub(crate) fn counter(node: &Host, name: &str) -> u64 {
    counter_of(node, "inet", name)
}

/// The same of the table of another family.
pub(crate) fn counter_of(node: &Host, family: &str, name: &str) -> u64 {
    let mut nft = node.command("nft");
    nft.args(["-j", "list", "counter", family, "portreeve", name]);
    let said = nft.output().unwrap();
    let listing: Value = serde_json::from_slice(&said.stdout).unwrap();
    let objects = listing["nftables"].as_array().unwrap();
    objects
        .iter()
        .find_map(|object| object["counter"]["packets"].as_u64())
        .unwrap()
}

fn split_labels(series: &str) -> (&str, Vec<&str>) {
    match series.trim_end_matches('}').split_once('{') {
        Some((name, labels)) => (name, labels.split(',').collect()),
        None => (series, Vec::new()),
    }
}

/// The name of the server at `to`, and the client address that it sees.
#[track_caller]
pub(crate) fn greeted(from: &Host, to: SocketAddr) -> Greeting {
    let outcome = from.connect(to, DEADLINE).unwrap();
    let stream = outcome
        .into_stream()
        .unwrap_or_else(|error| panic!("{to}: {error}"));
    greeting(&stream, DEADLINE).unwrap()
}

/// Says `text` and expects it back; the greeting has been read.
#[track_caller]
pub(crate) fn echoes(mut stream: &TcpStream, text: &str) {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(String::from_utf8_lossy(&back), text);
}

/// A connection that has been greeted.
#[track_caller]
pub(crate) fn connected(from: &Host, to: SocketAddr) -> TcpStream {
    let outcome = from.connect(to, DEADLINE).unwrap();
    let stream = outcome
        .into_stream()
        .unwrap_or_else(|error| panic!("{to}: {error}"));
    greeting(&stream, DEADLINE).unwrap();
    stream
}

fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    let from = lines.len().saturating_sub(20);
    format!("--- {}\n{}\n", log.display(), lines[from..].join("\n"))
}
