//! That one verdict reads one generation, shown with readers that would see a mix.
use std::sync::atomic::AtomicBool;

use policy::{NetworkPolicy, Pod, PolicyKey};

use super::*;
use crate::testing::{self, ip};
use crate::{Batch, Event, Index, Object, ObjectKey};

const A: &str = "10.0.0.1";
const B: &str = "10.0.0.2";

fn pod(name: &str, address: &str) -> Object {
    Object::from(Pod {
        node: "".into(),
        ..testing::pod(name, address)
    })
}

fn policy_key() -> PolicyKey {
    PolicyKey {
        namespace: "x".into(),
        name: "deny".into(),
    }
}

/// Isolates every pod of the namespace both ways.
fn deny() -> Event {
    let spec = serde_json::json!({"policyTypes": ["Ingress", "Egress"]});
    let spec = serde_json::from_value(spec).unwrap();
    Event::Upsert(Object::from(
        NetworkPolicy::new(policy_key(), spec).unwrap(),
    ))
}

fn batch(events: Vec<Event>) -> Batch {
    Batch {
        events,
        ..Batch::default()
    }
}

/// The policy isolates both pods or neither, so a verdict in which one side is isolated and the
/// other is not was read from two generations.
#[test]
fn no_reader_sees_two_generations_in_one_verdict() {
    const FLIPS: usize = 5_000;
    let table = Table::new(TableSettings::default());
    let mut index = Index::new(Arc::clone(&table));
    index.apply(batch(vec![
        Event::Upsert(pod("a", A)),
        Event::Upsert(pod("b", B)),
    ]));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let readers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let mut seen = [0_usize; 2];
                    while !done.load(Ordering::Relaxed) || seen.contains(&0) {
                        let decided = table.decide(ip(A), ip(B), Some(80), Protocol::Tcp);
                        let verdict = decided.expect("both pods are known").verdict;
                        let (egress, ingress) = (verdict.egress.isolated, verdict.ingress.isolated);
                        assert_eq!(egress, ingress, "two generations in one verdict");
                        seen[usize::from(egress)] += 1;
                    }
                })
            })
            .collect();
        for flip in 0.. {
            let remove = Event::Delete(ObjectKey::NetworkPolicy(policy_key()));
            index.apply(batch(vec![if flip % 2 == 0 { deny() } else { remove }]));
            done.store(flip >= FLIPS, Ordering::Relaxed);
            if readers.iter().all(thread::ScopedJoinHandle::is_finished) {
                break;
            }
        }
    });
    assert!(table.generation() > FLIPS as u64);
}

/// A pod moves to another address in every batch: exactly one of the two owns it at any time.
#[test]
fn notified_listener_finds_the_new_entries() {
    let table = Table::new(TableSettings::default());
    let mut index = Index::new(Arc::clone(&table));
    let changed = table.changed();
    for (round, (here, gone)) in (1..).zip([(A, B), (B, A)].into_iter().cycle().take(50)) {
        index.apply(batch(vec![Event::Upsert(pod("a", here))]));
        assert_eq!(*changed.borrow(), round);
        assert_eq!(table.generation(), round);
        assert!(table.endpoint(ip(here)).is_some() && table.endpoint(ip(gone)).is_none());
    }
}

#[test]
fn reader_waits_while_a_generation_is_written() {
    let table = Table::new(TableSettings::default());
    Index::new(Arc::clone(&table)).apply(batch(vec![Event::Upsert(pod("a", A))]));
    table.sequence.fetch_add(1, Ordering::AcqRel);
    thread::scope(|scope| {
        let reader = scope.spawn(|| table.endpoint(ip(A)));
        for _ in 0..1_000 {
            thread::yield_now();
            assert!(!reader.is_finished(), "read half a generation");
        }
        table.sequence.fetch_add(1, Ordering::AcqRel);
        assert!(reader.join().unwrap().is_some());
    });
}

/// Two pods without policy in a node's pod CIDR, for connections of the first to the second.
fn two_pods() -> (Arc<Table>, Index) {
    let table = Table::new(TableSettings::default());
    let mut index = Index::new(Arc::clone(&table));
    index.apply(batch(vec![
        Event::Upsert(node("n1", "10.0.0.0/24", "192.168.0.1")),
        Event::Upsert(pod("a", A)),
        Event::Upsert(pod("b", B)),
    ]));
    (table, index)
}

fn node(name: &str, pods: &str, address: &str) -> Object {
    Object::Node(policy::Node {
        name: name.into(),
        addresses: vec![ip(address)],
        pod_cidrs: vec![pods.parse().unwrap()],
    })
}

fn unknown(table: &Table, from: &str, to: &str) -> Option<String> {
    let decided = table.decide(ip(from), ip(to), Some(80), Protocol::Tcp);
    decided.err().map(|unknown| unknown.0.to_string())
}

