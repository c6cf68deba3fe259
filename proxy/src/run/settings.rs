//! The flags of `portreeve run`; each can be given as an environment variable too.
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;
use ipnet::IpNet;
use iptables_init::settings::Settings;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::enforcer::Deny;
use crate::limits::Bounds;
use crate::telemetry::spans::TelemetryArgs;

/// Traffic between a pod and the node that it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum OwnNode {
    /// Always allowed, as Kubernetes documents it.
    Allow,
    /// A pod's traffic to its node is under egress policy too.
    Judge,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// An object a line.
    Json,
}

impl From<OwnNode> for policy::OwnNode {
    fn from(own_node: OwnNode) -> Self {
        match own_node {
            OwnNode::Allow => Self::Allow,
            OwnNode::Judge => Self::Judge,
        }
    }
}

/// Enforce policies on this node until it is stopped. Needs `iptables-init install` before it.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct RunArgs {
    /// Where the cluster's state comes from: `kube`, or `dir:PATH` with manifests.
    #[arg(
        long,
        value_name = "SOURCE",
        default_value = "kube",
        env = "PORTREEVE_CLUSTER"
    )]
    pub(crate) cluster: String,
    /// Directory for the last good state, used at a start while the API server is unreachable.
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/var/lib/portreeve",
        env = "PORTREEVE_STATE_DIR"
    )]
    pub(crate) state_dir: PathBuf,
    /// Maximum age of that state.
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "24h",
        env = "PORTREEVE_STATE_MAX_AGE"
    )]
    pub(crate) state_max_age: humantime::Duration,
    /// Taint to remove from this Node once the daemon enforces; new nodes register with it.
    #[arg(long, value_name = "KEY", env = "PORTREEVE_STARTUP_TAINT")]
    pub(crate) startup_taint: Option<String>,
    /// Name of this Node object [default: $NODE_NAME, else the host name].
    #[arg(long, value_name = "NAME", env = "PORTREEVE_NODE")]
    node: Option<String>,
    /// Where to serve health, metrics and explanations over HTTP.
    #[arg(
        long,
        value_name = "ADDR",
        default_value = "127.0.0.1:15020",
        value_parser = place,
        env = "PORTREEVE_ADMIN"
    )]
    pub(crate) admin: SocketAddr,
    /// How denied connections are answered.
    #[arg(long, value_enum, default_value_t = Deny::Drop, env = "PORTREEVE_DENY")]
    pub(crate) deny: Deny,
    /// Addresses of this node's pods (repeatable) [default: the Node object's].
    #[arg(
        long,
        value_name = "CIDR",
        env = "PORTREEVE_POD_CIDR",
        value_delimiter = ',',
        value_parser = block
    )]
    pub(crate) pod_cidr: Vec<IpNet>,
    /// Addresses of any node's pods (repeatable) [default: every Node's pod CIDRs].
    #[arg(
        long,
        value_name = "CIDR",
        env = "PORTREEVE_CLUSTER_CIDR",
        value_delimiter = ',',
        value_parser = block
    )]
    pub(crate) cluster_cidr: Vec<IpNet>,
    /// Traffic between a pod and the node that it runs on.
    #[arg(long, value_enum, default_value_t = OwnNode::Allow, env = "PORTREEVE_OWN_NODE")]
    pub(crate) own_node: OwnNode,
    /// How long a first packet waits for a pod that is not known yet.
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "5s",
        env = "PORTREEVE_HOLD"
    )]
    pub(crate) hold: humantime::Duration,
    /// Socket path for handing live connections over to a new daemon,
    /// in a directory that only root can write to [default: none, a second daemon is rejected].
    #[arg(long, value_name = "PATH", env = "PORTREEVE_HANDOVER")]
    pub(crate) handover: Option<PathBuf>,
    /// How log lines look; they go to standard error, and RUST_LOG chooses which.
    #[arg(long, value_enum, default_value_t = LogFormat::Text, env = "PORTREEVE_LOG_FORMAT")]
    pub(crate) log_format: LogFormat,
    /// Write a record per connection to this file as JSON lines; `-` is standard output.
    #[arg(long, value_name = "PATH", env = "PORTREEVE_TRACE_FILE")]
    pub(crate) trace_file: Option<PathBuf>,
    /// Connections in all [default: what the descriptor limit allows].
    #[arg(long, value_name = "COUNT", env = "PORTREEVE_MAX_CONNECTIONS")]
    pub(crate) max_connections: Option<usize>,
    /// Connections of one source, a pod or an address outside [default: as many as are still free].
    #[arg(
        long,
        value_name = "COUNT",
        env = "PORTREEVE_MAX_CONNECTIONS_PER_SOURCE"
    )]
    pub(crate) max_connections_per_source: Option<usize>,
    /// MiB of memory for streams whose receivers do not keep up; one source may have half of it.
    #[arg(
        long,
        value_name = "MIB",
        default_value_t = 256,
        env = "PORTREEVE_MAX_UNREAD"
    )]
    pub(crate) max_unread: usize,
    #[command(flatten)]
    pub(crate) telemetry: TelemetryArgs,
    #[command(flatten)]
    pub(crate) redirect: Settings,
}

impl RunArgs {
    /// The uid of this daemon's pod, if it is given (`POD_UID`).
    pub(crate) fn pod(&self) -> Option<String> {
        let given = std::env::var("POD_UID").ok();
        given.filter(|uid| !uid.is_empty() && !uid.contains(char::is_whitespace))
    }

    /// The bounds by the limits of this process: of descriptors, after raising it to the maximum, and of memory.
    pub(crate) fn bounds(&self) -> anyhow::Result<Bounds> {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let limit = match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
            Ok(()) => hard,
            Err(_) => soft,
        };
        let backlog = std::fs::read_to_string("/proc/sys/net/core/somaxconn");
        Ok(Bounds::of(
            usize::try_from(limit)?,
            backlog
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .unwrap_or(4096),
            [Bounds::memory(), self.max_unread.saturating_mul(1 << 20)],
            self.max_connections,
            self.max_connections_per_source,
        ))
    }

    /// The Node's name as given, or else the host name.
    pub(crate) fn node(&self) -> anyhow::Result<String> {
        if let Some(name) = self
            .node
            .clone()
            .or_else(|| std::env::var("NODE_NAME").ok())
            .filter(|name| !name.is_empty())
        {
            return Ok(name);
        }
        let host = nix::unistd::gethostname().context("this host has no name; give --node")?;
        host.into_string()
            .ok()
            .context("the host's name is not text; give --node")
    }
}

fn block(text: &str) -> Result<IpNet, String> {
    let parsed = text.parse();
    parsed.map_err(|_| "write an address and a length, such as 10.244.0.0/24".to_owned())
}

fn place(text: &str) -> Result<SocketAddr, String> {
    let parsed = text.parse();
    parsed.map_err(|_| "write an address and a port, such as 127.0.0.1:15020".to_owned())
}
