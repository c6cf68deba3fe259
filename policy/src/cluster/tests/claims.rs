//! The rights and policies of a pod whose address another pod claims.
use super::*;

/// A node whose pods have addresses of this CIDR.
fn home(name: &str, cidr: &str) -> Node {
    Node {
        pod_cidrs: vec![cidr.parse().unwrap()],
        ..node(name, "192.0.2.1")
    }
}

/// x/a at A on n1 is isolated in both directions, and c may connect to it; y/ghost on n2, without
/// policy, claims A.
fn haunted(a: Pod, ghost: Pod, nodes: &[Node]) -> Cluster {
    let mut cluster = three_pods();
    for node in nodes {
        let _ = cluster.upsert_node(node.clone());
    }
    let _ = cluster.upsert_policy(policy(
        "x/a",
        "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress, Egress], ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {pod: c}}}]}]}",
    ));
    let _ = cluster.upsert_pod(a);
    let _ = cluster.upsert_pod(ghost);
    cluster
}

#[test]
fn claiming_an_isolated_pods_address_opens_nothing() {
    let a = || pod("x/a", A);
    let ghost = |started: &str| Pod {
        node: "n2".into(),
        started: started.into(),
        ..pod("y/ghost", A)
    };
    let terminating = |pod: Pod| Pod {
        terminating: true,
        ..pod
    };
    let (earlier, same, later) = (
        "2025-01-01T00:00:00Z",
        "2026-01-01T00:00:00Z",
        "2027-01-01T00:00:00Z",
    );
    let at_home = [home("n1", "10.0.0.0/24"), home("n2", "10.0.1.0/24")];
    let at_both = [home("n1", "10.0.0.0/24"), home("n2", "10.0.0.0/24")];
    let unknown = [];
    // The last column: whether the rules for a still count.
    for (a, ghost, nodes, granted, why) in [
        (
            a(),
            ghost(later),
            &at_home[..],
            true,
            "only n1 has the address",
        ),
        (a(), ghost(same), &at_home, true, "the same start"),
        (a(), ghost(later), &at_both, false, "both nodes have it"),
        (
            a(),
            ghost(same),
            &at_both,
            false,
            "both, and the same start",
        ),
        (a(), ghost(earlier), &at_both, true, "an older pod"),
        (a(), ghost(later), &unknown, false, "no node has it"),
        (
            a(),
            ghost(""),
            &unknown,
            false,
            "nobody says when it started",
        ),
        (
            terminating(a()),
            ghost(earlier),
            &at_home,
            false,
            "a terminates",
        ),
        (
            terminating(a()),
            terminating(ghost(later)),
            &at_both,
            false,
            "both terminate",
        ),
    ] {
        let cluster = haunted(a, ghost, nodes);
        assert!(!tcp80(&cluster, B, A), "ingress: {why}");
        assert!(!tcp80(&cluster, A, B), "egress: {why}");
        assert_eq!(tcp80(&cluster, C, A), granted, "{why}");
        let claims: Vec<Claim> = cluster.claims().collect();
        let [claim] = &claims[..] else {
            panic!("{why}: {claims:?}")
        };
        assert_eq!(claim.pods, [pod_key("x/a"), pod_key("y/ghost")], "{why}");
    }
}

#[test]
fn policy_of_another_claimant_opens_nothing() {
    let ghost = Pod {
        started: "2027-01-01T00:00:00Z".into(),
        addresses: vec![address("10.0.0.9"), address(A)],
        ..pod("y/ghost", A)
    };
    let open = "{podSelector: {matchLabels: {pod: ghost}}, policyTypes: [Ingress, Egress], ingress: [{}], egress: [{}]}";
    let terminating = Pod {
        terminating: true,
        ..pod("x/a", A)
    };
    for (a, node, why) in [
        (pod("x/a", A), "n1", "on the same node"),
        (terminating, "n2", "on another, while a terminates"),
    ] {
        let ghost = Pod {
            node: node.into(),
            ..ghost.clone()
        };
        let mut cluster = haunted(a, ghost, &[home("n1", "10.0.0.0/24")]);
        let _ = cluster.upsert_policy(policy("y/open", open));
        assert!(!tcp80(&cluster, B, A), "ingress: {why}");
        assert!(!tcp80(&cluster, A, B), "egress: {why}");
        assert!(!tcp80(&cluster, "10.0.0.9", A), "to itself: {why}");
        let _ = cluster.remove_pod(&pod_key("x/a"));
        assert!(tcp80(&cluster, B, A), "nobody else claims it: {why}");
    }
    let own = |name: &str| Pod {
        started: "2027-01-01T00:00:00Z".into(),
        ..pod(name, A)
    };
    let mut cluster = haunted(pod("x/a", A), own("x/ghost"), &[]);
    let _ = cluster.upsert_policy(policy("x/open", open));
    assert!(tcp80(&cluster, B, A), "the next pod of the same namespace");
}

#[test]
fn a_foreign_claim_gains_no_node_exemption() {
    let ghost = Pod {
        node: "n2".into(),
        started: "2027-01-01T00:00:00Z".into(),
        ..pod("y/ghost", A)
    };
    let nodes = [node("n1", "192.0.2.1"), node("n2", "192.0.2.2")];
    let cluster = haunted(pod("x/a", A), ghost, &nodes);
    assert!(!tcp80(&cluster, "192.0.2.2", A), "n2 is not the node of a");
}

#[test]
fn pods_with_a_nodes_address_keep_only_policies() {
    let mut cluster = three_pods();
    let _ = cluster.upsert_policy(policy(
        "y/from-b",
        "ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {pod: b}}}]}]",
    ));
    let _ = cluster.upsert_policy(policy("x/b", "podSelector: {matchLabels: {pod: b}}"));
    assert!(tcp80(&cluster, B, C) && !tcp80(&cluster, C, B));
    assert_touched(&cluster.upsert_node(node("n9", B)), &[B]);
    assert!(!tcp80(&cluster, B, C), "the node has no rights of the pod");
    assert!(!tcp80(&cluster, C, B), "the pod keeps its policies");
    let claim = cluster.claims().next().unwrap();
    assert_eq!((&claim.nodes[..], claim.holder), (&["n9".into()][..], None));
    let at_home = cluster.upsert_node(home("n1", "10.0.0.0/24"));
    assert_touched(&at_home, &[A, B, C]);
    assert!(tcp80(&cluster, B, C), "its node has the address");
    assert_touched(&cluster.remove_node("n1"), &[A, B, C]);
    assert!(!tcp80(&cluster, B, C));
    assert_touched(&cluster.remove_node("n9"), &[B]);
    assert!(tcp80(&cluster, B, C));
    assert_eq!(cluster.claims().count(), 0);
}
