//! How the control plane's programs are found, set up and started.
//!
//! Knows nothing of what they are asked for later.

use std::env;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::KubernetesError;
use super::{API_PORT, API_V4, etcd, write};
use crate::netns::Netns;
use crate::process::{Child, Command};
use crate::tools::built;
use crate::wait::wait_until;

pub(super) const SERVER: &str = "apiserver";
pub(super) const GATEWAY: &str = "gateway.sock";
/// How long a program may take until it serves. On two busy cores the API server took 20 s.
const STARTED: Duration = Duration::from_secs(120);
/// The static tokens: token, user, uid, groups.
const TOKENS: &str = "lab,lab,lab,system:masters\nkube-proxy,system:kube-proxy,system:kube-proxy\n\
    node-0,system:node:node-0,system:node:node-0,system:nodes\n";
/// The token of `system:kube-proxy`, which RBAC's defaults let do a kube-proxy's work.
pub(super) const KUBE_PROXY_TOKEN: &str = "kube-proxy";

/// Which Kubernetes runs: unset, the one that is pinned; `oldest`, the oldest release that Kubernetes'
/// own authors still support.
const RELEASE: &str = "LAB_KUBERNETES";

/// Where the programs are that `make tools` builds.
#[derive(Debug)]
pub(super) struct Programs {
    etcd: PathBuf,
    server: PathBuf,
    pub(super) kubectl: PathBuf,
    pub(super) kube_proxy: PathBuf,
    pub(super) controller_manager: PathBuf,
    pub(super) scheduler: PathBuf,
}

impl Programs {
    pub(super) fn find() -> Result<Self, KubernetesError> {
        let kubernetes = match env::var(RELEASE).as_deref() {
            Err(_) => built("kubernetes")?,
            Ok("oldest") => built("kubernetes-oldest")?,
            Ok(other) => {
                return Err(KubernetesError::Release {
                    variable: RELEASE,
                    value: other.into(),
                });
            }
        };
        Ok(Self {
            etcd: built("etcd")?.join("etcd"),
            server: kubernetes.join("kube-apiserver"),
            kubectl: kubernetes.join("kubectl"),
            kube_proxy: kubernetes.join("kube-proxy"),
            controller_manager: kubernetes.join("kube-controller-manager"),
            scheduler: kubernetes.join("kube-scheduler"),
        })
    }
}

pub(super) fn write_tokens(directory: &Path) -> Result<(), KubernetesError> {
    write(directory.join("tokens.csv"), TOKENS).map(drop)
}

pub(super) fn etcd(
    netns: &Netns,
    programs: &Programs,
    directory: &Path,
) -> Result<Child, KubernetesError> {
    let mut etcd = netns.command(&programs.etcd);
    etcd.arg("--data-dir").arg(directory.join("etcd"));
    // A crash of the machine may lose a test's data.
    etcd.args(["--unsafe-no-fsync", "--log-level=warn"]);
    let clients = format!("http://{}", etcd::CLIENTS);
    etcd.args(["--listen-client-urls", &clients]);
    etcd.args(["--advertise-client-urls", &clients]);
    etcd.args(["--listen-peer-urls", "http://127.0.0.1:2380"]);
    spawn(etcd, directory, "etcd")
}

