//! When changes are applied, with a clock that the test controls.
use serde_json::json;

use super::*;

fn pod(name: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "x"}, "status": {"podIP": "10.0.0.1"}})
}

/// The objects that are kept, as they are read again.
fn kept(state: &State) -> Vec<Value> {
    let objects = state.objects();
    let read = objects
        .iter()
        .map(|it| serde_json::from_str(&it.json()).expect("JSON"));
    read.collect()
}

fn policy(name: &str, spec: Value) -> Value {
    json!({"metadata": {"name": name, "namespace": "x", "uid": "u", "resourceVersion": "1"}, "spec": spec})
}

fn list(state: &mut State, kind: Kind, objects: Vec<Value>, now: Instant) {
    state.take(kind, Update::ListBegins, now);
    for object in objects {
        state.take(kind, Update::Listed(object), now);
    }
    state.take(kind, Update::ListEnds, now);
}

/// Pod a and policy p, in force.
fn listed(now: Instant) -> State {
    let mut state = State::default();
    list(&mut state, Kind::Pod, vec![pod("a")], now);
    list(
        &mut state,
        Kind::NetworkPolicy,
        vec![policy("p", json!({"podSelector": {}}))],
        now,
    );
    list(&mut state, Kind::Namespace, vec![], now);
    assert!(state.changes(now).is_none(), "nodes are not listed yet");
    list(&mut state, Kind::Node, vec![], now);
    assert_eq!(state.changes(now).expect("the full state").events.len(), 2);
    state
}

fn lose_all(state: &mut State, now: Instant) {
    for kind in Kind::ALL {
        state.take(kind, Update::Lost, now);
    }
}

#[test]
fn an_empty_cluster_has_a_first_state_too() {
    let now = Instant::now();
    let mut state = State::default();
    for kind in Kind::ALL {
        assert!(state.changes(now).is_none());
        list(&mut state, kind, vec![], now);
    }
    assert!(state.changes(now).is_some());
    assert!(state.changes(now).is_none());
}

#[test]
fn reconnected_kinds_wait_for_the_others() {
    let now = Instant::now();
    let mut state = listed(now);
    lose_all(&mut state, now);
    list(&mut state, Kind::Pod, vec![pod("b")], now);
    assert!(
        state.changes(now).is_none(),
        "pods of now, policies of then"
    );
    list(&mut state, Kind::NetworkPolicy, vec![], now);
    state.take(Kind::Namespace, Update::Resumed, now);
    assert!(state.changes(now).is_none());
    state.take(Kind::Node, Update::Resumed, now);
    assert_eq!(state.changes(now).expect("all at once").events.len(), 3);
}

#[test]
fn reconnected_kinds_wait_a_bounded_time() {
    let now = Instant::now();
    let mut state = listed(now);
    lose_all(&mut state, now);
    list(&mut state, Kind::Pod, vec![pod("b")], now);
    let due = state.due(now).expect("something waits");
    assert_eq!(due, now + TOGETHER);
    assert!(state.changes(due - Duration::from_millis(1)).is_none());
    assert!(state.changes(due).is_some());
    assert!(state.due(due).is_none());
    state.take(Kind::Pod, Update::Changed(pod("c")), due);
    assert!(
        state.changes(due).is_some(),
        "nor is every later change held up"
    );
}

#[test]
fn one_lost_kind_does_not_delay_the_others() {
    let now = Instant::now();
    let mut state = listed(now);
    state.take(Kind::Node, Update::Lost, now);
    state.take(Kind::Pod, Update::Changed(pod("b")), now);
    assert!(state.changes(now).is_some());
}

#[test]
fn a_list_that_breaks_off_deletes_nothing() {
    let now = Instant::now();
    let mut state = listed(now);
    state.take(Kind::Pod, Update::ListBegins, now);
    state.take(Kind::Pod, Update::Listed(pod("b")), now);
    state.take(Kind::Pod, Update::Lost, now);
    state.take(Kind::Pod, Update::Resumed, now);
    let batch = state.changes(now).expect("b is real");
    assert!(matches!(batch.events.as_slice(), [Event::Upsert(_)]));
}

#[test]
fn list_with_nameless_object_deletes_nothing_and_warns() {
    let now = Instant::now();
    let mut state = listed(now);
    list(&mut state, Kind::Pod, vec![json!({"metadata": {}})], now);
    let batch = state.changes(now).expect("a problem");
    assert_eq!((batch.events.len(), batch.problems.len()), (0, 1));
    list(&mut state, Kind::Pod, vec![], now);
    let batch = state
        .changes(now)
        .expect("the pod is gone, so is the problem");
    assert_eq!((batch.events.len(), batch.problems.len()), (1, 0));
}

