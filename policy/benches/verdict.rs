//! What a verdict and an event cost, by the size of the cluster.
//!
//! The rows of one table differ only in pods and policies that concern neither end of the
//! connection: their cost is to be the same. Every verdict here is of the worst kind for its ends:
//! both isolated, by two policies each, and the last rule allows.
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{
    BatchSize, BenchmarkGroup, BenchmarkId, Criterion, criterion_group, criterion_main,
};
use policy::{
    Budget, Cluster, Labels, Namespace, NetworkPolicy, Node, OwnNode, Pod, PodKey, PodPort,
    PolicyKey, Protocol, allows, decide, judge, v1,
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

/// Verdicts on a pod under as many rules as the API server can store. No rule allows the
/// connection; each verdict asks for another address and port.
fn hostile(c: &mut Criterion) {
    let mut group = c.benchmark_group("verdict/hostile");
    type RuleOf = fn(u32) -> String;
    let cases: [(&str, u32, u32, RuleOf); 4] = [
        ("a_block_and_a_port_each", 40, 10_000, |n| {
            let [_, a, b, c] = n.to_be_bytes();
            format!(
                r#"{{"from": [{{"ipBlock": {{"cidr": "172.{a}.{b}.{c}/32"}}}}], "ports": [{{"port": {}}}]}}"#,
                1 + n % 65_000
            )
        }),
        ("wide_ranges_of_ports", 40, 500, |n| {
            let [_, a, b, c] = n.to_be_bytes();
            format!(
                r#"{{"from": [{{"ipBlock": {{"cidr": "172.{a}.{b}.{c}/32"}}}}], "ports": [{{"port": {}, "endPort": {}}}]}}"#,
                1 + n % 1_000,
                65_534 - n % 997
            )
        }),
        ("a_block_with_an_exception_each", 40, 10_000, |n| {
            let [_, a, b, c] = n.to_be_bytes();
            format!(
                r#"{{"from": [{{"ipBlock": {{"cidr": "2001:db8::/32", "except": ["2001:db8:{a:x}:{b:x}{c:02x}::/64"]}}}}], "ports": [{{"port": {}}}]}}"#,
                1 + n % 65_000
            )
        }),
        ("a_selector_each_of_two_that_match_none", 40, 500, |n| {
            format!(
                r#"{{"from": [{{"podSelector": {{"matchExpressions": [{{"key": "k{n}", "operator": "Exists"}}]}}}}],
                    "ports": [{{"port": {}}}]}}"#,
                1 + n % 65_000
            )
        }),
    ];
    for (name, policies, rules, rule) in cases {
        let cluster = under(policies, rules, rule);
        let mut turn = 0_u32;
        group.bench_function(name, |b| {
            b.iter(|| {
                turn = turn.wrapping_add(0x9e37_79b9);
                let peer = IpAddr::V4(Ipv4Addr::from_bits(0xac00_0000 | turn >> 8));
                let port = u16::try_from(turn & 0xffff).ok();
                let (from, to) = (cluster.party(black_box(peer)), cluster.party(SERVER));
                decide(from, to, port, Protocol::Tcp, OwnNode::Allow)
            });
        });
        let (from, to) = (cluster.party(CLIENT), cluster.party(SERVER));
        group.bench_function(format!("{name}/from_a_pod"), |b| {
            b.iter(|| {
                decide(
                    black_box(from),
                    to,
                    Some(65_535),
                    Protocol::Tcp,
                    OwnNode::Allow,
                )
            });
        });
    }
    group.finish();
}

/// How long single verdicts take on a pod under 40 policies of 10,000 rules: one after the other, and each after other
/// work has taken the processor's caches. `the_clock` is what reading the clock adds to each of them.
fn percentiles(c: &mut Criterion) {
    let mut group = c.benchmark_group("verdict/single");
    let cluster = under(40, 10_000, |n| {
        let [_, a, b, c] = n.to_be_bytes();
        format!(
            r#"{{"from": [{{"ipBlock": {{"cidr": "172.{a}.{b}.{c}/32"}}}}], "ports": [{{"port": {}}}]}}"#,
            1 + n % 65_000
        )
    });
    let mut turn = 0_u32;
    let mut verdict = || {
        turn = turn.wrapping_add(0x9e37_79b9);
        let peer = IpAddr::V4(Ipv4Addr::from_bits(0xac00_0000 | turn >> 8));
        let port = u16::try_from(turn & 0xffff).ok();
        let (from, to) = (cluster.party(black_box(peer)), cluster.party(SERVER));
        black_box(decide(from, to, port, Protocol::Tcp, OwnNode::Allow));
    };
    let mut other_work = vec![0_u8; OTHER_WORK];
    let mut work = || {
        for line in other_work.iter_mut().step_by(64) {
            *line = line.wrapping_add(1);
        }
        black_box(&mut other_work);
    };
    each(&mut group, "the_clock", || {}, || {});
    each(&mut group, "in_a_row", || {}, &mut verdict);
    each(&mut group, "after_other_work", &mut work, &mut verdict);
    group.finish();
}

/// Bytes that other work touches: more than a core's own caches have.
const OTHER_WORK: usize = 8 << 20;

