//! The image and the DaemonSet without a container engine: the root file system is made by the script
//! that the Containerfile runs, and its programs run in it with what the DaemonSet grants: uid,
//! capabilities, system calls, read-only root, settings, mounts, and nothing of the node but its
//! network.
//!
//! `bwrap` plays the container runtime, with containerd's default seccomp filter (lab/tools/seccomp);
//! the API server is played by a directory of manifests.
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use serde_json::Value;
use tempfile::TempDir;
use testbed::runner::Test;

use crate::PORTREEVE;
use crate::bridges::{BRIDGE, takes};
use testbed::{SEVERAL_SYNS, SOON, TestCluster, allow_all, connected, deny_ingress, echoes, small};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    image_enforces_with_capabilities_of_the_daemonset,
    new_container_takes_over_streams_and_reports_ready,
    container_can_disable_bridge_nf_call,
    every_capability_of_the_daemonset_is_needed,
    net_broadcast_gives_prompt_bridge_address_events,
];

/// Where the daemon in the container finds its manifests.
const MANIFESTS: &str = "/manifests";
/// linux/capability.h
const CAPABILITIES: &[(&str, u32)] = &[
    ("NET_BROADCAST", 11),
    ("NET_ADMIN", 12),
    ("NET_RAW", 13),
    ("SYS_RESOURCE", 24),
];

fn image_enforces_with_capabilities_of_the_daemonset() {
    let image = Image::build("base");
    let mut bed = TestCluster::bare(small());
    bed.write_policies(&[allow_all(), deny_ingress("d")]);
    for node in 0..2 {
        let said = image.install(&bed, node, &image.granted("iptables-init"));
        assert!(said.status.success(), "{said:?}");
        image.run(&mut bed, node, &image.granted("portreeve"));
    }
    let (a, c) = (bed.lab.pod("x/a"), bed.lab.pod("x/c"));
    for to in c.addrs(80) {
        echoes(&connected(&a, to), "through both nodes' daemons");
    }
    bed.apply(&[deny_ingress("c")]);
    for to in c.addrs(80) {
        let outcome = a.connect(to, SOON).unwrap();
        assert_eq!(outcome.errno(), Some(Errno::ETIMEDOUT), "{to}");
    }
    let granted = image.granted("portreeve");
    assert_eq!(privilege(bed.daemon(0).child.id()), Privilege::of(&granted));
}

fn new_container_takes_over_streams_and_reports_ready() {
    let mut image = Image::build("base");
    let mut bed = TestCluster::bare(small());
    bed.write_policies(&[allow_all()]);
    let [first, granted] = ["iptables-init", "portreeve"].map(|name| image.granted(name));
    image.install(&bed, 0, &first);
    image.run(&mut bed, 0, &granted);
    let old = image.probe(&bed, 0);
    assert_eq!(old.output().unwrap().status.code(), Some(0));
    let (a, c) = (bed.lab.pod("x/a"), bed.lab.pod("x/c"));
    let streams = c.addrs(80).map(|to| connected(&a, to));

    let old = image.probe(&bed, 0);
    image.uid = "another".to_owned();
    let new = image.probe(&bed, 0);
    // As kubelet does, while the old one enforces.
    let said = image.install(&bed, 0, &first);
    assert!(said.status.success(), "{said:?}");
    let command = image.daemon(&bed, 0, &granted);
    let mut relieved = bed.relieve_by(0, command);
    for (probe, code) in [(old, 1), (new, 0)] {
        let said = probe.output().unwrap();
        assert_eq!(said.status.code(), Some(code), "{said:?}");
    }
    streams.iter().for_each(|it| echoes(it, "taken over"));
    relieved.child.kill();
    streams.iter().for_each(|it| echoes(it, "the new one's"));
}

fn container_can_disable_bridge_nf_call() {
    let image = Image::build("overlays/bridge");
    let bed = TestCluster::bare(small());
    let node = bed.lab.node(0);
    let sysctls = ["iptables", "ip6tables"].map(|it| format!("bridge/bridge-nf-call-{it}"));
    for sysctl in &sysctls {
        node.netns().set_sysctls(&[(sysctl, "1")]).unwrap();
    }
    let said = image.install(&bed, 0, &image.granted("iptables-init"));
    assert!(said.status.success(), "{said:?}");
    for sysctl in sysctls {
        let value = node.run(|| fs::read_to_string(format!("/proc/sys/net/{sysctl}")));
        assert_eq!(value.unwrap().unwrap(), "0\n", "{sysctl}");
    }
}

