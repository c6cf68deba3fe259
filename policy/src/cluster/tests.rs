//! Which addresses each event changes.
mod addresses;
mod budget;
mod claims;
mod cost;
mod oversized;

use super::*;
use crate::model::{Direction, PodPort, Protocol};
use crate::verdict::{OwnNode, allows, judge};

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn labels(text: &str) -> Labels {
    let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
    pairs
        .map(|(key, value)| (key.into(), value.into()))
        .collect()
}

fn pod_key(text: &str) -> PodKey {
    let (namespace, name) = text.split_once('/').unwrap();
    PodKey {
        namespace: namespace.into(),
        name: name.into(),
    }
}

fn policy_key(text: &str) -> PolicyKey {
    let (namespace, name) = text.split_once('/').unwrap();
    PolicyKey {
        namespace: namespace.into(),
        name: name.into(),
    }
}

/// A pod with the label `pod: NAME`, on node `n1`.
fn pod(key: &str, ip: &str) -> Pod {
    let key = pod_key(key);
    Pod {
        uid: format!("uid-{key}").into(),
        labels: Labels::from([("pod".into(), key.name.clone())]),
        key,
        node: "n1".into(),
        host_network: false,
        ports: Vec::new(),
        addresses: vec![address(ip)],
        finished: false,
        terminating: false,
        started: "2026-01-01T00:00:00Z".into(),
        oversized: false,
    }
}

fn policy(key: &str, spec: &str) -> NetworkPolicy {
    NetworkPolicy::new(policy_key(key), serde_saphyr::from_str(spec).unwrap()).unwrap()
}

fn node(name: &str, ip: &str) -> Node {
    let pod_cidrs = vec!["10.0.0.0/24".parse().unwrap()];
    Node {
        name: name.into(),
        addresses: vec![address(ip)],
        pod_cidrs,
    }
}

#[track_caller]
fn assert_touched(touched: &Touched, expected: &[&str]) {
    let expected: BTreeSet<IpAddr> = expected.iter().map(|text| address(text)).collect();
    assert_eq!(touched.addresses, expected);
}

fn tcp80(cluster: &Cluster, from: &str, to: &str) -> bool {
    let (from, to) = (cluster.party(address(from)), cluster.party(address(to)));
    let verdict = judge(from, to, Some(80), Protocol::Tcp, OwnNode::Allow);
    let allowed = allows(from, to, Some(80), Protocol::Tcp, OwnNode::Allow);
    assert_eq!(verdict.allowed(), allowed, "judge and allows agree");
    allowed
}

const A: &str = "10.0.0.1";
const B: &str = "10.0.0.2";
const C: &str = "10.0.0.3";

/// Pods x/a, x/b and y/c.
fn three_pods() -> Cluster {
    let mut cluster = Cluster::default();
    for (key, ip) in [("x/a", A), ("x/b", B), ("y/c", C)] {
        assert_touched(&cluster.upsert_pod(pod(key, ip)), &[ip]);
    }
    cluster
}

const FROM_C: &str = "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{podSelector: \
                      {matchLabels: {pod: c}}, namespaceSelector: {matchLabels: {team: blue}}}]}]}";

#[test]
fn an_event_that_changes_nothing_touches_nothing() {
    let mut cluster = three_pods();
    let team = Namespace::new("y", labels("team=blue"));
    assert!(cluster.upsert_namespace(team.clone()).is_empty());
    assert_touched(&cluster.upsert_policy(policy("x/p", FROM_C)), &[A, C]);
    assert_touched(&cluster.upsert_node(node("n1", "192.0.2.1")), &[A, B, C]);

    assert!(cluster.upsert_pod(pod("x/a", A)).is_empty());
    assert!(cluster.upsert_namespace(team).is_empty());
    assert!(cluster.upsert_policy(policy("x/p", FROM_C)).is_empty());
    assert!(cluster.upsert_node(node("n1", "192.0.2.1")).is_empty());
    assert!(
        cluster.upsert_node(node("n2", "192.0.2.2")).is_empty(),
        "no pods there"
    );
    assert!(cluster.remove_pod(&pod_key("x/nobody")).is_empty());
    assert!(cluster.remove_policy(&policy_key("x/none")).is_empty());
    assert!(cluster.remove_namespace("none").is_empty());
    assert!(cluster.remove_node("none").is_empty());
    let started = Pod {
        started: "2026-02-02T00:00:00Z".into(),
        ..pod("x/a", A)
    };
    assert!(
        cluster.upsert_pod(started).is_empty(),
        "only an address that several claim asks who is younger"
    );
}

