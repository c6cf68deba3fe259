//! What ends with its owner: namespaces, processes and their files.
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::panic::{self, AssertUnwindSafe};
use std::process::{ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use lab::{Cluster, Netns, PodSpec, ServiceSpec};
use testbed::runner::Test;

use super::{LIMIT, two_pods};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    cluster_starts_quickly_and_leaves_host_unchanged,
    namespaces_are_removed_after_drop_and_panic,
    every_namespace_has_its_own_run_directory,
    dropping_a_child_kills_and_reaps_it,
    children_die_with_a_killed_parent,
    a_missing_program_is_named,
];

fn cluster_starts_quickly_and_leaves_host_unchanged() {
    let before = interfaces();
    let names = ["x", "y", "z"]
        .into_iter()
        .flat_map(|ns| ["a", "b", "c"].map(|name| (ns, name)));
    let pods = names.enumerate().map(|(at, (ns, name))| {
        PodSpec::new(ns, name)
            .node(at % 2)
            .label("pod", name)
            .port("http", 80)
    });
    let services = ["x", "y", "z"].into_iter().flat_map(|ns| {
        ["a", "b", "c"].map(|n| ServiceSpec::new(ns, n).selects("pod", n).port(80, 80))
    });
    let started = Instant::now();
    let cluster = Cluster::builder()
        .nodes(2)
        .pods(pods)
        .services(services)
        .build()
        .unwrap();
    let took = started.elapsed();
    assert!(took < Duration::from_secs(3), "{took:?}");
    assert_eq!(cluster.pods().count(), 9);
    assert_eq!(interfaces(), before);
}

fn interfaces() -> String {
    fs::read_to_string("/proc/thread-self/net/dev").unwrap()
}

fn namespaces_are_removed_after_drop_and_panic() {
    let build = || {
        let cluster = two_pods();
        cluster.pod("x/a").serve(&[80]).unwrap();
        let capture = cluster.pod("x/a").capture().unwrap();
        let child = sleeper(cluster.pod("x/b").netns());
        let hosts = cluster.pods().chain(cluster.nodes());
        let held: Vec<_> = hosts.map(|host| host.netns().inode()).collect();
        assert!(
            held.iter().all(|inode| held_namespaces().contains(inode)),
            "the check sees them"
        );
        (held, (cluster, capture, child))
    };
    let expect_gone = |held: Vec<u64>, after: &str| {
        // A joined thread lets go of its namespace a moment after it was joined.
        let gone = || held.iter().all(|inode| !held_namespaces().contains(inode));
        lab::wait_until(LIMIT, format!("namespaces to go {after}"), gone).unwrap();
    };
    let (held, all) = build();
    drop(all);
    expect_gone(held, "after a drop");

    let mut held = Vec::new();
    let panicked = panic::catch_unwind(AssertUnwindSafe(|| {
        let (inodes, _all) = build();
        held = inodes;
        panic::resume_unwind(Box::new("on purpose"));
    }));
    assert!(panicked.is_err());
    expect_gone(held, "after a panic");
}

/// The network namespaces that any thread or descriptor of any process of this user holds.
fn held_namespaces() -> Vec<u64> {
    let list = |path: String| fs::read_dir(path).into_iter().flatten().flatten();
    let mut held = Vec::new();
    for process in list("/proc".into()) {
        let root = process.path().display().to_string();
        for thread in list(format!("{root}/task")) {
            held.extend(fs::metadata(thread.path().join("ns/net")).map(|ns| ns.ino()));
        }
        for handle in list(format!("{root}/fd")) {
            let Ok(target) = fs::read_link(handle.path()) else {
                continue;
            };
            let target = target.display().to_string();
            let inode = target
                .strip_prefix("net:[")
                .and_then(|rest| rest.strip_suffix(']'));
            held.extend(inode.and_then(|inode| inode.parse::<u64>().ok()));
        }
    }
    held
}

fn every_namespace_has_its_own_run_directory() {
    let (one, other) = (Netns::new().unwrap(), Netns::new().unwrap());
    let shell = |netns: &Netns, script: &str| {
        let mut command = netns.command("sh");
        command.args(["-c", script]);
        let output = command.output().unwrap();
        (
            output.status.success(),
            String::from_utf8(output.stdout).unwrap(),
        )
    };
    assert!(shell(&one, "touch /run/mark").0);
    assert!(
        shell(&one, "test -e /run/mark").0,
        "programs of one namespace share it"
    );
    assert!(
        !shell(&other, "test -e /run/mark").0,
        "another namespace has its own"
    );
    let (listed, interfaces) = shell(&one, "ls /sys/class/net");
    assert!(
        listed && ["lo\n", ""].contains(&interfaces.as_str()),
        "{interfaces}"
    );
}

fn sleeper(netns: &Netns) -> lab::Child {
    let mut command = netns.command("sleep");
    command.arg("1000");
    command.spawn().unwrap()
}

fn dropping_a_child_kills_and_reaps_it() {
    let netns = Netns::new().unwrap();
    let mut child = sleeper(&netns);
    let entry = format!("/proc/{}", child.id());
    assert_eq!(child.try_wait().unwrap(), None);
    drop(netns);
    assert_eq!(
        child.try_wait().unwrap(),
        None,
        "it holds its namespace itself"
    );
    drop(child);
    assert!(fs::metadata(entry).is_err(), "not even a zombie is left");

    let mut child = sleeper(&Netns::new().unwrap());
    child.terminate();
    assert!(!child.wait(LIMIT).unwrap().success());
}

/// Starts a child in a namespace, says its id and waits to be killed.
pub(crate) fn hold_a_child() -> ExitCode {
    lab::enter().unwrap();
    let child = sleeper(&Netns::new().unwrap());
    println!("{}", child.id());
    std::io::stdout().flush().unwrap();
    loop {
        thread::park();
    }
}

fn children_die_with_a_killed_parent() {
    let mut command = Netns::new()
        .unwrap()
        .command(std::env::current_exe().unwrap());
    command
        .arg("--hold-a-child")
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    let mut parent = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(parent.take_stdout().unwrap())
        .read_line(&mut line)
        .unwrap();
    let status = format!("/proc/{}/status", line.trim());
    let runs = || fs::read_to_string(&status).unwrap().contains("sleep");
    lab::wait_until(LIMIT, "the child to run", runs).unwrap();
    parent.kill();
    parent.wait(LIMIT).unwrap();
    lab::wait_until(LIMIT, "the child to die with its parent", || {
        // Its new parent may not have reaped it yet.
        fs::read_to_string(&status).map_or(true, |status| status.contains("State:\tZ"))
    })
    .unwrap();
}

fn a_missing_program_is_named() {
    let error = Netns::new()
        .unwrap()
        .command("no-such-program")
        .spawn()
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("no program no-such-program; install it"),
        "{error}"
    );
}
