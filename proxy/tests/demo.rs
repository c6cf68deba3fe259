//! `portreeve demo` from outside: exit status, output, and that nothing is left behind.
//!
//! Needs what the demo needs: root or user namespaces, iproute2, nftables, iptables, and
//! `iptables-init` built in the same profile.
#![expect(clippy::unwrap_used, reason = "a panic is how a test helper fails")]
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use serde_json::Value;
use tempfile::TempDir;

const PORTREEVE: &str = env!("CARGO_BIN_EXE_portreeve");
/// Ending takes a fraction of a second.
const GONE: Duration = Duration::from_secs(10);

fn init() -> PathBuf {
    let program = Path::new(PORTREEVE).with_file_name("iptables-init");
    assert!(
        program.is_file(),
        "{} is not built; run `cargo build --workspace` in the same profile",
        program.display()
    );
    program
}

fn demo(program: impl AsRef<Path>, args: &[&str]) -> Command {
    init();
    let mut command = Command::new(program.as_ref());
    command.arg("demo").args(args).stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn assert_exit(output: &Output, code: i32) {
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{out}\n{err}");
}

fn summary(output: &Output) -> Value {
    let last = text(&output.stdout).lines().last().unwrap();
    serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {last}"))
}

/// The programs in a directory of their own, `iptables-init` as `script` if one is given.
fn installed(script: Option<&str>) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let portreeve = dir.path().join("portreeve");
    fs::copy(PORTREEVE, &portreeve).unwrap();
    let init_here = dir.path().join("iptables-init");
    match script {
        None => drop(fs::copy(init(), init_here).unwrap()),
        Some(script) => {
            fs::write(&init_here, script).unwrap();
            fs::set_permissions(&init_here, fs::Permissions::from_mode(0o755)).unwrap();
        }
    }
    (dir, portreeve)
}

#[test]
fn demo_enforces_the_documentation_policies() {
    let output = demo(PORTREEVE, &["--headless"]).output().unwrap();
    assert_exit(&output, 0);
    let summary = summary(&output);
    for (key, expected) in [
        ("agree", Value::Bool(true)),
        ("nodes", 2.into()),
        ("pods", 9.into()),
        ("by_pod", 162.into()),
        ("by_service", 162.into()),
        ("differences", 0.into()),
        ("denials_on_record", summary["denied"].clone()),
    ] {
        assert_eq!(summary[key], expected, "{key} of {summary}");
    }
    let out = text(&output.stdout);
    assert!(!out.contains('\x1b'), "plain text:\n{out}");
    let reason = "isolated for ingress by y/default-deny-ingress, and no rule allows this";
    assert!(out.contains(reason), "{out}");
    // The summary is for machines.
    let lines = out.lines().filter(|line| !line.starts_with('{'));
    for line in lines {
        assert!(
            line.chars().count() <= 100,
            "wider than 100 columns: {line}"
        );
    }
}

#[test]
fn an_ordinary_user_needs_no_root() {
    // Readable by anybody, wherever the build is.
    let (_dir, portreeve) = installed(None);
    let mut command = if geteuid().is_root() {
        let mut command = Command::new("setpriv");
        command
            .args([
                "--reuid",
                "65534",
                "--regid",
                "65534",
                "--clear-groups",
                "--",
            ])
            .arg(portreeve)
            .args(["demo", "--headless"])
            .stdin(Stdio::null());
        command
    } else {
        demo(portreeve, &["--headless"])
    };
    let output = command.output().unwrap();
    assert_exit(&output, 0);
    assert_eq!(summary(&output)["differences"], 0);
}

const OWN: &str = r#"
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop, labels: {app: web}}, spec: {nodeName: worker-1, containers: [{name: c, ports: [{name: http, containerPort: 8080}, {containerPort: 9090}]}]}, status: {phase: Running, podIP: 192.0.2.1}}
- {apiVersion: v1, kind: Pod, metadata: {name: client, namespace: shop}, spec: {nodeName: worker-2, containers: [{name: c}]}, status: {phase: Running, podIP: 192.0.2.2}}
- {apiVersion: v1, kind: Pod, metadata: {name: job, namespace: shop}, spec: {nodeName: worker-2, containers: [{name: c}]}, status: {phase: Succeeded, podIP: 192.0.2.3}}
- {apiVersion: v1, kind: Pod, metadata: {name: proxy, namespace: kube-system}, spec: {nodeName: worker-2, hostNetwork: true, containers: [{name: c}]}, status: {phase: Running, podIP: 203.0.113.9}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-http, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{podSelector: {}}], ports: [{port: http}]}]
"#;

#[test]
fn demo_builds_and_enforces_given_manifests() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("state.yaml"), OWN).unwrap();
    let path = dir.path().to_str().unwrap();
    let output = demo(PORTREEVE, &["--headless", "--manifests", path])
        .output()
        .unwrap();
    assert_exit(&output, 0);
    let (out, summary) = (text(&output.stdout), summary(&output));
    // To the client on its default port 80, to web on two: twelve pod-to-pod dials, six of a family.
    for (key, expected) in [("pods", 2), ("nodes", 2), ("by_pod", 12), ("denied", 4)] {
        assert_eq!(summary[key], expected, "{key} of {summary}\n{out}");
    }
    for said in [
        "addresses are the lab's",
        "left out, ended pods own no address: shop/job",
        "kube-system/proxy",
        "NetworkPolicy shop/only-http",
    ] {
        assert!(out.contains(said), "{said}:\n{out}");
    }
}

