//! The applied DaemonSet: its containers, their privileges and their logs.
use std::fs;
use std::path::Path;

use serde_json::Value;
use testbed::runner::Test;

use crate::pods::is_ready;
use crate::room::{NAMESPACE, Room, room};

pub(crate) const TESTS: &[Test] = &testbed::tests![kubelet_runs_the_daemonset_manifest];

/// CAP_NET_ADMIN and CAP_NET_RAW (linux/capability.h).
const CAPABILITIES: u64 = 1 << 12 | 1 << 13;

fn kubelet_runs_the_daemonset_manifest() {
    let room = room();
    let pod = room.daemon();
    assert!(is_ready(&pod), "{pod}");
    let status = &pod["status"];
    assert_eq!(
        status["initContainerStatuses"][0]["state"]["terminated"]["exitCode"],
        0
    );
    assert_eq!(status["containerStatuses"][0]["restartCount"], 0);

    let daemon = daemon(&room, &pod);
    let status = fs::read_to_string(format!("/proc/{daemon}/status")).unwrap();
    let field = |name: &str| {
        let value = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap();
        u64::from_str_radix(value.trim(), 16).unwrap()
    };
    for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
        assert_eq!(field(set), CAPABILITIES, "{set}");
    }
    assert_eq!(field("NoNewPrivs:"), 1);
    // SECCOMP_MODE_FILTER
    assert_eq!(field("Seccomp:"), 2);
    let mounts = fs::read_to_string(format!("/proc/{daemon}/mountinfo")).unwrap();
    let root = mounts
        .lines()
        .find(|line| line.split(' ').nth(4) == Some("/"));
    assert!(
        root.unwrap().split(' ').nth(5).unwrap().starts_with("ro"),
        "{mounts}"
    );

    let log = room.log();
    assert!(log.contains("policy applied"), "{log}");
    let said = room.kubectl(&[
        "-n",
        NAMESPACE,
        "exec",
        "daemonset/portreeve",
        "-c",
        "portreeve",
        "--",
        "portreeve",
        "connections",
    ]);
    assert!(!said.is_empty());
    // Of the container, whose cgroup the process is in.
    let granted = &pod["spec"]["containers"][0]["resources"]["limits"]["memory"];
    assert_eq!(granted, "512Mi");
    assert_eq!(memory_limit(daemon), 512 << 20);
}

/// The daemon's process, as the machine numbers it.
pub(crate) fn daemon(room: &Room, pod: &Value) -> u32 {
    let processes = room
        .node
        .processes(pod["metadata"]["uid"].as_str().unwrap());
    let named = |id: &u32| {
        fs::read_to_string(format!("/proc/{id}/comm")).is_ok_and(|it| it == "portreeve\n")
    };
    processes.into_iter().find(named).unwrap()
}

/// How many bytes a process may have together with those in its cgroup, by either version of cgroups.
fn memory_limit(process: u32) -> u64 {
    let cgroups = fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap();
    let found = cgroups.lines().find_map(|line| {
        let (controller, path) = line.split_once(':')?.1.split_once(':')?;
        let file = match controller {
            "memory" => format!("memory{path}/memory.limit_in_bytes"),
            "" => format!("{}/memory.max", &path[1..]),
            _ => return None,
        };
        fs::read_to_string(Path::new("/sys/fs/cgroup").join(file)).ok()
    });
    found.unwrap().trim().parse().unwrap()
}
