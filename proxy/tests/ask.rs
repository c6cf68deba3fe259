//! `portreeve check` and `portreeve matrix` from outside: arguments, output, exit status.
#![expect(clippy::unwrap_used, reason = "a panic is how a test helper fails")]
use std::fs::write;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

const CLUSTER: &str = r#"
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Node, metadata: {name: n1}, spec: {podCIDR: 10.0.1.0/24}, status: {addresses: [{type: InternalIP, address: 192.168.0.1}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: a, namespace: x, labels: {app: foo}}, spec: {nodeName: n1}, status: {phase: Running, podIPs: [{ip: 10.0.1.1}, {ip: "fd00::1"}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: b, namespace: "y"}, spec: {nodeName: n1}, status: {phase: Running, podIPs: [{ip: 10.0.1.2}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: six, namespace: "y"}, spec: {nodeName: n2}, status: {phase: Running, podIPs: [{ip: "fd00::6"}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: done, namespace: "y"}, spec: {nodeName: n1}, status: {phase: Succeeded, podIP: 10.0.1.3}}
- {apiVersion: v1, kind: Pod, metadata: {name: host, namespace: "y"}, spec: {nodeName: n1, hostNetwork: true}, status: {phase: Running, podIP: 192.168.0.1}}
---
{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: default-deny, namespace: "y"}, spec: {podSelector: {matchExpressions: [{key: app, operator: DoesNotExist}]}, policyTypes: [Ingress]}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: allow-foo, namespace: "y"}
spec:
  podSelector: {}
  ingress:
  - from: [{podSelector: {}, namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: x}}}]
    ports: [{port: 80}]
"#;

fn cluster() -> (TempDir, String) {
    let dir = tempdir().unwrap();
    write(dir.path().join("state.yaml"), CLUSTER).unwrap();
    let source = format!("dir:{}", dir.path().display());
    (dir, source)
}