#[test]
fn demo_lists_differences_from_policy_by_pair() {
    // A node that refuses what policy allows.
    let script = format!(
        "#!/bin/sh\n{} \"$@\" && exec nft -f - <<'END'\ntable ip sabotage {{\n chain forward {{\n\
         \ttype filter hook forward priority 0\n\tip daddr 10.244.0.3 tcp dport 80 reject with tcp reset\n }}\n}}\nEND\n",
        init().display()
    );
    let (_dir, portreeve) = installed(Some(&script));
    let output = demo(portreeve, &["--headless"]).output().unwrap();
    assert_exit(&output, 1);
    let (out, summary) = (text(&output.stdout), summary(&output));
    assert_eq!(summary["agree"], false);
    assert!(summary["differences"].as_u64() > Some(0), "{summary}");
    let line = "x/a → x/c:80 by its address, IPv4: allowed, but refused";
    assert!(out.contains(line), "{out}");
}

#[test]
fn demo_spans_reach_jaeger_on_the_host() {
    let jaeger = Jaeger::start();
    let output = demo(PORTREEVE, &["--headless", "--jaeger", &jaeger.url()])
        .output()
        .unwrap();
    assert_exit(&output, 0);
    let out = text(&output.stdout);
    assert!(out.contains("http://127.0.0.1:16686/search?service=portreeve&operation=deny"));
    let spans = jaeger.denials();
    let count: u64 = spans
        .iter()
        .map(|span| tag(span, "count").as_u64().unwrap())
        .sum();
    assert!(
        Some(count) >= summary(&output)["denied"].as_u64(),
        "{count}: {out}"
    );
    assert!(spans.iter().all(|span| tag(span, "reason").is_string()));
}

/// Jaeger on ports of this host that are free.
struct Jaeger {
    otlp: u16,
    query: u16,
    child: Child,
    _files: TempDir,
}

impl Jaeger {
    fn start() -> Self {
        let program = lab::built("jaeger").unwrap().join("jaeger");
        let files = tempfile::tempdir().unwrap();
        let config = files.path().join("config.yaml");
        let free = || TcpListener::bind("127.0.0.1:0").unwrap();
        // All at once, so that they differ.
        let [otlp, query, grpc] =
            [free(), free(), free()].map(|it| it.local_addr().unwrap().port());
        let text = include_str!("../../testbed/jaeger.yaml")
            .replace("OTLP_GRPC", &format!("127.0.0.1:{otlp}"))
            .replace("OTLP_HTTP", "127.0.0.1:0")
            .replace("QUERY_HTTP", &format!("127.0.0.1:{query}"))
            .replace("QUERY_GRPC", &format!("127.0.0.1:{grpc}"))
            .replace("PAGE", "");
        fs::write(&config, text).unwrap();
        let mut command = Command::new(program);
        command.arg("--config").arg(&config);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let jaeger = Self {
            otlp,
            query,
            child: command.spawn().unwrap(),
            _files: files,
        };
        let answers = || jaeger.get("/api/services").is_some();
        lab::wait_until(GONE * 3, "Jaeger to answer", answers).unwrap();
        jaeger
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.otlp)
    }

    fn denials(&self) -> Vec<Value> {
        let query = "/api/traces?service=portreeve&operation=deny&limit=10000&lookback=1h";
        let answer = self.get(query).unwrap();
        let traces = answer["data"].as_array().unwrap().iter();
        traces
            .flat_map(|trace| trace["spans"].as_array().unwrap().clone())
            .collect()
    }

    fn get(&self, path: &str) -> Option<Value> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.query)).ok()?;
        stream.set_read_timeout(Some(GONE)).unwrap();
        write!(stream, "GET {path} HTTP/1.0\r\nHost: jaeger\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
    }
}

impl Drop for Jaeger {
    fn drop(&mut self) {
        let _gone_already = self.child.kill();
        let _status = self.child.wait();
    }
}

fn tag<'a>(span: &'a Value, key: &str) -> &'a Value {
    let mut tags = span["tags"].as_array().unwrap().iter();
    &tags.find(|tag| tag["key"] == key).unwrap()["value"]
}

