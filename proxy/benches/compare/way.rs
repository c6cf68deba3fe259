//! The ways from client to server: bare, bare with conntrack, through Portreeve with and without its proxy, through HAProxy.
//!
//! Each has a cluster of its own, all alike, that stands for the whole run; a way without load costs
//! nothing. Must not know what is measured.
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use lab::{Child, Cluster, Host, PodSpec, wait_for};
use serde_json::json;
use tempfile::TempDir;

use crate::collector::Collector;
use crate::flood::{Flood, Targets};
use crate::load::{Load, Servers, WHO};
use crate::machine::cpu_time;

pub(crate) const BARE: &str = "bare";
pub(crate) const TRACKED: &str = "bare + conntrack";
pub(crate) const PORTREEVE: &str = "Portreeve";
/// Portreeve without its proxy.
pub(crate) const KERNEL: &str = "Portreeve, --tcp kernel";
pub(crate) const HAPROXY: &str = "HAProxy";
/// What the name of a build ends with whose decisions are collected.
pub(crate) const COLLECTED: &str = " with spans";

/// How long a way may take until it carries connections.
const READY_WITHIN: Duration = Duration::from_secs(10);
/// Where HAProxy listens.
const HAPROXY_PORT: u16 = 15001;

/// Where the server is, seen from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// On the client's node: one proxy.
    OneNode,
    /// On another node: two proxies, since both nodes enforce.
    TwoNodes,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OneNode => "one node",
            Self::TwoNodes => "two nodes",
        })
    }
}

/// A build of the daemon, with the init step beside it.
#[derive(Clone, Debug)]
pub(crate) struct Build {
    name: String,
    daemon: PathBuf,
    /// Whether every connection becomes a span and metrics are scraped.
    collected: bool,
    /// Whether it is started with `--tcp kernel`.
    forwards: bool,
}

impl Build {
    /// As the table's head has it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The same without a proxy.
    pub(crate) fn forwarding(self) -> Self {
        Self {
            name: KERNEL.to_owned(),
            forwards: true,
            ..self
        }
    }

    /// The same, with all there is to see of its decisions collected.
    pub(crate) fn collected(&self) -> Self {
        Self {
            name: format!("{}{COLLECTED}", self.name),
            collected: true,
            ..self.clone()
        }
    }
}

/// The build that this bench belongs to.
pub(crate) fn own_build() -> Build {
    Build {
        name: PORTREEVE.to_owned(),
        daemon: env!("CARGO_BIN_EXE_portreeve").into(),
        collected: false,
        forwards: false,
    }
}

/// Reads `NAME=PATH`.
///
/// # Errors
/// What is wrong with it, for the command line.
pub(crate) fn other_build(text: &str) -> Result<Build, String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() => Ok(Build {
            name: name.to_owned(),
            daemon: path.into(),
            collected: false,
            forwards: false,
        }),
        _ => Err("give a name and a path, like before=/tmp/before/portreeve".to_owned()),
    }
}

/// A cluster of two nodes with a client, a server beside it and a server on the other node.
pub(crate) struct Way {
    name: String,
    proxied: bool,
    // Before the cluster: the daemons end first.
    daemons: Vec<Child>,
    collector: Option<Collector>,
    client: Host,
    near: Servers,
    far: Servers,
    cluster: Cluster,
    files: TempDir,
}

impl Way {
    /// No enforcement.
    pub(crate) fn bare() -> anyhow::Result<Self> {
        Self::new(BARE, false)
    }

    /// No enforcement on nodes whose conntrack follows every flow, as kube-proxy's rules have it do: what
    /// a node is before Portreeve comes to it.
    pub(crate) fn tracked() -> anyhow::Result<Self> {
        let way = Self::new(TRACKED, false)?;
        for node in way.cluster.nodes() {
            node.nft(SERVICES)?;
        }
        Ok(way)
    }

