//! A DaemonSet's rolling update with `maxSurge`, moment by moment: two pods of one node, of which one has the node.
//!
//! Without kubelet: pods are processes with `POD_UID`, as the DaemonSet sets it.
use std::io::ErrorKind;
use std::thread;

use lab::{Kind, wait_until};
use serde_json::json;
use socket2::{Domain, SockAddr, Socket, Type};
use testbed::runner::Test;

use crate::PORTREEVE;
use crate::handover::{asking, end_of, flags, heard, policies, terms_of};
use testbed::{DEADLINE, SOON, TestCluster, connected, deny_ingress, echoes, greeted, init, small};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    probe_succeeds_only_for_its_own_daemon,
    restarted_old_container_leaves_node_to_newer_pod,
    old_daemon_resumes_when_the_new_one_exits,
    a_new_daemon_that_cannot_start_disturbs_nothing,
    failed_handover_loses_no_connection,
    a_new_daemon_waits_for_the_old_one,
    old_daemon_keeps_enforcing_under_new_rules,
    changed_ports_hand_over_node_without_streams,
    new_daemon_waits_for_one_without_handover,
];

/// The daemon of a pod of node 0.
fn pod(bed: &TestCluster, uid: &str, more: &[&str]) -> lab::Command {
    let flags = flags(bed);
    let flags = flags.iter().map(String::as_str).chain(more.iter().copied());
    let mut command = bed.run_command(0, &flags.collect::<Vec<_>>());
    command.env("POD_UID", uid);
    command
}

/// The small cluster, with the pod `old` on node 0.
fn bed() -> TestCluster {
    let mut bed = TestCluster::bare(small());
    bed.write_policies(&policies());
    for node in 0..2 {
        bed.install(node, &[]);
    }
    bed.start_command(0, pod(&bed, "old", &[]));
    bed.start(1, &[]);
    bed
}

/// The probe's result for a pod of node 0: its exit code and reason.
fn probe(bed: &TestCluster, uid: &str) -> (Option<i32>, String) {
    let mut command = bed.lab.node(0).command(PORTREEVE);
    command.arg("ready").env("POD_UID", uid);
    let said = command.output().unwrap();
    let text = String::from_utf8([said.stdout, said.stderr].concat()).unwrap();
    (said.status.code(), text)
}

fn is_ready(bed: &TestCluster, uid: &str) -> bool {
    probe(bed, uid).0 == Some(0)
}

fn wait_until_ready(bed: &TestCluster, uid: &str) {
    let what = format!("the daemon of pod {uid} to have the node");
    wait_until(DEADLINE, what, || is_ready(bed, uid)).unwrap();
}

/// What is denied is denied, and what is allowed is allowed.
fn enforces(bed: &TestCluster) {
    let [a, b, d] = ["x/a", "x/b", "x/d"].map(|name| bed.lab.pod(name));
    for to in b.addrs(80) {
        greeted(&a, to);
    }
    let outcome = a.connect(d.addr_v4(80), SOON).unwrap();
    assert_eq!(outcome.kind(), Kind::TimedOut);
}

fn probe_succeeds_only_for_its_own_daemon() {
    let mut bed = bed();
    assert_eq!(probe(&bed, "old"), (Some(0), String::new()));
    assert_eq!(probe(&bed, ""), (Some(0), String::new()), "by hand");
    let (code, said) = probe(&bed, "new");
    assert_eq!(code, Some(1), "{said}");
    let whose = "this node's daemon is that of pod old, and not that of pod new";
    assert!(said.contains(whose), "{said}");

    let _old = bed.relieve_by(0, pod(&bed, "new", &[]));
    assert!(is_ready(&bed, "new"));
    assert_eq!(probe(&bed, "old").0, Some(1));
    bed.kill(0);
    let (code, said) = probe(&bed, "new");
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("no daemon answers"), "{said}");
}

