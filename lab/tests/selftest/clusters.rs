//! The description of a cluster, and its changes while it runs.
use std::time::Duration;

use lab::{Cluster, Kind, PodSpec, Protocol};
use testbed::runner::Test;

use super::{LIMIT, seen, web};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    pods_come_and_go_while_the_cluster_runs,
    manifests_describe_the_cluster,
    wrong_cluster_is_rejected_with_a_remedy,
];

fn pods_come_and_go_while_the_cluster_runs() {
    let mut cluster = web().build().unwrap();
    let to = cluster.service("x/none").addr_v4(80);
    let address = "10.244.1.77".parse().unwrap();
    let late = PodSpec::new("x", "late")
        .node("node-1")
        .ipv4(address)
        .label("app", "nothing");
    let client = cluster.pod("x/client");

    let added = cluster.add_pod(late).unwrap();
    added.serve(&[8080]).unwrap();
    assert_eq!(added.ipv4(), address);
    assert_eq!(seen(&client, added.addr_v4(8080)).0, "x/late");
    assert_eq!(seen(&client, to).0, "x/late", "its Service knows it");

    cluster.remove_pod("x/late").unwrap();
    assert_eq!(
        client.connect(to, LIMIT).unwrap().kind(),
        Kind::Refused,
        "no endpoint is left"
    );
    let gone = client
        .connect((address, 8080).into(), Duration::from_millis(200))
        .unwrap();
    assert_eq!(gone.kind(), Kind::TimedOut, "the address is nobody's");

    // The same address comes back with another pod.
    let heir = PodSpec::new("y", "heir").node("node-1").ipv4(address);
    cluster.add_pod(heir).unwrap().serve(&[8080]).unwrap();
    assert_eq!(seen(&client, (address, 8080).into()).0, "y/heir");
    let uids: Vec<_> = pods_of(&cluster)
        .map(|pod| pod["metadata"]["uid"].to_string())
        .collect();
    assert_eq!(
        uids.iter().collect::<std::collections::BTreeSet<_>>().len(),
        uids.len()
    );
}

fn pods_of(cluster: &Cluster) -> impl Iterator<Item = serde_json::Value> {
    let list = cluster.manifests();
    let items = list["items"].as_array().unwrap().clone();
    items.into_iter().filter(|item| item["kind"] == "Pod")
}

fn manifests_describe_the_cluster() {
    let mut cluster = Cluster::builder()
        .node("alpha")
        .namespace("x", [("team", "red")])
        .pod(
            PodSpec::new("x", "a")
                .port("http", 80)
                .port_of("dns", 53, Protocol::Udp),
        )
        .pod(PodSpec::new("y", "b").label("app", "web"))
        .build()
        .unwrap();
    cluster.relabel_pod("y/b", [("app", "db")]).unwrap();
    cluster.relabel_namespace("x", [("team", "blue")]);
    let list = cluster.manifests();
    let items = list["items"].as_array().unwrap();
    let kinds: Vec<_> = items
        .iter()
        .map(|item| item["kind"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["Namespace", "Namespace", "Node", "Pod", "Pod"]);
    assert_eq!(items[0]["metadata"]["labels"]["team"], "blue");
    assert_eq!(items[2]["spec"]["podCIDRs"][1], "fd00:10:244::/64");
    assert_eq!(items[3]["spec"]["nodeName"], "alpha");
    assert_eq!(
        items[3]["spec"]["containers"][0]["ports"][1]["protocol"],
        "UDP"
    );
    assert_eq!(
        items[3]["status"]["podIP"],
        cluster.pod("x/a").ipv4().to_string()
    );
    assert_eq!(items[4]["metadata"]["labels"]["app"], "db");
}

fn wrong_cluster_is_rejected_with_a_remedy() {
    let pod = || PodSpec::new("x", "a");
    let taken: std::net::Ipv4Addr = "10.244.0.9".parse().unwrap();
    let outside: std::net::Ipv4Addr = "10.0.0.9".parse().unwrap();
    for (builder, expected) in [
        (Cluster::builder(), "no node; ask the builder for"),
        (
            Cluster::builder().node("n").node("n"),
            "two nodes n; give one",
        ),
        (
            Cluster::builder().nodes(1).pod(pod()).pod(pod()),
            "two pods x/a; give one",
        ),
        (
            Cluster::builder().nodes(2).pod(pod().node("n")),
            "node n, which there is not; nodes are node-0, node-1",
        ),
        (
            Cluster::builder().nodes(1).pod(pod().node(1)),
            "node number 1, which there is not",
        ),
        (
            Cluster::builder().nodes(1).pod(pod().ipv4(outside)),
            "outside of the pod CIDR 10.244.0.0/16",
        ),
        (
            Cluster::builder()
                .nodes(1)
                .pod(pod().ipv4(taken))
                .pod(PodSpec::new("x", "b").ipv4(taken)),
            "which x/a has on the same node; choose another",
        ),
        (Cluster::builder().nodes(201), "at most 200"),
    ] {
        let error = builder.build().unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
}