fn portreeve(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_portreeve"));
    command
        .args(args)
        .env_remove("PORTREEVE_CLUSTER")
        .env("KUBECONFIG", "/nonexistent")
        .stdin(Stdio::null());
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn check_json_has_the_documented_keys() {
    let (_dir, source) = cluster();
    let open = json!({"isolated": false, "allowed": true, "policies": []});
    let ask = |from: &str, to: &str, port: &str| {
        let args = [
            "check",
            "--cluster",
            &source,
            "--from",
            from,
            "--to",
            to,
            "--port",
            port,
        ];
        portreeve(&[&args[..], &["--output", "json"]].concat())
    };
    for (from, to, port, status, verdict, ingress, exempt, why) in [
        (
            "x/a",
            "y/b",
            "80",
            0,
            "allow",
            json!({"isolated": true, "allowed": true, "policies": ["y/allow-foo"]}),
            json!(null),
            "a rule allows it",
        ),
        (
            "x/a",
            "y/b",
            "81",
            1,
            "deny",
            json!({"isolated": true, "allowed": false, "policies": ["y/allow-foo", "y/default-deny"]}),
            json!(null),
            "another port",
        ),
        (
            "10.0.1.1",
            "10.0.1.2",
            "80",
            0,
            "allow",
            json!({"isolated": true, "allowed": true, "policies": ["y/allow-foo"]}),
            json!(null),
            "by address",
        ),
        (
            "9.9.9.9",
            "y/b",
            "80",
            1,
            "deny",
            json!({"isolated": true, "allowed": false, "policies": ["y/allow-foo", "y/default-deny"]}),
            json!(null),
            "from outside",
        ),
        (
            "y/b",
            "x/a",
            "80",
            0,
            "allow",
            open.clone(),
            json!(null),
            "nothing isolates x/a",
        ),
        (
            "x/a",
            "y/six",
            "80",
            0,
            "allow",
            json!({"isolated": true, "allowed": true, "policies": ["y/allow-foo"]}),
            json!(null),
            "the family in common",
        ),
        (
            "y/b",
            "y/b",
            "81",
            0,
            "allow",
            json!({"isolated": true, "allowed": false, "policies": ["y/allow-foo", "y/default-deny"]}),
            json!("self"),
            "itself",
        ),
        (
            "y/host",
            "y/b",
            "81",
            0,
            "allow",
            json!({"isolated": true, "allowed": false, "policies": ["y/allow-foo", "y/default-deny"]}),
            json!("node"),
            "its node",
        ),
        (
            "x/a",
            "y/host",
            "81",
            0,
            "allow",
            open.clone(),
            json!("node"),
            "a hostNetwork pod is its node",
        ),
    ] {
        let output = ask(from, to, port);
        assert_eq!(
            output.status.code(),
            Some(status),
            "{from} {to}: {why}: {}",
            text(&output.stderr)
        );
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        let mut seen = answer["ingress"].clone();
        seen.as_object_mut().unwrap().remove("rules");
        assert_eq!(seen, ingress, "{from} {to}: {why}");
        assert_eq!(
            (
                &answer["verdict"],
                &answer["from"],
                &answer["to"],
                &answer["exempt"]
            ),
            (&json!(verdict), &json!(from), &json!(to), &exempt),
            "{why}"
        );
        assert_eq!(
            (&answer["port"], &answer["protocol"]),
            (&json!(port.parse::<u16>().unwrap()), &json!("TCP"))
        );
        assert_eq!(answer["egress"]["isolated"], json!(false));
    }
}

#[test]
fn check_text_names_pods_policy_and_rule() {
    let (_dir, source) = cluster();
    let ask = |from: &str, to: &str, port: &str| {
        let args = [
            "check",
            "--cluster",
            &source,
            "--from",
            from,
            "--to",
            to,
            "--port",
            port,
        ];
        let output = portreeve(&args);
        assert_eq!(text(&output.stderr), warnings());
        text(&output.stdout).to_owned()
    };
    assert_eq!(
        ask("x/a", "y/b", "80"),
        "ALLOW  x/a (10.0.1.1) -> y/b (10.0.1.2), port 80/TCP\n\
         \x20 egress:  open, no policy isolates x/a for egress\n\
         \x20 ingress: allowed by y/allow-foo (spec.ingress[0])\n"
    );
    assert_eq!(
        ask("9.9.9.9", "10.0.1.2", "80"),
        "DENY  9.9.9.9 (no pod) -> 10.0.1.2 (pod y/b), port 80/TCP\n\
         \x20 egress:  open, no policy isolates 9.9.9.9 for egress\n\
         \x20 ingress: denied, y/allow-foo and y/default-deny isolate 10.0.1.2 and no rule allows this\n"
    );
    assert!(ask("y/b", "y/b", "1").contains("a pod always reaches itself"));
}

/// The warnings about the manifests of [`CLUSTER`].
fn warnings() -> String {
    ["allow-foo", "default-deny"]
        .map(|policy| {
            format!(
                "portreeve: warning: NetworkPolicy y/{policy}, spec.podSelector: selects y/host, which runs on \
                 its node's network (hostNetwork): no policy isolates what has no address of its own; take the \
                 pods off the host network, or do not count on this policy for them\n"
            )
        })
        .concat()
}

/// A pod of another node claims the address of an isolated pod.
const HAUNTED: &str = r#"
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Node, metadata: {name: n1}, spec: {podCIDR: 10.1.1.0/24}}
- {apiVersion: v1, kind: Node, metadata: {name: n2}, spec: {podCIDR: 10.1.2.0/24}}
- {apiVersion: v1, kind: Pod, metadata: {name: db, namespace: bank}, spec: {nodeName: n1}, status: {phase: Running, podIP: 10.1.1.5, startTime: "2026-01-01T00:00:00Z"}}
- {apiVersion: v1, kind: Pod, metadata: {name: ghost, namespace: evil}, spec: {nodeName: n2}, status: {phase: Running, podIP: 10.1.1.5, startTime: "2026-02-01T00:00:00Z"}}
- {apiVersion: v1, kind: Pod, metadata: {name: m, namespace: evil}, spec: {nodeName: n2}, status: {phase: Running, podIP: 10.1.2.5, startTime: "2026-02-01T00:00:00Z"}}
- {apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: deny, namespace: bank}, spec: {podSelector: {}, policyTypes: [Ingress, Egress]}}
"#;

