//! A real Kubernetes control plane, etcd and kube-apiserver, for clusters of the lab; the lab plays
//! what is behind it: kubelet, scheduler, controllers. Where these matter, there are real ones:
//! [`ControlPlane::controllers`] and [`ControlPlane::node`].
//!
//! One control plane serves one cluster after the other, see [`ControlPlane::join`] and
//! [`ControlPlane::publish`]. It authorises by RBAC and admits as by default. Its programs come from
//! `lab/tools`. Knows no policies.

mod api;
mod bulk;
mod controllers;
mod error;
mod etcd;
mod kube_proxy;
mod node;
mod objects;
mod start;
mod state;

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::net::if_::if_nametoindex;
use serde_json::{Value, json};

use crate::cluster::{Cluster, Host};
use crate::netns::Netns;
use crate::process::Child;
use crate::tools;
use crate::wait::wait_until;
use api::Api;
use start::Programs;

pub use controllers::Controllers;
pub use error::KubernetesError;
pub use kube_proxy::ProxyMode;
pub use node::{BUSYBOX, Image, Network, Node};

/// Where the API server is for the nodes of the cluster that has joined.
pub const API_V4: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 2);
/// The same host's IPv6 address. The server's certificate names it by `kubernetes` only.
pub const API_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0, 2);
/// The API server's port.
pub const API_PORT: u16 = 6443;

/// The link to the cluster's fabric.
const LINK: &str = "eth0";
const GONE: Duration = Duration::from_secs(10);

/// A running control plane. Dropping it ends it.
#[derive(Debug)]
pub struct ControlPlane {
    netns: Netns,
    directory: PathBuf,
    programs: Programs,
    api: Api,
    state: Mutex<state::State>,
    // In drop order: no program waits for one that has ended.
    _gateway: Child,
    server: Mutex<Option<Child>>,
    _etcd: Child,
}

impl ControlPlane {
    /// Starts etcd and the API server, empty, and waits until they serve.
    ///
    /// Data, certificates and logs go to `directory`, which must be empty.
    ///
    /// # Errors
    /// [`KubernetesError`], with the end of the log of a program that failed.
    pub fn start(directory: &Path) -> Result<Self, KubernetesError> {
        let programs = Programs::find()?;
        let netns = Netns::new()?;
        tools::ip(&netns, "link set lo up\n")?;
        start::write_tokens(directory)?;
        let etcd = start::etcd(&netns, &programs, directory)?;
        let server = start::server(&netns, &programs, directory, &[])?;
        let control = Self {
            _gateway: start::gateway(&netns, &programs, directory)?,
            api: Api::new(directory.join(start::GATEWAY)),
            state: Mutex::default(),
            server: Mutex::new(Some(server)),
            _etcd: etcd,
            netns,
            directory: directory.into(),
            programs,
        };
        control.await_ready()?;
        Ok(control)
    }