/// Times single calls, each after `before`, and prints the percentiles.
#[expect(clippy::disallowed_types, reason = "a bench has a clock")]
fn each(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    mut before: impl FnMut(),
    mut call: impl FnMut(),
) {
    let mut times = Vec::new();
    group.bench_function(name, |b| {
        b.iter_custom(|calls| {
            let timed = (0..calls).map(|_| {
                before();
                let began = std::time::Instant::now();
                call();
                began.elapsed()
            });
            let first = times.len();
            times.extend(timed);
            times[first..].iter().sum()
        });
    });
    times.sort_unstable();
    let at = |hundredth: usize| times.get(times.len() * hundredth / 100);
    if let (Some(half), Some(most)) = (at(50), at(99)) {
        println!("{name}: p50 {half:?}, p99 {most:?} of {}", times.len());
    }
}

/// The two ends: a client with a thousand labels, and a server under this many policies with this
/// many rules each.
fn under(policies: u32, rules: u32, rule: impl Fn(u32) -> String) -> Cluster {
    let mut cluster = cluster(2, 0);
    let mut client = client();
    for label in 0..1_000 {
        client
            .labels
            .insert(format!("k{}", 1_000_000 + label).into(), "".into());
    }
    let _ = cluster.upsert_pod(client);
    // Selectors that the client matches and the server's rules do not use.
    let others: Vec<String> = (0..1_000).map(|n| rule(1_000_000 + n)).collect();
    let others = format!(
        r#"{{"podSelector": {{"matchLabels": {{"no": "pod"}}}}, "ingress": [{}]}}"#,
        others.join(",")
    );
    let _ = cluster.upsert_policy(policy("ends", "others", &others));
    for number in 0..policies {
        let rules: Vec<String> = (0..rules).map(|n| rule(number * rules + n)).collect();
        let spec = format!(
            r#"{{"podSelector": {{"matchLabels": {{"app": "server"}}}}, "ingress": [{}]}}"#,
            rules.join(",")
        );
        let _ = cluster.upsert_policy(policy("ends", &format!("many-{number}"), &spec));
    }
    cluster
}

/// The cost of one tenant's large policy in a cluster with the pods of others.
fn hostile_events(c: &mut Criterion) {
    let mut cluster = cluster(4_000, 0);
    let mut group = c.benchmark_group("event/hostile");
    let mut turn = 0;
    let peers = |turn: u32, peer: fn(u32) -> String, count: u32| {
        let peers: Vec<String> = (0..count).map(|n| peer(turn * 100_000 + n)).collect();
        let spec = format!(
            r#"{{"podSelector": {{"matchLabels": {{"no": "pod"}}}}, "ingress": [{{"from": [{}]}}]}}"#,
            peers.join(",")
        );
        policy("evil", "large", &spec)
    };
    type PeerOf = fn(u32) -> String;
    let cases: [(&str, u32, PeerOf); 3] = [
        ("20000_selectors_of_a_label_each", 20_000, |n| {
            format!(
                r#"{{"namespaceSelector": {{}}, "podSelector": {{"matchLabels": {{"a": "u{n}"}}}}}}"#
            )
        }),
        ("500_selectors_that_all_pods_match", 500, |n| {
            format!(
                r#"{{"namespaceSelector": {{}}, "podSelector": {{"matchLabels": {{"tier": "backend"}},
                    "matchExpressions": [{{"key": "k{n}", "operator": "DoesNotExist"}}]}}}}"#
            )
        }),
        ("500_selectors_that_every_second_pod_matches", 500, |n| {
            let apps: Vec<String> = (0..97)
                .filter(|app| (app * 31 + n) % 2 == 0)
                .map(|app| format!(r#""app-{app}""#))
                .collect();
            format!(
                r#"{{"namespaceSelector": {{}}, "podSelector": {{"matchExpressions": [
                    {{"key": "app", "operator": "NotIn", "values": [{}, "none-{n}"]}}]}}}}"#,
                apps.join(",")
            )
        }),
    ];
    for (name, count, peer) in cases {
        let all: Vec<String> = (0..count).map(peer).collect();
        let text = format!(
            r#"{{"podSelector": {{"matchLabels": {{"no": "pod"}}}}, "ingress": [{{"from": [{}]}}]}}"#,
            all.join(",")
        );
        group.bench_function(format!("{name}/is_read"), |b| {
            b.iter(|| policy("evil", "large", black_box(&text)));
        });
        group.bench_function(name, |b| {
            b.iter_batched(
                || {
                    turn += 1;
                    peers(turn, peer, count)
                },
                |policy| cluster.upsert_policy(policy),
                BatchSize::PerIteration,
            );
        });
        let mut number = 0;
        group.bench_function(format!("{name}/then_a_pod_is_relabelled"), |b| {
            b.iter_batched(
                || {
                    number += 1;
                    let mut pod = other_pod(2 + number % 3_000);
                    pod.labels.insert("turn".into(), number.to_string().into());
                    pod
                },
                |pod| cluster.upsert_pod(pod),
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
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
    let mut cluster = Cluster::with_budget(Budget::unbounded());
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
        oversized: false,
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

criterion_group! { name = benches; config = quick(); targets = verdict, hostile, percentiles, events, hostile_events }
criterion_main!(benches);
