//! Policies that exceed the budget of their namespace.
use super::*;
use crate::budget::Resource;

const A_FROM_C: &str = "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {pod: c}}}]}]}";
const TWO_RULES: &str = "{podSelector: {matchLabels: {pod: b}}, ingress: [{from: [{namespaceSelector: {}}]}, {ports: [{port: 80}]}]}";

/// Pods x/a, x/b and y/c, with a budget of three rules for each namespace.
fn tight() -> Cluster {
    let mut cluster = Cluster::with_budget(Budget::default().with(Resource::Rules, 3));
    for (key, ip) in [("x/a", A), ("x/b", B), ("y/c", C)] {
        let _ = cluster.upsert_pod(pod(key, ip));
    }
    cluster
}

fn refused(cluster: &Cluster) -> Vec<(String, u64, u64)> {
    let refused = cluster.refused();
    refused
        .map(|(key, excess)| (key.to_string(), excess.count, excess.bound))
        .collect()
}

#[test]
fn a_policy_over_budget_isolates_and_allows_nothing() {
    let mut cluster = tight();
    let _ = cluster.upsert_policy(policy("x/1", A_FROM_C));
    assert!(tcp80(&cluster, C, A) && tcp80(&cluster, C, B));
    let _ = cluster.upsert_policy(policy("x/2", TWO_RULES));
    assert!(tcp80(&cluster, C, B), "three rules are within it");
    let before = cluster.findings_version();
    assert_touched(&cluster.upsert_policy(policy("x/3", TWO_RULES)), &[B]);
    assert_eq!(refused(&cluster), [("x/3".into(), 5, 3)]);
    assert_ne!(cluster.findings_version(), before);
    assert!(tcp80(&cluster, C, B), "what another policy allows stays so");
    let _ = cluster.remove_policy(&policy_key("x/2"));
    assert!(refused(&cluster).is_empty(), "there is room again");
    assert!(tcp80(&cluster, C, B));
    let _ = cluster.upsert_policy(policy("x/0", TWO_RULES));
    assert_eq!(
        refused(&cluster),
        [("x/3".into(), 5, 3)],
        "0 and 1 are before it"
    );
    let _ = cluster.remove_policy(&policy_key("x/0"));
    let large = "{podSelector: {matchLabels: {pod: b}}, ingress: [{}, {}, {}, {}]}";
    assert_touched(&cluster.upsert_policy(policy("x/3", large)), &[B]);
    assert!(!tcp80(&cluster, C, B), "four rules alone are too many");
    assert!(tcp80(&cluster, C, A), "the other pods are as they were");
    assert_eq!(cluster.selected_by(&policy_key("x/3")), [pod_key("x/b")]);
}

#[test]
fn a_namespace_over_budget_affects_no_other() {
    let mut cluster = tight();
    let _ = cluster.upsert_policy(policy("y/deny", "{}"));
    let large = "{ingress: [{}, {}, {}, {}]}";
    assert_touched(&cluster.upsert_policy(policy("x/large", large)), &[A, B]);
    let (from, to) = (A, C);
    assert!(!tcp80(&cluster, from, to), "y's deny stands");
    let _ = cluster.remove_policy(&policy_key("y/deny"));
    assert!(tcp80(&cluster, from, to));
    assert_eq!(refused(&cluster).len(), 1);
}

#[test]
fn the_first_surplus_policy_isolates_the_namespace() {
    let mut cluster = Cluster::with_budget(Budget::default().with(Resource::Policies, 2));
    for (key, ip) in [("x/a", A), ("x/b", B), ("y/c", C)] {
        let _ = cluster.upsert_pod(pod(key, ip));
    }
    let of =
        |pod: &str| format!("{{podSelector: {{matchLabels: {{pod: {pod}}}}}, ingress: [{{}}]}}");
    let _ = cluster.upsert_policy(policy("x/1", &of("a")));
    let _ = cluster.upsert_policy(policy("x/2", &of("none")));
    assert!(tcp80(&cluster, B, C) && tcp80(&cluster, C, B));
    for name in ["x/3", "x/4", "x/5"] {
        let _ = cluster.upsert_policy(policy(name, &of("none")));
        assert!(
            !tcp80(&cluster, C, B) && !tcp80(&cluster, B, C),
            "every pod is closed both ways"
        );
        assert!(tcp80(&cluster, C, A), "but for what is in force");
    }
    let isolating = |cluster: &Cluster, at| {
        cluster
            .endpoint(address(at))
            .unwrap()
            .isolating(Direction::Ingress)
            .to_vec()
    };
    assert_eq!(
        isolating(&cluster, B),
        [policy_key("x/3")],
        "one stands for all"
    );
    assert_eq!(refused(&cluster).len(), 3);
    let _ = cluster.remove_policy(&policy_key("x/3"));
    assert_eq!(isolating(&cluster, B), [policy_key("x/4")]);
    let _ = cluster.remove_policy(&policy_key("x/4"));
    let _ = cluster.remove_policy(&policy_key("x/5"));
    assert!(refused(&cluster).is_empty());
    assert!(tcp80(&cluster, C, B) && tcp80(&cluster, B, C));
}

