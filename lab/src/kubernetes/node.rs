//! A real node: kubelet and containerd in a node of the lab, whose pods are containers.
//!
//! It has mounts, processes and cgroups of its own below one process; when that ends, nothing is left
//! on the machine. Needs root, and cgroups that root may write to. Knows the pods as far as it is to
//! find their processes.

mod cgroups;
mod configuration;
mod image;

use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::error::KubernetesError;
use super::start;
use super::{API_V4, ControlPlane, write};
use crate::cluster::Host;
use crate::netns::Netns;
use crate::process::{Child, Command, find_program};
use crate::tools::{ToolError, built};
use crate::wait::wait_until;
use cgroups::Cgroups;

pub use configuration::{BUSYBOX, Network};
pub use image::Image;

/// What the first process of the node does.
const ROOM: &str = include_str!("node/room.sh");
/// Where Debian's package has the CNI plugins.
const PLUGINS: &str = "/usr/lib/cni";
/// Where containerd looks for networks, in the node's directory.
const NETWORKS: &str = "cni";
const TAKEN_IN: Duration = Duration::from_secs(10);
/// containerd's debug message when it reloads its networks.
const TAKES_IN: &str = "receiving change event from cni conf dir";

/// A node that runs containers. Dropping it ends them all.
#[derive(Debug)]
pub struct Node {
    host: Host,
    pod_cidrs: Value,
    directory: PathBuf,
    // In drop order: all processes in the room end with it.
    room: Child,
    kubelet: Child,
    cgroups: Cgroups,
}

impl Node {
    /// Starts kubelet and containerd on a node of `manifests`, and waits until the node is ready.
    pub(super) fn start(
        control: &ControlPlane,
        host: &Host,
        manifests: &Value,
    ) -> Result<Self, KubernetesError> {
        let name = host.name();
        let mut objects = manifests["items"].as_array().into_iter().flatten();
        let object = objects.find(|it| it["kind"] == "Node" && it["metadata"]["name"] == name);
        let object = object.cloned().unwrap_or_default();
        // The cluster assigns the pod CIDRs; kubelet adds the rest.
        control.apply(&object)?;
        let directory = control.directory.join(name);
        let cni = directory.join(NETWORKS);
        fs::create_dir_all(&cni).map_err(|source| file_error(&cni, source))?;
        let pod_cidrs = object["spec"]["podCIDRs"].clone();
        write_network(&directory, Network::Ptp, &pod_cidrs)?;
        let containerd = configuration::containerd(&cni, Path::new(PLUGINS));
        write(directory.join("containerd.toml"), &containerd)?;
        let cgroups = Cgroups::new()?;
        let room = room(host, &directory, &cgroups)?;
        let program = built("kubelet")?.join("kubelet");
        let kubelet = kubelet(control, host, &directory, enter(host, room.id(), &program))?;
        let mut node = Self {
            host: host.clone(),
            pod_cidrs,
            directory,
            room,
            kubelet,
            cgroups,
        };
        node.import_busybox()?;
        node.await_ready(control)?;
        Ok(node)
    }

    /// Imports an image into the node, so that it needs no registry.
    ///
    /// # Errors
    /// If the archive cannot be made, or containerd refuses it.
    pub fn import(&self, image: &Image<'_>) -> Result<(), KubernetesError> {
        let archive = image.archive(&self.directory)?;
        let mut command = self.containerd();
        command.args(["images", "import"]).arg(&archive);
        let said = command.output()?;
        if !said.status.success() {
            return Err(KubernetesError::Failed {
                called: format!("ctr images import {}", image.name),
                complaint: String::from_utf8_lossy(&said.stderr).trim().into(),
            });
        }
        fs::remove_file(&archive).map_err(|source| file_error(&archive, source))
    }