fn every_capability_of_the_daemonset_is_needed() {
    let image = Image::build("base");
    let mut bed = TestCluster::bare(small());
    bed.write_policies(&[allow_all()]);
    for container in ["iptables-init", "portreeve"] {
        let granted = image.granted(container);
        for capability in &granted {
            let without: Vec<_> = granted
                .iter()
                .filter(|it| it != &capability)
                .cloned()
                .collect();
            match (container, capability.as_str()) {
                ("iptables-init", "NET_ADMIN") => refused(&image.install(&bed, 0, &without)),
                ("portreeve", "NET_ADMIN") => {
                    image.install(&bed, 0, &image.granted("iptables-init"));
                    refused(&image.daemon(&bed, 0, &without).output().unwrap());
                }
                ("portreeve", "NET_RAW") => {
                    // Errors for connections that the kernel forwards are its own.
                    let spliced = |mut command: lab::Command| {
                        command.args(["--tcp", "spliced"]);
                        command
                    };
                    let init = image.granted("iptables-init");
                    for (node, capabilities) in [(0, &granted), (1, &without)] {
                        let install = image.command(&bed, node, "iptables-init", &init);
                        assert!(spliced(install).output().unwrap().status.success());
                        let daemon = image.daemon(&bed, node, capabilities);
                        bed.start_command(node, spliced(daemon));
                    }
                    assert_eq!(unreachable(&bed, "x/a"), Errno::EHOSTUNREACH);
                    assert_eq!(unreachable(&bed, "x/c"), Errno::ETIMEDOUT);
                }
                _ => panic!("no test shows what {container} needs {capability} for"),
            }
        }
    }
}

/// Needed for bridges only: without it the daemon polls pods' addresses every two seconds.
fn net_broadcast_gives_prompt_bridge_address_events() {
    let image = Image::build("overlays/bridge");
    let mut bed = TestCluster::bare(small().gateway(BRIDGE));
    bed.write_policies(&[allow_all()]);
    let granted = image.granted("portreeve");
    let mut without = granted.clone();
    without.retain(|capability| capability != "NET_BROADCAST");
    assert_eq!(without, Image::build("base").granted("portreeve"));
    for (node, pod, capabilities, at_once) in
        [(0, "x/a", &granted, true), (1, "x/c", &without, false)]
    {
        image.install(&bed, node, &image.granted("iptables-init"));
        image.run(&mut bed, node, capabilities);
        let (host, pod) = (bed.lab.node(node), bed.lab.pod(pod));
        let address = |last| Ipv4Addr::new(10, 244, u8::try_from(node).unwrap(), last);
        // The first come at any time between questions, of which a daemon that begins has some more; the last
        // just after one.
        takes(&pod, &host, address(100));
        takes(&pod, &host, address(101));
        let since = Instant::now();
        takes(&pod, &host, address(102));
        let took = since.elapsed();
        assert_eq!(took < Duration::from_secs(1), at_once, "{took:?}");
    }
}

/// Expects that a program names the capability that it lacks.
fn refused(output: &Output) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("CAP_NET_ADMIN"), "{said}");
}

/// What a pod sees when it connects to a host without a route.
fn unreachable(bed: &TestCluster, pod: &str) -> Errno {
    let [to, _] = bed.lab.unreachable(80);
    let outcome = bed.lab.pod(pod).connect(to, SEVERAL_SYNS).unwrap();
    outcome.errno().unwrap()
}

/// The image's root file system, and the pod that the DaemonSet makes of it.
struct Image {
    root: TempDir,
    /// The mounts that a container may write to, one below the other.
    volumes: TempDir,
    /// Makes the runtime's default filter.
    seccomp: PathBuf,
    pod: Value,
    uid: String,
    settings: BTreeMap<String, String>,
    recipe: String,
}

impl Image {
    /// Makes the root file system as the Containerfile does, for the pod that `directory` makes.
    fn build(directory: &str) -> Self {
        let recipe = fs::read_to_string(deploy("image/Containerfile")).unwrap();
        let mut kubectl = Command::new(tool("kubernetes", "kubectl"));
        let built = kubectl
            .arg("kustomize")
            .arg(deploy(directory))
            .output()
            .unwrap();
        assert!(built.status.success(), "{built:?}");
        let built = String::from_utf8(built.stdout).unwrap();
        let objects: Vec<Value> = serde_saphyr::from_multiple(&built).unwrap();
        let only = |kind: &str| objects.iter().find(|it| it["kind"] == kind).unwrap();
        let image = Self {
            root: TempDir::new().unwrap(),
            volumes: TempDir::new().unwrap(),
            seccomp: tool("seccomp", "seccomp"),
            pod: only("DaemonSet")["spec"]["template"]["spec"].clone(),
            uid: "0a1b2c3d".to_owned(),
            settings: serde_json::from_value(only("ConfigMap")["data"].clone()).unwrap(),
            recipe,
        };
        assert!(
            image
                .recipe
                .contains("RUN /rootfs /image /programs/portreeve /programs/iptables-init")
        );
        let mut rootfs = Command::new(deploy("image/rootfs"));
        rootfs.arg(image.root.path()).arg(PORTREEVE);
        rootfs.arg(Path::new(PORTREEVE).with_file_name("iptables-init"));
        let said = rootfs.output().unwrap();
        assert!(said.status.success(), "{said:?}");
        // The place for the manifests, which the DaemonSet has no use for.
        fs::create_dir(image.root.path().join("manifests")).unwrap();
        image
    }

