//! The commands that ask a running daemon, as an operator on the node uses them.
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Lines};
use std::process::{ChildStdout, Output, Stdio};

use lab::{Child, Host, Kind, PodSpec, wait_until};
use serde_json::{Value, json};
use testbed::runner::Test;

use crate::PORTREEVE;
use testbed::{
    DEADLINE, SEVERAL_SYNS, SOON, TestCluster, allow_ingress, ask_as, connected, deny_ingress,
    echoes, metric, small,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    explain_command_shows_the_policy_in_force,
    connections_command_filters_by_pod_and_namespace,
    observe_shows_each_decision_once,
    observe_filters_kernel_flows_and_severed_connections,
    the_admin_port_answers_by_address_only,
];

fn policies() -> [Value; 2] {
    [deny_ingress("b"), allow_ingress("c")]
}

fn portreeve(node: &Host, arguments: &[&str]) -> Output {
    let mut command = node.command(PORTREEVE);
    command.args(arguments);
    command.output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn explain_command_shows_the_policy_in_force() {
    let mut bed = TestCluster::enforced(&[], &policies());
    let node = bed.lab.node(0);
    let explain = |to: &str, output: &str| {
        let question = ["explain", "--from", "x/a", "--to", to, "--port", "80"];
        portreeve(&node, &[&question[..], &["--output", output]].concat())
    };
    let denied = explain("x/b", "text");
    assert_eq!(denied.status.code(), Some(1), "{denied:?}");
    let text = said(&denied);
    assert!(text.starts_with("DENY  x/a ("), "{text}");
    assert!(
        text.contains("ingress: denied, x/deny-ingress-b isolates x/b"),
        "{text}"
    );
    let allowed = explain("x/c", "json");
    assert_eq!(allowed.status.code(), Some(0), "{allowed:?}");
    let json: Value = serde_json::from_str(&said(&allowed)).unwrap();
    assert_eq!(json["ingress"]["policies"], json!(["x/allow-ingress-c"]));

    let unknown = explain("x/nobody", "text");
    assert_eq!(unknown.status.code(), Some(2), "{unknown:?}");
    let error = String::from_utf8_lossy(&unknown.stderr);
    assert!(error.contains("there is no pod x/nobody"), "{error}");
    bed.kill(0);
    let nobody = explain("x/b", "text");
    assert_eq!(nobody.status.code(), Some(2), "{nobody:?}");
    let error = String::from_utf8_lossy(&nobody.stderr);
    assert!(
        error.contains("no daemon answers at 127.0.0.1:15020") && error.contains("`portreeve run`"),
        "{error}"
    );
}

fn connections_command_filters_by_pod_and_namespace() {
    let bed = TestCluster::enforced(&[], &policies());
    let (a, d, c, node) = (
        bed.lab.pod("x/a"),
        bed.lab.pod("x/d"),
        bed.lab.pod("x/c"),
        bed.lab.node(1),
    );
    let first = connected(&a, c.addr_v4(80));
    echoes(&first, "ping");
    let _second = connected(&d, c.addr_v6(81));
    let list = |filter: &[&str]| {
        let arguments = [&["connections", "--output", "json"], filter].concat();
        let output = portreeve(&node, &arguments);
        assert!(output.status.success(), "{output:?}");
        let listed: Vec<Value> = serde_json::from_str(&said(&output)).unwrap();
        let clients = listed.iter().map(|it| it["source.k8s.pod.name"].clone());
        clients.collect::<Vec<_>>()
    };
    assert_eq!(list(&[]), ["a", "d"]);
    assert_eq!(list(&["--pod", "x/d"]), ["d"]);
    assert_eq!(list(&["--pod", "x/c", "--namespace", "x"]), ["a", "d"]);
    assert!(list(&["--namespace", "y"]).is_empty());
    let text = said(&portreeve(&node, &["connections", "--pod", "x/a"]));
    let [head, line] = &text.lines().collect::<Vec<_>>()[..] else {
        panic!("a head and a line: {text}")
    };
    assert!(head.trim_start().starts_with("STAGE"), "{text}");
    let from = format!("x/a {}", first.local_addr().unwrap());
    for part in ["live", &from, "x/allow-ingress-c", " 4 "] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
    let wrong = portreeve(&node, &["connections", "--pod", "a"]);
    assert_eq!(wrong.status.code(), Some(2), "{wrong:?}");
}

fn observe_shows_each_decision_once() {
    let bed = TestCluster::enforced(&[], &policies());
    let (a, b, d, node) = (
        bed.lab.pod("x/a"),
        bed.lab.pod("x/b"),
        bed.lab.pod("x/d"),
        bed.lab.node(0),
    );
    let mut all = Observer::of(&node, &["--output", "json"]);
    let mut of_d = Observer::of(&node, &["--pod", "x/d", "--verdict", "deny"]);
    observers(&node, 2);
    // Its SYN is repeated meanwhile.
    let denied = a.connect(b.addr_v4(80), SEVERAL_SYNS).unwrap();
    assert_eq!(denied.kind(), Kind::TimedOut);
    assert_eq!(
        d.connect(b.addr_v4(81), SOON).unwrap().kind(),
        Kind::TimedOut
    );
    let (first, second) = (all.decision(), all.decision());
    assert_eq!(first["source.k8s.pod.name"], "a", "{first}");
    assert_eq!(first["policies"], json!(["x/deny-ingress-b"]), "{first}");
    assert!(first["time"].is_string(), "{first}");
    assert_eq!(
        (&second["source.k8s.pod.name"], &second["destination.port"]),
        (&json!("d"), &json!(81)),
        "each attempt once: {second}"
    );
    let line = of_d.line();
    for part in [" DENY x/d ", " -> x/b ", "TCP, ingress: x/deny-ingress-b"] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
}

/// A running `portreeve observe`.
struct Observer {
    _child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Observer {
    fn of(node: &Host, filter: &[&str]) -> Self {
        let mut command = node.command(PORTREEVE);
        command.arg("observe").args(filter).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.take_stdout().unwrap()).lines();
        Self {
            _child: child,
            lines,
        }
    }

    fn line(&mut self) -> String {
        self.lines.next().unwrap().unwrap()
    }

    fn decision(&mut self) -> Value {
        serde_json::from_str(&self.line()).unwrap()
    }
}

/// Waits for this number of `portreeve observe` clients.
fn observers(node: &Host, number: u64) {
    wait_until(DEADLINE, format!("{number} observers"), || {
        metric(node, "portreeve_observe_clients") == number
    })
    .unwrap();
}

/// A pod of another namespace asks x/b.
fn observe_filters_kernel_flows_and_severed_connections() {
    let other = PodSpec::new("y", "e").node(0).label("pod", "e");
    let mut bed = TestCluster::bare(small().pod(other));
    bed.write_policies(&[allow_ingress("b")]);
    bed.enforce(&[]);
    let pod = |key: &str| bed.lab.pod(key);
    let (a, b, e, node) = (pod("x/a"), pod("x/b"), pod("y/e"), bed.lab.node(0));
    b.serve_udp(&[53]).unwrap();
    let json = ["--output", "json"];
    let mut all = Observer::of(&node, &json);
    let mut of_y = Observer::of(&node, &[&["--namespace", "y"], &json[..]].concat());
    let mut cut = Observer::of(&node, &[&["--verdict", "sever"], &json[..]].concat());
    let mut denied = Observer::of(&node, &["--verdict", "deny", "--pod", "y/e"]);
    observers(&node, 4);

    // Allowed and carried, then relayed, then from another namespace.
    let carried = crate::carried::flow(&a, b.addr_v4(53));
    assert!(crate::carried::goes_on(&carried) && crate::carried::goes_on(&carried));
    let first = all.decision();
    let keys: BTreeSet<_> = first.as_object().unwrap().keys().cloned().collect();
    let mut expected: BTreeSet<_> = crate::admin::KEYS.map(String::from).into();
    // What is not known yet.
    for key in ["bytes.sent", "bytes.received", "end_time"] {
        expected.remove(key);
    }
    expected.insert("time".to_owned());
    assert_eq!(keys, expected, "{first}");
    let shape = |it: &Value| {
        ["verdict", "protocol", "path", "source.k8s.pod.name"]
            .map(|key| it[key].as_str().unwrap().to_owned())
    };
    assert_eq!(shape(&first), ["allow", "UDP", "kernel", "a"]);
    let relayed = connected(&a, b.addr_v4(80));
    assert_eq!(shape(&all.decision()), ["allow", "TCP", "spliced", "a"]);
    let others = connected(&e, b.addr_v4(80));
    assert_eq!(shape(&all.decision()), ["allow", "TCP", "spliced", "e"]);
    assert_eq!(shape(&of_y.decision()), ["allow", "TCP", "spliced", "e"]);

    // A change cuts all three; then a datagram is denied.
    bed.apply(&[deny_ingress("b")]);
    let severed: BTreeSet<_> = (0..3).map(|_| shape(&cut.decision())).collect();
    let expected = [
        ("TCP", "spliced", "a"),
        ("TCP", "spliced", "e"),
        ("UDP", "kernel", "a"),
    ]
    .map(|(protocol, path, pod)| ["sever", protocol, path, pod].map(str::to_owned));
    assert_eq!(severed, expected.into());
    let (from_y, in_all) = (of_y.decision(), [(); 3].map(|()| all.decision()));
    assert_eq!(shape(&from_y), ["sever", "TCP", "spliced", "e"]);
    assert!(
        in_all.iter().all(|it| it["verdict"] == "sever"),
        "{in_all:?}"
    );
    assert_eq!(from_y["policies"], json!(["x/deny-ingress-b"]));
    assert!(!crate::carried::goes_on(&crate::carried::flow(
        &e,
        b.addr_v4(53)
    )));
    assert_eq!(shape(&of_y.decision()), ["deny", "UDP", "kernel", "e"]);
    let line = denied.line();
    for part in [" DENY y/e ", " -> x/b ", "UDP, ingress: x/deny-ingress-b"] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
    drop((relayed, others));
}

fn the_admin_port_answers_by_address_only() {
    let bed = TestCluster::enforced(&[], &[]);
    let node = bed.lab.node(0);
    for (host, status) in [
        ("localhost:15020", 200),
        ("127.0.0.1:15020", 200),
        ("[::1]", 200),
        ("portreeve.attacker.example:15020", 421),
    ] {
        let answer = ask_as(&node, host, "GET", "/connections").unwrap();
        assert_eq!(answer.status, status, "{host}: {answer:?}");
        for guard in [
            "content-security-policy: default-src 'none'; script-src 'sha256-",
            "x-content-type-options: nosniff",
            "x-frame-options: deny",
            "cross-origin-resource-policy: same-origin",
        ] {
            assert!(answer.head.contains(guard), "{guard}: {answer:?}");
        }
        assert!(
            !answer.head.contains("access-control-allow"),
            "no other site may read it: {answer:?}"
        );
    }
    for (host, target, status, why) in [
        (
            "127.0.0.1",
            "http://attacker.example/connections",
            421,
            "the URI counts",
        ),
        (
            "attacker.example",
            "http://127.0.0.1:15020/connections",
            200,
            "the URI counts",
        ),
        (
            "127.0.0.1\r\nHost: attacker.example",
            "/connections",
            400,
            "two names",
        ),
        (
            "127.0.0.1\r\nHost: 127.0.0.1",
            "/connections",
            400,
            "twice the same",
        ),
    ] {
        let answer = ask_as(&node, host, "GET", target).unwrap();
        assert_eq!(answer.status, status, "{why}: {answer:?}");
    }
}
