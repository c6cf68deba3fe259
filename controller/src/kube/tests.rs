//! The source with an API server that fails in all the ways of a real one, and more.
mod faults;
mod server;

use std::collections::BTreeSet;
use std::time::Duration;

use policy::Direction;
use serde_json::{Value, json};
use tempfile::TempDir;

use self::server::Api;
use super::*;
use crate::{Event, Index, Object, Table, TableSettings};

const DEADLINE: Duration = Duration::from_secs(20);

/// An API server with a small cluster, and where to keep its state.
struct TestCluster {
    api: Api,
    folder: TempDir,
}

impl TestCluster {
    async fn new() -> Self {
        let api = Api::start().await;
        api.put("nodes", node());
        api.put("namespaces", json!({"metadata": {"name": "x"}}));
        for (name, last) in [("a", 1), ("b", 2), ("c", 3)] {
            api.put("pods", pod(name, last));
        }
        api.put(
            "networkpolicies",
            policy("deny", json!({"podSelector": {}})),
        );
        Self {
            api,
            folder: TempDir::new().expect("a folder"),
        }
    }

    fn settings(&self) -> KubeSettings {
        KubeSettings {
            node: "n1".to_owned(),
            state_dir: self.folder.path().join("state"),
            state_max_age: Duration::from_secs(3600),
        }
    }

    async fn source(&self) -> KubeSource {
        self.source_with(timeouts()).await
    }

    async fn source_with(&self, timeouts: Timeouts) -> KubeSource {
        let connector = Connector::Plain(self.api.address);
        let source = KubeSource::start_with(self.settings(), connector, timeouts).await;
        let mut source = source.expect("a configuration");
        // A slow machine must not make a test take what is on disk.
        source.fall_back = None;
        source
    }
}

fn timeouts() -> Timeouts {
    Timeouts {
        retry: (Duration::from_millis(5), Duration::from_millis(50)),
        resume: Duration::from_secs(60),
        answer: Duration::from_secs(10),
        watch: Duration::from_secs(60),
    }
}

fn node() -> Value {
    json!({"metadata": {"name": "n1"}, "spec": {"podCIDR": "10.0.1.0/24"}})
}

fn pod(name: &str, last: u8) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "x", "uid": name, "labels": {"app": name}},
        "spec": {"nodeName": "n1", "containers": [{"name": "c"}]},
        "status": {"phase": "Running", "podIP": format!("10.0.1.{last}")}
    })
}

fn policy(name: &str, spec: Value) -> Value {
    let metadata = json!({"name": name, "namespace": "x", "uid": name});
    json!({"metadata": metadata, "spec": spec})
}

async fn next(source: &mut KubeSource) -> Batch {
    tokio::time::timeout(DEADLINE, source.next())
        .await
        .expect("a batch within the deadline")
}

/// What a batch does, a line an event, sorted.
fn lines(batch: &Batch) -> Vec<String> {
    let lines: BTreeSet<String> = batch
        .events
        .iter()
        .map(|event| match event {
            Event::Upsert(object) => format!("+{}", object.key()),
            Event::Delete(key) => format!("-{key}"),
        })
        .collect();
    lines.into_iter().collect()
}

const FULL: [&str; 6] = [
    "+Namespace x",
    "+NetworkPolicy x/deny",
    "+Node n1",
    "+Pod x/a",
    "+Pod x/b",
    "+Pod x/c",
];