    fn container(&self, name: &str) -> &Value {
        let lists = ["initContainers", "containers"].map(|list| self.pod[list].as_array());
        let mut all = lists.into_iter().flatten().flatten();
        all.find(|it| it["name"] == name).unwrap()
    }

    /// The capabilities of a container, all others being dropped.
    fn granted(&self, container: &str) -> Vec<String> {
        let capabilities = &self.container(container)["securityContext"]["capabilities"];
        assert_eq!(capabilities["drop"], serde_json::json!(["ALL"]));
        serde_json::from_value(capabilities["add"].clone()).unwrap()
    }

    /// The init container, to its end.
    fn install(&self, bed: &TestCluster, node: usize, capabilities: &[String]) -> Output {
        let command = self.command(bed, node, "iptables-init", capabilities);
        command.output().unwrap()
    }

    /// Starts the daemon's container and waits until the daemon enforces.
    fn run(&self, bed: &mut TestCluster, node: usize, capabilities: &[String]) {
        let command = self.daemon(bed, node, capabilities);
        bed.start_command(node, command);
    }

    fn daemon(&self, bed: &TestCluster, node: usize, capabilities: &[String]) -> lab::Command {
        let mut command = self.command(bed, node, "portreeve", capabilities);
        command.args(["--cluster", &format!("dir:{MANIFESTS}")]);
        command
    }

    /// The startup probe.
    fn probe(&self, bed: &TestCluster, node: usize) -> lab::Command {
        let (name, probe) = ("portreeve", "startupProbe");
        let mut command = self.sandbox(bed, node, name, &self.granted(name));
        command.args(strings(&self.container(name)[probe]["exec"]["command"]));
        command
    }

    /// A container's command as its pod has it, on a node.
    fn command(
        &self,
        bed: &TestCluster,
        node: usize,
        name: &str,
        capabilities: &[String],
    ) -> lab::Command {
        let mut command = self.sandbox(bed, node, name, capabilities);
        command.args(strings(&self.container(name)["command"]));
        command
    }

    /// The sandbox command of a container; a program follows.
    fn sandbox(
        &self,
        bed: &TestCluster,
        node: usize,
        name: &str,
        capabilities: &[String],
    ) -> lab::Command {
        let container = self.container(name);
        let context = &container["securityContext"];
        assert_eq!(context["readOnlyRootFilesystem"], true);
        // bwrap sets no_new_privs and keeps the uid.
        assert_eq!(context["allowPrivilegeEscalation"], false);
        assert_eq!(self.pod["securityContext"]["runAsUser"], 0);
        assert_eq!(self.pod["hostNetwork"], true);

        let host = bed.lab.node(node);
        let mut command = host.command("bwrap");
        command.args(["--die-with-parent", "--unshare-pid", "--unshare-ipc"]);
        command
            .arg("--ro-bind")
            .args([self.root.path(), Path::new("/")]);
        // As container runtimes have it: the node's parameters can be read and not written.
        command.args(["--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys"]);
        command.args(["--dev", "/dev", "--ro-bind", "/sys", "/sys"]);
        command
            .arg("--ro-bind")
            .args([&bed.manifests(), Path::new(MANIFESTS)]);
        for mount in container["volumeMounts"].as_array().into_iter().flatten() {
            let volume = self.volume(mount["name"].as_str().unwrap(), host.name());
            let at = mount["mountPath"].as_str().unwrap();
            // As runtimes do, before they make the root read-only.
            fs::create_dir_all(self.root.path().join(&at[1..])).unwrap();
            command.arg("--bind").args([&volume, Path::new(at)]);
        }
        assert_eq!(
            self.pod["securityContext"]["seccompProfile"]["type"],
            "RuntimeDefault"
        );
        command
            .args(["--seccomp", "0"])
            .stdin(self.filter(capabilities));
        command.args(["--cap-drop", "ALL"]);
        for capability in capabilities {
            command.args(["--cap-add", &format!("CAP_{capability}")]);
        }
        command.arg("--clearenv");
        for (key, value) in self.environment(container, host.name()) {
            command.args(["--setenv", &key, &value]);
        }
        command.arg("--");
        command
    }

