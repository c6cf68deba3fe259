//! What readers of the table see while changes come without end: never more than one state or the
//! next would give, and never another pod's rights.
#![expect(
    clippy::unwrap_used,
    reason = "a test panics at what it cannot do; clippy knows helpers of tests for none"
)]
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};
use std::thread;

use controller::{Batch, Decision, Event, Index, Object, ObjectKey, Table, TableSettings};
use policy::{Labels, Namespace, NetworkPolicy, Node, Pod, PodKey, PolicyKey, Protocol};
use serde_json::{Value, json};

const APPS: [&str; 3] = ["red", "green", "blue"];
const NAMESPACES: [&str; 2] = ["x", "y"];
/// Addresses that pods may have: few, so that they are taken over often.
const ADDRESSES: u8 = 6;

/// SplitMix64 (Steele, Lea and Flood 2014): the same sequence for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % bound as u64).unwrap()
    }

    fn of<'a, T: ?Sized>(&mut self, choices: &[&'a T]) -> &'a T {
        choices[self.below(choices.len())]
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

fn address(number: u8) -> IpAddr {
    [10, 0, 0, number].into()
}

fn label(key: &str, value: &str) -> Labels {
    Labels::from([(key.into(), value.into())])
}

fn pod(name: &str, app: &str, at: IpAddr, born: usize) -> Pod {
    Pod {
        key: PodKey {
            namespace: NAMESPACES[born % 2].into(),
            name: name.into(),
        },
        uid: format!("u{born}").into(),
        labels: label("app", app),
        node: "n1".into(),
        host_network: false,
        ports: Vec::new(),
        addresses: vec![at],
        finished: false,
        terminating: false,
        started: format!("2026-01-01T00:00:00.{born:09}Z").into(),
        oversized: false,
    }
}

fn policy(namespace: &str, name: &str, spec: Value) -> Object {
    let key = PolicyKey {
        namespace: namespace.into(),
        name: name.into(),
    };
    let spec = serde_json::from_value(spec).unwrap();
    Object::from(NetworkPolicy::new(key, spec).unwrap())
}

fn node() -> Object {
    Object::Node(Node {
        name: "n1".into(),
        addresses: Vec::new(),
        pod_cidrs: vec!["10.0.0.0/24".parse().unwrap()],
    })
}

fn batch(events: Vec<Event>) -> Batch {
    Batch {
        events,
        ..Batch::default()
    }
}

/// One change of a cluster, perhaps of several objects.
fn change(random: &mut Random, objects: &BTreeMap<ObjectKey, Object>, born: usize) -> Vec<Event> {
    let pods: Vec<&Pod> = objects
        .values()
        .filter_map(|object| match object {
            Object::Pod(pod) => Some(&**pod),
            _ => None,
        })
        .collect();
    let app = random.of(&APPS);
    let at = address(u8::try_from(random.below(ADDRESSES.into())).unwrap());
    let new = || Event::Upsert(Object::from(pod(&format!("p{born}"), app, at, born)));
    let holder = pods.iter().find(|pod| pod.addresses == [at]);
    let edited = |edit: fn(&mut Pod, &str)| {
        let mut pod = (*holder?).clone();
        edit(&mut pod, app);
        Some(vec![Event::Upsert(Object::from(pod))])
    };
    let namespace = random.of(&NAMESPACES);
    let name = random.of(&["p1", "p2", "p3"]);
    let some = match random.below(9) {
        0 => edited(|pod, app| pod.labels = label("app", app)),
        1 => edited(|pod, _| pod.finished = true),
        2 => edited(|pod, _| pod.terminating = true),
        3 => holder.map(|pod| vec![Event::Delete(ObjectKey::Pod(pod.key.clone()))]),
        // The address goes over at once; or the old holder's end is reported later, or never.
        4 => holder.map(|pod| vec![Event::Delete(ObjectKey::Pod(pod.key.clone())), new()]),
        5 => Some(vec![new()]),
        6 => {
            let labels = label("team", app);
            let relabelled = Namespace::new(namespace, labels);
            Some(vec![Event::Upsert(Object::Namespace(relabelled))])
        }
        7 => {
            let key = policy(namespace, name, json!({})).key();
            objects.contains_key(&key).then(|| vec![Event::Delete(key)])
        }
        _ => None,
    };
    some.unwrap_or_else(|| {
        let peers = [
            json!([{ "podSelector": { "matchLabels": { "app": app } } }]),
            json!([{ "namespaceSelector": { "matchLabels": { "team": app } } }]),
            json!([{ "ipBlock": { "cidr": "10.0.0.0/30" } }]),
        ];
        let peer = peers[random.below(peers.len())].clone();
        let own = json!({ "matchLabels": { "app": random.of(&APPS) } });
        let specs = [
            json!({ "podSelector": own, "policyTypes": ["Ingress"], "ingress": [{ "from": peer }] }),
            json!({ "podSelector": own, "policyTypes": ["Egress"], "egress": [{ "to": peer }] }),
            json!({ "podSelector": own, "policyTypes": ["Ingress", "Egress"] }),
        ];
        let spec = specs[random.below(specs.len())].clone();
        vec![Event::Upsert(policy(namespace, name, spec))]
    })
}