#[test]
fn object_created_and_deleted_between_batches_is_skipped() {
    let now = Instant::now();
    let mut state = listed(now);
    state.take(Kind::Pod, Update::Changed(pod("b")), now);
    state.take(Kind::Pod, Update::Deleted(pod("b")), now);
    assert!(state.changes(now).is_none());
    state.take(Kind::Pod, Update::Deleted(pod("a")), now);
    state.take(Kind::Pod, Update::Changed(pod("a")), now);
    assert!(state.changes(now).is_none(), "back as it was");
}

#[test]
fn invalid_update_keeps_policy_invalid_new_policy_denies() {
    let now = Instant::now();
    let mut state = listed(now);
    let bad = json!({"podSelector": {}, "ingress": [{"fron": []}]});
    state.take(
        Kind::NetworkPolicy,
        Update::Changed(policy("p", bad.clone())),
        now,
    );
    state.take(Kind::NetworkPolicy, Update::Changed(policy("q", bad)), now);
    let batch = state.changes(now).expect("q");
    let [Event::Upsert(Object::NetworkPolicy(q))] = batch.events.as_slice() else {
        panic!("{:?}", batch.events);
    };
    assert_eq!(&*q.key().name, "q");
    assert_eq!(q.rule_count(policy::Direction::Ingress), 0);
    assert_eq!(batch.problems.len(), 2);
    state.take(
        Kind::NetworkPolicy,
        Update::Deleted(policy("q", json!({}))),
        now,
    );
    assert_eq!(state.changes(now).expect("gone").problems.len(), 1);
}

#[test]
fn invalid_new_policy_isolates_its_declared_directions() {
    use policy::Direction::{Egress, Ingress};
    for (spec, ingress, egress) in [
        (
            json!({"podSelector": {}, "policyTypes": ["Egress"], "odd": 1}),
            false,
            true,
        ),
        (
            json!({"podSelector": {}, "ingress": [{"odd": 1}]}),
            true,
            false,
        ),
        (
            json!({"podSelector": {}, "egress": [{"odd": 1}]}),
            true,
            true,
        ),
        (
            json!({"podSelector": {}, "policyTypes": ["Sideways"]}),
            true,
            true,
        ),
        (
            json!({"podSelector": {"odd": 1}, "policyTypes": ["Ingress"]}),
            true,
            false,
        ),
        (json!("odd"), true, true),
        (Value::Null, true, true),
    ] {
        let now = Instant::now();
        let mut state = listed(now);
        state.take(
            Kind::NetworkPolicy,
            Update::Changed(policy("q", spec.clone())),
            now,
        );
        let batch = state.changes(now).expect("q");
        let [Event::Upsert(Object::NetworkPolicy(q))] = batch.events.as_slice() else {
            panic!("{spec}: {:?}", batch.events);
        };
        assert_eq!(
            (q.isolates(Ingress), q.isolates(Egress)),
            (ingress, egress),
            "{spec}"
        );
    }
}

#[test]
fn saved_objects_restore_the_same_state() {
    let now = Instant::now();
    let mut state = listed(now);
    let bad = json!({"podSelector": {"matchLabels": {"a": "b"}}, "odd": 1});
    state.take(Kind::NetworkPolicy, Update::Changed(policy("q", bad)), now);
    state.changes(now).expect("q");
    let mut restored = State::default();
    let batch = restored.restore(kept(&state));
    assert_eq!(batch.events.len(), 3);
    assert_eq!(restored.sent, state.sent);
    assert!(
        restored.changes(now).is_none(),
        "the API server has said nothing yet"
    );
}

#[test]
fn a_neighbours_change_precedes_many_large_ones() {
    let now = Instant::now();
    let mut state = listed(now);
    let values: Vec<String> = (0..1000).map(|number| format!("v{number}")).collect();
    let large = json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "NotIn", "values": values}]}});
    for number in 0..40 {
        let changed = policy(&format!("p{number}"), large.clone());
        state.take(Kind::NetworkPolicy, Update::Changed(changed), now);
    }
    let mut neighbour = policy("p", json!({"podSelector": {}}));
    neighbour["metadata"]["namespace"] = "y".into();
    state.take(Kind::NetworkPolicy, Update::Changed(neighbour), now);
    let counts = |state: &mut State| state.changes(now).map_or(0, |it| it.events.len());
    let found = [0; 3].map(|_| counts(&mut state));
    assert_eq!(found, [1, 40, 0], "the neighbour, then all others together");
    // After an outage there are no turns.
    lose_all(&mut state, now);
    for number in 0..40 {
        let name = format!("p{number}");
        state.take(
            Kind::NetworkPolicy,
            Update::Changed(policy(&name, json!({"podSelector": {}}))),
            now,
        );
    }
    for number in 0..300 {
        state.take(Kind::Pod, Update::Changed(pod(&format!("p{number}"))), now);
    }
    for kind in Kind::ALL {
        state.take(kind, Update::Resumed, now);
    }
    let batch = state.changes(now).expect("all of them");
    assert_eq!(batch.events.len(), 340);
    let pairs = turns::pairs(&state.sent, &"x".into());
    assert_eq!(pairs, 301 * 41, "of this namespace only");
}
