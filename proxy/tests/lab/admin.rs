//! What operators see: records of connections and the admin port.
use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use lab::{Kind, wait_for, wait_until};
use serde_json::{Value, json};
use testbed::runner::Test;

use testbed::{
    DEADLINE, SEVERAL_SYNS, SOON, TestCluster, allow_ingress, ask, ask_by, connected, deny_ingress,
    metric,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    each_connection_record_has_the_documented_keys,
    trace_file_dash_writes_records_to_stdout,
    admin_port_serves_health_metrics_and_policies,
    metrics_pass_promtool_and_match_the_documentation,
    bytes_are_counted_while_a_connection_is_live,
    connections_endpoint_lists_only_live_connections,
    explain_answers_as_check_does,
];

/// The keys of a record where both ends are pods, as users rely on them.
pub(crate) const KEYS: [&str; 21] = [
    "verdict",
    "direction",
    "policies",
    "reason",
    "protocol",
    "source.address",
    "source.port",
    "source.k8s.namespace.name",
    "source.k8s.pod.name",
    "source.k8s.pod.uid",
    "destination.address",
    "destination.port",
    "destination.k8s.namespace.name",
    "destination.k8s.pod.name",
    "destination.k8s.pod.uid",
    "k8s.node.name",
    "bytes.sent",
    "bytes.received",
    "start_time",
    "end_time",
    "path",
];

fn policies() -> [Value; 2] {
    [deny_ingress("b"), allow_ingress("c")]
}

fn uid(bed: &TestCluster, name: &str) -> Value {
    let manifests = bed.lab.manifests();
    let mut items = manifests["items"].as_array().unwrap().iter();
    let pod = items.find(|it| it["kind"] == "Pod" && it["metadata"]["name"] == name);
    pod.unwrap()["metadata"]["uid"].clone()
}

fn each_connection_record_has_the_documented_keys() {
    let bed = {
        let mut bed = TestCluster::bare(testbed::small());
        bed.write_policies(&policies());
        for node in 0..2 {
            bed.install(node, &[]);
            let file = bed.file(&format!("records-{node}"));
            bed.start(node, &["--trace-file", file.to_str().unwrap()]);
        }
        bed
    };
    let (a, b, c) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.pod("x/c"));
    // Denied on node 0, its SYN repeated.
    assert_eq!(
        a.connect(b.addr_v4(80), SEVERAL_SYNS).unwrap().kind(),
        Kind::TimedOut
    );
    // Allowed on node 1, with bytes that are known.
    let mut stream = a
        .connect(c.addr_v6(80), DEADLINE)
        .unwrap()
        .into_stream()
        .unwrap();
    let port = stream.local_addr().unwrap().port();
    stream.write_all(&[7; 1000]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).unwrap();
    drop(stream);

    let there = records(&bed.file("records-1"), 1);
    // x/a is non-isolated: its own node judges only what x/b's policy asks for.
    let here = records(&bed.file("records-0"), 1);
    let ([denied], [allowed]) = (&here[..], &there[..]) else {
        panic!("a record a connection: {here:?} {there:?}")
    };
    let expected: BTreeSet<&str> = KEYS.into();
    for record in [denied, allowed] {
        let keys: BTreeSet<&str> = record
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        assert_eq!(keys, expected, "{record}");
        assert_eq!(record["source.k8s.pod.uid"], uid(&bed, "a"), "{record}");
        assert_eq!(record["source.k8s.namespace.name"], "x", "{record}");
        assert_eq!(
            (&record["path"], &record["protocol"]),
            (&json!("spliced"), &json!("TCP")),
            "{record}"
        );
        assert!(
            record["start_time"].as_str() <= record["end_time"].as_str(),
            "{record}"
        );
        assert!(
            record["reason"]
                .as_str()
                .is_some_and(|reason| reason.ends_with('.')),
            "{record}"
        );
    }
    check(
        denied,
        &json!({
            "verdict": "deny", "direction": "ingress", "policies": ["x/deny-ingress-b"], "k8s.node.name": "node-0",
            "source.address": a.ipv4(), "destination.address": b.ipv4(), "destination.port": 80,
            "destination.k8s.pod.name": "b", "destination.k8s.pod.uid": uid(&bed, "b"), "bytes.sent": 0, "bytes.received": 0,
        }),
    );
    check(
        allowed,
        &json!({
            "verdict": "allow", "direction": "ingress", "policies": ["x/allow-ingress-c"], "k8s.node.name": "node-1",
            "source.address": a.ipv6(), "source.port": port, "destination.address": c.ipv6(), "destination.port": 80,
            "destination.k8s.pod.name": "c", "destination.k8s.pod.uid": uid(&bed, "c"),
            "bytes.sent": 1000, "bytes.received": heard.len(),
        }),
    );
}