#[test]
fn policy_event_touches_selected_pods_and_new_peers() {
    let mut cluster = three_pods();
    for (event, spec, touched, why) in [
        (
            "x/p",
            "podSelector: {matchLabels: {pod: a}}",
            &[A][..],
            "selects a",
        ),
        (
            "x/p",
            "podSelector: {matchLabels: {pod: b}}",
            &[A, B],
            "moves from a to b",
        ),
        (
            "x/p",
            "{podSelector: {matchLabels: {pod: b}}, policyTypes: [Egress]}",
            &[B],
            "changes",
        ),
        (
            "x/q",
            "{podSelector: {matchLabels: {pod: z}}, ingress: [{from: [{namespaceSelector: {}}]}]}",
            &[A, B, C],
            "selects nobody yet, but all match its new selector",
        ),
        (
            "y/r",
            "{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}]}",
            &[C],
            "the selector is not new",
        ),
        ("z/s", "podSelector: {}", &[], "a namespace without pods"),
    ] {
        let result = cluster.upsert_policy(policy(event, spec));
        let expected = touched.iter().map(|text| address(text)).collect();
        assert_eq!(result.addresses, expected, "{event} {why}");
    }
    assert_eq!(cluster.selected_by(&policy_key("x/p")), [pod_key("x/b")]);
    assert_eq!(cluster.selected_by(&policy_key("y/r")), [pod_key("y/c")]);
    assert_eq!(cluster.selected_by(&policy_key("x/none")), []);
    let selected = cluster.selected();
    assert_touched(&cluster.remove_policy(&policy_key("x/p")), &[B]);
    let selected = selected
        .iter()
        .map(|(policy, pods)| (policy.key().to_string(), pods));
    let expected = [
        ("x/p", vec![pod_key("x/b")]),
        ("x/q", vec![]),
        ("y/r", vec![pod_key("y/c")]),
        ("z/s", vec![]),
    ];
    assert!(
        selected.eq(expected.map(|(key, pods)| (key.to_owned(), pods))),
        "as it was"
    );
    assert_touched(&cluster.remove_policy(&policy_key("x/q")), &[]);
    assert_touched(&cluster.remove_policy(&policy_key("y/r")), &[C]);
}

#[test]
fn a_namespace_relabel_touches_its_matching_pods_only() {
    let mut cluster = three_pods();
    let _ = cluster.upsert_policy(policy("x/p", FROM_C));
    assert!(!tcp80(&cluster, C, A));
    let blue = |name: &str| Namespace::new(name, labels("team=blue"));
    assert_touched(&cluster.upsert_namespace(blue("x")), &[]);
    assert_touched(&cluster.upsert_namespace(blue("y")), &[C]);
    assert!(tcp80(&cluster, C, A));
    let more = Namespace::new("y", labels("team=blue,other=label"));
    assert_touched(&cluster.upsert_namespace(more), &[]);
    assert_touched(
        &cluster.upsert_namespace(Namespace::new("y", labels("team=red"))),
        &[C],
    );
    assert!(!tcp80(&cluster, C, A));
    let _ = cluster.upsert_namespace(blue("y"));
    assert_touched(&cluster.remove_namespace("y"), &[C]);
    assert!(!tcp80(&cluster, C, A));
}

#[test]
fn namespace_of_pods_exists_with_its_name_label() {
    let mut cluster = three_pods();
    let spec = "ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: 'y'}}}]}]";
    let _ = cluster.upsert_policy(policy("x/p", spec));
    assert!(tcp80(&cluster, C, A));
    assert!(!tcp80(&cluster, B, A));
    let names = |cluster: &Cluster| -> Vec<String> {
        cluster
            .namespaces()
            .map(|namespace| namespace.name().to_string())
            .collect()
    };
    assert_eq!(names(&cluster), ["x", "y"]);
    let _ = cluster.upsert_namespace(Namespace::new("z", Labels::new()));
    let _ = cluster.remove_namespace("y");
    assert!(tcp80(&cluster, C, A), "its pods still name it");
    let _ = cluster.remove_pod(&pod_key("y/c"));
    assert_eq!(names(&cluster), ["x", "z"]);
    let _ = cluster.remove_namespace("z");
    assert_eq!(names(&cluster), ["x"]);
}