#[test]
fn arrival_order_does_not_decide_policies_over_budget() {
    let names = ["x/1", "x/2", "x/3", "x/4"];
    let specs = [A_FROM_C, TWO_RULES, TWO_RULES, A_FROM_C];
    for first in 0..4 {
        for step in [1, 3] {
            let mut cluster = tight();
            for turn in 0..4 {
                let at = (first + turn * step) % 4;
                let _ = cluster.upsert_policy(policy(names[at], specs[at]));
            }
            let found: Vec<_> = refused(&cluster).into_iter().map(|it| it.0).collect();
            assert_eq!(found, ["x/3", "x/4"], "{first} by {step}");
        }
    }
}

/// Pods x/a, x/b and y/c, with two policies that count for each pod.
fn two_for_a_pod() -> Cluster {
    let mut cluster = Cluster::with_budget(Budget::default().with(Resource::OfAPod, 2));
    for (key, ip) in [("x/a", A), ("x/b", B), ("y/c", C)] {
        let _ = cluster.upsert_pod(pod(key, ip));
    }
    cluster
}

fn surplus(cluster: &Cluster) -> Vec<(String, Vec<String>)> {
    let names = |pods: &BTreeSet<PodKey>| pods.iter().map(ToString::to_string).collect();
    let surplus = cluster.surplus();
    surplus
        .map(|(key, pods)| (key.to_string(), names(pods)))
        .collect()
}

fn isolating(cluster: &Cluster, at: &str, direction: Direction) -> Vec<String> {
    let endpoint = cluster.endpoint(address(at)).unwrap();
    let names = endpoint.isolating(direction).iter();
    names.map(ToString::to_string).collect()
}

#[test]
fn policy_over_pod_limit_isolates_the_pod() {
    let from_c = "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {pod: c}}}]}]}";
    let open = "ingress: [{}]";
    let mut cluster = two_for_a_pod();
    let _ = cluster.upsert_policy(policy("x/2", from_c));
    let _ = cluster.upsert_policy(policy("x/5", "podSelector: {matchLabels: {pod: a}}"));
    assert!(tcp80(&cluster, A, C) && tcp80(&cluster, C, A) && !tcp80(&cluster, B, A));
    assert!(surplus(&cluster).is_empty());
    let before = cluster.findings_version();
    assert_touched(&cluster.upsert_policy(policy("x/7", open)), &[A, B]);
    assert_ne!(cluster.findings_version(), before);
    assert_eq!(surplus(&cluster), [("x/7".into(), vec!["x/a".into()])]);
    assert!(tcp80(&cluster, C, A), "the first two count");
    assert!(!tcp80(&cluster, B, A), "the third does not");
    assert!(!tcp80(&cluster, A, C), "and closes the other direction too");
    assert!(tcp80(&cluster, C, B), "on the other pod it counts");
    assert_eq!(isolating(&cluster, A, Direction::Egress), ["x/7"]);
    let all = cluster.selected_by(&policy_key("x/7"));
    assert_eq!(all, [pod_key("x/a"), pod_key("x/b")]);

    assert_touched(&cluster.upsert_policy(policy("x/9", open)), &[B]);
    assert_touched(&cluster.upsert_policy(policy("x/1", open)), &[A, B]);
    let outside = "198.51.100.1";
    assert!(tcp80(&cluster, outside, A), "the order of names decides");
    assert_eq!(
        isolating(&cluster, A, Direction::Ingress),
        ["x/1", "x/2", "x/5"]
    );
    assert_eq!(
        surplus(&cluster),
        [
            ("x/5".into(), vec!["x/a".into()]),
            ("x/9".into(), vec!["x/b".into()])
        ]
    );
    let _ = cluster.remove_policy(&policy_key("x/1"));
    let _ = cluster.remove_policy(&policy_key("x/2"));
    assert!(tcp80(&cluster, outside, A), "x/7 counts now");
    assert_eq!(surplus(&cluster), [("x/9".into(), vec!["x/a".into()])]);
    let _ = cluster.upsert_policy(policy("x/5", "podSelector: {matchLabels: {pod: none}}"));
    assert!(surplus(&cluster).is_empty(), "as many as count");
    assert!(tcp80(&cluster, A, C));
}

#[test]
fn a_pods_list_of_policies_is_bounded() {
    let mut cluster = two_for_a_pod();
    for number in 0..20 {
        let _ = cluster.upsert_policy(policy(&format!("x/{number:02}"), "ingress: [{}]"));
        let _ = cluster.upsert_pod(pod("x/d", "10.0.0.4"));
        let lists = cluster
            .pods
            .values()
            .map(|state| state.selection.policies());
        assert!(lists.map(<[_]>::len).max() <= Some(3), "{number}");
    }
    let toggled = policy_key("x/00");
    let first = cluster.policies[&toggled].policy.clone();
    let before = cluster.selections.made;
    for _ in 0..10 {
        let _ = cluster.remove_policy(&toggled);
        let _ = cluster.upsert_policy(first.clone());
    }
    let made = cluster.selections.made - before;
    assert!(made <= 20, "{made} selections for three pods in 20 changes");
}