/// What a reader sees of two addresses: may they, by which pods, and who isolates; or unknown.
type Seen = Option<(bool, Option<Arc<str>>, Option<Arc<str>>, [bool; 2])>;

fn look(table: &Table, from: IpAddr, to: IpAddr) -> Seen {
    let decided = table.decide(from, to, Some(80), Protocol::Tcp);
    let Decision { verdict, from, to } = decided.ok()?;
    Some((
        verdict.allowed(),
        from.map(|pod| Arc::clone(&pod.identity.uid)),
        to.map(|pod| Arc::clone(&pod.identity.uid)),
        [verdict.egress.isolated, verdict.ingress.isolated],
    ))
}

fn pairs() -> Vec<(IpAddr, IpAddr)> {
    let ends = || (0..ADDRESSES).map(address);
    ends().flat_map(|a| ends().map(move |b| (a, b))).collect()
}

/// What a table made afresh of these objects says of every pair.
fn truth(objects: &BTreeMap<ObjectKey, Object>) -> Vec<Seen> {
    let table = Table::new(TableSettings::default());
    let events = objects.values().cloned().map(Event::Upsert).collect();
    Index::new(Arc::clone(&table)).apply(batch(events));
    let look = |(from, to)| look(&table, from, to);
    pairs().into_iter().map(look).collect()
}

#[test]
fn readers_see_old_or_new_state_never_between() {
    const BATCHES: usize = 600;
    const READERS: u64 = 3;
    let table = Table::new(TableSettings::default());
    let mut index = Index::new(Arc::clone(&table));
    let mut objects = BTreeMap::from([(node().key(), node())]);
    index.apply(batch(vec![Event::Upsert(node())]));
    // The truth after each batch; it is there before the batch begins to come into force.
    let history = RwLock::new(vec![truth(&objects)]);
    let (begun, in_force) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let done = AtomicBool::new(false);
    let pairs = pairs();
    let mut random = Random(1);
    thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS)
            .map(|seed| {
                let (table, history, pairs) = (&table, &history, &pairs);
                let (begun, in_force, done) = (&begun, &in_force, &done);
                scope.spawn(move || {
                    let mut random = Random(100 + seed);
                    let mut looks = 0;
                    while !done.load(Ordering::Relaxed) {
                        let at = random.below(pairs.len());
                        let first = in_force.load(Ordering::SeqCst);
                        let seen = look(table, pairs[at].0, pairs[at].1);
                        let last = begun.load(Ordering::SeqCst);
                        let history = history.read().unwrap();
                        let states = &history[first..=last];
                        assert!(
                            states.iter().any(|state| state[at] == seen),
                            "{:?} between batches {first} and {last}: {seen:?}, but {:?}",
                            pairs[at],
                            states.iter().map(|state| &state[at]).collect::<Vec<_>>()
                        );
                        looks += 1;
                    }
                    looks
                })
            })
            .collect();
        for number in 1..=BATCHES {
            let mut events: BTreeMap<ObjectKey, Event> = BTreeMap::new();
            for part in 0..=random.below(3) {
                for event in change(&mut random, &objects, number * 4 + part) {
                    let key = match &event {
                        Event::Upsert(object) => object.key(),
                        Event::Delete(key) => key.clone(),
                    };
                    events.insert(key, event);
                }
            }
            // Of one object events come in order; of several in any.
            let mut events: Vec<Event> = events.into_values().collect();
            random.shuffle(&mut events);
            for event in &events {
                match event {
                    Event::Upsert(object) => drop(objects.insert(object.key(), object.clone())),
                    Event::Delete(key) => drop(objects.remove(key)),
                }
            }
            history.write().unwrap().push(truth(&objects));
            begun.store(number, Ordering::SeqCst);
            index.apply(batch(events));
            in_force.store(number, Ordering::SeqCst);
            if readers.iter().any(thread::ScopedJoinHandle::is_finished) {
                break;
            }
        }
        done.store(true, Ordering::Relaxed);
        for reader in readers {
            assert!(reader.join().unwrap() > BATCHES, "too few looks");
        }
    });
    // Both answers and unknown addresses were among what was seen.
    let history = history.into_inner().unwrap();
    let answers = |wanted: Option<bool>| {
        let all = history.iter().flatten();
        all.filter(|seen| seen.as_ref().map(|seen| seen.0) == wanted)
            .count()
    };
    for wanted in [Some(true), Some(false), None] {
        assert!(answers(wanted) > BATCHES, "{wanted:?}");
    }
}