    /// `iptables-init install` and `portreeve run` on both nodes. The client is isolated for egress
    /// and both servers for ingress; a policy each allows just these connections.
    pub(crate) fn portreeve(build: &Build) -> anyhow::Result<Self> {
        let mut way = Self::new(&build.name, !build.forwards)?;
        let init = build.daemon.with_file_name("iptables-init");
        ensure!(
            init.is_file(),
            "there is no {}; build it by `cargo build --release --workspace`, or use `make bench`",
            init.display()
        );
        let manifests = way.files.path().join("manifests");
        fs::create_dir(&manifests)?;
        way.cluster
            .write_manifests(&manifests.join("cluster.json"))?;
        fs::write(manifests.join("policies.json"), policies().to_string())?;
        if build.collected {
            way.collector = Some(Collector::start(&way.cluster.outside())?);
        }
        for node in way.cluster.nodes() {
            let mut install = node.command(&init);
            install.arg("install");
            let mode = build.forwards.then_some(["--tcp", "kernel"]);
            install.args(mode.iter().flatten());
            let installed = install.output()?;
            ensure!(
                installed.status.success(),
                "iptables-init install on {}: {}",
                node.name(),
                String::from_utf8_lossy(&installed.stderr)
            );
            let mut daemon = node.command(&build.daemon);
            daemon
                .arg("run")
                .args(["--cluster", &format!("dir:{}", manifests.display())])
                .args(["--node", node.name()])
                .args(mode.iter().flatten());
            if let Some(collector) = &mut way.collector {
                daemon.args(["--otlp-endpoint", collector.endpoint()]);
                daemon.args(["--trace-allowed", "1"]);
                collector.scrape(node.clone())?;
            }
            way.daemons.push(way.started(&node, daemon)?);
        }
        Ok(way)
    }

    /// HAProxy on both nodes, set up as its documentation advises for transparent proxying.
    pub(crate) fn haproxy() -> anyhow::Result<Self> {
        let mut way = Self::new(HAPROXY, true)?;
        let config = way.files.path().join("haproxy.cfg");
        fs::write(&config, haproxy_config()?)?;
        for node in way.cluster.nodes() {
            node.nft(&haproxy_redirect())?;
            node.ip(
                "rule add fwmark 0x1 lookup 100\nroute add local 0.0.0.0/0 dev lo table 100\n",
            )?;
            let mut daemon = node.command("haproxy");
            daemon.args(["-db", "-f"]).arg(&config);
            let daemon = way
                .started(&node, daemon)
                .context("HAProxy is measured beside; install it by `apt install haproxy`")?;
            way.daemons.push(daemon);
        }
        Ok(way)
    }

    /// As the table's head has it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether this way is worth measuring at `load`: that decisions are collected costs only where some
    /// are made, and a flood is of interest where it is decided, beside the bare network.
    pub(crate) fn is_for(&self, load: Load) -> bool {
        let judges = !self.daemons.is_empty() && self.name != HAPROXY;
        match load {
            Load::Flooded(_) => self.collector.is_none() && (judges || self.name == BARE),
            _ => self.collector.is_none() || load.is_of_decisions(),
        }
    }

    /// What is collected of its decisions, if that is.
    pub(crate) fn collector(&self) -> Option<&Collector> {
        self.collector.as_ref()
    }

    /// The client.
    pub(crate) fn client(&self) -> &Host {
        &self.client
    }

    /// The server at the end of `path`.
    pub(crate) fn server(&self, path: Path) -> &Servers {
        match path {
            Path::OneNode => &self.near,
            Path::TwoNodes => &self.far,
        }
    }

    /// Waits until connections pass, and makes sure that they pass in this very way: the server
    /// always sees the client's address, but its port only if no proxy stands between.
    pub(crate) fn assure(&self) -> anyhow::Result<()> {
        for path in [Path::OneNode, Path::TwoNodes] {
            let mut last = None;
            let passed = wait_for(READY_WITHIN, format!("{} over {path}", self.name), || {
                let dialled = self
                    .server(path)
                    .seen_from(&self.client, Duration::from_millis(500));
                match dialled {
                    Ok((seen, own)) if seen.ip() == own.ip() && (seen != own) == self.proxied => {
                        Some(())
                    }
                    other => {
                        last = Some(other);
                        None
                    }
                }
            });
            if passed.is_err() {
                bail!(
                    "{} does not carry connections over {path} as it should: dialled, the server saw: {last:?}\n{}",
                    self.name,
                    self.logs()
                );
            }
        }
        Ok(())
    }