    /// What a node has at a volume's path: its kernel's own files, else a directory of its own.
    fn volume(&self, name: &str, node: &str) -> PathBuf {
        let mut volumes = self.pod["volumes"].as_array().unwrap().iter();
        let volume = volumes.find(|it| it["name"] == name).unwrap();
        let path = volume["hostPath"]["path"].as_str().unwrap();
        if path.starts_with("/proc/") {
            return path.into();
        }
        let path = self.volumes.path().join(format!("{node}{path}"));
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// The runtime's default filter for a container with these capabilities.
    fn filter(&self, capabilities: &[String]) -> File {
        let mut seccomp = Command::new(&self.seccomp);
        seccomp.args(capabilities.iter().map(|name| format!("CAP_{name}")));
        let said = seccomp.output().unwrap();
        assert!(said.status.success(), "{said:?}");
        let path = self.volumes.path().join("filter");
        fs::write(&path, said.stdout).unwrap();
        File::open(path).unwrap()
    }

    /// The image's variables, then the ConfigMap's, then the container's own.
    fn environment(&self, container: &Value, node: &str) -> Vec<(String, String)> {
        let pair = |line: &str| {
            line.split_once('=')
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
        };
        let of_image = self
            .recipe
            .lines()
            .filter_map(|line| line.strip_prefix("ENV "));
        let mut all: Vec<_> = of_image.filter_map(pair).collect();
        all.extend(self.settings.clone());
        for own in container["env"].as_array().into_iter().flatten() {
            let value = match own["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
                Some("spec.nodeName") => node,
                Some("metadata.namespace") => "portreeve-system",
                Some("metadata.name") => "portreeve-x1y2z",
                Some("metadata.uid") => &self.uid,
                Some(other) => panic!("this test does not know the field {other}"),
                None => own["value"].as_str().unwrap(),
            };
            // As kubelet does, with what comes before.
            let put_in = |value: String, (name, known): &(String, String)| {
                value.replace(&format!("$({name})"), known)
            };
            let value = all.iter().fold(value.to_owned(), put_in);
            all.push((own["name"].as_str().unwrap().into(), value));
        }
        all
    }
}

fn strings(list: &Value) -> Vec<String> {
    serde_json::from_value(list.clone()).unwrap()
}

fn deploy(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy")
        .join(path)
}

/// A program of lab/tools.
fn tool(module: &str, program: &str) -> PathBuf {
    let mut build = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../lab/tools/build"));
    let said = build.args(["--where", module]).output().unwrap();
    assert!(
        said.status.success(),
        "{}",
        String::from_utf8_lossy(&said.stderr)
    );
    Path::new(String::from_utf8(said.stdout).unwrap().trim()).join(program)
}

/// What a process may do.
#[derive(Debug, PartialEq, Eq)]
struct Privilege {
    effective: u64,
    permitted: u64,
    /// No program that it starts can have more.
    no_new_privileges: bool,
    filtered: bool,
}

impl Privilege {
    /// These capabilities, and no means to gain others.
    fn of(capabilities: &[String]) -> Self {
        let bit = |name: &String| CAPABILITIES.iter().find(|(it, _)| it == name).unwrap().1;
        let mask = capabilities.iter().map(|name| 1 << bit(name)).sum();
        Self {
            effective: mask,
            permitted: mask,
            no_new_privileges: true,
            filtered: true,
        }
    }
}

/// What the daemon below `bwrap` may do.
fn privilege(bwrap: u32) -> Privilege {
    let daemon = descendants(bwrap).into_iter().find(|pid| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|it| it == "portreeve\n")
    });
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.unwrap())).unwrap();
    let field = |name: &str| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap();
        u64::from_str_radix(line.trim(), 16).unwrap()
    };
    Privilege {
        effective: field("CapEff:"),
        permitted: field("CapPrm:"),
        no_new_privileges: field("NoNewPrivs:") == 1,
        // SECCOMP_MODE_FILTER
        filtered: field("Seccomp:") == 2,
    }
}

fn descendants(parent: u32) -> Vec<u32> {
    let parent_of = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // pid (comm) state ppid; a comm may have spaces and parentheses.
        stat.rsplit_once(')')?
            .1
            .split_whitespace()
            .nth(1)?
            .parse::<u32>()
            .ok()
    };
    let all = fs::read_dir("/proc").unwrap();
    let all: Vec<u32> = all
        .filter_map(|it| it.unwrap().file_name().to_str()?.parse().ok())
        .collect();
    let mut found = vec![parent];
    let mut next = 0;
    while next < found.len() {
        let of = found[next];
        found.extend(
            all.iter()
                .copied()
                .filter(|pid| parent_of(*pid) == Some(of)),
        );
        next += 1;
    }
    found
}
