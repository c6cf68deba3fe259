//! What goes wrong with permissions, credentials, answers, objects and the disk.
use super::*;

#[tokio::test]
async fn failed_snapshot_write_is_reported() {
    let cluster = TestCluster::new().await;
    std::fs::write(cluster.folder.path().join("state"), "a file, not a folder").expect("written");
    let mut source = cluster.source().await;
    next(&mut source).await;
    let reported = async {
        while source.status().save_error().is_none() {
            let _ = tokio::time::timeout(Duration::from_millis(5), source.next()).await;
        }
    };
    tokio::time::timeout(DEADLINE, reported)
        .await
        .expect("a report");
    let reported = source.status.save_error().expect("a report");
    assert!(reported.contains("/state/state.yaml"), "{reported}");
}

#[tokio::test]
async fn missing_permission_is_named_and_delays_first_state() {
    let cluster = TestCluster::new().await;
    cluster.api.state().refuse.insert("networkpolicies", 403);
    let mut source = cluster.source().await;
    until(&source, "refused", |status| status.outage().is_some()).await;
    let (_, why) = source.status.outage().expect("an outage");
    let line = "{apiGroups: [\"networking.k8s.io\"], resources: [\"networkpolicies\"], verbs: [\"watch\"]}";
    assert!(why.to_string().contains(line), "{why}");
    let early = tokio::time::timeout(Duration::from_millis(100), source.next()).await;
    assert!(early.is_err(), "three kinds are not the full state");
    cluster.api.state().refuse.clear();
    assert_eq!(lines(&next(&mut source).await), FULL);
}

#[tokio::test]
async fn expired_credentials_are_retried_until_valid() {
    let cluster = TestCluster::new().await;
    for resource in ["pods", "nodes", "namespaces", "networkpolicies"] {
        cluster.api.state().refuse.insert(resource, 401);
    }
    let mut source = cluster.source().await;
    until(&source, "refused", |status| {
        status
            .outage()
            .is_some_and(|(_, why)| why.cause() == "unauthorized")
    })
    .await;
    cluster.api.state().refuse.clear();
    assert_eq!(lines(&next(&mut source).await), FULL);
}

#[tokio::test]
async fn garbage_on_a_watch_loses_no_change() {
    let cluster = TestCluster::new().await;
    let mut source = cluster.source().await;
    next(&mut source).await;
    for garbage in [
        "{\"type\":\"ADDED\",\"object\":",
        "no json",
        "{\"type\":\"SUNG\"}",
        "[]",
    ] {
        cluster.api.send_raw("pods", garbage);
        cluster.api.put("pods", pod("d", 4));
        assert_eq!(lines(&next(&mut source).await), ["+Pod x/d"], "{garbage}");
        cluster.api.delete("pods", "x/d");
        assert_eq!(lines(&next(&mut source).await), ["-Pod x/d"], "{garbage}");
    }
}

#[tokio::test]
async fn unreadable_object_keeps_last_good_state_with_report() {
    let cluster = TestCluster::new().await;
    let mut source = cluster.source().await;
    next(&mut source).await;
    let mut bad = pod("a", 1);
    bad["status"]["podIP"] = "10.0.1.999".into();
    cluster.api.put("pods", bad);
    let batch = next(&mut source).await;
    assert_eq!(lines(&batch), [""; 0]);
    let problem = batch.problems.first().expect("a problem").to_string();
    assert!(problem.starts_with("Pod x/a, status.podIP: "), "{problem}");
    cluster.api.put("pods", pod("a", 9));
    let batch = next(&mut source).await;
    assert_eq!(
        (lines(&batch).as_slice(), batch.problems.len()),
        (["+Pod x/a".to_owned()].as_slice(), 0)
    );
}

#[tokio::test]
async fn policy_never_readable_isolates_its_selected_pods() {
    let cluster = TestCluster::new().await;
    cluster.api.delete("networkpolicies", "x/deny");
    let spec = json!({
        "podSelector": {"matchLabels": {"app": "a"}},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"moonPhase": "full"}]}]
    });
    cluster.api.put("networkpolicies", policy("new", spec));
    let mut source = cluster.source().await;
    let table = Table::new(TableSettings::default());
    let mut index = Index::new(Arc::clone(&table));
    index.apply(next(&mut source).await);
    let endpoint = |last: u8| {
        table
            .endpoint(format!("10.0.1.{last}").parse().expect("an address"))
            .expect("a pod")
    };
    assert!(endpoint(1).isolated(Direction::Ingress));
    assert!(!endpoint(1).isolated(Direction::Egress));
    assert!(
        !endpoint(2).isolated(Direction::Ingress),
        "it selects a alone"
    );
    let problem = table.problems().first().expect("a problem").to_string();
    assert!(
        problem.contains("NetworkPolicy x/new, spec.ingress[0].from[0]"),
        "{problem}"
    );
    assert!(problem.contains("are closed"), "{problem}");
}

#[tokio::test]
async fn policies_of_other_systems_are_found_by_discovery() {
    let cluster = TestCluster::new().await;
    cluster.api.state().others = vec![
        (
            "cilium.io/v2",
            "CiliumNetworkPolicy",
            "ciliumnetworkpolicies",
            Some(3),
        ),
        ("cilium.io/v2", "CiliumEndpoint", "ciliumendpoints", Some(3)),
        (
            "crd.antrea.io/v1beta1",
            "ClusterNetworkPolicy",
            "clusternetworkpolicies",
            Some(0),
        ),
        (
            "policy.networking.k8s.io/v1alpha1",
            "AdminNetworkPolicy",
            "adminnetworkpolicies",
            None,
        ),
        ("apps/v1", "Deployment", "deployments", Some(1)),
    ];
    let client = Connector::Plain(cluster.api.address)
        .client()
        .await
        .expect("a client");
    let found = foreign::look(&client).await.expect("an answer");
    let found: Vec<_> = found.iter().map(String::as_str).collect();
    let [cilium, admin] = found[..] else {
        panic!("{found:?}")
    };
    assert_eq!(cilium, "cilium.io/v2 CiliumNetworkPolicy");
    assert!(
        admin.starts_with("policy.networking.k8s.io/v1alpha1 AdminNetworkPolicy, if"),
        "{admin}"
    );
    assert_eq!(
        cluster.api.request_count(&["GET /apis/apps"]),
        0,
        "only groups that matter"
    );
}
