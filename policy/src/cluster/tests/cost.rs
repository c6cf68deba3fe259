//! The cost of an event, in comparisons of labels and in selections: it grows with the objects affected, not with the
//! size of the cluster.
use serde_json::json;

use super::*;
use crate::budget::Resource;
use crate::selector::asked;

/// `pods` pods, ten in each namespace, all with the label `tier: b`.
fn many_pods(pods: u32) -> Cluster {
    let mut cluster = Cluster::default();
    for number in 0..pods {
        let _ = cluster.upsert_pod(one_of_many(number));
    }
    cluster
}

fn one_of_many(number: u32) -> Pod {
    let address = std::net::Ipv4Addr::from_bits(0x0a00_0000 + number).to_string();
    let mut pod = pod(&format!("n{}/p{number}", number / 10), &address);
    pod.labels.insert("tier".into(), "b".into());
    pod
}

/// A policy that selects no pod, with these peers.
fn with_peers(key: &str, peers: impl Iterator<Item = serde_json::Value>) -> NetworkPolicy {
    let spec = json!({"podSelector": {"matchLabels": {"no": "pod"}},
        "ingress": [{"from": peers.collect::<Vec<_>>()}]});
    NetworkPolicy::new(policy_key(key), serde_json::from_value(spec).unwrap()).unwrap()
}

#[test]
fn new_selectors_check_only_pods_sharing_labels() {
    let mut cluster = many_pods(400);
    let peers = |unique: &'static str| {
        (0..500).map(move |number| {
            json!({"namespaceSelector": {}, "podSelector": {"matchLabels":
                {"tier": "b", unique: format!("u{number}")}}})
        })
    };
    let cost = asked::by(|| cluster.upsert_policy(with_peers("evil/p", peers("none"))));
    assert_eq!(cost, 0, "no pod has the label");
    let cost = asked::by(|| cluster.upsert_policy(with_peers("evil/q", peers("pod"))));
    assert_eq!(cost, 0, "no pod has these values of it");
    let cost = asked::by(|| cluster.remove_policy(&policy_key("evil/p")));
    assert_eq!(cost, 0);
    let one = (7..8).map(|n| json!({"podSelector": {"matchLabels": {"pod": format!("p{n}")}}, "namespaceSelector": {}}));
    let cost = asked::by(|| cluster.upsert_policy(with_peers("evil/r", one)));
    assert!(cost < 10, "one pod of 400 matches: {cost}");
}

#[test]
fn new_pods_check_only_selectors_of_their_labels() {
    let mut cluster = many_pods(100);
    let of_pods = (0..1000).map(|n| json!({"namespaceSelector": {}, "podSelector": {"matchLabels": {"a": format!("u{n}"), "tier": "b"}}}));
    let of_namespaces = (0..1000).map(|n| json!({"namespaceSelector": {"matchLabels": {"team": format!("t{n}")}}, "podSelector": {"matchLabels": {"tier": "b"}}}));
    let _ = cluster.upsert_policy(with_peers("evil/p", of_pods.chain(of_namespaces)));
    let own = (0..1000).map(|n| json!({"podSelector": {"matchExpressions": [{"key": format!("k{n}"), "operator": "DoesNotExist"}]}}));
    let _ = cluster.upsert_policy(with_peers("evil/q", own));
    let cost = asked::by(|| cluster.upsert_pod(one_of_many(1000)));
    assert!(cost < 10, "{cost} comparisons");
    let changed = Pod {
        uid: "another".into(),
        ..one_of_many(1000)
    };
    let cost = asked::by(|| cluster.upsert_pod(changed));
    assert!(cost < 10, "{cost} comparisons");
}

#[test]
fn selectors_matching_every_pod_are_evaluated_together() {
    let mut cluster = many_pods(1000);
    let everybody = (0..300).map(|n| {
        json!({"namespaceSelector": {}, "podSelector": {"matchLabels": {"tier": "b"},
            "matchExpressions": [{"key": format!("k{n}"), "operator": "DoesNotExist"}]}})
    });
    let cost = asked::by(|| cluster.upsert_policy(with_peers("evil/p", everybody)));
    assert_eq!(cost, 0, "not pod by pod");
    let matches = |n: u32| {
        let endpoint = cluster.endpoint(one_of_many(n).addresses[0]).unwrap();
        endpoint.matches.clone()
    };
    assert_eq!(matches(7).len(), 300);
    assert!(Arc::ptr_eq(&matches(7), &matches(999)), "one set for all");
}