#[test]
fn claiming_an_isolated_pods_address_opens_nothing() {
    let dir = tempdir().unwrap();
    write(dir.path().join("state.yaml"), HAUNTED).unwrap();
    let source = format!("dir:{}", dir.path().display());
    let ask = |more: &[&str]| {
        let output = portreeve(&[more, &["--cluster", &source, "--port", "80"]].concat());
        let said = text(&output.stderr);
        for part in [
            "10.1.1.5 is claimed by pod bank/db, pod evil/ghost",
            "bank/db is treated as its holder",
            "status.podIPs",
        ] {
            assert!(said.contains(part), "{part:?}: {said}");
        }
        output
    };
    for to in ["10.1.1.5", "bank/db"] {
        let output = ask(&["check", "--from", "evil/m", "--to", to]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(text(&output.stdout).contains("bank/deny"), "{output:?}");
    }
    let output = ask(&["matrix", "--output", "json"]);
    let matrix: Value = serde_json::from_slice(&output.stdout).unwrap();
    let pods = matrix["pods"].as_array().unwrap();
    let at = |pod: &str| pods.iter().position(|it| it == pod).unwrap();
    assert_eq!(matrix["allowed"][at("evil/m")][at("bank/db")], false);
    assert_eq!(matrix["allowed"][at("bank/db")][at("evil/m")], false);
}

#[test]
fn invalid_check_exits_with_2_and_a_remedy() {
    let (_dir, source) = cluster();
    let bad = tempdir().unwrap();
    write(
        bad.path().join("p.yaml"),
        "apiVersion: extensions/v1beta1\nkind: NetworkPolicy\nmetadata: {name: p}\n",
    )
    .unwrap();
    let bad = format!("dir:{}", bad.path().display());
    let check = |source: &str, from: &str, to: &str, port: &str| {
        portreeve(&[
            "check",
            "--cluster",
            source,
            "--from",
            from,
            "--to",
            to,
            "--port",
            port,
        ])
    };
    for (output, expected) in [
        (
            check(&source, "x/aa", "y/b", "80"),
            "there is no pod x/aa; did you mean x/a?",
        ),
        (
            check(&source, "z/host", "y/b", "80"),
            "did you mean y/host?",
        ),
        (
            check(&source, "x/a", "y/done", "80"),
            "the pod y/done has ended",
        ),
        (
            check(&source, "y/b", "y/six", "80"),
            "no address family in common",
        ),
        (
            check(&source, "b", "y/six", "80"),
            "neither namespace/pod nor an IP address",
        ),
        (
            check("files", "x/a", "y/b", "80"),
            "neither kube nor dir:PATH",
        ),
        (
            check("dir:/nonexistent", "x/a", "y/b", "80"),
            "cannot be listed",
        ),
        (
            check(&bad, "x/a", "y/b", "80"),
            "p.yaml, document 1, NetworkPolicy p, apiVersion: extensions/v1beta1",
        ),
        (check(&source, "x/a", "y/b", "0"), "0 is not in 1..=65535"),
        (check(&source, "x/a", "y/b", "http"), "invalid value 'http'"),
        (
            portreeve(&["check", "--cluster", &source, "--from", "x/a"]),
            "--to <Y>",
        ),
        (
            portreeve(&["check", "--cluster", &source, "--frm", "x/a"]),
            "unexpected argument",
        ),
        (
            portreeve(&["matrix", "--cluster", "kube"]),
            "no usable client configuration",
        ),
        (
            portreeve(&["matrix", "--cluster", &source, "--protocol", "ICMP"]),
            "unknown protocol",
        ),
        (
            portreeve(&["check", "--cluster", &source, "--queries", "/nonexistent"]),
            "cannot read /nonexistent",
        ),
    ] {
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{expected}: {error}");
        assert!(error.contains(expected), "{expected}: {error}");
        assert_eq!(text(&output.stdout), "", "{expected}");
    }
}

fn queries(source: &str, file: &Path, input: &[u8]) -> (Option<i32>, Vec<Value>) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_portreeve"))
        .args(["check", "--cluster", source, "--queries"])
        .arg(file)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    if file == Path::new("-") {
        stdin.write_all(input).unwrap();
    }
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let answers = text(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    (output.status.code(), answers.collect())
}

#[test]
fn many_questions_get_their_answers_in_order() {
    let (dir, source) = cluster();
    let input = br#"{"from":"x/a","to":"y/b","port":80,"protocol":"TCP"}
{"from":"y/b","to":"10.0.1.1","port":80}
{"from":"x/a","to":"y/b","port":80,"protocol":"UDP"}
"#;
    let file = dir.path().join("queries");
    write(&file, input).unwrap();
    for path in [Path::new("-"), &file] {
        let (code, answers) = queries(&source, path, input);
        assert_eq!(code, Some(0), "a denied question is an answered one");
        let verdicts: Vec<_> = answers
            .iter()
            .map(|answer| answer["verdict"].as_str())
            .collect();
        assert_eq!(verdicts, [Some("allow"), Some("allow"), Some("deny")]);
    }
}

#[test]
fn invalid_batch_line_gives_error_and_status_2() {
    let (_dir, source) = cluster();
    let long = format!("{{\"from\":\"{}\"}}", "x".repeat(100_000));
    let lines = [
        &br#"{"from":"x/a","to":"y/b","port":80}"#[..],
        b"nonsense",
        b"",
        br#"{"from":"x/a","to":"y/b"}"#,
        br#"{"from":"x/a","to":"y/b","port":70000}"#,
        br#"{"from":"x/a","to":"y/b","port":0}"#,
        br#"{"from":"x/a","to":"y/b","port":80,"protocol":"ICMP"}"#,
        br#"{"from":"x/a","to":"y/b","port":80,"prot":"TCP"}"#,
        br#"{"from":"x/a","to":"y/done","port":80}"#,
        b"\xff\xfe",
        long.as_bytes(),
        br#"{"from":"x/a","to":"y/b","port":81}"#,
    ];
    let (code, answers) = queries(&source, Path::new("-"), &lines.join(&b'\n'));
    assert_eq!(code, Some(2));
    assert_eq!(
        answers.len(),
        lines.len() - 1,
        "a blank line is no question"
    );
    let errors: Vec<bool> = answers
        .iter()
        .map(|answer| answer["error"].is_string())
        .collect();
    let good = answers.len() - 1;
    assert!(
        errors
            .iter()
            .enumerate()
            .all(|(at, error)| *error != (at == 0 || at == good)),
        "{answers:?}"
    );
}

#[test]
fn matrix_has_every_running_pod_in_every_format() {
    let (_dir, source) = cluster();
    let matrix = |more: &[&str]| {
        let output = portreeve(&[&["matrix", "--cluster", &source][..], more].concat());
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains("left out: the pod y/done has ended"));
        text(&output.stdout).to_owned()
    };
    let answer: Value = serde_json::from_str(&matrix(&["--output", "json"])).unwrap();
    assert_eq!(
        answer,
        json!({
            "port": 80, "protocol": "TCP",
            "pods": ["x/a", "y/b", "y/host", "y/six"],
            "allowed": [
                [true, true, true, true],
                [true, true, true, false],
                [true, true, true, false],
                [true, false, false, true],
            ],
        })
    );
    assert_eq!(
        matrix(&["--output", "csv", "--port", "81", "--protocol", "udp"]),
        "from,x/a,y/b,y/host,y/six\nx/a,true,false,true,false\ny/b,true,true,true,false\n\
         y/host,true,true,true,false\ny/six,true,false,false,true\n"
    );
    let table = matrix(&[]);
    assert!(
        table.contains("y/host") && table.contains('✓') && table.contains('✗'),
        "{table}"
    );
    assert!(
        table.ends_with("port 80/TCP: 12 of 16 allowed (✓), rows are sources\n"),
        "{table}"
    );
    assert!(!table.contains('\u{1b}'), "colour where nobody sees it");
}
