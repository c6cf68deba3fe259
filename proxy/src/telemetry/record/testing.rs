//! A decision for the tests of its records.
use std::net::IpAddr;
use std::sync::Arc;

use controller::{Batch, Decision, Event, Index, Object, Table, TableSettings};
use policy::{Labels, NetworkPolicy, Node, Pod, PodKey, PolicyKey, Protocol};
use serde_json::json;

/// Address of pod x/a, uid `uid-a`.
pub(crate) const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 1, 2));
/// Address of pod x/c, uid `uid-c`, on node-2.
pub(crate) const SERVER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 2, 2));

/// The decision when x/a on `node` connects to x/c; if x/a is `isolated`, it may not.
pub(crate) fn decision(node: &str, isolated: bool) -> Arc<Decision> {
    let pod = |name: &str, node: &str, address| {
        Event::Upsert(Object::from(Pod {
            key: PodKey {
                namespace: "x".into(),
                name: name.into(),
            },
            uid: format!("uid-{name}").into(),
            labels: Labels::new(),
            node: node.into(),
            host_network: false,
            ports: Vec::new(),
            addresses: vec![address],
            finished: false,
            terminating: false,
            started: "".into(),
            oversized: false,
        }))
    };
    let known = |name: &str| {
        Event::Upsert(Object::Node(Node {
            name: name.into(),
            addresses: Vec::new(),
            pod_cidrs: Vec::new(),
        }))
    };
    let mut events = vec![
        known("node-1"),
        known("node-2"),
        pod("a", node, CLIENT),
        pod("c", "node-2", SERVER),
    ];
    if isolated {
        let key = PolicyKey {
            namespace: "x".into(),
            name: "deny".into(),
        };
        let spec = serde_json::from_value(json!({ "policyTypes": ["Egress"] })).unwrap();
        let policy = NetworkPolicy::new(key, spec).unwrap();
        events.push(Event::Upsert(Object::from(policy)));
    }
    let table = Table::new(TableSettings::default());
    Index::new(Arc::clone(&table)).apply(Batch {
        events,
        ..Batch::default()
    });
    let decided = table.decide(CLIENT, SERVER, Some(80), Protocol::Tcp);
    Arc::new(decided.expect("both ends are known"))
}
