//! Which of the changes that wait come into force next, so that one namespace's do not delay others'.
//!
//! All that waits of a namespace comes into force together, since its parts in another order than
//! the API server's could open what never was open. If there is much to do, the namespaces with
//! least go first, and those with more than fits have turns of their own in between, one after the
//! other. Knows nothing of what the changes mean.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use policy::{PodKey, PolicyKey};

use crate::objects::Kind;
use crate::{Object, ObjectKey};

/// What several namespaces together may have in one turn. A change counts as one, a policy as one
/// more for each [`SPEC`] bytes, and changed policies as one more for each [`SELECTED`] pairs.
const TURN: usize = 256;
/// Bytes of a policy's `spec` that count like a change.
const SPEC: usize = 1024;
/// Pairs of a pod and a policy of the namespace that count like a change: one edit may concern them
/// all.
const SELECTED: usize = 2_000;

/// Whose turn it is.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// Namespaces with little to do have just had theirs.
    small: bool,
    /// The namespace that had the last turn of its own.
    last: Option<Arc<str>>,
}

type Waiting = BTreeMap<ObjectKey, Option<Object>>;

impl Turns {
    /// Takes out of `waiting` what comes next; `spec` is the length of a policy's `spec`, `pairs` the
    /// number of a namespace's pods times that of its policies.
    pub(super) fn next(
        &mut self,
        waiting: &mut Waiting,
        spec: impl Fn(&PolicyKey) -> usize,
        pairs: impl Fn(&Arc<str>) -> usize,
    ) -> Waiting {
        let mut sizes: BTreeMap<Option<Arc<str>>, usize> = BTreeMap::new();
        let mut changed = BTreeSet::new();
        for key in waiting.keys() {
            let size = sizes.entry(namespace(key).cloned()).or_default();
            *size += 1;
            if let ObjectKey::NetworkPolicy(key) = key {
                *size += spec(key) / SPEC;
                changed.insert(&key.namespace);
            }
        }
        for namespace in changed {
            if let Some(size) = sizes.get_mut(&Some(Arc::clone(namespace))) {
                *size += pairs(namespace) / SELECTED;
            }
        }
        let mut ascending: Vec<_> = sizes.iter().map(|(name, size)| (*size, name)).collect();
        ascending.sort_unstable();
        let mut sum = 0;
        let fitting = ascending.iter().take_while(|(size, _)| {
            sum += size;
            sum <= TURN
        });
        let fitting = fitting.count();
        let (small, large) = ascending.split_at(fitting);
        if large.is_empty() || fitting > 0 && !self.small {
            self.small = !large.is_empty();
            let chosen: Vec<_> = small.iter().map(|(_, name)| (*name).clone()).collect();
            return take(waiting, |key| chosen.contains(&namespace(key).cloned()));
        }
        self.small = false;
        let names = || large.iter().map(|(_, name)| *name);
        let next = names().filter(|name| **name > self.last).min();
        let next = next.or_else(|| names().min()).cloned().flatten();
        self.last.clone_from(&next);
        take(waiting, |key| namespace(key) == next.as_ref())
    }
}

fn take(waiting: &mut Waiting, mut wanted: impl FnMut(&ObjectKey) -> bool) -> Waiting {
    waiting.extract_if(.., |key, _| wanted(key)).collect()
}

/// How many pods a namespace has among `objects`, times how many policies.
pub(super) fn pairs(objects: &BTreeMap<ObjectKey, Object>, namespace: &Arc<str>) -> usize {
    let (namespace, name) = (Arc::clone(namespace), Arc::from(""));
    let pods = ObjectKey::Pod(PodKey {
        namespace: Arc::clone(&namespace),
        name: Arc::clone(&name),
    });
    let policies = ObjectKey::NetworkPolicy(PolicyKey { namespace, name });
    let [pods, policies] = [pods, policies].map(|first| {
        let of = |key: &ObjectKey| (Kind::of(key), self::namespace(key).cloned());
        let from = objects.range(&first..).map(|(key, _)| of(key));
        from.take_while(|key| *key == of(&first)).count()
    });
    pods * policies
}

