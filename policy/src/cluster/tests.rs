//! How the cluster publishes: what each event touches, and who owns an address.
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
fn a_policy_event_touches_selected_pods_and_matches_of_new_selectors() {
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
    assert_touched(&cluster.remove_policy(&policy_key("x/p")), &[B]);
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
fn a_namespace_exists_by_its_pods_with_its_name_as_label() {
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
fn an_address_belongs_to_the_pod_that_holds_it_now() {
    let mut cluster = three_pods();
    let _ = cluster.upsert_policy(policy("x/p", "podSelector: {matchLabels: {pod: a}}"));
    let owner = |cluster: &Cluster| {
        cluster
            .endpoint(address(A))
            .map(|it| it.identity.key.clone())
    };
    let finished = Pod {
        finished: true,
        ..pod("x/a", A)
    };

    assert_touched(&cluster.upsert_pod(finished.clone()), &[A]);
    assert_eq!(owner(&cluster), None, "a finished pod owns nothing");
    assert_eq!(cluster.selected_by(&policy_key("x/p")), []);
    assert!(
        cluster.pod(&pod_key("x/a")).is_some(),
        "but it is still there"
    );
    assert_touched(&cluster.upsert_pod(pod("y/d", A)), &[A]);
    assert_eq!(owner(&cluster), Some(pod_key("y/d")));
    assert!(tcp80(&cluster, B, A), "the policy was the other pod's");
    assert_touched(&cluster.remove_pod(&pod_key("x/a")), &[]);
    assert_eq!(owner(&cluster), Some(pod_key("y/d")));

    // A pod of the same name comes back with another uid and address.
    let again = Pod {
        uid: "second".into(),
        ..pod("y/d", "10.0.0.9")
    };
    assert_touched(&cluster.upsert_pod(again), &[A, "10.0.0.9"]);
    assert_eq!(owner(&cluster), None);
}

/// Only pods labelled b may talk to c; x/b gives its address to y/d, which may not.
#[test]
fn whatever_the_order_of_events_a_reused_address_is_its_new_holders() {
    let old = || pod("x/b", B);
    let new = || Pod {
        started: "2026-01-01T00:00:09Z".into(),
        ..pod("y/d", B)
    };
    let relabelled = Pod {
        labels: labels("pod=b,seen=late"),
        ..old()
    };
    let terminating = |pod: Pod| Pod {
        terminating: true,
        ..pod
    };
    let finished = Pod {
        finished: true,
        ..old()
    };
    let undated = |pod: Pod| Pod {
        started: "".into(),
        ..pod
    };
    for (events, why) in [
        (vec![old(), new()], "the old pod's end is not told yet"),
        (vec![new(), old()], "the old pod is told of late"),
        (vec![old(), new(), relabelled], "a late update of the old"),
        (
            vec![new(), terminating(old())],
            "the old pod is terminating",
        ),
        (
            vec![undated(new()), terminating(undated(old()))],
            "it is terminating, and nobody says when it started",
        ),
        (
            vec![terminating(new()), terminating(old())],
            "both terminate",
        ),
        (vec![undated(new()), finished], "it has finished"),
    ] {
        let mut cluster = three_pods();
        let _ = cluster.remove_pod(&pod_key("x/b"));
        let _ = cluster.upsert_policy(policy(
            "y/from-b",
            "{podSelector: {matchLabels: {pod: c}}, ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {pod: b}}}]}]}",
        ));
        let first = events[0].clone();
        let _ = cluster.upsert_pod(first.clone());
        assert_eq!(tcp80(&cluster, B, C), first.key == old().key, "{why}");
        for event in &events[1..] {
            let _ = cluster.upsert_pod(event.clone());
        }
        let holder = cluster.endpoint(address(B)).unwrap();
        assert_eq!(holder.identity.uid, new().uid, "{why}");
        assert!(!holder.contested(), "{why}");
        assert!(!tcp80(&cluster, B, C), "{why}");
        let held = cluster.remove_pod(&old().key);
        assert!(held.is_empty(), "the old pod's end changes nothing: {why}");
    }
}

#[test]
fn a_terminating_pod_keeps_its_policies_and_its_address_until_it_is_gone() {
    let mut cluster = three_pods();
    let _ = cluster.upsert_policy(policy("x/p", FROM_C));
    let before = cluster.endpoint(address(A));
    let terminating = Pod {
        terminating: true,
        ..pod("x/a", A)
    };
    assert!(cluster.upsert_pod(terminating).is_empty());
    assert_eq!(cluster.endpoint(address(A)), before);
    assert_touched(&cluster.remove_pod(&pod_key("x/a")), &[A]);
    assert_eq!(cluster.endpoint(address(A)), None);
}

#[test]
fn a_pod_that_comes_back_under_its_name_is_another_pod() {
    let mut cluster = three_pods();
    let again = Pod {
        uid: "second".into(),
        ..pod("x/a", A)
    };
    // Its end was not told: one event takes the other's place.
    assert_touched(&cluster.upsert_pod(again), &[A]);
    let uid = cluster.endpoint(address(A)).unwrap().identity.uid.clone();
    assert_eq!(&*uid, "second");
}

#[test]
fn host_network_pods_are_their_node() {
    let mut cluster = three_pods();
    let host = Pod {
        host_network: true,
        ..pod("x/host", "192.0.2.1")
    };
    assert!(cluster.upsert_pod(host).is_empty());
    assert!(cluster.endpoint(address("192.0.2.1")).is_none());
    let _ = cluster.upsert_policy(policy("x/p", "policyTypes: [Ingress, Egress]"));
    assert_eq!(
        cluster.selected_by(&policy_key("x/p")),
        [pod_key("x/a"), pod_key("x/b")]
    );
    assert!(!tcp80(&cluster, "192.0.2.1", A));
    assert_touched(&cluster.upsert_node(node("n1", "192.0.2.1")), &[A, B, C]);
    assert!(
        tcp80(&cluster, "192.0.2.1", A),
        "now it is known as the node that a runs on"
    );
    assert!(tcp80(&cluster, A, "192.0.2.1"));
    assert_touched(&cluster.remove_node("n1"), &[A, B, C]);
    assert!(!tcp80(&cluster, A, "192.0.2.1"));
}

#[test]
fn a_contested_address_gets_what_all_claimants_have_and_no_grant() {
    let mut cluster = three_pods();
    // Everybody may talk to a; only c may be talked to by a pod labelled b.
    let _ = cluster.upsert_policy(policy(
        "x/open",
        "{podSelector: {matchLabels: {pod: a}}, ingress: [{}]}",
    ));
    let _ = cluster.upsert_policy(policy(
        "y/from-b",
        "ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {pod: b}}}]}]",
    ));
    assert!(tcp80(&cluster, B, A) && tcp80(&cluster, B, C));

    assert_touched(&cluster.upsert_pod(pod("x/thief", B)), &[B]);
    let endpoint = cluster.endpoint(address(B)).unwrap();
    assert!(endpoint.contested());
    assert_eq!(
        endpoint.identity.key,
        pod_key("x/thief"),
        "started in the same second: the last by name"
    );
    assert_eq!(
        cluster.contested(),
        [(address(B), vec![pod_key("x/b"), pod_key("x/thief")])]
    );
    assert!(!tcp80(&cluster, B, C), "b's grant is closed to the thief");
    assert!(tcp80(&cluster, B, A), "what is open to everybody stays so");
    assert!(tcp80(&cluster, A, B), "neither claimant is isolated");

    assert_touched(&cluster.upsert_pod(pod("x/thief2", A)), &[A]);
    assert!(
        !tcp80(&cluster, C, A),
        "a is isolated, and its grants are nobody's"
    );
    let open = [policy_key("x/open")];
    assert_eq!(
        cluster
            .endpoint(address(A))
            .unwrap()
            .isolating(Direction::Ingress),
        open
    );
    let verdict = judge(
        cluster.party(address(C)),
        cluster.party(address(A)),
        Some(80),
        Protocol::Tcp,
        OwnNode::Allow,
    );
    assert_eq!(verdict.ingress.policies, open);
    assert!(
        verdict
            .reason()
            .contains("more than one running pod claims"),
        "{}",
        verdict.reason()
    );
    assert!(
        !cluster
            .endpoint(address(A))
            .unwrap()
            .isolated(Direction::Egress)
    );

    assert_touched(&cluster.remove_pod(&pod_key("x/thief")), &[B]);
    assert_touched(&cluster.remove_pod(&pod_key("x/thief2")), &[A]);
    assert!(tcp80(&cluster, B, C) && tcp80(&cluster, C, A));
    assert_eq!(cluster.contested(), []);
}

#[test]
fn a_contested_addresss_claimants_may_keep_changing() {
    let mut cluster = three_pods();
    let _ = cluster.upsert_pod(pod("y/d", A));
    let spec = "{podSelector: {matchLabels: {pod: d}}, policyTypes: [Egress], egress: [{}]}";
    assert_touched(&cluster.upsert_policy(policy("y/p", spec)), &[A]);
    assert!(
        !tcp80(&cluster, A, B),
        "the isolation of any claimant counts"
    );
    assert_touched(
        &cluster.upsert_policy(policy(
            "x/unrelated",
            "podSelector: {matchLabels: {pod: b}}",
        )),
        &[B],
    );
    assert_touched(&cluster.remove_policy(&policy_key("y/p")), &[A]);
    assert!(tcp80(&cluster, A, C));
    let elsewhere = Pod {
        node: "n2".into(),
        ..pod("y/d", A)
    };
    let _ = cluster.upsert_node(node("n1", "192.0.2.1"));
    let _ = cluster.upsert_policy(policy("x/deny", "policyTypes: [Ingress, Egress]"));
    assert!(tcp80(&cluster, "192.0.2.1", A), "both claimants run on n1");
    let _ = cluster.upsert_pod(elsewhere);
    assert!(!tcp80(&cluster, "192.0.2.1", A), "one of them does not");
}

#[test]
fn a_pod_with_two_addresses_is_one_pod() {
    let mut cluster = three_pods();
    let six = "2001:db8::1";
    let mut dual = pod("x/a", A);
    dual.addresses.extend([address(six), address(six)]);
    // What is at the first address is what it was.
    assert_touched(&cluster.upsert_pod(dual), &[six]);
    let (four, six) = (
        cluster.endpoint(address(A)).unwrap(),
        cluster.endpoint(address(six)).unwrap(),
    );
    assert!(Arc::ptr_eq(&four, &six));
    let _ = cluster.upsert_policy(policy("x/deny", "policyTypes: [Ingress, Egress]"));
    assert!(tcp80(&cluster, A, "2001:db8::1"), "a pod reaches itself");
    assert_touched(&cluster.remove_pod(&pod_key("x/a")), &[A, "2001:db8::1"]);
    assert_eq!(cluster.endpoints().count(), 2);
}

#[test]
fn pods_under_the_same_policies_share_what_was_compiled() {
    let mut cluster = three_pods();
    for key in ["x/p", "x/q"] {
        let _ = cluster.upsert_policy(policy(key, "ingress: [{from: [{podSelector: {}}]}]"));
    }
    let _ = cluster.upsert_policy(policy("x/r", "ingress: []"));
    let [a, b] = [A, B].map(|text| cluster.endpoint(address(text)).unwrap());
    let (a, b) = (a.ingress.as_ref().unwrap(), b.ingress.as_ref().unwrap());
    assert!(Arc::ptr_eq(a, b));
    assert!(
        Arc::ptr_eq(&a.rules[0], &a.rules[1]),
        "equal rules of two policies"
    );
    assert_eq!((a.policies.len(), a.distinct.len()), (3, 1));
}

#[test]
fn a_selectors_id_is_never_another_selectors() {
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
