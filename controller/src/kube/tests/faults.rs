//! What goes wrong with permissions, credentials, answers, objects and the disk.
use super::*;

#[tokio::test]
async fn failed_snapshot_write_is_reported() {
    let bed = Bed::new().await;
    std::fs::write(bed.folder.path().join("state"), "a file, not a folder").expect("written");
    let mut source = bed.source().await;
    next(&mut source).await;
    let said = async {
        while source.status().unkept().is_none() {
            let _ = tokio::time::timeout(Duration::from_millis(5), source.next()).await;
        }
    };
    tokio::time::timeout(DEADLINE, said)
        .await
        .expect("it is said");
    let said = source.status.unkept().expect("said");
    assert!(said.contains("/state/state.yaml"), "{said}");
}

#[tokio::test]
async fn missing_permission_is_named_and_delays_first_state() {
    let bed = Bed::new().await;
    bed.api.world().refuse.insert("networkpolicies", 403);
    let mut source = bed.source().await;
    until(&source, "refused", |status| status.away().is_some()).await;
    let (_, why) = source.status.away().expect("away");
    let line = "{apiGroups: [\"networking.k8s.io\"], resources: [\"networkpolicies\"], verbs: [\"watch\"]}";
    assert!(why.to_string().contains(line), "{why}");
    let early = tokio::time::timeout(Duration::from_millis(100), source.next()).await;
    assert!(early.is_err(), "three kinds are not the full state");
    bed.api.world().refuse.clear();
    assert_eq!(lines(&next(&mut source).await), FULL);
}

#[tokio::test]
async fn expired_credentials_are_retried_until_valid() {
    let bed = Bed::new().await;
    for resource in ["pods", "nodes", "namespaces", "networkpolicies"] {
        bed.api.world().refuse.insert(resource, 401);
    }
    let mut source = bed.source().await;
    until(&source, "refused", |status| {
        status
            .away()
            .is_some_and(|(_, why)| why.cause() == "unauthorized")
    })
    .await;
    bed.api.world().refuse.clear();
    assert_eq!(lines(&next(&mut source).await), FULL);
}

#[tokio::test]
async fn garbage_on_a_watch_loses_no_change() {
    let bed = Bed::new().await;
    let mut source = bed.source().await;
    next(&mut source).await;
    for garbage in [
        "{\"type\":\"ADDED\",\"object\":",
        "no json",
        "{\"type\":\"SUNG\"}",
        "[]",
    ] {
        bed.api.babble("pods", garbage);
        bed.api.put("pods", pod("d", 4));
        assert_eq!(lines(&next(&mut source).await), ["+Pod x/d"], "{garbage}");
        bed.api.delete("pods", "x/d");
        assert_eq!(lines(&next(&mut source).await), ["-Pod x/d"], "{garbage}");
    }
}

#[tokio::test]
async fn unreadable_object_keeps_last_good_state_with_report() {
    let bed = Bed::new().await;
    let mut source = bed.source().await;
    next(&mut source).await;
    let mut bad = pod("a", 1);
    bad["status"]["podIP"] = "10.0.1.999".into();
    bed.api.put("pods", bad);
    let batch = next(&mut source).await;
    assert_eq!(lines(&batch), [""; 0]);
    let told = batch.problems.first().expect("a problem").to_string();
    assert!(told.starts_with("Pod x/a, status.podIP: "), "{told}");
    bed.api.put("pods", pod("a", 9));
    let batch = next(&mut source).await;
    assert_eq!(
        (lines(&batch).as_slice(), batch.problems.len()),
        (["+Pod x/a".to_owned()].as_slice(), 0)
    );
}

#[tokio::test]
async fn policy_never_readable_isolates_its_selected_pods() {
    let bed = Bed::new().await;
    bed.api.delete("networkpolicies", "x/deny");
    let spec = json!({
        "podSelector": {"matchLabels": {"app": "a"}},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"moonPhase": "full"}]}]
    });
    bed.api.put("networkpolicies", policy("new", spec));
    let mut source = bed.source().await;
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
    let told = table.problems().first().expect("a problem").to_string();
    assert!(
        told.contains("NetworkPolicy x/new, spec.ingress[0].from[0]"),
        "{told}"
    );
    assert!(told.contains("are closed"), "{told}");
}

#[tokio::test]
async fn policies_of_other_systems_are_found_by_discovery() {
    let bed = Bed::new().await;
    bed.api.world().others = vec![
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
    let client = Connector::Plain(bed.api.address)
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
        bed.api.asked(&["GET /apis/apps"]),
        0,
        "only groups that matter"
    );
}
