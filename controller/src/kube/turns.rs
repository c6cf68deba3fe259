//! Which of the changes that wait come into force next, so that one namespace's do not delay others'.
//!
//! All that waits of a namespace comes into force together, since its parts in another order than
//! the API server's could open what never was open. If there is much to do, the namespaces with
//! least go first, and those with more than fits have turns of their own in between, one after the
//! other. Knows nothing of what the changes mean.
use std::collections::BTreeMap;
use std::sync::Arc;

use policy::PolicyKey;

use crate::{Object, ObjectKey};

/// What several namespaces together may have in one turn. A change counts as one, and a policy as
/// one more for each [`SPEC`] bytes.
const TURN: usize = 256;
/// Bytes of a policy's `spec` that count like a change.
const SPEC: usize = 1024;

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
    /// Takes out of `waiting` what comes next; `spec` is the length of a policy's `spec`.
    pub(super) fn next(
        &mut self,
        waiting: &mut Waiting,
        spec: impl Fn(&PolicyKey) -> usize,
    ) -> Waiting {
        let mut sizes: BTreeMap<Option<Arc<str>>, usize> = BTreeMap::new();
        for key in waiting.keys() {
            let size = match key {
                ObjectKey::NetworkPolicy(key) => 1 + spec(key) / SPEC,
                _ => 1,
            };
            *sizes.entry(namespace(key).cloned()).or_default() += size;
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
        for key in turns.next(waiting, |_| 20_000).into_keys() {
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
}