#[test]
fn the_order_of_events_does_not_matter() {
    enum Event {
        Pod(Pod),
        Namespace(Namespace),
        Node(Node),
        Policy(NetworkPolicy),
    }
    let apply = |cluster: &mut Cluster, event: &Event| match event {
        Event::Pod(pod) => cluster.upsert_pod(pod.clone()),
        Event::Namespace(namespace) => cluster.upsert_namespace(namespace.clone()),
        Event::Node(node) => cluster.upsert_node(node.clone()),
        Event::Policy(policy) => cluster.upsert_policy(policy.clone()),
    };
    let egress =
        "{policyTypes: [Egress], egress: [{to: [{podSelector: {}}], ports: [{port: web}]}]}";
    let served = PodPort {
        name: Some("web".into()),
        number: 80,
        protocol: Protocol::Tcp,
    };
    let events = [
        Event::Pod(Pod {
            ports: vec![served],
            ..pod("x/a", A)
        }),
        Event::Pod(pod("x/b", B)),
        Event::Pod(pod("y/c", C)),
        Event::Namespace(Namespace::new("y", labels("team=blue"))),
        Event::Node(node("n1", "192.0.2.1")),
        Event::Policy(policy("x/p", FROM_C)),
        Event::Policy(policy("x/q", egress)),
    ];
    let ends = [A, B, C, "192.0.2.1", "198.51.100.1"];
    let expected = |from: &str, to: &str| match (from, to) {
        _ if from == to => true,
        (A | B, "192.0.2.1") | ("192.0.2.1", _) => true,
        (A | B, B | C | "198.51.100.1") => false,
        (C, A) => true,
        (_, A) => false,
        _ => true,
    };
    for start in 0..events.len() {
        for step in [1, 2, 3, 4, 5, 6] {
            // 7 is prime: every step visits all events.
            let mut cluster = Cluster::default();
            let mut touched = Touched::default();
            for turn in 0..events.len() {
                touched.merge(apply(
                    &mut cluster,
                    &events[(start + turn * step) % events.len()],
                ));
            }
            assert_touched(&touched, &[A, B, C]);
            for (from, to) in ends.iter().flat_map(|&from| ends.map(|to| (from, to))) {
                let found = tcp80(&cluster, from, to);
                assert_eq!(
                    found,
                    expected(from, to),
                    "{from} to {to}, {start} by {step}"
                );
            }
        }
    }
}

#[test]
fn pods_under_same_policies_share_compiled_rules() {
    let mut cluster = three_pods();
    for key in ["x/p", "x/q"] {
        let _ = cluster.upsert_policy(policy(key, "ingress: [{from: [{podSelector: {}}]}]"));
    }
    let _ = cluster.upsert_policy(policy("x/r", "ingress: []"));
    cluster.prepare(&[address(A)].into(), usize::MAX);
    let [a, b] = [A, B].map(|text| cluster.endpoint(address(text)).unwrap());
    let (a, b) = (a.ingress.as_ref().unwrap(), b.ingress.as_ref().unwrap());
    assert!(Arc::ptr_eq(a, b));
    let rules: Vec<_> = a.rules().map(|(_, rules)| rules).collect();
    assert!(
        Arc::ptr_eq(rules[0], rules[1]),
        "equal rules of two policies"
    );
    assert_eq!((a.names().len(), a.evaluated()), (3, 1));
}

#[test]
fn selector_ids_are_never_reused() {
    let mut cluster = three_pods();
    let from = |label: &str| {
        format!(
            "{{podSelector: {{matchLabels: {{pod: a}}}}, ingress: [{{from: [{{podSelector: {{matchLabels: {{{label}}}}}}}]}}]}}"
        )
    };
    let _ = cluster.upsert_policy(policy("x/p", &from("pod: b")));
    let matches = |cluster: &Cluster| cluster.endpoint(address(B)).unwrap().matches.to_vec();
    let first = matches(&cluster);
    assert_eq!(first.len(), 1);
    // Thousands of selectors come and go; the forgotten ones leave the pods too.
    for turn in 0..2_000 {
        let label = if turn % 2 == 0 {
            format!("turn: t{turn}")
        } else {
            "pod: b".to_owned()
        };
        let _ = cluster.upsert_policy(policy("x/p", &from(&label)));
        let extra = format!(
            "{{podSelector: {{}}, ingress: [{{from: [{{podSelector: {{matchExpressions: [{{key: t{turn}, operator: DoesNotExist}}]}}}}]}}]}}"
        );
        let _ = cluster.upsert_policy(policy("x/extra", &extra));
        assert!(
            tcp80(&cluster, B, A),
            "the extra policy allows it in turn {turn}"
        );
    }
    let _ = cluster.remove_policy(&policy_key("x/extra"));
    assert!(tcp80(&cluster, B, A), "the last turn was b's");
    assert!(
        matches(&cluster).len() < 600,
        "{} ids on one pod",
        matches(&cluster).len()
    );
    let _ = cluster.upsert_policy(policy("x/p", &from("pod: c")));
    assert!(!tcp80(&cluster, B, A));
}