fn restarted_old_container_leaves_node_to_newer_pod() {
    let mut bed = bed();
    let [a, b] = ["x/a", "x/b"].map(|name| bed.lab.pod(name));
    let live = connected(&a, b.addr_v4(80));
    // Out of memory while it rests.
    drop(bed.relieve_by(0, pod(&bed, "new", &[])));
    let mut again = bed.spawn(pod(&bed, "old", &[]));
    again.says("pod new, which came after this one's");
    echoes(&live, "undisturbed");
    assert!(is_ready(&bed, "new"));
    // So it is if the new one is killed and started again, too.
    bed.kill(0);
    bed.start_command(0, pod(&bed, "new", &[]));
    wait_until_ready(&bed, "new");
    enforces(&bed);

    // A rollback deletes the new pod.
    bed.daemon(0).terminate();
    wait_until_ready(&bed, "old");
    enforces(&bed);
    again.terminate();
}

fn old_daemon_resumes_when_the_new_one_exits() {
    let mut bed = bed();
    let [a, b] = ["x/a", "x/b"].map(|name| bed.lab.pod(name));
    let mut old = bed.relieve_by(0, pod(&bed, "new", &[]));
    bed.kill(0);
    wait_until_ready(&bed, "old");
    old.says("resuming enforcement");
    enforces(&bed);
    // The new one comes again, and the next version after it.
    let live = connected(&a, b.addr_v4(80));
    bed.start_command(0, pod(&bed, "new", &[]));
    wait_until_ready(&bed, "new");
    echoes(&live, "taken over");
    let _new = bed.relieve_by(0, pod(&bed, "newest", &[]));
    echoes(&live, "taken over twice");
    enforces(&bed);
    old.terminate();
}

fn a_new_daemon_that_cannot_start_disturbs_nothing() {
    let bed = bed();
    let [a, b] = ["x/a", "x/b"].map(|name| bed.lab.pod(name));
    let live = connected(&a, b.addr_v4(80));
    let nothing = bed.file("nothing.json");
    std::fs::write(
        &nothing,
        json!({ "apiVersion": "v1", "kind": "List", "items": [] }).to_string(),
    )
    .unwrap();
    let nothing = format!("dir:{}", nothing.display());
    for (flags, code) in [
        (["--cluster", &nothing], 1),
        (["--cluster", "dir:/nowhere"], 2),
        (["--proxy-port", "7000"], 1),
    ] {
        let said = pod(&bed, "new", &flags).output().unwrap();
        assert_eq!(said.status.code(), Some(code), "{said:?}");
        assert!(is_ready(&bed, "old"));
        echoes(&live, "undisturbed");
    }
    enforces(&bed);
}

fn failed_handover_loses_no_connection() {
    let mut bed = bed();
    let [a, b] = ["x/a", "x/b"].map(|name| bed.lab.pod(name));
    let live: Vec<_> = b.addrs(80).map(|to| connected(&a, to)).into();
    let mut terms = terms_of(&bed.lab.node(0));
    terms["pod"] = "new".into();
    // The reply, the queues with their listeners, the connections, the end.
    let messages = 1 + thread::available_parallelism().unwrap().get() + live.len() + 1;
    for heard_of in [1, 2, messages - 1, messages] {
        let line = asking(&bed, &terms);
        for turn in 0..heard_of {
            let said = heard(&line);
            assert!(
                !said.is_null() && said["refused"].is_null(),
                "{turn}: {said}"
            );
        }
        drop(line);
        live.iter().for_each(|it| echoes(it, "goes on"));
        enforces(&bed);
        wait_until_ready(&bed, "old");
        let log = bed.daemon(0).log();
        assert!(log.contains("this one goes on"), "{log}");
        // It waits for the next one again.
        bed.daemon(0)
            .says("goes on with the connections that no other daemon took over");
        let offered = || bed.file("handover.sock").exists();
        wait_until(DEADLINE, "the next offer", offered).unwrap();
    }
    let mut old = bed.relieve_by(0, pod(&bed, "new", &[]));
    live.iter().for_each(|it| echoes(it, "taken over"));
    enforces(&bed);
    old.terminate();
}

