//! What changes while the daemon runs: policies on disk, pods that come up.
use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom, Write};
use std::thread;
use std::time::{Duration, Instant};

use lab::{Kind, PodSpec, wait_until};
use serde_json::{Value, json};
use testbed::runner::Test;

use testbed::{
    DEADLINE, SOON, TestCluster, allow_all, ask, connected, deny_ingress, echoes, greeted, metric,
    policy,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    policy_change_on_disk_applies_within_a_second,
    file_edited_in_place_applies_within_a_second,
    half_written_file_keeps_last_good_state,
    invalid_policy_is_named_and_keeps_last_state,
    a_relabelled_pod_gets_its_new_rights,
    unknown_pod_is_dropped_after_the_hold,
    pod_known_within_hold_connects_immediately,
];

fn policy_change_on_disk_applies_within_a_second() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"));
    for (policies, expected) in [
        (vec![deny_ingress("b")], Kind::TimedOut),
        (vec![allow_all()], Kind::Connected),
        (vec![deny_ingress("b")], Kind::TimedOut),
        // Now b is non-isolated: no policy at all.
        (vec![], Kind::Connected),
    ] {
        let written = Instant::now();
        bed.write_policies(&policies);
        wait_until(DEADLINE, format!("{expected}"), || {
            // Loads of short dials: the first one with the new outcome ends the wait.
            a.connect(b.addr_v4(80), Duration::from_millis(150))
                .unwrap()
                .kind()
                == expected
        })
        .unwrap();
        let took = written.elapsed();
        assert!(
            took < Duration::from_secs(1),
            "{expected} only after {took:?}"
        );
        assert_eq!(
            a.connect(b.addr_v6(80), SOON).unwrap().kind(),
            expected,
            "IPv6"
        );
    }
}

fn file_edited_in_place_applies_within_a_second() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"));
    let path = bed.manifests().join("more.yaml");
    let written = Instant::now();
    let mut file = OpenOptions::new()
        .create_new(true)
        .write(true)
        .open(&path)
        .unwrap();
    writeln!(file, "{}", deny_in_yaml("b")).unwrap();
    drop(file);
    wait_until(DEADLINE, "the policy of a new file", || {
        metric(&bed.lab.node(0), "portreeve_enforced_generation") > 0
            && ask(&bed.lab.node(0), "/policies")
                .unwrap()
                .body
                .contains("deny-in-yaml")
    })
    .unwrap();
    assert!(
        written.elapsed() < Duration::from_secs(1),
        "{:?}",
        written.elapsed()
    );
    // The union of policies: allow-all still allows.
    assert!(a.connect(b.addr_v4(80), SOON).unwrap().is_connected());
}

fn deny_in_yaml(pod: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
         metadata: {{namespace: x, name: deny-in-yaml}}\n\
         spec: {{podSelector: {{matchLabels: {{pod: {pod}}}}}, policyTypes: [Ingress]}}"
    )
}