    /// Starts the flood that is part of `load`, if one is. It comes from a pod on the client's node.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn flood(&self, load: Load) -> anyhow::Result<Option<Flood>> {
        let Load::Flooded(kind) = load else {
            return Ok(None);
        };
        let from = self.cluster.pod("bench/flood");
        // Another port than that of the connects, whose threads would wait for the flood's requests.
        let server = self.cluster.pod("bench/near").addr_v4(WHO);
        // So its link's neighbour is known.
        from.connect(server, READY_WITHIN)?;
        let targets = Targets {
            denied: self.client.addr_v4(WHO),
            server,
            silent: self.cluster.blackhole(80)[0],
        };
        Ok(Some(Flood::start(kind, &from, &targets)?))
    }

    /// CPU time that the way's daemons have used so far.
    pub(crate) fn busy(&self) -> anyhow::Result<Duration> {
        let mut busy = Duration::ZERO;
        for daemon in &self.daemons {
            let tasks = format!("/proc/{}/task", daemon.id());
            let tasks = fs::read_dir(tasks)
                .with_context(|| format!("{} has ended:\n{}", self.name, self.logs()))?;
            for task in tasks {
                busy += cpu_time(task?.path());
            }
        }
        Ok(busy)
    }

    fn new(name: &str, proxied: bool) -> anyhow::Result<Self> {
        let cluster = Cluster::builder()
            .nodes(2)
            .pod(PodSpec::new("bench", "client").label("role", "client"))
            .pod(PodSpec::new("bench", "flood").label("role", "flood"))
            .pod(PodSpec::new("bench", "near").label("role", "server"))
            .pod(PodSpec::new("bench", "far").label("role", "server").node(1))
            .build()?;
        Ok(Self {
            name: name.to_owned(),
            proxied,
            daemons: Vec::new(),
            collector: None,
            client: cluster.pod("bench/client"),
            near: Servers::start(cluster.pod("bench/near"))?,
            far: Servers::start(cluster.pod("bench/far"))?,
            cluster,
            files: TempDir::new()?,
        })
    }

    fn started(&self, node: &Host, mut daemon: lab::Command) -> anyhow::Result<Child> {
        let log = self.files.path().join(format!("{}.log", node.name()));
        let log = fs::File::create(log)?;
        daemon.stdout(log.try_clone()?).stderr(log);
        Ok(daemon.spawn()?)
    }

    fn logs(&self) -> String {
        let nodes = self.cluster.nodes();
        let log = |node: Host| self.files.path().join(format!("{}.log", node.name()));
        nodes
            .map(|node| fs::read_to_string(log(node)).unwrap_or_default())
            .collect()
    }
}

fn policies() -> serde_json::Value {
    let roles = |role| json!({"podSelector": {"matchLabels": {"role": role}}});
    let policy = |name, spec: serde_json::Value| {
        json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"namespace": "bench", "name": name},
            "spec": spec,
        })
    };
    let mut client = roles("client");
    client["policyTypes"] = json!(["Egress"]);
    client["egress"] = json!([{"to": [roles("server")]}]);
    let mut server = roles("server");
    server["policyTypes"] = json!(["Ingress"]);
    server["ingress"] = json!([{"from": [roles("client"), roles("flood")]}]);
    let mut flood = roles("flood");
    flood["policyTypes"] = json!(["Egress"]);
    let outside = json!({"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.244.0.0/16"]}});
    flood["egress"] = json!([{"to": [roles("server"), outside]}]);
    json!({
        "apiVersion": "v1",
        "kind": "List",
        "items": [policy("client", client), policy("server", server), policy("flood", flood)],
    })
}

/// A thread a core and a listener a thread; pipes as large as ours; the client's address is kept.
fn haproxy_config() -> anyhow::Result<String> {
    let cores = thread::available_parallelism()?;
    Ok(format!(
        "global
    nbthread {cores}
    maxconn 4096
    tune.pipesize 1048576
defaults
    mode tcp
    option splice-auto
    option clitcpka
    option srvtcpka
    timeout connect 10s
    timeout client 1h
    timeout server 1h
listen pods
    bind 0.0.0.0:{HAPROXY_PORT} transparent shards by-thread
    source 0.0.0.0 usesrc clientip
    server destination 0.0.0.0
"
    ))
}

/// The hooks of kube-proxy's nat rules, without a Service.
const SERVICES: &str = "table ip services {
    chain prerouting {
        type nat hook prerouting priority -100; policy accept;
    }
    chain output {
        type nat hook output priority -100; policy accept;
    }
    chain postrouting {
        type nat hook postrouting priority 100; policy accept;
    }
}
";

/// The kernel's own advice (Documentation/networking/tproxy.rst): what has a socket goes to it,
/// what pods or nodes send to pods goes to the proxy.
fn haproxy_redirect() -> String {
    format!(
        "table ip haproxy {{
    chain divert {{
        type filter hook prerouting priority mangle; policy accept;
        meta l4proto tcp socket transparent 1 meta mark set 0x1 accept
        iifname != \"lo\" ip daddr 10.244.0.0/16 meta l4proto tcp tproxy to :{HAPROXY_PORT} meta mark set 0x1 accept
    }}
}}
"
    )
}