/// The old daemon aborts the handover, and exits a while later.
fn a_new_daemon_waits_for_the_old_one() {
    let mut bed = TestCluster::bare(small());
    bed.write_policies(&policies());
    for node in 0..2 {
        bed.install(node, &[]);
        bed.start(node, &[]);
    }
    let place = bed.file("handover.sock");
    let listener = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
    listener.bind(&SockAddr::unix(&place).unwrap()).unwrap();
    listener.listen(8).unwrap();
    let asked = thread::spawn(move || {
        // The first connection only checks whether a daemon is there.
        let mut lines = std::iter::repeat_with(|| listener.accept().unwrap().0);
        lines.find_map(|line| {
            let asked = heard(&line);
            let reply = json!({ "format": asked["format"], "settings": asked["settings"] });
            (!asked.is_null()).then(|| line.send(reply.to_string().as_bytes()).unwrap())
        });
    });
    let flags = flags(&bed);
    let new = bed.spawn(bed.run_command(0, &flags.each_ref().map(String::as_str)));
    asked.join().unwrap();
    new.says("the handover broke off");
    bed.daemon(0).terminate();
    new.says("policy applied");
    bed.adopt(0, new);
    enforces(&bed);
}

fn old_daemon_keeps_enforcing_under_new_rules() {
    let mut bed = bed();
    let node = bed.lab.node(0);
    let [a, b, c] = ["x/a", "x/b", "x/c"].map(|name| bed.lab.pod(name));
    let live = connected(&a, c.addr_v4(80));
    let nft = |script: &str| {
        let mut nft = node.command("nft");
        nft.args(["-a", script]);
        let said = nft.output().unwrap();
        assert!(said.status.success(), "{said:?}");
        String::from_utf8(said.stdout).unwrap()
    };
    // First only the rules change, then the sets are created again as well.
    for layout in ["as it is", "another"] {
        if layout == "another" {
            let listed = nft("list chain inet portreeve installed_by");
            let (_, handle) = listed.split_once("return").unwrap();
            let (_, handle) = handle.split_once("# handle ").unwrap();
            let handle = handle.split_whitespace().next().unwrap();
            nft(&format!(
                "replace rule inet portreeve installed_by handle {handle} return comment \"portreeve layout 0 content 0\""
            ));
        }
        let said = init(&node, "install", &["--fail", "open"]);
        assert!(said.status.success(), "{said:?}");
        // It may have seen the rule that this test replaced.
        wait_until_ready(&bed, "old");
        echoes(&live, layout);
        enforces(&bed);
        // What changes now is in force as well, by the sets too.
        bed.apply(&[deny_ingress("b"), deny_ingress("d")]);
        let outcome = a.connect(b.addr_v4(81), SOON).unwrap();
        assert_eq!(outcome.kind(), Kind::TimedOut, "{layout}");
        bed.apply(&policies());
        enforces(&bed);
    }
    bed.relieve_by(0, pod(&bed, "new", &["--fail", "open"]));
    echoes(&live, "taken over");
    enforces(&bed);
}

fn changed_ports_hand_over_node_without_streams() {
    let mut bed = bed();
    let [a, b] = ["x/a", "x/b"].map(|name| bed.lab.pod(name));
    let live = connected(&a, b.addr_v4(80));
    let others = ["--proxy-port", "7000", "--queue", "200"];
    bed.install(0, &others);
    let mut old = bed.relieve_by(0, pod(&bed, "new", &others));
    assert_eq!(end_of(&live), ErrorKind::ConnectionReset);
    enforces(&bed);
    for daemon in [&old, &*bed.daemon(0)] {
        daemon.says("other settings");
    }
    assert!(is_ready(&bed, "new"));
    old.terminate();
}

/// An older version, and a daemon whose socket path cannot be created.
fn new_daemon_waits_for_one_without_handover() {
    let mut bed = TestCluster::enforced(&[], &policies());
    let [a, b] = ["x/a", "x/b"].map(|name| bed.lab.pod(name));
    for place in [None, Some("/proc/nowhere/handover.sock")] {
        if let Some(place) = place {
            let mut command = bed.run_command(0, &["--handover", place]);
            command.env("POD_UID", "old");
            bed.start_command(0, command);
            bed.daemon(0).says("this daemon cannot be relieved");
        }
        let live = connected(&a, b.addr_v4(80));
        let mut new = bed.spawn(pod(&bed, "new", &[]));
        new.says("127.0.0.1:15020");
        echoes(&live, "undisturbed");
        // It answers for all: so the controller deletes its pod, and the node is not stuck.
        assert!(is_ready(&bed, "new"));
        bed.daemon(0).terminate();
        new.says("policy applied");
        wait_until_ready(&bed, "new");
        enforces(&bed);
        new.terminate();
    }
}
