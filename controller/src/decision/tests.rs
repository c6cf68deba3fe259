//! What becomes of a flow when the table changes under it.
use policy::{Labels, NetworkPolicy, Node, Pod, Protocol};
use serde_json::json;

use super::*;
use crate::testing::{self, ip};
use crate::{Batch, Event, Index, Object, ObjectKey, Table, TableSettings};

const A: &str = "10.0.0.1";
const B: &str = "10.0.0.2";
const OUTSIDE: &str = "192.0.2.1";

fn pod(name: &str, uid: &str, address: &str) -> Pod {
    Pod {
        uid: uid.into(),
        ..testing::pod(name, address)
    }
}

fn upsert(pod: Pod) -> Event {
    Event::Upsert(Object::from(pod))
}

fn gone(name: &str) -> Event {
    Event::Delete(ObjectKey::Pod(pod(name, "", A).key))
}

/// Isolates a both ways.
fn deny() -> Event {
    let key = PolicyKey {
        namespace: "x".into(),
        name: "deny".into(),
    };
    let spec = json!({"policyTypes": ["Ingress", "Egress"]});
    let spec = serde_json::from_value(spec).unwrap();
    Event::Upsert(Object::from(NetworkPolicy::new(key, spec).unwrap()))
}

fn node() -> Event {
    Event::Upsert(Object::Node(Node {
        name: "n1".into(),
        addresses: Vec::new(),
        pod_cidrs: vec!["10.0.0.0/24".parse().unwrap()],
    }))
}

/// What becomes of a flow between two addresses when `events` come after its verdict.
fn after(events: Vec<Event>, client: &str, server: &str) -> Option<Severance> {
    let table = Table::new(TableSettings::default());
    let mut index = Index::new(Arc::clone(&table));
    let first = vec![node(), upsert(pod("a", "a1", A)), upsert(pod("b", "b1", B))];
    let mut apply = |events| {
        index.apply(Batch {
            events,
            ..Batch::default()
        })
    };
    let decide = || table.decide(ip(client), ip(server), Some(80), Protocol::Tcp);
    apply(first);
    let rests_on = decide().expect("both ends are known");
    apply(events);
    rests_on.overturned(ip(client), ip(server), &decide())
}

#[test]
fn flow_survives_changes_that_do_not_affect_it() {
    let relabelled = Pod {
        labels: Labels::from([("seen".into(), "twice".into())]),
        ..pod("a", "a1", A)
    };
    let terminating = Pod {
        terminating: true,
        ..pod("a", "a1", A)
    };
    for (events, why) in [
        (vec![], "nothing happened"),
        (vec![upsert(relabelled)], "the same pod with other labels"),
        (
            vec![upsert(terminating)],
            "it still serves what it has begun",
        ),
        (vec![upsert(pod("c", "c1", "10.0.0.3"))], "a third pod"),
    ] {
        assert!(after(events.clone(), A, B).is_none(), "{why}");
        assert!(after(events, OUTSIDE, A).is_none(), "{why}");
    }
    assert!(after(vec![gone("b")], A, OUTSIDE).is_none(), "not its pod");
}

#[test]
fn flow_of_a_replaced_pod_is_severed() {
    let finished = Pod {
        finished: true,
        ..pod("a", "a1", A)
    };
    for (events, reason) in [
        (
            vec![gone("a")],
            "Severed: x/a (uid a1) no longer has 10.0.0.1.",
        ),
        (
            vec![upsert(finished)],
            "Severed: x/a (uid a1) no longer has 10.0.0.1.",
        ),
        (
            vec![upsert(pod("a", "a2", A))],
            "Severed: 10.0.0.1 was x/a (uid a1) and is x/a (uid a2) now.",
        ),
        (
            vec![gone("a"), upsert(pod("d", "d1", A))],
            "Severed: 10.0.0.1 was x/a (uid a1) and is x/d (uid d1) now.",
        ),
        (
            vec![upsert(pod("a", "a1", "10.0.0.9"))],
            "Severed: x/a (uid a1) no longer has 10.0.0.1.",
        ),
    ] {
        for (client, server, direction) in [(A, B, "egress"), (B, A, "ingress")] {
            let severance = after(events.clone(), client, server).expect(reason);
            assert_eq!(severance.replaced.as_deref(), Some(reason));
            assert_eq!(severance.decision.direction(), direction);
            assert!(severance.decision.policies().is_empty(), "no policy did it");
            assert_eq!(severance.decision.reason_label(), Reason::EndpointReplaced);
            let from = severance.decision.from.as_ref().unwrap();
            let was = if client == A { "a1" } else { "b1" };
            assert_eq!(&*from.identity.uid, was, "the flow's own pods");
        }
        assert!(after(events.clone(), A, OUTSIDE).is_some(), "to outside");
        assert!(after(events, OUTSIDE, A).is_some(), "from outside");
    }
    let both = vec![gone("a"), gone("b")];
    assert!(after(both, A, B).is_some(), "only one unknown end is named");
}

#[test]
fn flow_denied_by_new_policy_names_that_policy() {
    let severance = after(vec![deny()], A, B).unwrap();
    assert_eq!(severance.decision.policies()[0].to_string(), "x/deny");
    assert_eq!(severance.decision.direction(), "both");
    assert_eq!(severance.decision.reason_label(), Reason::NoRule);
    assert_eq!(severance.replaced, None);
}