fn half_written_file_keeps_last_good_state() {
    let bed = TestCluster::enforced(&[], &[deny_ingress("b")]);
    let (a, b, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.node(0));
    let denied = || {
        assert_eq!(
            a.connect(b.addr_v4(80), SOON).unwrap().kind(),
            Kind::TimedOut
        );
    };
    denied();
    // An editor that truncates, writes a part, and takes its time.
    let path = bed.manifests().join("policies.json");
    let mut file = OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    file.write_all(b"{\"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": [{\"kind\": \"Netw")
        .unwrap();
    file.flush().unwrap();
    let said = |text: &str| {
        ask(&node, "/readyz").is_some_and(|it| it.status == 200 && it.body.contains(text))
    };
    wait_until(
        DEADLINE,
        "the half-written file to be named on /readyz",
        || said("policies.json"),
    )
    .unwrap();
    denied();
    assert!(metric(&node, "portreeve_config_problems") > 0);
    // Now it is whole.
    let mark = bed.mark();
    let mut whole = allow_all();
    let mut marker = policy(
        &mark,
        &json!({ "podSelector": {}, "policyTypes": ["Ingress"] }),
    );
    marker["metadata"]["namespace"] = "marks".into();
    whole = json!({ "apiVersion": "v1", "kind": "List", "items": [whole, marker] });
    file.set_len(0).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.write_all(whole.to_string().as_bytes()).unwrap();
    drop(file);
    bed.wait_in_force(&mark);
    assert!(a.connect(b.addr_v4(80), SOON).unwrap().is_connected());
    assert_eq!(ask(&node, "/readyz").unwrap().body, "ready\n");
}

fn invalid_policy_is_named_and_keeps_last_state() {
    let bed = TestCluster::enforced(&[], &[deny_ingress("b")]);
    let (a, b, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.node(0));
    let mut broken: Value = deny_ingress("b");
    broken["spec"]["ingress"] = json!([{ "from": [{ "ipBlock": { "cidr": "0.0.0.0/33" } }] }]);
    bed.apply(&[broken]);
    let readyz = ask(&node, "/readyz").unwrap();
    for part in ["deny-ingress-b", "policies.json", "cidr"] {
        assert!(
            readyz.body.contains(part),
            "{part} is not in {}",
            readyz.body
        );
    }
    assert_eq!(readyz.status, 200, "{readyz:?}");
    assert_eq!(
        a.connect(b.addr_v4(80), SOON).unwrap().kind(),
        Kind::TimedOut
    );
}

fn a_relabelled_pod_gets_its_new_rights() {
    let from = json!([{ "from": [{ "podSelector": { "matchLabels": { "access": "true" } } }] }]);
    let spec = json!({ "podSelector": { "matchLabels": { "pod": "c" } }, "policyTypes": ["Ingress"], "ingress": from });
    let mut bed = TestCluster::enforced(&[], &[policy("access", &spec)]);
    let (a, c) = (bed.lab.pod("x/a"), bed.lab.pod("x/c"));
    for (labels, expected) in [
        (vec![("pod", "a")], Kind::TimedOut),
        (vec![("pod", "a"), ("access", "true")], Kind::Connected),
        (vec![("pod", "a"), ("access", "false")], Kind::TimedOut),
    ] {
        bed.lab.relabel_pod("x/a", labels.iter().copied()).unwrap();
        bed.write_cluster();
        wait_until(DEADLINE, format!("{expected} with {labels:?}"), || {
            let limit = Duration::from_millis(300);
            c.addrs(80)
                .iter()
                .all(|to| a.connect(*to, limit).unwrap().kind() == expected)
        })
        .unwrap();
    }
}

/// A pod that runs, and that no manifest names.
fn with_a_stranger(flags: &[&str]) -> TestCluster {
    let mut bed = TestCluster::enforced(flags, &[]);
    let spec = PodSpec::new("x", "stranger")
        .node(0)
        .label("pod", "stranger");
    bed.lab.add_pod(spec).unwrap().serve(&[80]).unwrap();
    bed
}

fn unknown_pod_is_dropped_after_the_hold() {
    let bed = with_a_stranger(&["--hold", "300ms"]);
    let (stranger, a, c) = (
        bed.lab.pod("x/stranger"),
        bed.lab.pod("x/a"),
        bed.lab.pod("x/c"),
    );
    for (from, to) in [
        (&stranger, a.addr_v4(80)),
        (&stranger, c.addr_v6(80)),
        (&a, stranger.addr_v4(80)),
        (&c, stranger.addr_v6(80)),
    ] {
        let capture = from.capture().unwrap();
        let outcome = from.connect(to, SOON).unwrap();
        assert_eq!(outcome.kind(), Kind::TimedOut, "{} to {to}", from.name());
        assert_eq!(capture.syn_acks_from(to), 0, "{} to {to}", from.name());
    }
    let refused = metric(
        &bed.lab.node(0),
        "portreeve_dropped_packets_total{reason=\"unknown_pod\"}",
    );
    assert!(refused >= 3, "{refused}");
}

fn pod_known_within_hold_connects_immediately() {
    let bed = with_a_stranger(&["--hold", "20s"]);
    let (stranger, a) = (bed.lab.pod("x/stranger"), bed.lab.pod("x/a"));
    let capture = a.capture().unwrap();
    let to = stranger.addr_v4(80);
    thread::scope(|scope| {
        let dialled = scope.spawn(|| connected(&a, to));
        capture
            .wait_for(DEADLINE, "the SYN", 1, |packet| packet.is_syn_to(to))
            .unwrap();
        bed.write_cluster();
        let written = Instant::now();
        let stream = dialled.join().unwrap();
        assert!(
            written.elapsed() < Duration::from_millis(900),
            "{:?}",
            written.elapsed()
        );
        echoes(&stream, "hello");
    });
    // The very first SYN was held and let through, or one sent before its repeat was due.
    assert!(capture.syns_to(to) <= 2, "{}", capture.syns_to(to));
    assert_eq!(
        greeted(&stranger, a.addr_v4(80)).client.ip(),
        stranger.ipv4()
    );
}
