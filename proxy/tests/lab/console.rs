//! The commands that ask a running daemon, as an operator on the node uses them.
use std::io::{BufRead, BufReader};
use std::process::{Output, Stdio};

use lab::runner::Test;
use lab::{Host, Kind, wait_until};
use serde_json::{Value, json};

use crate::support::{
    Bed, DEADLINE, PORTREEVE, SEVERAL_SYNS, SOON, allow_ingress, ask_as, connected, deny_ingress,
    echoes, metric,
};

pub(crate) const TESTS: &[Test] = &lab::tests![
    explain_says_on_the_command_line_what_is_in_force,
    connections_lists_what_stands_by_pod_and_namespace,
    observe_shows_each_decision_once_as_it_is_made,
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

fn explain_says_on_the_command_line_what_is_in_force() {
    let mut bed = Bed::enforced(&[], &policies());
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

fn connections_lists_what_stands_by_pod_and_namespace() {
    let bed = Bed::enforced(&[], &policies());
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

fn observe_shows_each_decision_once_as_it_is_made() {
    let bed = Bed::enforced(&[], &policies());
    let (a, b, d, node) = (
        bed.lab.pod("x/a"),
        bed.lab.pod("x/b"),
        bed.lab.pod("x/d"),
        bed.lab.node(0),
    );
    let observe = |filter: &[&str]| {
        let mut command = node.command(PORTREEVE);
        command.arg("observe").args(filter).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.take_stdout().unwrap()).lines();
        (child, lines)
    };
    let (_all, mut all) = observe(&["--output", "json"]);
    let (_of_d, mut of_d) = observe(&["--pod", "x/d", "--verdict", "deny"]);
    wait_until(DEADLINE, "both observers", || {
        metric(&node, "portreeve_observers") == 2
    })
    .unwrap();
    // Its SYN is repeated meanwhile.
    let denied = a.connect(b.addr_v4(80), SEVERAL_SYNS).unwrap();
    assert_eq!(denied.kind(), Kind::TimedOut);
    assert_eq!(
        d.connect(b.addr_v4(81), SOON).unwrap().kind(),
        Kind::TimedOut
    );
    let mut next = || -> Value { serde_json::from_str(&all.next().unwrap().unwrap()).unwrap() };
    let (first, second) = (next(), next());
    assert_eq!(first["source.k8s.pod.name"], "a", "{first}");
    assert_eq!(first["policies"], json!(["x/deny-ingress-b"]), "{first}");
    assert!(first["time"].is_string(), "{first}");
    assert_eq!(
        (&second["source.k8s.pod.name"], &second["destination.port"]),
        (&json!("d"), &json!(81)),
        "each attempt once: {second}"
    );
    let line = of_d.next().unwrap().unwrap();
    for part in [" DENY x/d ", " -> x/b ", "TCP, ingress: x/deny-ingress-b"] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
}

fn the_admin_port_answers_by_address_only() {
    let bed = Bed::enforced(&[], &[]);
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
}