#[test]
fn invalid_demo_input_exits_with_2_and_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let (broken, empty) = (
        dir.path().join("broken.yaml"),
        dir.path().join("empty.yaml"),
    );
    fs::write(
        &broken,
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p}, spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/99}}]}]}}",
    )
    .unwrap();
    fs::write(
        &empty,
        "{apiVersion: v1, kind: Namespace, metadata: {name: lonely}}",
    )
    .unwrap();
    let (_dir, alone) = installed(None);
    fs::remove_file(alone.with_file_name("iptables-init")).unwrap();
    let (broken, empty) = (broken.to_str().unwrap(), empty.to_str().unwrap());
    for (program, args, expected) in [
        (
            Path::new(PORTREEVE),
            vec!["--jaeger", "localhost:4317"],
            "give http://HOST",
        ),
        (
            Path::new(PORTREEVE),
            vec!["--jaeger", "http://127.0.0.1:9"],
            "nobody takes spans at 127.0.0.1:9",
        ),
        (
            Path::new(PORTREEVE),
            vec!["--manifests", "/nonexistent"],
            "/nonexistent",
        ),
        (
            Path::new(PORTREEVE),
            vec!["--manifests", broken],
            "spec.ingress[0].from[0].ipBlock.cidr",
        ),
        (
            Path::new(PORTREEVE),
            vec!["--manifests", empty],
            "no pod to build; give --manifests",
        ),
        (Path::new(PORTREEVE), vec!["--frobnicate"], "--frobnicate"),
        (alone.as_path(), vec![], "build both programs"),
    ] {
        let output = demo(program, &args).output().unwrap();
        assert_exit(&output, 2);
        let err = text(&output.stderr);
        assert!(err.contains(expected), "{args:?}: {err}");
    }
}

#[test]
fn unprivileged_demo_names_the_remedy() {
    // In a user namespace that may not have another one, without capabilities.
    let script = "echo 0 > /proc/sys/user/max_user_namespaces && \
                  exec setpriv --bounding-set=-all --inh-caps=-all \"$0\" demo";
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "sh", "-c", script, PORTREEVE])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_exit(&output, 2);
    let err = text(&output.stderr);
    assert!(
        err.contains("user.max_user_namespaces") && err.contains("run as root"),
        "{err}"
    );
}

#[test]
fn interrupted_demo_leaves_nothing_behind() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let (mut child, _out) = started(&["--headless"], "portreeve run on");
        let children = namespaces_of_children(&child);
        assert!(!children.is_empty(), "daemons run");
        kill(pid(&child), signal).unwrap();
        let status = child.wait().unwrap();
        if signal != Signal::SIGKILL {
            assert_eq!(status.code(), Some(128 + signal as i32), "{signal}");
        }
        assert_gone(&children, signal);
    }
}

#[test]
fn kept_demo_cluster_runs_until_sigint() {
    let (mut child, mut out) = started(&["--headless", "--keep"], "{\"agree\":");
    let children = namespaces_of_children(&child);
    assert!(!children.is_empty(), "daemons run");
    kill(pid(&child), Signal::SIGINT).unwrap();
    assert_eq!(
        child.wait().unwrap().code(),
        Some(0),
        "all agreed, so ending it is no failure"
    );
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_gone(&children, Signal::SIGINT);
}

/// Starts the demo and reads its output up to a line that contains `until`.
fn started(args: &[&str], until: &str) -> (Child, BufReader<ChildStdout>) {
    let mut child = demo(PORTREEVE, args)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut all = String::new();
    while !all.lines().last().is_some_and(|line| line.contains(until)) {
        assert!(
            out.read_line(&mut all).unwrap() > 0,
            "no {until:?} in:\n{all}"
        );
    }
    (child, out)
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).unwrap())
}

/// The network namespaces of a process's children, by number.
fn namespaces_of_children(child: &Child) -> BTreeSet<u64> {
    let own = fs::metadata("/proc/self/ns/net").unwrap().ino();
    let parent = format!("PPid:\t{}\n", child.id());
    let children = processes().into_iter().filter(|process| {
        fs::read_to_string(process.join("status")).is_ok_and(|status| status.contains(&parent))
    });
    let namespace = |process: PathBuf| Some(fs::metadata(process.join("ns/net")).ok()?.ino());
    children
        .filter_map(namespace)
        .filter(|namespace| *namespace != own)
        .collect()
}

/// Waits until no process is in one of `namespaces` or holds it open.
fn assert_gone(namespaces: &BTreeSet<u64>, signal: Signal) {
    let held = |process: &PathBuf| {
        let open = fs::read_dir(process.join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        let open = open
            .map(|handle| handle.path())
            .chain([process.join("ns/net")]);
        open.filter_map(|path| fs::read_link(path).ok())
            .any(|target| {
                let target = target.to_string_lossy().into_owned();
                let number = target
                    .strip_prefix("net:[")
                    .and_then(|rest| rest.strip_suffix(']'));
                number
                    .and_then(|number| number.parse().ok())
                    .is_some_and(|number: u64| namespaces.contains(&number))
            })
    };
    let gone = lab::wait_until(GONE, "daemons and namespaces to be gone", || {
        !processes().iter().any(held)
    });
    gone.unwrap_or_else(|error| panic!("after {signal}: {error}"));
    assert!(
        !Path::new("/run/portreeve-demo").exists(),
        "a directory after {signal}"
    );
}

fn processes() -> Vec<PathBuf> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let number = |path: &PathBuf| {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        name.bytes().all(|byte| byte.is_ascii_digit())
    };
    entries.map(|entry| entry.path()).filter(number).collect()
}
