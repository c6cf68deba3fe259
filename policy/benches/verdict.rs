//! What a verdict and an event cost, by the size of the cluster.
//!
//! The rows of one table differ only in pods and policies that concern neither end of the
//! connection: their cost is to be the same. Every verdict here is of the worst kind for its ends:
//! both isolated, by two policies each, and the last rule allows.
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use policy::{
    Cluster, Labels, Namespace, NetworkPolicy, Node, OwnNode, Pod, PodKey, PodPort, PolicyKey,
    Protocol, allows, judge, v1,
};

const PODS: [u32; 4] = [10, 100, 1_000, 10_000];
const POLICIES: [u32; 4] = [1, 10, 100, 2_000];

/// Other pods live in this many namespaces, and other policies are spread over them.
const NAMESPACES: u32 = 50;

const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 255, 0, 1));
const SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 255, 0, 2));

fn verdict(c: &mut Criterion) {
    for policies in POLICIES {
        let mut group = c.benchmark_group(format!("verdict/{policies}_policies"));
        for pods in PODS {
            let cluster = cluster(pods, policies);
            let (from, to) = (cluster.party(CLIENT), cluster.party(SERVER));
            assert!(judge(from, to, Some(8080), Protocol::Tcp, OwnNode::Allow).allowed());
            group.bench_function(BenchmarkId::new("allows", pods), |b| {
                b.iter(|| {
                    let (from, to) = black_box((from, to));
                    allows(
                        from,
                        to,
                        black_box(Some(8080)),
                        Protocol::Tcp,
                        OwnNode::Allow,
                    )
                });
            });
            group.bench_function(BenchmarkId::new("judge", pods), |b| {
                b.iter(|| {
                    let (from, to) = black_box((from, to));
                    judge(
                        from,
                        to,
                        black_box(Some(8080)),
                        Protocol::Tcp,
                        OwnNode::Allow,
                    )
                });
            });
        }
        group.finish();
    }
}

fn events(c: &mut Criterion) {
    let mut cluster = cluster(10_000, 2_000);
    let mut group = c.benchmark_group("event/10000_pods_2000_policies");
    let mut turn = 0_u32;
    group.bench_function("pod_relabelled", |b| {
        b.iter_batched(
            || {
                turn += 1;
                let mut pod = other_pod(turn % 10_000);
                pod.labels.insert("turn".into(), turn.to_string().into());
                pod
            },
            |pod| cluster.upsert_pod(pod),
            BatchSize::SmallInput,
        );
    });
    group.bench_function("pod_unchanged", |b| {
        let pod = server();
        b.iter_batched(
            || pod.clone(),
            |pod| cluster.upsert_pod(pod),
            BatchSize::SmallInput,
        );
    });
    group.bench_function("policy_with_a_new_selector", |b| {
        b.iter_batched(
            || {
                turn += 1;
                policy("ns-0", "turning", &one_app_spec(&format!("other-{turn}")))
            },
            |policy| cluster.upsert_policy(policy),
            BatchSize::SmallInput,
        );
    });
    group.bench_function("policy_on_all_pods_of_a_namespace", |b| {
        b.iter_batched(
            || {
                turn += 1;
                let port = 1 + turn % 60_000;
                let spec = format!(r#"{{"ingress": [{{"ports": [{{"port": {port}}}]}}]}}"#);
                policy("ns-1", "port", &spec)
            },
            |policy| cluster.upsert_policy(policy),
            BatchSize::SmallInput,
        );
    });
    let mut blue = false;
    group.bench_function("namespace_relabelled", |b| {
        b.iter_batched(
            || {
                blue = !blue;
                namespace(2, if blue { "blue" } else { "red" })
            },
            |namespace| cluster.upsert_namespace(namespace),
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

/// `pods` pods, the two ends among them, and `policies` policies that concern neither, beside the
/// four that do.
fn cluster(pods: u32, policies: u32) -> Cluster {
    let mut cluster = Cluster::default();
    let node = Node {
        name: "node".into(),
        addresses: Vec::new(),
        pod_cidrs: Vec::new(),
    };
    let _ = cluster.upsert_node(node);
    for index in 0..NAMESPACES {
        let _ = cluster.upsert_namespace(namespace(index, "green"));
    }
    for index in 0..policies {
        let namespace = format!("ns-{}", index % NAMESPACES);
        let spec = one_app_spec(&format!("app-{}", index % 97));
        let _ = cluster.upsert_policy(policy(&namespace, &format!("policy-{index}"), &spec));
    }
    for (name, spec) in [
        ("client-block", CLIENT_BLOCK),
        ("client-named", CLIENT_NAMED),
        ("server-block", SERVER_BLOCK),
        ("server-peer", SERVER_PEER),
    ] {
        let _ = cluster.upsert_policy(policy("ends", name, spec));
    }
    let _ = cluster.upsert_pod(client());
    let _ = cluster.upsert_pod(server());
    for index in 2..pods {
        let _ = cluster.upsert_pod(other_pod(index));
    }
    cluster
}

const CLIENT_BLOCK: &str = r#"{"podSelector": {"matchLabels": {"app": "client"}}, "policyTypes": ["Egress"],
    "egress": [{"to": [{"ipBlock": {"cidr": "192.0.2.0/24", "except": ["192.0.2.128/25"]}}]}]}"#;
const CLIENT_NAMED: &str = r#"{"podSelector": {"matchLabels": {"app": "client"}}, "policyTypes": ["Egress"],
    "egress": [{"to": [{"podSelector": {"matchLabels": {"app": "server"}}}], "ports": [{"port": "web"}]}]}"#;
const SERVER_BLOCK: &str = r#"{"podSelector": {"matchLabels": {"app": "server"}},
    "ingress": [{"from": [{"ipBlock": {"cidr": "198.51.100.0/24"}}], "ports": [{"port": 8080}]}]}"#;
const SERVER_PEER: &str = r#"{"podSelector": {"matchLabels": {"app": "server"}},
    "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}],
                 "ports": [{"port": 8000, "endPort": 9000}]}]}"#;