/// Waits until the watches say so.
async fn until(source: &KubeSource, what: &str, holds: impl Fn(&WatchStatus) -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds(&source.status) {
        assert!(Instant::now() < deadline, "{what}: {:?}", source.status);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn all_connected(status: &WatchStatus) -> bool {
    status.kinds().iter().all(|kind| kind.connected)
}

#[tokio::test]
async fn first_batch_has_all_four_kinds_in_full() {
    for streams in [Some(true), Some(false)] {
        let cluster = TestCluster::new().await;
        cluster.api.state().streams = streams;
        let mut source = cluster.source().await;
        assert_eq!(lines(&next(&mut source).await), FULL, "{streams:?}");
        assert!(all_connected(&source.status));
        assert!(source.status.kinds().iter().all(|kind| kind.lists == 1));
    }
}

#[tokio::test]
async fn server_without_streaming_lists_is_paged() {
    let cluster = TestCluster::new().await;
    cluster.api.state().streams = None;
    let answer = Duration::from_millis(100);
    let mut source = cluster
        .source_with(Timeouts {
            answer,
            ..timeouts()
        })
        .await;
    assert_eq!(lines(&next(&mut source).await), FULL);
    assert!(
        cluster.api.request_count(&["/pods", "continue="]) > 0,
        "pods come in two pages"
    );
}

#[tokio::test]
async fn a_failed_list_stream_falls_back_to_pages() {
    for code in [400, 404, 410, 422, 429, 500, 503] {
        let cluster = TestCluster::new().await;
        cluster.api.state().streams = Some(false);
        cluster.api.state().stream_refusal = code;
        let mut source = cluster.source().await;
        assert_eq!(lines(&next(&mut source).await), FULL, "{code}");
        assert!(source.status.outage().is_none(), "{code}");
        assert!(
            cluster.api.request_count(&["/pods", "continue="]) > 0,
            "{code}"
        );
    }
}

#[tokio::test]
async fn an_outage_is_reported_by_the_paged_list() {
    let cluster = TestCluster::new().await;
    cluster.api.state().refuse.insert("pods", 500);
    let mut source = cluster.source().await;
    until(&source, "outage", |status| status.outage().is_some()).await;
    assert!(cluster.api.request_count(&["/pods", "limit="]) > 0);
    cluster.api.state().refuse.clear();
    assert_eq!(lines(&next(&mut source).await), FULL);
    assert!(
        cluster.api.request_count(&["/pods", "sendInitialEvents"]) > 1,
        "it is tried again"
    );
}

#[tokio::test]
async fn a_cluster_is_listed_once_without_a_watch() {
    let cluster = TestCluster::new().await;
    let unreadable = json!({"podSelector": {}, "policyTypes": ["Sideways"]});
    cluster
        .api
        .put("networkpolicies", policy("bad", unreadable));
    let connector = Connector::Plain(cluster.api.address);
    let loaded = load::load_by(&connector, DEADLINE).await.expect("a list");
    assert_eq!(loaded.cluster.pods().count(), 3);
    let [problem] = &loaded.problems[..] else {
        panic!("{:?}", loaded.problems)
    };
    assert_eq!(problem.object.as_deref(), Some("NetworkPolicy x/bad"));
    assert!(
        cluster.api.request_count(&["/pods", "continue="]) > 0,
        "pods come in two pages"
    );
    assert_eq!(cluster.api.request_count(&["watch="]), 0);
    cluster.api.state().refuse.insert("nodes", 403);
    let error = load::load_by(&connector, DEADLINE).await.expect_err("403");
    assert_eq!(error.cause(), "forbidden");
}

#[tokio::test]
async fn only_relevant_changes_arrive_one_by_one() {
    let cluster = TestCluster::new().await;
    let mut source = cluster.source().await;
    next(&mut source).await;
    cluster.api.put("pods", pod("d", 4));
    assert_eq!(lines(&next(&mut source).await), ["+Pod x/d"]);
    let mut same = pod("d", 4);
    same["status"]["conditions"] = json!([{"type": "Ready"}]);
    same["metadata"]["annotations"] = json!({"seen": "now"});
    cluster.api.put("pods", same);
    cluster.api.delete("pods", "x/a");
    assert_eq!(lines(&next(&mut source).await), ["-Pod x/a"]);
    cluster.api.put(
        "namespaces",
        json!({"metadata": {"name": "x", "labels": {"team": "t"}}}),
    );
    assert_eq!(lines(&next(&mut source).await), ["+Namespace x"]);
}

#[tokio::test]
async fn broken_watch_resumes_without_a_list() {
    let cluster = TestCluster::new().await;
    let mut source = cluster.source().await;
    next(&mut source).await;
    cluster.api.cut();
    cluster.api.put("pods", pod("d", 4));
    assert_eq!(lines(&next(&mut source).await), ["+Pod x/d"]);
    assert!(
        source.status.kinds().iter().all(|kind| kind.lists == 1),
        "nothing is listed again"
    );
}

#[tokio::test]
async fn changes_during_an_outage_arrive_in_one_batch() {
    let cluster = TestCluster::new().await;
    let mut source = cluster
        .source_with(Timeouts {
            resume: Duration::ZERO,
            ..timeouts()
        })
        .await;
    next(&mut source).await;
    cluster.api.set_up(false);
    until(&source, "outage", |status| status.outage().is_some()).await;
    cluster.api.delete("pods", "x/a");
    cluster.api.put("pods", pod("d", 4));
    cluster.api.delete("networkpolicies", "x/deny");
    cluster.api.put(
        "networkpolicies",
        policy("other", json!({"podSelector": {}})),
    );
    cluster.api.set_up(true);
    let expected = [
        "+NetworkPolicy x/other",
        "+Pod x/d",
        "-NetworkPolicy x/deny",
        "-Pod x/a",
    ];
    assert_eq!(lines(&next(&mut source).await), expected);
    assert!(source.status.outage().is_none());
}

#[tokio::test]
async fn expired_resourceversion_relists_and_finds_deleted_objects() {
    let cluster = TestCluster::new().await;
    let mut source = cluster.source().await;
    next(&mut source).await;
    cluster.api.set_up(false);
    until(&source, "outage", |status| status.outage().is_some()).await;
    cluster.api.delete("pods", "x/b");
    cluster.api.state().floor = u64::MAX;
    cluster.api.set_up(true);
    assert_eq!(lines(&next(&mut source).await), ["-Pod x/b"]);
    let kinds = source.status.kinds();
    let pods = kinds
        .iter()
        .find(|kind| kind.resource == "pods")
        .expect("pods");
    assert_eq!(
        (pods.lists, pods.errors.get("expired").copied()),
        (2, Some(1))
    );
}

#[tokio::test]
async fn relists_back_off_when_every_resourceversion_expires() {
    let cluster = TestCluster::new().await;
    cluster.api.state().streams = Some(false);
    cluster.api.state().floor = u64::MAX;
    let retry = (Duration::from_secs(2), Duration::from_secs(2));
    let mut source = cluster
        .source_with(Timeouts {
            retry,
            ..timeouts()
        })
        .await;
    next(&mut source).await;
    let before = cluster.api.request_count(&["/nodes"]);
    let calm = tokio::time::timeout(Duration::from_secs(1), source.next()).await;
    assert!(calm.is_err(), "nothing has changed");
    // A try is a list of one page and a watch; another watch that gets through may wake this one.
    let asked = cluster.api.request_count(&["/nodes"]) - before;
    assert!(asked < 12, "{asked} requests in a second");
}

#[tokio::test]
async fn own_node_object_may_be_deleted_and_recreated() {
    let cluster = TestCluster::new().await;
    let mut source = cluster.source().await;
    next(&mut source).await;
    cluster
        .api
        .put("nodes", json!({"metadata": {"name": "n2"}}));
    assert_eq!(lines(&next(&mut source).await), ["+Node n2"]);
    cluster.api.delete("nodes", "n1");
    cluster.api.delete("nodes", "n2");
    assert_eq!(lines(&next(&mut source).await), ["-Node n2"]);
    cluster.api.put(
        "nodes",
        json!({"metadata": {"name": "n1"}, "spec": {"podCIDR": "10.0.2.0/24"}}),
    );
    assert_eq!(lines(&next(&mut source).await), ["+Node n1"]);
}

#[tokio::test]
async fn start_during_outage_uses_snapshot_then_differences() {
    let cluster = TestCluster::new().await;
    {
        let mut source = cluster.source().await;
        next(&mut source).await;
        // The state is kept while the source waits for more.
        let kept = source.keeper.snapshot.path();
        let write = async {
            while !kept.exists() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::select! {
            batch = source.next() => panic!("nothing has changed: {batch:?}"),
            done = tokio::time::timeout(DEADLINE, write) => done.expect("it is kept"),
        }
    }
    cluster.api.set_up(false);
    cluster.api.delete("pods", "x/b");
    let mut source = cluster.source().await;
    source.fall_back = Some(Instant::now() + DEADLINE);
    assert_eq!(
        lines(&next(&mut source).await),
        FULL,
        "as soon as the first request has failed"
    );
    assert!(source.status.restored().is_some());
    assert!(source.status.outage().is_some());
    cluster.api.set_up(true);
    assert_eq!(lines(&next(&mut source).await), ["-Pod x/b"]);
    assert!(source.status.restored().is_none());
}

#[tokio::test]
async fn start_during_outage_waits_without_a_snapshot() {
    let cluster = TestCluster::new().await;
    cluster.api.set_up(false);
    let mut source = cluster.source().await;
    source.fall_back = Some(Instant::now());
    let early = tokio::time::timeout(Duration::from_millis(200), source.next()).await;
    assert!(early.is_err(), "there is no state");
    cluster.api.set_up(true);
    assert_eq!(lines(&next(&mut source).await), FULL);
}

#[tokio::test]
async fn policy_gets_one_event_from_all_nodes() {
    let cluster = TestCluster::new().await;
    let (mut one, mut two) = (cluster.source().await, cluster.source().await);
    let problems = [Problem::warning("selects a host", "do not")
        .of("NetworkPolicy x/deny")
        .at("spec.podSelector")];
    for source in [&mut one, &mut two] {
        next(source).await;
        source.report(&problems);
        source.report(&problems);
    }
    let deadline = Instant::now() + DEADLINE;
    while cluster
        .api
        .request_count(&["POST", "/apis/events.k8s.io/v1/namespaces/x/events"])
        < 2
    {
        assert!(
            Instant::now() < deadline,
            "{:?}",
            cluster.api.state().requests
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let events = cluster.api.state().events.clone();
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(events[0]["regarding"]["name"], "deny");
    assert_eq!(
        events[0]["note"],
        "spec.podSelector: selects a host; do not"
    );
}

#[tokio::test]
async fn api_and_manifests_give_the_same_changes() {
    let cluster = TestCluster::new().await;
    let mut source = cluster.source().await;
    let from_api = next(&mut source).await;
    let mut items = Vec::new();
    for (kind, mut object) in [
        ("Node", node()),
        ("Namespace", json!({"metadata": {"name": "x"}})),
        ("Pod", pod("a", 1)),
        ("Pod", pod("b", 2)),
        ("Pod", pod("c", 3)),
        ("NetworkPolicy", policy("deny", json!({"podSelector": {}}))),
    ] {
        object["kind"] = kind.into();
        object["apiVersion"] = if kind == "NetworkPolicy" {
            "networking.k8s.io/v1"
        } else {
            "v1"
        }
        .into();
        items.push(object);
    }
    let file = cluster.folder.path().join("state.json");
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    std::fs::write(&file, list.to_string()).expect("written");
    let (_, from_file) = crate::manifest::ManifestSource::open(&file).expect("valid");
    let objects = |batch: Batch| {
        let mut objects: Vec<Object> = batch
            .events
            .into_iter()
            .map(|event| match event {
                Event::Upsert(object) => object,
                Event::Delete(key) => panic!("{key} is gone from a first batch"),
            })
            .collect();
        objects.sort_by_key(Object::key);
        objects
    };
    assert_eq!(objects(from_api), objects(from_file));
}
