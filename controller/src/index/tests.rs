//! Batches in, generations and findings out.

use policy::{Labels, PolicyKey, Protocol};

use super::*;
use crate::testing::{self, ip};
use crate::{LocalPod, TableSettings};

fn pod(name: &str, address: &str) -> policy::Pod {
    policy::Pod {
        labels: Labels::from([("pod".into(), name.into())]),
        ..testing::pod(name, address)
    }
}

fn node() -> Object {
    Object::Node(policy::Node {
        name: "n1".into(),
        addresses: vec![ip("192.168.0.1"), ip("10.0.0.1")],
        pod_cidrs: vec![
            "10.0.0.0/24".parse().unwrap(),
            "10.0.1.0/24".parse().unwrap(),
        ],
    })
}

fn deny_all() -> Object {
    let key = PolicyKey {
        namespace: "x".into(),
        name: "deny".into(),
    };
    let spec = policy::v1::NetworkPolicySpec::default();
    Object::from(policy::NetworkPolicy::new(key, spec).unwrap())
}

/// A pod with too many labels.
fn oversized(name: &str, address: &str) -> Object {
    let mut pod = pod(name, address);
    pod.labels = (0..=policy::Pod::LABELS)
        .map(|number| (number.to_string().into(), "".into()))
        .collect();
    Object::from(pod.bounded())
}

#[test]
fn oversized_pods_of_a_namespace_are_one_problem() {
    let (table, mut index) = setup();
    index.apply(batch([node(), oversized("a", "10.0.0.2")]));
    index.apply(batch([oversized("b", "10.0.0.3")]));
    let problems = table.problems();
    let [problem] = &problems[..] else {
        panic!("{problems:?}")
    };
    let text = problem.to_string();
    assert!(
        text.starts_with("Pod x/a: has more than 256 labels"),
        "{text}"
    );
    assert!(text.contains("and so do 1 more pods"), "{text}");
    index.apply(batch(
        [pod("a", "10.0.0.2"), pod("b", "10.0.0.3")].map(Object::from),
    ));
    assert!(table.problems().is_empty());
}

fn batch(objects: impl IntoIterator<Item = Object>) -> Batch {
    Batch {
        events: objects.into_iter().map(Event::Upsert).collect(),
        ..Batch::default()
    }
}

fn setup() -> (Arc<Table>, Index) {
    let table = Table::new(TableSettings::default());
    let index = Index::new(Arc::clone(&table));
    (table, index)
}

fn settled(table: &Table, from: &str, to: &str) -> Option<bool> {
    let decided = table.decide(ip(from), ip(to), Some(80), Protocol::Tcp);
    Some(decided.ok()?.verdict.allowed())
}

#[test]
fn batch_becomes_one_generation_and_notifies_listeners() {
    let (table, mut index) = setup();
    let mut changed = table.changed();
    assert_eq!(table.generation(), 0);
    assert!(!changed.has_changed().unwrap());

    let touched = index.apply(batch([
        node(),
        Object::from(pod("a", "10.0.0.2")),
        Object::from(pod("b", "10.0.0.3")),
    ]));
    assert_eq!(touched, [ip("10.0.0.2"), ip("10.0.0.3")].into());
    assert_eq!(*changed.borrow_and_update(), 1);
    assert_eq!(settled(&table, "10.0.0.2", "10.0.0.3"), Some(true));

    index.apply(batch([deny_all()]));
    assert_eq!(*changed.borrow_and_update(), 2);
    assert_eq!(settled(&table, "10.0.0.2", "10.0.0.3"), Some(false));

    let problems = Arc::new(vec![Problem::error("p", "r")]);
    index.apply(Batch {
        events: Vec::new(),
        problems: Arc::clone(&problems),
    });
    assert_eq!(table.problems(), problems);
    assert!(
        !changed.has_changed().unwrap(),
        "a problem alone changes no verdict"
    );

    let touched = index.apply(Batch {
        events: vec![Event::Delete(ObjectKey::NetworkPolicy(PolicyKey {
            namespace: "x".into(),
            name: "deny".into(),
        }))],
        ..Batch::default()
    });
    assert_eq!(touched.len(), 2);
    assert_eq!(settled(&table, "10.0.0.2", "10.0.0.3"), Some(true));
}

#[test]
fn an_empty_first_batch_is_a_generation_too() {
    let (table, mut index) = setup();
    index.apply(Batch::default());
    assert_eq!(table.generation(), 1);
    index.apply(Batch::default());
    assert_eq!(table.generation(), 1);
}

