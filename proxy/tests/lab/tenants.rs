//! One tenant's large policies do not affect other tenants.
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::thread;
use std::time::{Duration, Instant};

use lab::{Cluster, PodSpec, wait_until};
use serde_json::{Value, json};
use testbed::runner::Test;

use crate::bounds::flood;
use testbed::streams::StopOnDrop;
use testbed::{DEADLINE, TestCluster, allow_ingress, ask, deny_ingress, metric, policy};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    first_packets_cost_the_same_under_many_rules,
    a_large_policy_delays_no_other_tenants_deny,
];

/// SYNs of the pod under many rules that are denied.
const FLOOD: u64 = 2_000;

/// Pods x/a, x/b and x/d on one node.
fn one_node() -> lab::Builder {
    let pod = |name: &str| PodSpec::new("x", name).label("pod", name).port("http", 80);
    Cluster::builder().nodes(1).pods(["a", "b", "d"].map(pod))
}

fn first_packets_cost_the_same_under_many_rules() {
    let many = (0..20).map(|number| {
        let rule = |n: usize| {
            json!({ "to": [{ "ipBlock": { "cidr": format!("172.{number}.{}.{}/32", n / 256, n % 256) } }],
                "ports": [{ "port": 1 + n }] })
        };
        let rules: Vec<Value> = (0..1_000).map(rule).collect();
        let spec = json!({ "podSelector": { "matchLabels": { "pod": "d" } }, "policyTypes": ["Egress"],
            "egress": rules });
        policy(&format!("many-{number}"), &spec)
    });
    let policies: Vec<Value> = many.chain([allow_ingress("b")]).collect();
    let mut bed = TestCluster::bare(one_node());
    bed.write_policies(&policies);
    bed.enforce(&[]);
    let (a, d, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/d"), bed.lab.node(0));
    let victim = bed.lab.pod("x/b");
    let daemon = bed.daemon(0).child.id();
    let denied = || {
        metric(
            &node,
            "portreeve_policy_verdicts_total{verdict=\"deny\",direction=\"egress\"}",
        )
    };
    let (stop, sent) = (AtomicBool::new(false), AtomicUsize::new(0));
    let before = (denied(), user_time(daemon));
    thread::scope(|scope| {
        scope.spawn(|| flood(&d, &victim, &node, &stop, &sent));
        let _stopped = StopOnDrop(&stop);
        wait_until(DEADLINE, "the flood to be denied", || {
            denied() >= before.0 + FLOOD
        })
        .unwrap();
        let outcome = a.connect(victim.addr_v4(80), DEADLINE).unwrap();
        assert!(outcome.is_connected(), "the neighbour: {outcome}");
    });
    let spent = user_time(daemon) - before.1;
    let each = spent / u32::try_from(denied() - before.0).unwrap();
    // In a debug build; rule by rule it takes milliseconds. This is CPU time, so other load does not count.
    assert!(each < Duration::from_millis(1), "{each:?} for each SYN");
}

/// The user CPU time of all threads of a process: the 14th field (proc_pid_stat(5)), in hundredths of a second.
fn user_time(process: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let ticks: u64 = fields.split(' ').nth(11).unwrap().parse().unwrap();
    Duration::from_millis(ticks * 10)
}

fn a_large_policy_delays_no_other_tenants_deny() {
    let mut bed = TestCluster::bare(one_node());
    bed.enforce(&[]);
    let pods = (0..3_000).map(|number| {
        json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": format!("p{number}"),
            "namespace": format!("n{}", number % 100), "labels": { "a": format!("v{number}") } },
            "spec": { "nodeName": "elsewhere" },
            "status": { "podIP": format!("10.200.{}.{}", number / 250, 1 + number % 250) } })
    });
    let list = |items: Vec<Value>| json!({ "apiVersion": "v1", "kind": "List", "items": items });
    bed.write("crowd.json", &list(pods.collect()));
    bed.apply(&[allow_ingress("b")]);
    let large = |turn: usize, peers: usize| {
        let peer = |n| json!({ "namespaceSelector": {}, "podSelector": { "matchLabels": { "a": format!("u{turn}-{n}") } } });
        let peers: Vec<Value> = (0..peers).map(peer).collect();
        let mut large = policy(
            "large",
            &json!({ "podSelector": {}, "ingress": [{ "from": peers }] }),
        );
        large["metadata"]["namespace"] = "evil".into();
        large
    };
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"));
    for (turn, peers) in [4_000, 5_000, 5_001].into_iter().enumerate() {
        let began = Instant::now();
        bed.write("tenant.json", &large(turn, peers));
        bed.apply(&[allow_ingress("b"), deny_ingress("b")][turn % 2..=turn % 2]);
        let waited = began.elapsed();
        // Most of it is reading the file, without optimisation.
        assert!(waited < Duration::from_secs(3), "{peers} peers: {waited:?}");
        let outcome = a
            .connect(b.addr_v4(80), Duration::from_millis(200))
            .unwrap();
        assert_eq!(outcome.is_connected(), turn % 2 == 0, "{outcome}");
    }
    let node = bed.lab.node(0);
    assert_eq!(metric(&node, "portreeve_policies_refused"), 1);
    let ready = ask(&node, "/readyz").unwrap();
    assert!(
        ready.body.contains("NetworkPolicy evil/large")
            && ready.body.contains("5001 distinct peer selectors"),
        "{}",
        ready.body
    );
}
