//! What the daemon does for pods that kubelet starts, and without a daemon.
use lab::wait_until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use testbed::runner::Test;

use crate::daemonset::daemon;
use crate::pods::{
    PORT, idle, is_kept_from, is_ready, namespace, only, pod, reaches, ready, server, started,
};
use crate::room::{NAMESPACE, PATIENCE, Room, room};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    policy_isolates_kubelet_pod_except_its_probes,
    pods_stay_isolated_without_daemon_until_the_next,
    killed_daemon_is_restarted_and_enforces,
    first_connection_of_a_pod_is_judged,
];

/// The clients that policies allow.
fn friends() -> Value {
    json!({ "pod": "friend" })
}

fn policy_isolates_kubelet_pod_except_its_probes() {
    let room = room();
    namespace(&room, "probes");
    let mut probed = server("probes", "web");
    let container = &mut probed["spec"]["containers"][0];
    let probe = |how: Value| {
        let mut probe = json!({ "periodSeconds": 1, "failureThreshold": 2, "timeoutSeconds": 1 });
        probe
            .as_object_mut()
            .unwrap()
            .extend(how.as_object().unwrap().clone());
        probe
    };
    container["readinessProbe"] = probe(json!({ "httpGet": { "port": PORT, "path": "/" } }));
    container["livenessProbe"] = probe(json!({ "tcpSocket": { "port": PORT } }));
    container["startupProbe"] =
        probe(json!({ "exec": { "command": ["wget", "-q", "-O-", "http://localhost:8080/"] } }));
    // What is listed is a page.
    container["command"] = json!([
        "sh",
        "-c",
        "mkdir /www && echo hello >/www/index.html && exec httpd -f -vv -p 8080 -h /www"
    ]);
    for pod in [
        &probed,
        &idle("probes", "friend"),
        &idle("probes", "stranger"),
    ] {
        room.apply(pod);
    }
    let web = ready(&room, &probed);
    let friend = ready(&room, &idle("probes", "friend"));
    let stranger = ready(&room, &idle("probes", "stranger"));
    reaches(&friend, &web);
    reaches(&stranger, &web);

    room.apply(&only("probes", "close-web", "web", &friends()));
    room.in_force("close-web");
    reaches(&friend, &web);
    is_kept_from(&stranger, &web);

    let asked = || {
        let log = room.kubectl(&["-n", "probes", "logs", "web"]);
        log.lines().filter(|it| it.contains("url:/")).count()
    };
    let before = asked();
    wait_until(PATIENCE, "some more probes", || asked() > before + 4).unwrap();
    let pod = room.wait_for_pod(("probes", "web"), "to be there", |_| true);
    assert!(is_ready(&pod), "{pod}");
    assert_eq!(pod["status"]["containerStatuses"][0]["restartCount"], 0);

    let explain = |from: &str| {
        let (from, port) = (format!("probes/{from}"), PORT.to_string());
        let asked = [
            "explain",
            "--from",
            &from,
            "--to",
            "probes/web",
            "--port",
            &port,
        ];
        let args = [
            "-n",
            NAMESPACE,
            "exec",
            "daemonset/portreeve",
            "-c",
            "portreeve",
            "--",
            "portreeve",
        ];
        room.control.kubectl(&[&args[..], &asked].concat(), "")
    };
    assert!(explain("friend").is_ok_and(|it| it.contains("close-web")));
    assert!(explain("stranger").is_err());
}

fn pods_stay_isolated_without_daemon_until_the_next() {
    let room = room();
    let (web, friend, stranger) = policed(&room, "gone");
    let free = started(&room, &server("gone", "free"));
    nodes_of_the_daemonset(&room, &json!({ "kubernetes.io/os": "none" }));
    wait_until(PATIENCE, "the daemon's pod to go", || {
        room.pods(NAMESPACE).is_empty()
    })
    .unwrap();
    is_kept_from(&friend, &web);
    is_kept_from(&stranger, &web);
    reaches(&stranger, &free);
    nodes_of_the_daemonset(&room, &json!({ "kubernetes.io/os": "linux" }));
    room.rolled_out();
    reaches(&friend, &web);
    is_kept_from(&stranger, &web);
}

fn killed_daemon_is_restarted_and_enforces() {
    let room = room();
    let (web, friend, stranger) = policed(&room, "killed");
    let pod = room.daemon();
    let restarts = |pod: &Value| pod["status"]["containerStatuses"][0]["restartCount"].as_u64();
    let before = restarts(&pod).unwrap();
    let name = pod["metadata"]["name"].as_str().unwrap();
    let id = i32::try_from(daemon(&room, &pod)).unwrap();
    kill(Pid::from_raw(id), Signal::SIGKILL).unwrap();
    room.wait_for_pod((NAMESPACE, name), "to be restarted and ready", |pod| {
        restarts(pod) == Some(before + 1) && is_ready(pod)
    });
    reaches(&friend, &web);
    is_kept_from(&stranger, &web);
}

/// A pod's address is known to the API some time after it can send: until then it is held back.
fn first_connection_of_a_pod_is_judged() {
    let room = room();
    let (web, ..) = policed(&room, "first");
    for number in 0..20 {
        // An allowed client may wait as long as a busy machine needs.
        let (label, patience) = if may(number) {
            ("friend", 60)
        } else {
            ("stranger", 12)
        };
        let dial = format!("nc -w {patience} {} {PORT} </dev/null", web.ipv4());
        let mut pod = pod("first", &name(number), &["sh", "-c", &dial]);
        pod["metadata"]["labels"]["pod"] = label.into();
        pod["spec"]["restartPolicy"] = "Never".into();
        room.apply(&pod);
    }
    let end = |pod: &Value| pod["status"]["containerStatuses"][0]["state"]["terminated"].clone();
    for number in 0..20 {
        let name = name(number);
        let pod = room.wait_for_pod(("first", &name), "to end", |pod| end(pod).is_object());
        assert_eq!(end(&pod)["exitCode"] == 0, may(number), "{name}: {pod}");
    }
}

fn name(number: u8) -> String {
    format!("dials-{number}")
}

fn may(number: u8) -> bool {
    number.is_multiple_of(2)
}

/// A server, one that may reach it, and one that may not, in a namespace of their own.
pub(crate) fn policed(room: &Room, name: &str) -> (lab::Host, lab::Host, lab::Host) {
    namespace(room, name);
    let pods = [
        server(name, "web"),
        idle(name, "friend"),
        idle(name, "stranger"),
    ];
    pods.iter().for_each(|pod| room.apply(pod));
    let policy = format!("only-friends-{name}");
    room.apply(&only(name, &policy, "web", &friends()));
    let [web, friend, stranger] = pods.each_ref().map(|pod| ready(room, pod));
    room.in_force(&policy);
    reaches(&friend, &web);
    is_kept_from(&stranger, &web);
    (web, friend, stranger)
}

/// Moves the DaemonSet to other nodes.
fn nodes_of_the_daemonset(room: &Room, selector: &Value) {
    let change = json!({ "spec": { "template": { "spec": { "nodeSelector": selector } } } });
    let path = format!("/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/portreeve");
    room.control.request("PATCH", &path, Some(&change)).unwrap();
}