#[test]
fn unowned_cluster_address_is_unknown() {
    let cases = |table: &Table| {
        [
            ("10.0.0.2", "10.0.0.9"),
            ("10.0.1.255", "10.0.0.2"),
            ("10.0.0.8", "10.0.0.9"),
            ("10.0.0.2", "10.0.0.1"),
            ("10.0.0.2", "10.0.2.0"),
            ("9.255.255.255", "10.0.0.2"),
            ("192.168.0.1", "10.0.0.2"),
            ("10.0.0.2", "fd00::1"),
        ]
        .map(|(from, to)| {
            let decided = table.decide(ip(from), ip(to), None, Protocol::Tcp);
            decided.err().map(|unknown| unknown.0.to_string())
        })
    };
    let known = |text: &str| Some(text.to_owned());
    let (table, mut index) = setup();
    index.apply(batch([node(), Object::from(pod("a", "10.0.0.2"))]));
    assert_eq!(
        cases(&table),
        [
            known("10.0.0.9"),
            known("10.0.1.255"),
            known("10.0.0.8"),
            None,
            None,
            None,
            None,
            None
        ]
    );

    let settings = TableSettings {
        cluster_cidrs: vec!["10.0.2.0/24".parse().unwrap(), "fd00::/16".parse().unwrap()],
        ..TableSettings::default()
    };
    let table = Table::new(settings);
    Index::new(Arc::clone(&table)).apply(batch([node(), Object::from(pod("a", "10.0.0.2"))]));
    assert_eq!(
        cases(&table),
        [
            None,
            None,
            None,
            None,
            known("10.0.2.0"),
            None,
            None,
            known("fd00::1")
        ]
    );
}

#[test]
fn node_pods_are_listed_with_their_isolating_policies() {
    let (table, mut index) = setup();
    let elsewhere = policy::Pod {
        node: "n2".into(),
        ..pod("c", "10.0.0.4")
    };
    let on_host = policy::Pod {
        host_network: true,
        ..pod("d", "192.168.0.1")
    };
    let ended = policy::Pod {
        finished: true,
        ..pod("e", "10.0.0.5")
    };
    let pods = [
        pod("b", "10.0.0.3"),
        pod("a", "10.0.0.2"),
        elsewhere,
        on_host,
        ended,
    ];
    index.apply(batch(
        pods.map(Object::from).into_iter().chain([deny_all()]),
    ));
    let local = table.local("n1");
    let shown = |pod: &LocalPod| {
        (
            pod.identity.key.to_string(),
            pod.address.to_string(),
            [pod.ingress_isolated, pod.egress_isolated, pod.vacant],
        )
    };
    let expected = |name: &str, address: &str| (name.into(), address.into(), [true, false, false]);
    assert_eq!(
        local.iter().map(shown).collect::<Vec<_>>(),
        [expected("x/a", "10.0.0.2"), expected("x/b", "10.0.0.3")]
    );
    assert_eq!(table.local("n3"), []);
    assert_eq!(table.node_pod_cidrs("n1"), []);

    index.apply(batch([node()]));
    assert_eq!(table.node_pod_cidrs("n1").len(), 2);
    assert_eq!(table.node_addresses("n1").len(), 2);
}

#[test]
fn policies_are_listed_with_their_selected_pods() {
    let (table, mut index) = setup();
    index.apply(batch([
        Object::from(pod("b", "10.0.0.3")),
        Object::from(pod("a", "10.0.0.2")),
        deny_all(),
    ]));
    let listed = serde_json::to_value(table.policies()).unwrap();
    let expected = serde_json::json!([
        {"policy": "x/deny", "ingress": true, "egress": false, "pods": ["x/a", "x/b"]}
    ]);
    assert_eq!(listed, expected);
}

#[test]
fn contested_address_is_reported_until_resolved() {
    let (table, mut index) = setup();
    index.apply(batch([
        Object::from(pod("a", "10.0.0.2")),
        Object::from(pod("b", "10.0.0.2")),
    ]));
    let [problem] = &table.problems()[..] else {
        panic!("{:?}", table.problems())
    };
    assert!(
        problem
            .problem
            .starts_with("10.0.0.2 is claimed by pod x/a, pod x/b: it is not known"),
        "{problem}"
    );
    assert!(table.endpoint(ip("10.0.0.2")).unwrap().contested());

    let ended = policy::Pod {
        finished: true,
        ..pod("a", "10.0.0.2")
    };
    index.apply(batch([Object::from(ended)]));
    assert_eq!(*table.problems(), []);
    assert_eq!(
        &*table.endpoint(ip("10.0.0.2")).unwrap().identity.key.name,
        "b"
    );
}