    /// Puts the API server on the nodes' network of `cluster`, at [`API_V4`] and [`API_V6`]; it
    /// leaves the one before.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn join(&self, cluster: &Cluster) -> Result<(), KubernetesError> {
        self.leave()?;
        let netns = self.netns.path();
        tools::ip(
            cluster.fabric(),
            &format!(
                "link add control type veth peer name {LINK} netns {}\n\
                 link set control addrgenmode none master underlay up\n",
                netns.display()
            ),
        )?;
        tools::ip(
            &self.netns,
            &format!(
                "link set {LINK} up\naddr add {API_V4}/24 dev {LINK}\n\
                 addr add {API_V6}/64 dev {LINK} nodad\n"
            ),
        )?;
        Ok(())
    }

    /// Removes the API server from the nodes' network without closing connections.
    ///
    /// # Errors
    /// If the link does not go.
    pub fn leave(&self) -> Result<(), KubernetesError> {
        let linked = || self.netns.run(|| if_nametoindex(LINK).is_ok());
        if linked()? {
            // The kernel also removes the link, some time after its cluster.
            let _ = tools::ip(&self.netns, &format!("link del {LINK}\n"));
        }
        wait_until(GONE, "the link to the last cluster to go", || {
            matches!(linked(), Ok(false))
        })?;
        Ok(())
    }

    /// Makes `objects` (Namespaces, Nodes, Pods, NetworkPolicies, Services, ...) what the lab has in
    /// the API: creates and updates what differs from the last call, deletes what is not among them.
    ///
    /// An object's `status` is written as the kubelet writes it. A namespace that an object names
    /// exists too, and each has a ServiceAccount `default`. A Service with a selector has its
    /// EndpointSlices. What others changed meanwhile stays until the object changes here.
    ///
    /// # Errors
    /// [`KubernetesError::Refused`] with the server's words; what came before is done.
    pub fn publish(&self, objects: &[Value]) -> Result<(), KubernetesError> {
        lock(&self.state).become_these(&self.api, objects)
    }

    /// Creates `objects` with their status, many at once and in no order: for clusters that are large
    /// and never [published](Self::publish). What they need must be there, a pod's namespace and its
    /// ServiceAccount `default` too.
    ///
    /// # Errors
    /// The first [`KubernetesError`]; the others may be there or not.
    pub fn create(&self, objects: &[Value]) -> Result<(), KubernetesError> {
        bulk::create(&self.api, objects)
    }

    /// Creates or updates one object, which is not to be one of those that are
    /// [published](Self::publish): server-side apply of what it says, except its status.
    ///
    /// # Errors
    /// [`KubernetesError::Refused`] with the server's words.
    pub fn apply(&self, object: &Value) -> Result<(), KubernetesError> {
        let (body, _status) = state::split(object);
        self.api.apply(&objects::path(object)?, &body).map(drop)
    }

    /// Deletes one object that is not published.
    ///
    /// # Errors
    /// [`KubernetesError::Refused`] with the server's words.
    pub fn delete(&self, object: &Value) -> Result<(), KubernetesError> {
        let path = objects::path(object)?;
        self.api.request("DELETE", &path, None).map(drop)
    }

    /// Asks the API as `system:masters`: `method` on `path` with a JSON body, if any. `PATCH` is a
    /// merge patch (RFC 7386).
    ///
    /// # Errors
    /// [`KubernetesError::Refused`] unless the answer is a success.
    pub fn request(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, KubernetesError> {
        self.api.request(method, path, body)
    }

    /// Runs `kubectl` as `system:masters` with `input` as its standard input; returns what it wrote
    /// on its standard output.
    ///
    /// # Errors
    /// [`KubernetesError::Kubectl`] with its words if it fails.
    pub fn kubectl(&self, args: &[&str], input: &str) -> Result<String, KubernetesError> {
        let (stdin, mut writer) = std::io::pipe().map_err(|source| self.file_error(source))?;
        let mut command = self.netns.command(&self.programs.kubectl);
        command.args(args).stdin(stdin);
        command.env("KUBECONFIG", start::admin_kubeconfig(&self.directory));
        command.env("KUBECACHEDIR", self.directory.join("kubectl"));
        let said = thread::scope(|scope| {
            // A kubectl that refuses its input may stop reading it: its own words say more.
            scope.spawn(move || drop(writer.write_all(input.as_bytes())));
            command.output()
        })?;
        if !said.status.success() {
            return Err(KubernetesError::Kubectl {
                args: args.join(" "),
                complaint: String::from_utf8_lossy(&said.stderr).trim().into(),
            });
        }
        Ok(String::from_utf8_lossy(&said.stdout).into())
    }

    /// A fresh token of a ServiceAccount (TokenRequest), valid for an hour.
    ///
    /// # Errors
    /// [`KubernetesError::Refused`], most often because there is no such account.
    pub fn token(&self, namespace: &str, account: &str) -> Result<String, KubernetesError> {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
        let request = json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest" });
        let answer = self.api.request("POST", &path, Some(&request))?;
        let token = answer["status"]["token"].as_str();
        Ok(token.unwrap_or_default().into())
    }

    /// Writes a kubeconfig for programs on the nodes: the API server at [`API_V4`], with `token`.
    ///
    /// # Errors
    /// [`KubernetesError::File`].
    pub fn kubeconfig(&self, name: &str, token: &str) -> Result<PathBuf, KubernetesError> {
        start::write_kubeconfig(&self.directory, name, API_V4, token)
    }

    /// Starts the real kube-proxy on a node. Its rules are there some time later. The cluster must
    /// have no Services of the lab's own: they have a table of the same name.
    ///
    /// # Errors
    /// [`KubernetesError`], if it could not be started.
    pub fn kube_proxy(&self, node: &Host, mode: ProxyMode) -> Result<Child, KubernetesError> {
        kube_proxy::start(&self.programs, &self.directory, node, mode)
    }

    /// Starts the real controllers that pods on a real node need, and the scheduler. They take as
    /// theirs what is in the API, so this control plane should serve no other cluster.
    ///
    /// # Errors
    /// [`KubernetesError`], if they could not be started.
    pub fn controllers(&self) -> Result<Controllers, KubernetesError> {
        controllers::start(&self.netns, &self.programs, &self.directory)
    }

    /// Makes the first node of `cluster`, which must have joined, a real one: kubelet and containerd,
    /// and waits until it is ready. The cluster must have no pods of the lab's own there.
    ///
    /// # Errors
    /// [`KubernetesError`], with the end of the log of a program that failed.
    pub fn node(&self, cluster: &Cluster) -> Result<Node, KubernetesError> {
        Node::start(self, &cluster.node(0), &cluster.manifests())
    }

    /// The API server's certificate authority, in PEM.
    #[must_use]
    pub fn authority(&self) -> PathBuf {
        start::authority(&self.directory)
    }

    /// Where the control plane runs, for tests that break its network.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Ends the API server at once; etcd keeps what it has.
    pub fn stop_server(&self) {
        drop(lock(&self.server).take());
    }

    /// Starts the API server again after [`ControlPlane::stop_server`] and waits until it serves.
    ///
    /// # Errors
    /// As [`ControlPlane::start`].
    pub fn start_server(&self) -> Result<(), KubernetesError> {
        self.start_server_with(&[])
    }

    /// Starts the API server again with more flags, see [`ControlPlane::start_server`].
    ///
    /// # Errors
    /// As [`ControlPlane::start`].
    pub fn start_server_with(&self, flags: &[&str]) -> Result<(), KubernetesError> {
        let server = start::server(&self.netns, &self.programs, &self.directory, flags)?;
        *lock(&self.server) = Some(server);
        self.await_ready()
    }

    /// The end of the API server's log.
    #[must_use]
    pub fn log(&self) -> String {
        start::tail(&self.directory, start::SERVER)
    }

    /// Compacts etcd to the present revision, as the API server does every few minutes:
    /// a watch from an earlier one gets 410 Gone.
    ///
    /// # Errors
    /// If etcd does not do it.
    pub fn compact(&self) -> Result<(), KubernetesError> {
        let namespaces = self.api.request("GET", "/api/v1/namespaces", None)?;
        let revision = &namespaces["metadata"]["resourceVersion"];
        self.netns.run(|| etcd::compact(revision))?
    }

    fn await_ready(&self) -> Result<(), KubernetesError> {
        let mut server = lock(&self.server);
        let Some(server) = server.as_mut() else {
            return Ok(());
        };
        start::await_start(&self.directory, start::SERVER, server, || {
            // RBAC's default roles are there too then.
            self.api.request("GET", "/readyz", None).is_ok()
        })
    }

    fn file_error(&self, source: std::io::Error) -> KubernetesError {
        KubernetesError::File {
            path: self.directory.clone(),
            source,
        }
    }
}

/// The value is consistent after a panic too: it is what was done so far.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write(path: PathBuf, text: &str) -> Result<PathBuf, KubernetesError> {
    match fs::write(&path, text) {
        Ok(()) => Ok(path),
        Err(source) => Err(KubernetesError::File { path, source }),
    }
}
