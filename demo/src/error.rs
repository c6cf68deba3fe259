//! Why there can be no demo, and what to do about it.
use std::io;
use std::path::PathBuf;

use controller::manifest::LoadError;
use lab::{ClusterError, PrivilegeError, ProcessError};

/// Why the demo cannot run. In all cases it leaves nothing behind.
#[derive(Debug, thiserror::Error)]
pub(super) enum DemoError {
    #[error(
        "--jaeger is {url:?}; give http://HOST or http://HOST:PORT, where PORT takes OTLP (4317: gRPC, 4318: HTTP)"
    )]
    JaegerUrl { url: String },
    #[error(
        "nobody takes spans at {at}: {source}; start Jaeger with its OTLP port open, or leave --jaeger out"
    )]
    NoJaeger { at: String, source: io::Error },
    #[error("cannot relay spans out of the demo: {0}; leave --jaeger out")]
    SpanProxy(#[source] io::Error),
    #[error("there is no {}; build both programs, for example by `cargo build --release`", expected.display())]
    NoInit { expected: PathBuf },
    #[error("this program's own path is not known; is /proc mounted?")]
    OwnPath(#[source] io::Error),
    #[error(transparent)]
    Manifests(#[from] LoadError),
    #[error("cannot read {}: {source}; make it a readable manifest file or a directory of them", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error(
        "there is no pod to build; give --manifests Pods and not only what makes them, for example by `kubectl get pods,namespaces,nodes,networkpolicies -A -o yaml > state.yaml`"
    )]
    NoPods,
    #[error(
        "{count} {what} are more than the {most} that one machine can show; give --manifests a part of them, for example by `kubectl get -n NAMESPACE`"
    )]
    TooMany {
        what: &'static str,
        count: usize,
        most: usize,
    },
    #[error("policies changed while they were handed to the daemons: {0}; report this as a bug")]
    NotTheSame(String),
    #[error("cannot create namespaces for the demo: {0}")]
    Privilege(#[from] PrivilegeError),
    #[error("the cluster cannot be built: {0}")]
    Lab(#[from] ClusterError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("{pod} cannot serve its ports: {source}; give it other containerPorts")]
    Serve { pod: String, source: io::Error },
    #[error("iptables-init install failed on {node}: {said}")]
    Init { node: String, said: String },
    #[error("the daemon on {node} does not run: {what}; the end of its log:\n  {log}")]
    Daemon {
        node: String,
        what: String,
        log: String,
    },
    #[error("connections cannot be opened: {0}; see `ulimit -n`, and the process limits")]
    Dial(#[source] io::Error),
    #[error("cannot handle signals: {0}; see the process limits")]
    Signals(#[source] io::Error),
    #[error("the demo's own files cannot be kept in memory: {0}; see the memory limits")]
    State(#[source] io::Error),
}