#[test]
fn policy_selecting_host_network_pod_gives_warning() {
    let (table, mut index) = setup();
    let on_host = |name| {
        Object::from(policy::Pod {
            host_network: true,
            ..pod(name, "192.168.0.1")
        })
    };
    index.apply(batch([on_host("a"), on_host("b"), deny_all()]));
    let [problem] = &table.problems()[..] else {
        panic!("{:?}", table.problems())
    };
    assert_eq!(problem.object.as_deref(), Some("NetworkPolicy x/deny"));
    assert!(
        problem.problem.starts_with("selects x/a and 1 more"),
        "{problem}"
    );
}

#[test]
fn policy_over_budget_names_field_count_and_remedy() {
    let (table, mut index) = setup();
    let large = |rules: usize| {
        let key = PolicyKey {
            namespace: "x".into(),
            name: "large".into(),
        };
        let rules = vec![serde_json::json!({"ports": [{"port": 80}]}); rules];
        let spec = serde_json::json!({"podSelector": {}, "ingress": rules});
        let spec = serde_json::from_value(spec).unwrap();
        Object::from(policy::NetworkPolicy::new(key, spec).unwrap())
    };
    let pods = [pod("a", "10.0.0.2"), pod("b", "10.0.0.3")].map(Object::from);
    index.apply(batch(pods.into_iter().chain([large(50_001)])));
    assert_eq!(settled(&table, "10.0.0.2", "10.0.0.3"), Some(false));
    let [problem] = &table.problems()[..] else {
        panic!("{:?}", table.problems())
    };
    assert_eq!(
        problem.to_string(),
        "NetworkPolicy x/large, spec: it has 50001 rules, and a namespace may have 50000: \
         it isolates the pods that it selects and allows nothing; make it smaller, or \
         delete another policy of the namespace; it comes into force as soon as there is room"
    );
    assert_eq!(problem.severity, crate::Severity::Error);
    assert_eq!(table.refused(), 1);
    index.apply(batch([large(50_000)]));
    assert_eq!(settled(&table, "10.0.0.2", "10.0.0.3"), Some(true));
    assert_eq!((table.refused(), table.problems().len()), (0, 0));
}

#[test]
fn only_first_policies_over_budget_are_named() {
    let (table, mut index) = setup();
    let many = (0..2_030).map(|number| {
        let key = PolicyKey {
            namespace: "x".into(),
            name: format!("p{number:04}").into(),
        };
        let spec = policy::v1::NetworkPolicySpec::default();
        Object::from(policy::NetworkPolicy::new(key, spec).unwrap())
    });
    index.apply(batch(many));
    let problems = table.problems();
    assert_eq!((table.refused(), problems.len()), (30, 21));
    assert!(problems[0].to_string().starts_with(
        "NetworkPolicy x/p2000, metadata.namespace: it is number 2001 of the namespace's policies"
    ));
    assert!(
        problems[20]
            .to_string()
            .starts_with("Namespace x: 10 more policies")
    );
}

#[test]
fn policy_over_pod_limit_is_named() {
    let (table, mut index) = setup();
    let all = |number: usize| {
        let key = PolicyKey {
            namespace: "x".into(),
            name: format!("p{number:04}").into(),
        };
        let spec = serde_json::from_value(serde_json::json!({"ingress": [{}]})).unwrap();
        Object::from(policy::NetworkPolicy::new(key, spec).unwrap())
    };
    let pods = [pod("a", "10.0.0.2"), pod("b", "10.0.0.3")].map(Object::from);
    index.apply(batch(pods.into_iter().chain((0..502).map(all))));
    let [problem] = &table.problems()[..] else {
        panic!("{:?}", table.problems())
    };
    assert_eq!(
        problem.to_string(),
        "NetworkPolicy x/p0500, spec.podSelector: 500 policies whose names come before select x/a and 1 more too, and no \
         more count for a pod: it isolates the pod in both directions and allows nothing there, for the policies that \
         follow too; select fewer pods, or merge policies; it comes into force there as soon as there is room"
    );
    assert_eq!(table.refused(), 1);
    assert_eq!(
        settled(&table, "10.0.0.2", "10.0.0.3"),
        Some(false),
        "egress is closed"
    );
}