    /// Gives the pods that are started from now on another network.
    ///
    /// # Errors
    /// If containerd does not take it in.
    pub fn network(&self, network: Network) -> Result<(), KubernetesError> {
        let log = || start::whole(&self.directory, "containerd");
        let before = log().len();
        write_network(&self.directory, network, &self.pod_cidrs)?;
        wait_until(TAKEN_IN, "containerd to take a network in", || {
            log()
                .get(before..)
                .is_some_and(|new| new.contains(TAKES_IN))
        })?;
        Ok(())
    }

    /// A program to be started among the node's own mounts, processes and cgroups.
    #[must_use]
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        enter(&self.host, self.room.id(), program.as_ref())
    }

    /// The processes of a pod by its uid, sandbox and all containers, as the machine numbers them.
    #[must_use]
    pub fn processes(&self, uid: &str) -> Vec<u32> {
        self.cgroups.processes(&format!("pod{uid}"))
    }

    /// A pod that runs here, as a host of the lab: its object in, what it has on the network out.
    ///
    /// # Errors
    /// [`KubernetesError::Incomplete`] if it has no addresses or no process yet.
    pub fn pod(&self, pod: &Value) -> Result<Host, KubernetesError> {
        let incomplete = |field| KubernetesError::Incomplete {
            field,
            object: pod["metadata"]["name"].to_string(),
        };
        let metadata = &pod["metadata"];
        let uid = metadata["uid"].as_str().unwrap_or_default();
        let processes = self.processes(uid);
        let netns = processes.iter().find_map(|id| Netns::of_process(*id).ok());
        let netns = netns.ok_or_else(|| incomplete("process"))?;
        let addresses = pod["status"]["podIPs"].as_array().into_iter().flatten();
        let addresses = addresses.filter_map(|it| it["ip"].as_str()?.parse::<IpAddr>().ok());
        let (mut v4, mut v6) = (None, None);
        for address in addresses {
            match address {
                IpAddr::V4(address) => v4 = Some(address),
                IpAddr::V6(address) => v6 = Some(address),
            }
        }
        let name = format!(
            "{}/{}",
            metadata["namespace"].as_str().unwrap_or_default(),
            metadata["name"].as_str().unwrap_or_default()
        );
        let both = v4.zip(v6).ok_or_else(|| incomplete("status.podIPs"))?;
        Ok(Host::new(&name, netns, both.0, both.1))
    }

    /// The ends of the logs of kubelet and containerd.
    #[must_use]
    pub fn log(&self) -> String {
        let kubelet = start::tail(&self.directory, "kubelet");
        let containerd = start::whole(&self.directory, "containerd");
        let lines = containerd.lines().filter(|it| !it.contains("level=debug"));
        let last: Vec<_> = lines.rev().take(30).collect();
        let containerd: Vec<_> = last.into_iter().rev().collect();
        format!(
            "kubelet:\n{kubelet}\ncontainerd:\n{}",
            containerd.join("\n")
        )
    }

    /// containerd's own client.
    fn containerd(&self) -> Command {
        let mut command = self.command("ctr");
        command.args(["--address", configuration::SOCKET, "--namespace", "k8s.io"]);
        command
    }

    fn import_busybox(&self) -> Result<(), KubernetesError> {
        let root = self.directory.join("busybox");
        image::busybox(&root)?;
        [BUSYBOX, configuration::PAUSE].iter().try_for_each(|name| {
            self.import(&Image {
                name,
                root: &root,
                environment: &["PATH=/bin"],
                // A sandbox does nothing until it is killed.
                command: &["sleep", "2147483647"],
            })
        })
    }

    fn await_ready(&mut self, control: &ControlPlane) -> Result<(), KubernetesError> {
        let path = format!("/api/v1/nodes/{}", self.host.name());
        start::await_start(&self.directory, "kubelet", &mut self.kubelet, || {
            let node = control.request("GET", &path, None).unwrap_or_default();
            let conditions = node["status"]["conditions"].as_array();
            let mut conditions = conditions.into_iter().flatten();
            conditions.any(|it| it["type"] == "Ready" && it["status"] == "True")
        })
    }
}