fn check(record: &Value, expected: &Value) {
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&record[key], value, "{key} of {record}");
    }
}

/// The records of a file, once there are so many.
fn records(file: &Path, count: usize) -> Vec<Value> {
    wait_for(DEADLINE, "the records", || {
        let text = fs::read_to_string(file).ok()?;
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        (lines.len() >= count).then_some(lines)
    })
    .unwrap()
}

fn trace_file_dash_writes_records_to_stdout() {
    let mut bed = TestCluster::bare(testbed::small());
    bed.write_policies(&policies());
    bed.install(0, &[]);
    bed.start(0, &["--trace-file", "-"]);
    let b = bed.lab.pod("x/b").addr_v4(80);
    let tried = bed.lab.pod("x/a").connect(b, SOON).unwrap();
    assert_eq!(tried.kind(), Kind::TimedOut);
    let said = bed.file(&format!("{}.log", bed.lab.node(0).name()));
    wait_until(DEADLINE, "a record among what the daemon says", || {
        let said = fs::read_to_string(&said).unwrap();
        let mut records = said
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        records.any(|record: Value| record["verdict"] == "deny" && record["path"] == "spliced")
    })
    .unwrap();
}

fn admin_port_serves_health_metrics_and_policies() {
    let bed = TestCluster::enforced(&[], &policies());
    let (a, b, c) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.pod("x/c"));
    let node = bed.lab.node(0);
    for (path, status, body) in [
        ("/livez", 200, "ok\n"),
        ("/readyz", 200, "ready\n"),
        ("/nowhere", 404, "there are: "),
    ] {
        let answer = ask(&node, path).unwrap();
        assert!(
            answer.status == status && answer.body.starts_with(body),
            "{path}: {answer:?}"
        );
    }
    assert_eq!(ask_by(&node, "POST", "/livez").unwrap().status, 405);
    let listed = ask(&node, "/policies").unwrap();
    assert!(
        listed.head.contains("content-type: application/json"),
        "{}",
        listed.head
    );
    let text = listed.body;
    for part in ["deny-ingress-b", "allow-ingress-c"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    connected(&a, c.addr_v4(80));
    assert_eq!(
        a.connect(b.addr_v4(80), SOON).unwrap().kind(),
        Kind::TimedOut
    );
    let metrics = ask(&node, "/metrics").unwrap();
    assert!(
        metrics
            .head
            .contains("content-type: text/plain; version=0.0.4"),
        "{}",
        metrics.head
    );
    let decisions = |verdict: &str, cause: &str| {
        format!(
            "portreeve_policy_verdicts_total{{verdict=\"{verdict}\",direction=\"ingress\",path=\"spliced\",reason=\"{cause}\"}}"
        )
    };
    for (at, name) in [
        (0, "portreeve_ready".to_owned()),
        (0, "portreeve_table_generation".to_owned()),
        (0, "portreeve_endpoints".to_owned()),
        (0, "portreeve_policies".to_owned()),
        (0, "portreeve_verdict_duration_seconds_count".to_owned()),
        (0, "portreeve_policy_sync_duration_seconds_count".to_owned()),
        (0, decisions("deny", "no_rule")),
        // x/a is non-isolated: only the server's node judges what goes there.
        (1, decisions("allow", "rule")),
        (
            1,
            "portreeve_upstream_connect_duration_seconds_count".to_owned(),
        ),
    ] {
        let value = metric(&bed.lab.node(at), &name);
        assert!(value >= 1, "{name} of node {at}\n{}", metrics.body);
    }
}

