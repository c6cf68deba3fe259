//! Address owners: reused and contested addresses, those of nodes, and pods with two.
use super::*;

#[test]
fn address_belongs_to_its_current_pod() {
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
fn reused_address_follows_new_pod_in_any_order() {
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
        (vec![old(), new()], "the old pod's end is not known yet"),
        (vec![new(), old()], "the old pod's event comes late"),
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
fn terminating_pod_keeps_policies_and_address_until_deleted() {
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
fn recreated_pod_of_same_name_is_another_pod() {
    let mut cluster = three_pods();
    let again = Pod {
        uid: "second".into(),
        ..pod("x/a", A)
    };
    // No event reported its deletion: the new pod replaces it in one event.
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
fn contested_address_gets_isolation_but_no_grants() {
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
fn claimants_of_contested_address_may_keep_changing() {
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
    let _ = cluster.upsert_node(Node {
        pod_cidrs: Vec::new(),
        ..node("n1", "192.0.2.1")
    });
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
    // The endpoint at the first address is unchanged.
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