/// Makes `network` the only one. containerd reloads when a file is removed, not when a
/// complete one appears.
fn write_network(
    directory: &Path,
    network: Network,
    pod_cidrs: &Value,
) -> Result<(), KubernetesError> {
    let text = configuration::network(network, pod_cidrs).to_string();
    let new = write(directory.join("network"), &text)?;
    let networks = directory.join(NETWORKS);
    let place = networks.join(format!("{network:?}.conflist"));
    fs::rename(new, &place).map_err(|source| file_error(&place, source))?;
    let others = fs::read_dir(&networks).map_err(|source| file_error(&networks, source))?;
    others
        .filter_map(|other| Some(other.ok()?.path()))
        .filter(|other| *other != place)
        .try_for_each(|other| fs::remove_file(&other).map_err(|source| file_error(&other, source)))
}

/// Starts the process that all others are below, and waits until containerd serves.
fn room(host: &Host, directory: &Path, cgroups: &Cgroups) -> Result<Child, KubernetesError> {
    let containerd = installed("containerd", "containerd")?;
    installed("runc", "runc")?;
    if !Path::new(PLUGINS).join("ptp").is_file() {
        return Err(ToolError::Missing {
            program: "ptp",
            package: "containernetworking-plugins",
        }
        .into());
    }
    let script = write(directory.join("room.sh"), ROOM)?;
    let (stdin, mut go) = io::pipe().map_err(|source| file_error(directory, source))?;
    let mut command = host.command("sh");
    // It must be in its cgroups before it enters a cgroup namespace.
    let unshare = "unshare --mount --pid --cgroup --fork --kill-child";
    command.args(["-c", &format!("read go && exec {unshare} sh \"$@\"")]);
    command.arg("sh").arg(script).arg(directory).arg(containerd);
    command.stdin(stdin);
    let mut room = start::spawn(command, directory, "containerd")?;
    let id = room.id();
    cgroups.take(id)?;
    go.write_all(b"go\n")
        .map_err(|source| file_error(directory, source))?;
    start::await_start(directory, "containerd", &mut room, || {
        let mut version = enter(host, id, Path::new("ctr"));
        version.args(["--address", configuration::SOCKET, "version"]);
        version.output().is_ok_and(|said| said.status.success())
    })?;
    Ok(room)
}

/// A program in the namespaces that the process `room` has made.
fn enter(host: &Host, room: u32, program: &Path) -> Command {
    let mut command = host.command("nsenter");
    command.arg(format!("--mount=/proc/{room}/ns/mnt"));
    command.arg(format!("--pid=/proc/{room}/ns/pid_for_children"));
    command.arg(format!("--cgroup=/proc/{room}/ns/cgroup"));
    command.arg("--").arg(program);
    command
}

fn kubelet(
    control: &ControlPlane,
    host: &Host,
    directory: &Path,
    mut kubelet: Command,
) -> Result<Child, KubernetesError> {
    let name = host.name();
    // There is no name server.
    let resolver = write(directory.join("resolv.conf"), "")?;
    let configuration = configuration::kubelet(&resolver).to_string();
    let configuration = write(directory.join("kubelet.json"), &configuration)?;
    let kubeconfig = start::write_kubeconfig(&control.directory, name, API_V4, name)?;
    kubelet.arg("--config").arg(configuration);
    kubelet.arg("--kubeconfig").arg(kubeconfig);
    kubelet.args(["--hostname-override", name]);
    kubelet.args(["--node-ip", &format!("{},{}", host.ipv4(), host.ipv6())]);
    start::spawn(kubelet, directory, "kubelet")
}

fn installed(program: &'static str, package: &'static str) -> Result<PathBuf, ToolError> {
    find_program(Path::new(program)).ok_or(ToolError::Missing { program, package })
}

fn file_error(path: &Path, source: io::Error) -> KubernetesError {
    KubernetesError::File {
        path: path.into(),
        source,
    }
}
