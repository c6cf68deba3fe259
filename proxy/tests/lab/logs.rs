//! Log lines of denied connections.
use serde_json::Value;
use testbed::runner::Test;

use testbed::{DEADLINE, TestCluster, deny_ingress};

pub(crate) const TESTS: &[Test] = &testbed::tests![repeated_denials_are_logged_and_then_counted];

fn repeated_denials_are_logged_and_then_counted() {
    const TRIES: usize = 40;
    let flags = ["--deny", "reject", "--log-format", "json"];
    let mut bed = TestCluster::enforced(&flags, &[deny_ingress("b"), deny_ingress("d")]);
    let a = bed.lab.pod("x/a");
    let denied = |name: &str| {
        let to = bed.lab.pod(name).addr_v4(80);
        assert!(a.connect(to, DEADLINE).unwrap().into_stream().is_err());
    };
    (0..TRIES).for_each(|_| denied("x/b"));
    // The flood hides nobody else.
    denied("x/d");
    let daemon = bed.daemon(0);
    daemon.child.terminate();
    daemon.child.wait(DEADLINE).unwrap();
    let log = daemon.log();
    let lines: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}")))
        .collect();
    let about = |name: &str| {
        lines
            .iter()
            .filter(|line| line["destination"] == name)
            .count()
    };
    assert_eq!((about("x/b"), about("x/d")), (5, 1), "{log}");
    let line = lines
        .iter()
        .find(|line| line["destination"] == "x/b")
        .unwrap();
    for (key, value) in [
        ("message", "connection denied"),
        ("verdict", "deny"),
        ("source", "x/a"),
        ("protocol", "TCP"),
        ("direction", "ingress"),
        ("policies", "x/deny-ingress-b"),
    ] {
        assert_eq!(line[key], value, "{key}: {line}");
    }
    let suppressed = lines
        .iter()
        .find(|line| line["suppressed"].is_u64())
        .unwrap();
    assert_eq!(suppressed["suppressed"], TRIES - 5, "{suppressed}");
    assert_eq!(suppressed["pod"], "x/b");
}