/// The namespace that a change is of; a Node is of none.
fn namespace(key: &ObjectKey) -> Option<&Arc<str>> {
    match key {
        ObjectKey::Node(_) => None,
        ObjectKey::Namespace(name) => Some(name),
        ObjectKey::NetworkPolicy(key) => Some(&key.namespace),
        ObjectKey::Pod(key) => Some(&key.namespace),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(namespace: &str, count: usize) -> Waiting {
        let key = |number: usize| PolicyKey {
            namespace: namespace.into(),
            name: number.to_string().into(),
        };
        let keys = (0..count).map(|number| (ObjectKey::NetworkPolicy(key(number)), None));
        keys.collect()
    }

    /// The namespaces of each turn, with the number of their changes.
    fn turn(turns: &mut Turns, waiting: &mut Waiting) -> Vec<(String, usize)> {
        let mut found = BTreeMap::<String, usize>::new();
        for key in turns.next(waiting, |_| 20_000, |_| 0).into_keys() {
            let name = namespace(&key).map_or_else(String::new, ToString::to_string);
            *found.entry(name).or_default() += 1;
        }
        found.into_iter().collect()
    }

    #[test]
    fn neighbours_go_before_a_namespaces_many_changes() {
        let (mut turns, mut waiting) = (Turns::default(), changes("a", 40));
        waiting.extend(changes("b", 60));
        waiting.extend(changes("y", 1));
        assert_eq!(turn(&mut turns, &mut waiting), [("y".into(), 1)]);
        // Neighbours that come meanwhile wait for one of the large namespaces, not for all.
        waiting.extend(changes("y", 2));
        waiting.extend(changes("z", 1));
        assert_eq!(turn(&mut turns, &mut waiting), [("a".into(), 40)]);
        let neighbours = [("y".into(), 2), ("z".into(), 1)];
        assert_eq!(turn(&mut turns, &mut waiting), neighbours);
        waiting.extend(changes("a", 40));
        assert_eq!(turn(&mut turns, &mut waiting), [("b".into(), 60)]);
        assert_eq!(turn(&mut turns, &mut waiting), [("a".into(), 40)]);
        assert!(turn(&mut turns, &mut waiting).is_empty() && waiting.is_empty());
    }

    #[test]
    fn few_changes_come_into_force_together() {
        let (mut turns, mut waiting) = (Turns::default(), changes("a", 4));
        waiting.extend(changes("b", 4));
        waiting.insert(ObjectKey::Node("n".into()), None);
        assert_eq!(turn(&mut turns, &mut waiting).len(), 3);
        assert!(waiting.is_empty());
    }

    #[test]
    fn many_small_namespaces_all_get_their_turn() {
        let (mut turns, mut waiting) = (Turns::default(), Waiting::new());
        for number in 0..100 {
            waiting.extend(changes(&format!("n{number}"), 1));
        }
        let mut served = 0;
        for _ in 0..20 {
            served += turn(&mut turns, &mut waiting).len();
        }
        assert_eq!((served, waiting.len()), (100, 0));
    }

    #[test]
    fn edits_that_concern_many_pods_go_alone() {
        let (mut turns, mut waiting) = (Turns::default(), changes("a", 1));
        for namespace in ["b", "c", "y"] {
            waiting.extend(changes(namespace, 1));
        }
        let mut next = || {
            let pairs = |namespace: &Arc<str>| match &**namespace {
                "y" => 10,
                _ => 1_000 * 500,
            };
            let keys = turns.next(&mut waiting, |_| 100, pairs).into_keys();
            let names = keys.filter_map(|key| namespace(&key).map(ToString::to_string));
            names.collect::<Vec<_>>()
        };
        // The first of them still fits beside the neighbour.
        assert_eq!(next(), ["a", "y"]);
        assert_eq!(next(), ["c"]);
        assert_eq!(next(), ["b"]);
    }
}
