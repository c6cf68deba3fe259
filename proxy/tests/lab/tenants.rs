//! What one tenant writes into policies is not felt by the others.
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lab::runner::Test;
use lab::{Cluster, PodSpec};
use serde_json::{Value, json};

use crate::bounds::{StopOnDrop, flood};
use crate::support::{Bed, DEADLINE, allow_ingress, ask, deny_ingress, metric, policy};

pub(crate) const TESTS: &[Test] = &lab::tests![
    a_pod_under_many_rules_does_not_delay_its_neighbour,
    a_tenants_large_policy_does_not_delay_anothers_deny,
];

/// SYNs of the pod under many rules.
const FLOOD: usize = 3_000;

/// Pods x/a, x/b and x/d on one node.
fn one_node() -> lab::Builder {
    let pod = |name: &str| PodSpec::new("x", name).label("pod", name).port("http", 80);
    Cluster::builder().nodes(1).pods(["a", "b", "d"].map(pod))
}

fn a_pod_under_many_rules_does_not_delay_its_neighbour() {
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
    let mut bed = Bed::bare(one_node());
    bed.write_policies(&policies);
    bed.enforce(&[]);
    let (a, d, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/d"), bed.lab.node(0));
    let victim = bed.lab.pod("x/b");
    let (stop, sent) = (AtomicBool::new(false), AtomicUsize::new(0));
    let slowest = thread::scope(|scope| {
        scope.spawn(|| flood(&d, &victim, &node, &stop, &sent));
        let _stopped = StopOnDrop(&stop);
        let (mut connects, mut slowest) = (0, Duration::ZERO);
        while sent.load(Ordering::Relaxed) < FLOOD || connects < 50 {
            let began = Instant::now();
            let outcome = a.connect(victim.addr_v4(80), DEADLINE).unwrap();
            assert!(outcome.is_connected(), "{sent:?} sent: {outcome}");
            slowest = slowest.max(began.elapsed());
            connects += 1;
        }
        slowest
    });
    let denied = "portreeve_decisions_total{verdict=\"deny\",direction=\"egress\"}";
    assert!(metric(&node, denied) > 0, "the flood met the gate");
    // Without optimisation, with 1,024 packets of the flood in the queue.
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
}

fn a_tenants_large_policy_does_not_delay_anothers_deny() {
    let mut bed = Bed::bare(one_node());
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