#[test]
fn a_vacated_address_gives_a_pod_no_rights() {
    let (table, mut index) = two_pods();
    let holder = table.endpoint(ip(A)).unwrap().identity.clone();
    let left = UncertainAddresses {
        vacant: [(ip(A), vec![holder])].into(),
        ..UncertainAddresses::default()
    };
    let before = table.generation();
    assert_eq!(table.set_uncertain(left.clone()), [ip(A)].into());
    assert_eq!(table.generation(), before + 1);
    assert_eq!(table.set_uncertain(left), [].into(), "nothing new");
    assert_eq!(unknown(&table, A, B).as_deref(), Some(A));
    assert_eq!(unknown(&table, B, A).as_deref(), Some(A));
    assert!(table.local("")[0].vacant && !table.local("")[1].vacant);

    index.apply(batch(vec![deny()]));
    assert_eq!(
        unknown(&table, A, B).as_deref(),
        Some(A),
        "policies change nothing"
    );
    let another = |uid: &str| match pod("a", A) {
        Object::Pod(pod) => Object::from(Pod {
            uid: uid.into(),
            ..(*pod).clone()
        }),
        _ => panic!("a pod"),
    };
    index.apply(batch(vec![Event::Upsert(another("2"))]));
    assert_eq!(unknown(&table, A, B), None, "the API names another pod");
    index.apply(batch(vec![Event::Delete(another("2").key())]));
    assert_eq!(unknown(&table, A, B).as_deref(), Some(A));
    assert_eq!(
        table.set_uncertain(UncertainAddresses::default()),
        [ip(A)].into()
    );
}

#[test]
fn an_awaited_address_is_unknown_until_claimed() {
    const OUTSIDE: &str = "192.168.77.5";
    let (table, mut index) = two_pods();
    assert_eq!(unknown(&table, OUTSIDE, A), None);
    let awaited = UncertainAddresses {
        awaited: [ip(OUTSIDE)].into(),
        ..UncertainAddresses::default()
    };
    assert_eq!(table.set_uncertain(awaited), [ip(OUTSIDE)].into());
    assert_eq!(unknown(&table, OUTSIDE, A).as_deref(), Some(OUTSIDE));
    index.apply(batch(vec![Event::Upsert(pod("c", OUTSIDE))]));
    assert_eq!(unknown(&table, OUTSIDE, A), None);
}

#[test]
fn a_node_cannot_claim_another_nodes_pod_addresses() {
    let (table, mut index) = two_pods();
    assert!(unknown(&table, "10.0.0.9", A).is_some());
    index.apply(batch(vec![Event::Upsert(node(
        "n2",
        "10.0.1.0/24",
        "10.0.0.9",
    ))]));
    assert!(unknown(&table, "10.0.0.9", A).is_some());
    index.apply(batch(vec![Event::Upsert(node(
        "n2",
        "10.0.1.0/24",
        "10.0.1.9",
    ))]));
    assert_eq!(unknown(&table, "10.0.1.9", A), None, "of its own");
}

/// A pod of another node claims a Node's address and isolates itself: that closes the address for nobody.
#[test]
fn a_claim_closes_no_nodes_address() {
    const NODE: &str = "192.0.2.7";
    let claimed_on = |on: &str| {
        let table = Table::new(TableSettings {
            node: "n1".into(),
            ..TableSettings::default()
        });
        let mut index = Index::new(Arc::clone(&table));
        let Object::Pod(claimant) = pod("claimant", NODE) else {
            panic!("a pod")
        };
        let claimant = Object::from(Pod {
            node: on.into(),
            ..(*claimant).clone()
        });
        index.apply(batch(vec![
            Event::Upsert(node("n2", "10.0.2.0/24", NODE)),
            Event::Upsert(claimant),
            deny(),
        ]));
        let decided = table.decide(ip("198.51.100.1"), ip(NODE), Some(80), Protocol::Tcp);
        (decided.unwrap().verdict.allowed(), table.holder(ip(NODE)))
    };
    for on in ["n2", "n3"] {
        assert!(matches!(claimed_on(on), (true, Holder::Node)), "{on}");
    }
    // It may be a pod of this node, and the Node object be an old one.
    assert!(matches!(claimed_on("n1"), (false, Holder::Pod(_))));
}

#[test]
fn an_address_is_pod_node_unknown_or_outside() {
    let table = Table::new(TableSettings {
        cluster_cidrs: vec!["10.0.0.0/24".parse().unwrap()],
        ..TableSettings::default()
    });
    let mut index = Index::new(Arc::clone(&table));
    index.apply(batch(vec![Event::Upsert(pod("a", A))]));
    table.set_gateways([ip("10.0.0.254")].into());
    assert!(matches!(table.holder(ip(A)), Holder::Pod(pod) if &*pod.identity.key.name == "a"));
    assert!(matches!(table.holder(ip("10.0.0.254")), Holder::Node));
    assert!(matches!(table.holder(ip("10.0.0.9")), Holder::Unknown));
    assert!(matches!(table.holder(ip("192.0.2.1")), Holder::Outside));
}