/// Starts the API server and waits for the certificate that it makes itself, and with whose key it
/// signs ServiceAccounts' tokens.
pub(super) fn server(
    netns: &Netns,
    programs: &Programs,
    directory: &Path,
    flags: &[&str],
) -> Result<Child, KubernetesError> {
    let certificates = directory.join("certificates");
    let key = certificates.join("apiserver.key");
    let mut server = netns.command(&programs.server);
    server.arg(format!("--etcd-servers=http://{}", etcd::CLIENTS));
    server.arg(format!("--secure-port={API_PORT}"));
    server.arg(format!("--advertise-address={API_V4}"));
    server.arg("--service-cluster-ip-range=10.96.0.0/16,fd00:10:96::/112");
    server.arg(format!("--cert-dir={}", certificates.display()));
    let tokens = directory.join("tokens.csv");
    server.arg(format!("--token-auth-file={}", tokens.display()));
    server.args([
        "--authorization-mode=Node,RBAC",
        // Node names cannot be resolved.
        "--kubelet-preferred-address-types=InternalIP",
        "--allow-privileged=true",
        "--profiling=false",
    ]);
    server.arg("--service-account-issuer=https://kubernetes.default.svc");
    server.arg(format!("--service-account-key-file={}", key.display()));
    server.arg(format!(
        "--service-account-signing-key-file={}",
        key.display()
    ));
    server.args(flags);
    let mut server = spawn(server, directory, SERVER)?;
    await_start(directory, SERVER, &mut server, || {
        authority(directory).is_file()
    })?;
    Ok(server)
}

/// Starts `kubectl proxy`, through which the lab asks the API.
pub(super) fn gateway(
    netns: &Netns,
    programs: &Programs,
    directory: &Path,
) -> Result<Child, KubernetesError> {
    let kubeconfig = write_kubeconfig(directory, "lab", Ipv4Addr::LOCALHOST, "lab")?;
    let mut gateway = netns.command(&programs.kubectl);
    gateway
        .arg("proxy")
        .arg("--unix-socket")
        .arg(directory.join(GATEWAY));
    gateway.env("KUBECONFIG", kubeconfig);
    spawn(gateway, directory, "gateway")
}

/// The API server's certificate, which has its own authority in the same file.
pub(super) fn authority(directory: &Path) -> PathBuf {
    directory.join("certificates/apiserver.crt")
}

/// The kubeconfig of `system:masters` for programs beside the API server.
pub(super) fn admin_kubeconfig(directory: &Path) -> PathBuf {
    directory.join("lab.kubeconfig")
}

pub(super) fn write_kubeconfig(
    directory: &Path,
    name: &str,
    server: Ipv4Addr,
    token: &str,
) -> Result<PathBuf, KubernetesError> {
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: lab\n\
         contexts: [{{ name: lab, context: {{ cluster: lab, user: lab }} }}]\n\
         users: [{{ name: lab, user: {{ token: \"{token}\" }} }}]\n\
         clusters:\n- name: lab\n  cluster:\n    server: https://{server}:{API_PORT}\n\
         \x20   tls-server-name: kubernetes\n    certificate-authority: {}\n",
        authority(directory).display()
    );
    write(directory.join(format!("{name}.kubeconfig")), &text)
}

/// Starts a program that writes to `NAME.log`.
pub(super) fn spawn(
    mut command: Command,
    directory: &Path,
    name: &str,
) -> Result<Child, KubernetesError> {
    let path = directory.join(format!("{name}.log"));
    let log = File::options()
        .create(true)
        .append(true)
        .open(&path)
        .and_then(|log| Ok((log.try_clone()?, log)));
    let (stdout, stderr) = log.map_err(|source| KubernetesError::File { path, source })?;
    command.stdout(stdout).stderr(stderr);
    Ok(command.spawn()?)
}

/// Waits until `serves`, or the program's end, which is an error.
pub(super) fn await_start(
    directory: &Path,
    name: &'static str,
    child: &mut Child,
    mut serves: impl FnMut() -> bool,
) -> Result<(), KubernetesError> {
    let mut ended = false;
    let waited = wait_until(STARTED, format!("{name} to serve"), || {
        ended = !matches!(child.try_wait(), Ok(None));
        ended || serves()
    });
    if ended || waited.is_err() {
        return Err(KubernetesError::NotServing {
            program: name,
            log: tail(directory, name),
        });
    }
    Ok(())
}

/// The last lines of a program's log.
pub(super) fn tail(directory: &Path, name: &str) -> String {
    let text = whole(directory, name);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}

/// All of a program's log so far.
pub(super) fn whole(directory: &Path, name: &str) -> String {
    let path = directory.join(format!("{name}.log"));
    fs::read_to_string(&path).unwrap_or_else(|error| error.to_string())
}