/// An address goes from pod to pod; every other one may talk to the server. The end of the last
/// holder is reported before, with, or after the beginning of the next, and late updates of it come in
/// between. A question meanwhile gets the rights of the pod whose uid the answer names.
#[test]
fn reused_address_never_gets_another_pods_rights() {
    const REUSES: usize = 10_000;
    let (client, server) = (address(1), address(2));
    let table = Table::new(TableSettings::default());
    let mut index = Index::new(Arc::clone(&table));
    let spec = json!({
        "podSelector": { "matchLabels": { "app": "server" } },
        "ingress": [{ "from": [{ "namespaceSelector": {}, "podSelector": { "matchLabels": { "app": "even" } } }] }],
    });
    index.apply(batch(vec![
        Event::Upsert(node()),
        Event::Upsert(Object::from(pod("server", "server", server, 0))),
        Event::Upsert(policy("x", "only-even", spec)),
    ]));
    let holder = |number: usize| {
        let app = ["even", "odd"][number % 2];
        pod(&format!("holder-{number}"), app, client, number)
    };
    let upsert = |pod| Event::Upsert(Object::from(pod));
    let gone = |number| Event::Delete(ObjectKey::Pod(holder(number).key));
    let rightly = |seen: &Seen| match seen {
        None => true,
        Some((allowed, from, ..)) => {
            let number: usize = from.as_ref().unwrap()[1..].parse().unwrap();
            *allowed == number.is_multiple_of(2)
        }
    };
    let done = AtomicBool::new(false);
    let mut random = Random(2);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut looks = 0;
            while !done.load(Ordering::Relaxed) {
                let seen = look(&table, client, server);
                assert!(rightly(&seen), "{seen:?}");
                looks += 1;
            }
            looks
        });
        for number in 1..=REUSES {
            let last = number - 1;
            let late = |edit: fn(&mut Pod)| {
                let mut pod = holder(last);
                edit(&mut pod);
                upsert(pod)
            };
            let finished = || late(|pod| pod.finished = true);
            let terminating = || late(|pod| pod.terminating = true);
            let new = || upsert(holder(number));
            let orders: [Vec<Vec<Event>>; 6] = [
                vec![vec![gone(last)], vec![new()]],
                vec![vec![gone(last), new()]],
                vec![vec![new(), gone(last)]],
                vec![vec![new()], vec![terminating()], vec![gone(last)]],
                vec![vec![finished()], vec![new()], vec![gone(last)]],
                vec![vec![new()], vec![finished(), gone(last)]],
            ];
            let order = orders[random.below(orders.len())].clone();
            let mut begun = false;
            for events in order {
                begun |= events.contains(&new());
                index.apply(batch(events));
                let seen = look(&table, client, server);
                assert!(rightly(&seen), "reuse {number}: {seen:?}");
                let uid = seen.and_then(|seen| seen.1);
                assert!(!begun || uid == Some(holder(number).uid), "{uid:?}");
            }
        }
        done.store(true, Ordering::Relaxed);
        assert!(reader.join().unwrap() > REUSES / 10);
    });
}
