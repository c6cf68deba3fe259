//! How long one edit of a namespace's policies takes in the worst cases, with what the published
//! table needs of it: other namespaces' changes wait so long. Prints the median and the maximum.
#![expect(clippy::disallowed_types, reason = "a bench has a clock")]
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use policy::{Cluster, Endpoint, Labels, NetworkPolicy, Pod, PodKey, PolicyKey, Touched};

const PODS: u32 = 1_000;
/// Labels of a pod, each of two values: no two pods have the same.
const LABELS: u32 = 10;
const EDITS: u32 = 21;
/// As the daemon's table has it.
const MERGED: usize = 100_000;

type Table = HashMap<IpAddr, Arc<Endpoint>>;
type Edited = Vec<(&'static str, String)>;

fn main() {
    many_selections();
    many_selectors();
}

/// An edit that concerns all pods of a namespace, each of which another half of the policies
/// selects: about 500.
fn many_selections() {
    let all = |turn| format!(r#"{{"podSelector": {{}}, "ingress": [{}]}}"#, rule(turn));
    let half = |turn| {
        let selected = format!(r#"{{"matchLabels": {{"b0": "{}"}}}}"#, turn % 2);
        format!(
            r#"{{"podSelector": {selected}, "ingress": [{}]}}"#,
            rule(turn)
        )
    };
    type Edit<'a> = (&'a str, u32, &'a dyn Fn(u32) -> Edited);
    let cases: [Edit<'_>; 5] = [
        ("the first policy", 49, &|turn| vec![("a", all(turn))]),
        ("the last policy", 49, &|turn| vec![("z", all(turn))]),
        ("a podSelector", 49, &|turn| vec![("a", half(turn))]),
        ("two policies", 49, &|turn| {
            vec![("a", all(turn)), ("b", all(turn))]
        }),
        ("more than 500 on a pod", 50, &|turn| {
            vec![("a", half(turn))]
        }),
    ];
    for rules in [1, 40] {
        for (name, of_a_label, edited) in cases {
            let cluster = under_many_policies(of_a_label, rules);
            edit(&format!("{rules} rules each, {name}"), cluster, edited);
        }
    }
}

/// An edit that gives 4,000 pods of all namespaces 500 other selectors.
fn many_selectors() {
    type Peer = fn(u32) -> String;
    let cases: [(&str, Peer); 2] = [
        ("selectors that all pods match", |n| {
            format!(r#"{{"key": "k{n}", "operator": "DoesNotExist"}}"#)
        }),
        ("selectors that every second pod matches", |n| {
            let (label, value) = (n % LABELS, n / LABELS % 2);
            format!(r#"{{"key": "b{label}", "operator": "NotIn", "values": ["{value}", "{n}"]}}"#)
        }),
    ];
    for (name, expression) in cases {
        let mut cluster = Cluster::default();
        for number in 0..4_000 {
            let _ = cluster.upsert_pod(pod(&format!("n{}", number % 50), number));
        }
        edit(name, cluster, &|turn| {
            let peers = (0..500).map(|n| {
                let expression = expression(n + turn * 1_000);
                format!(
                    r#"{{"namespaceSelector": {{}}, "podSelector": {{"matchExpressions": [{expression}]}}}}"#
                )
            });
            let peers: Vec<_> = peers.collect();
            let none = r#""podSelector": {"matchLabels": {"no": "pod"}}"#;
            let spec = format!(
                r#"{{{none}, "ingress": [{{"from": [{}]}}]}}"#,
                peers.join(",")
            );
            vec![("large", spec)]
        });
    }
}

/// Times edits, with publishing them and freeing what they replace.
fn edit(name: &str, mut cluster: Cluster, edited: &dyn Fn(u32) -> Edited) {
    let mut table = Table::new();
    let all = Touched {
        addresses: cluster.endpoints().map(|(address, _)| address).collect(),
    };
    publish(&cluster, &all, &mut table);
    let mut times: Vec<Duration> = (0..EDITS)
        .map(|turn| {
            let policies = edited(turn).into_iter();
            let policies = policies.map(|(name, spec)| policy(name, &spec));
            let changes = policies.map(|it| (it.key().clone(), Some(Arc::new(it))));
            let changes = changes.collect();
            let began = Instant::now();
            let touched = cluster.change_policies(changes);
            publish(&cluster, &touched, &mut table);
            began.elapsed()
        })
        .collect();
    times.remove(0);
    times.sort_unstable();
    let (half, most) = (times[times.len() / 2], times[times.len() - 1]);
    println!("{name}: median {half:.1?}, max {most:.1?}");
}

fn publish(cluster: &Cluster, touched: &Touched, table: &mut Table) {
    cluster.prepare(&touched.addresses, MERGED);
    for address in &touched.addresses {
        match cluster.endpoint(*address) {
            Some(endpoint) => table.insert(*address, endpoint),
            None => table.remove(address),
        };
    }
}

/// The pods of a namespace, and so many policies for each value of each label.
fn under_many_policies(of_a_label: u32, rules: u32) -> Cluster {
    let mut cluster = Cluster::default();
    let changes = (0..2 * LABELS * of_a_label).map(|number| {
        let (label, value) = (number / 2 % LABELS, number % 2);
        let rules = (0..rules).map(|n| rule(100_000 + number * rules + n));
        let rules: Vec<_> = rules.collect();
        let selected = format!(r#"{{"matchLabels": {{"b{label}": "{value}"}}}}"#);
        let rules = rules.join(",");
        let spec = format!(r#"{{"podSelector": {selected}, "ingress": [{rules}]}}"#);
        let policy = policy(&format!("p{number:04}"), &spec);
        (policy.key().clone(), Some(Arc::new(policy)))
    });
    let _ = cluster.change_policies(changes.collect());
    for number in 0..PODS {
        let _ = cluster.upsert_pod(pod("a", number));
    }
    assert_eq!(cluster.refused().len(), 0);
    cluster
}

fn rule(number: u32) -> String {
    let [_, a, b, c] = number.to_be_bytes();
    let port = 1 + number % 65_000;
    format!(
        r#"{{"from": [{{"ipBlock": {{"cidr": "172.{a}.{b}.{c}/32"}}}}], "ports": [{{"port": {port}}}]}}"#
    )
}

fn policy(name: &str, spec: &str) -> NetworkPolicy {
    let key = PolicyKey {
        namespace: "a".into(),
        name: name.into(),
    };
    let spec = serde_json::from_str(spec).expect("the spec is JSON");
    NetworkPolicy::new(key, spec).expect("the policy is valid")
}

fn pod(namespace: &str, number: u32) -> Pod {
    let labels = (0..LABELS).map(|label| {
        let value = number >> label & 1;
        (format!("b{label}").into(), value.to_string().into())
    });
    Pod {
        key: PodKey {
            namespace: namespace.into(),
            name: format!("p{number}").into(),
        },
        uid: format!("u{number}").into(),
        labels: labels.collect::<Labels>(),
        node: "node".into(),
        host_network: false,
        ports: Vec::new(),
        addresses: vec![IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + number))],
        finished: false,
        terminating: false,
        started: "2026-01-01T00:00:00Z".into(),
        oversized: false,
    }
}
