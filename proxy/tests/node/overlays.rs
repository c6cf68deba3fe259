//! The overlays of the DaemonSet that change the node; each test applies `base` again at its end.
use testbed::runner::Test;

use crate::enforcement::policed;
use crate::pods::{idle, is_kept_from, namespace, reaches, ready};
use crate::room::room;

pub(crate) const TESTS: &[Test] = &testbed::tests![
    taint_is_removed_once_the_daemon_enforces,
    uninstall_restores_node_and_reinstall_enforces,
];

const TAINT: &str = "portreeve.io/agent-not-ready";

fn taint_is_removed_once_the_daemon_enforces() {
    let room = room();
    namespace(&room, "new");
    room.kubectl(&[
        "taint",
        "node",
        "node-0",
        &format!("{TAINT}=true:NoSchedule"),
    ]);
    let pod = idle("new", "early");
    room.apply(&pod);
    room.wait_for_pod(("new", "early"), "to be kept waiting", |pod| {
        let mut conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
        conditions.any(|it| {
            it["reason"] == "Unschedulable"
                && it["message"].to_string().contains("untolerated taint")
        })
    });
    room.install("overlays/startup-taint");
    ready(&room, &pod);
    let tainted = room.kubectl(&["get", "node", "node-0", "-o", "jsonpath={.spec.taints}"]);
    assert!(!tainted.contains(TAINT), "{tainted}");
    room.install("base");
    room.rolled_out();
}

fn uninstall_restores_node_and_reinstall_enforces() {
    let room = room();
    let (web, friend, stranger) = policed(&room, "out");
    room.install("overlays/uninstall");
    room.rolled_out();
    let left = [
        "nft list tables",
        "ip rule show",
        "ip route show table 15001",
    ]
    .map(|call| room.said(call));
    assert!(
        !left.concat().contains("portreeve") && !left.concat().contains("15001"),
        "{left:?}"
    );
    assert_eq!(left[2], "");
    reaches(&stranger, &web);
    room.install("base");
    room.rolled_out();
    room.in_force("only-friends-out");
    reaches(&friend, &web);
    is_kept_from(&stranger, &web);
}