#[test]
fn long_pod_selector_needs_no_per_pod_comparison() {
    let mut cluster = Cluster::with_budget(Budget::default().with(Resource::Rules, 1));
    for number in 0..10 {
        let _ = cluster.upsert_pod(one_of_many(number));
    }
    let long = |name: &str, rules: &str| {
        let absent = |n| json!({"key": format!("k{n}"), "operator": "DoesNotExist"});
        let absent: Vec<_> = (0..1000).map(absent).collect();
        let rules: serde_json::Value = serde_saphyr::from_str(rules).unwrap();
        let spec = json!({"podSelector": {"matchLabels": {"tier": "b"}, "matchExpressions": absent}, "ingress": rules});
        NetworkPolicy::new(policy_key(name), serde_json::from_value(spec).unwrap()).unwrap()
    };
    for (name, rules, why) in [
        ("n0/p", "[]", "a new policy"),
        ("n0/q", "[{}]", "another"),
        ("n0/o", "[{}]", "two that change together"),
    ] {
        let cost = asked::by(|| {
            let touched = cluster.upsert_policy(long(name, rules));
            assert_eq!(touched.addresses.len(), 10, "{why}");
        });
        assert_eq!(cost, 0, "{why}");
    }
}

#[test]
fn policies_that_change_together_select_each_pod_once() {
    let mut cluster = Cluster::with_budget(Budget::default().with(Resource::Rules, 200));
    for number in 0..10 {
        let _ = cluster.upsert_pod(one_of_many(number));
    }
    for number in 0..100 {
        let _ = cluster.upsert_policy(policy(&format!("n0/p{number}"), "ingress: [{}]"));
    }
    let large = policy("n0/a", &format!("ingress: [{}]", ["{}"; 200].join(", ")));
    for (change, refused) in [(Some(large), 100), (None, 0)] {
        let before = cluster.selections.made;
        let touched = match change {
            Some(policy) => cluster.upsert_policy(policy),
            None => cluster.remove_policy(&policy_key("n0/a")),
        };
        assert_eq!(touched.addresses.len(), 10);
        assert_eq!(cluster.refused().len(), refused);
        let made = cluster.selections.made - before;
        assert!(made <= 2, "{made} for ten pods that are selected alike");
    }
}

#[test]
fn many_edits_of_a_namespace_are_settled_once() {
    let mut cluster = Cluster::default();
    for number in 0..10 {
        let _ = cluster.upsert_pod(one_of_many(number));
    }
    let edits = |spec: Option<&str>| {
        let names = (0..40).map(|number| format!("n0/p{number}"));
        let edit = |name: String| {
            (
                policy_key(&name),
                spec.map(|spec| Arc::new(policy(&name, spec))),
            )
        };
        names.map(edit).collect::<BTreeMap<_, _>>()
    };
    for (spec, count) in [
        (Some("ingress: [{from: [{podSelector: {}}]}]"), 10),
        (Some("ingress: [{}]"), 10),
        (Some("ingress: [{}]"), 0),
        (None, 10),
        (None, 0),
    ] {
        let before = cluster.selections.made;
        let touched = cluster.change_policies(edits(spec));
        assert_eq!(touched.addresses.len(), count, "{spec:?}");
        assert!(cluster.selections.made <= before + 1, "{spec:?}");
    }
}

#[test]
fn a_change_merges_a_bounded_number_of_rules() {
    let mut cluster = Cluster::default();
    // Each pod is selected by two policies of its own, and by one with all others.
    for number in 0..10 {
        let _ = cluster.upsert_pod(one_of_many(number));
        for port in [80, 81] {
            let spec = format!(
                "{{podSelector: {{matchLabels: {{pod: p{number}}}}}, ingress: [{{ports: [{{port: {port}}}]}}]}}"
            );
            let _ = cluster.upsert_policy(policy(&format!("n0/p{number}-{port}"), &spec));
        }
    }
    let touched = cluster.upsert_policy(policy("n0/all", "ingress: [{ports: [{port: 82}]}]"));
    assert_eq!(touched.addresses.len(), 10);
    // Three lists with an entry each: the second pod's exceed it.
    cluster.prepare(&touched.addresses, 7);
    let evaluated = touched.addresses.iter().map(|address| {
        let endpoint = cluster.endpoint(*address).unwrap();
        endpoint.ingress.as_ref().unwrap().evaluated()
    });
    let evaluated: Vec<usize> = evaluated.collect();
    assert_eq!(evaluated, [0, 0, 3, 3, 3, 3, 3, 3, 3, 3]);
    let addresses: Vec<_> = touched.addresses.iter().map(ToString::to_string).collect();
    for to in &addresses {
        assert!(tcp80(&cluster, "192.0.2.1", to), "{to}");
    }
}