fn metrics_pass_promtool_and_match_the_documentation() {
    let bed = TestCluster::enforced(&[], &policies());
    let node = bed.lab.node(0);
    let text = ask(&node, "/metrics").unwrap().body;
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let said = said_of(&repository.join("lab/tools/promtool"), &text);
    assert!(said.status.success(), "{said:?}");
    assert!(said.stderr.is_empty(), "{said:?}");

    let exposed: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    let page = fs::read_to_string(repository.join("docs/metrics.md")).unwrap();
    // Watches and snapshots are of the Kubernetes API; manifests have none.
    let documented: BTreeSet<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `portreeve_")?.split('`').next())
        .filter(|name| !name.starts_with("watch_") && *name != "state_from_snapshot")
        .collect();
    let exposed: BTreeSet<&str> = exposed
        .into_iter()
        .map(|name| name.strip_prefix("portreeve_").unwrap())
        .collect();
    assert_eq!(
        exposed, documented,
        "the daemon's metrics and docs/metrics.md's"
    );
}

/// What `promtool check metrics` has to say of a page of metrics.
fn said_of(promtool: &Path, metrics: &str) -> Output {
    let mut child = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(metrics.as_bytes()).unwrap();
    drop(input);
    child.wait_with_output().unwrap()
}

fn bytes_are_counted_while_a_connection_is_live() {
    let bed = TestCluster::enforced(&[], &policies());
    let (a, c, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/c"), bed.lab.node(1));
    let sent = "portreeve_bytes_total{direction=\"sent\",path=\"spliced\"}";
    let live = "portreeve_connections{stage=\"live\"}";
    let stream = connected(&a, c.addr_v4(80));
    testbed::echoes(&stream, "0123456789");
    assert_eq!((metric(&node, live), metric(&node, sent)), (1, 10));
    testbed::echoes(&stream, "0123456789");
    drop(stream);
    bed.wait_for_no_connection();
    assert_eq!((metric(&node, live), metric(&node, sent)), (0, 20));
}

fn connections_endpoint_lists_only_live_connections() {
    let bed = TestCluster::enforced(&[], &policies());
    let (a, c, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/c"), bed.lab.node(1));
    let stream = connected(&a, c.addr_v4(80));
    let listed = ask(&node, "/connections").unwrap().json();
    let [only] = &listed.as_array().unwrap()[..] else {
        panic!("one connection: {listed}")
    };
    check(
        only,
        &json!({
            "source.k8s.pod.name": "a", "source.k8s.pod.uid": uid(&bed, "a"), "destination.k8s.pod.name": "c",
            "destination.address": c.ipv4(), "destination.port": 80, "verdict": "allow", "policies": ["x/allow-ingress-c"],
        }),
    );
    drop(stream);
    bed.wait_for_no_connection();
    assert_eq!(ask(&node, "/connections").unwrap().json(), json!([]));
}

fn explain_answers_as_check_does() {
    let bed = TestCluster::enforced(&[], &policies());
    let node = bed.lab.node(0);
    let (a, b) = (bed.lab.pod("x/a").ipv4(), bed.lab.pod("x/b").ipv4());
    for (from, to, verdict) in [("x/a", "x/b", "deny"), ("x/a", "x/c", "allow")] {
        let path = format!("/explain?from={from}&to={to}&port=80&protocol=TCP");
        let answer = ask(&node, &path).unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(answer.json()["verdict"], verdict, "{answer:?}");
    }
    let by_address = ask(&node, &format!("/explain?from={a}&to={b}&port=80"))
        .unwrap()
        .json();
    assert_eq!(
        by_address["ingress"]["policies"],
        json!(["x/deny-ingress-b"]),
        "{by_address}"
    );
    for wrong in [
        "from=x/a",
        "from=x/a&to=x/b&port=0",
        "from=x/nobody&to=x/b&port=80",
        "from=x/a&to=x/b&port=80&protocol=ICMPP",
    ] {
        let answer = ask(&node, &format!("/explain?{wrong}")).unwrap();
        assert_eq!(answer.status, 400, "{wrong}: {answer:?}");
        assert!(answer.json()["error"].is_string(), "{wrong}: {answer:?}");
    }
}