/// Selects and allows one app of the namespace, and the green namespaces' pods of another one.
fn one_app_spec(app: &str) -> String {
    format!(
        r#"{{"podSelector": {{"matchLabels": {{"app": "{app}"}}}}, "ingress": [{{"from": [
            {{"podSelector": {{"matchLabels": {{"app": "{app}"}}}}}},
            {{"podSelector": {{"matchLabels": {{"app": "{app}-friend"}}}},
              "namespaceSelector": {{"matchLabels": {{"team": "green"}}}}}}],
            "ports": [{{"port": 80}}]}}]}}"#
    )
}

fn policy(namespace: &str, name: &str, spec: &str) -> NetworkPolicy {
    let key = PolicyKey {
        namespace: namespace.into(),
        name: name.into(),
    };
    let spec: v1::NetworkPolicySpec = serde_json::from_str(spec).expect("the spec is JSON");
    NetworkPolicy::new(key, spec).expect("the policy is valid")
}

fn namespace(index: u32, team: &str) -> Namespace {
    Namespace::new(
        format!("ns-{index}"),
        Labels::from([("team".into(), team.into())]),
    )
}

fn pod(namespace: &str, name: &str, app: &str, address: IpAddr) -> Pod {
    Pod {
        key: PodKey {
            namespace: namespace.into(),
            name: name.into(),
        },
        uid: format!("uid-{name}").into(),
        labels: Labels::from([
            ("app".into(), app.into()),
            ("tier".into(), "backend".into()),
        ]),
        node: "node".into(),
        host_network: false,
        ports: vec![PodPort {
            name: Some("web".into()),
            number: 8080,
            protocol: Protocol::Tcp,
        }],
        addresses: vec![address],
        finished: false,
        terminating: false,
        started: Arc::from("2026-01-01T00:00:00Z"),
    }
}

fn client() -> Pod {
    pod("ends", "client", "client", CLIENT)
}

fn server() -> Pod {
    pod("ends", "server", "server", SERVER)
}

fn other_pod(index: u32) -> Pod {
    let address = Ipv4Addr::from_bits(Ipv4Addr::new(10, 0, 0, 0).to_bits() + index);
    let (namespace, app) = (index % NAMESPACES, index % 97);
    pod(
        &format!("ns-{namespace}"),
        &format!("pod-{index}"),
        &format!("app-{app}"),
        address.into(),
    )
}

fn quick() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600))
        .sample_size(20)
        .without_plots()
}

criterion_group! { name = benches; config = quick(); targets = verdict, events }
criterion_main!(benches);
