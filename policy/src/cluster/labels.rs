//! An index of pods and namespaces by their labels: the cost of finding a selector's pods is the
//! number of matches, not of all pods.
//!
//! Each thing has a slot, a small number that is reused after the thing is gone, so that large sets
//! can be bitmaps. Knows neither selectors' ids nor the effects of a match.
use std::cell::OnceCell;
use std::collections::HashMap;
use std::sync::Arc;

use crate::model::{Labels, Namespace, Pod};
use crate::selector::{Requirement, Test};

/// Number of a thing in its [`ByLabel`].
pub(super) type Slot = u32;

/// The key under which a pod is listed by its namespace's name; no label has an empty key.
pub(super) const NAMESPACE: &str = "";

/// Up to this many candidates are checked one by one; more are handled as bitmaps.
const FEW: usize = 64;

/// Comparisons that checking candidates one by one may take.
const COMPARISONS: usize = 1024;

/// A thing that is listed by its labels.
pub(super) trait Labelled {
    fn labels(&self) -> &Labels;
    /// The name of its namespace, if it has one.
    fn namespace(&self) -> Option<&Arc<str>>;
}

impl Labelled for Arc<Pod> {
    fn labels(&self) -> &Labels {
        &self.labels
    }

    fn namespace(&self) -> Option<&Arc<str>> {
        Some(&self.key.namespace)
    }
}

impl Labelled for Arc<Namespace> {
    fn labels(&self) -> &Labels {
        (**self).labels()
    }

    fn namespace(&self) -> Option<&Arc<str>> {
        None
    }
}

/// Things by slot, and slots by label.
#[derive(Debug)]
pub(super) struct ByLabel<T> {
    things: Vec<Option<T>>,
    free: Vec<Slot>,
    keys: HashMap<Arc<str>, Values>,
}

/// The things that have a label of one key.
#[derive(Debug, Default)]
struct Values {
    /// Sorted; never empty.
    slots: HashMap<Arc<str>, Vec<Slot>>,
    /// The slots of all values together.
    count: usize,
}

/// A set of slots.
#[derive(Clone, Debug)]
pub(super) struct Bits(Vec<u64>);

impl<T> Default for ByLabel<T> {
    fn default() -> Self {
        Self {
            things: Vec::new(),
            free: Vec::new(),
            keys: HashMap::new(),
        }
    }
}

impl<T: Labelled> ByLabel<T> {
    pub(super) fn insert(&mut self, thing: T) -> Slot {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.things.push(None);
            slot_of(self.things.len() - 1)
        });
        let namespace = thing.namespace().map(|name| (Arc::from(NAMESPACE), name));
        let namespace = namespace.iter().map(|(key, name)| (key, *name));
        for (key, value) in thing.labels().iter().chain(namespace) {
            let values = self.keys.entry(key.clone()).or_default();
            let slots = values.slots.entry(value.clone()).or_default();
            if let Err(at) = slots.binary_search(&slot) {
                slots.insert(at, slot);
                values.count += 1;
            }
        }
        self.things[slot as usize] = Some(thing);
        slot
    }

    pub(super) fn remove(&mut self, slot: Slot) {
        let Some(thing) = self.things[slot as usize].take() else {
            return;
        };
        let namespace = thing.namespace().map(|name| (Arc::from(NAMESPACE), name));
        let namespace = namespace.iter().map(|(key, name)| (key, *name));
        for (key, value) in thing.labels().iter().chain(namespace) {
            let Some(values) = self.keys.get_mut(key) else {
                continue;
            };
            if let Some(slots) = values.slots.get_mut(value) {
                if let Ok(at) = slots.binary_search(&slot) {
                    slots.remove(at);
                    values.count -= 1;
                }
                if slots.is_empty() {
                    values.slots.remove(value);
                }
            }
            if values.slots.is_empty() {
                self.keys.remove(key);
            }
        }
        self.free.push(slot);
    }

    /// Replaces a thing that has the same labels and namespace.
    pub(super) fn replace(&mut self, slot: Slot, thing: T) {
        self.things[slot as usize] = Some(thing);
    }

    pub(super) fn get(&self, slot: Slot) -> Option<&T> {
        self.things.get(slot as usize)?.as_ref()
    }

    /// All slots are below this.
    pub(super) fn slots_end(&self) -> usize {
        self.things.len()
    }

    /// How many things have the label that a requirement names; for a negative one, these are the
    /// ones that do not meet it.
    pub(super) fn count(&self, requirement: &Requirement) -> usize {
        let Some(values) = self.keys.get(&requirement.key) else {
            return 0;
        };
        match &requirement.test {
            Test::In(names) | Test::NotIn(names) => {
                let slots = names.iter().filter_map(|name| values.slots.get(name));
                slots.map(Vec::len).sum()
            }
            Test::Exists | Test::DoesNotExist => values.count,
        }
    }

    /// Those that [`Self::count`] counts, in no order.
    fn slots(&self, requirement: &Requirement) -> Vec<Slot> {
        let Some(values) = self.keys.get(&requirement.key) else {
            return Vec::new();
        };
        match &requirement.test {
            Test::In(names) | Test::NotIn(names) => {
                let slots = names.iter().filter_map(|name| values.slots.get(name));
                slots.flatten().copied().collect()
            }
            Test::Exists | Test::DoesNotExist => values.slots.values().flatten().copied().collect(),
        }
    }

    fn bits(&self, requirement: &Requirement) -> Bits {
        let mut bits = Bits(vec![0; self.things.len().div_ceil(64)]);
        for slot in self.slots(requirement) {
            bits.0[slot as usize / 64] |= 1 << (slot % 64);
        }
        bits
    }

    fn everything(&self) -> Bits {
        let mut bits = Bits(vec![0; self.things.len().div_ceil(64)]);
        for (slot, thing) in self.things.iter().enumerate() {
            bits.0[slot / 64] |= u64::from(thing.is_some()) << (slot % 64);
        }
        bits
    }
}

/// A requirement that many selectors share, with the slots that meet it.
pub(super) struct Shared {
    requirement: Requirement,
    count: usize,
    bits: OnceCell<Bits>,
}

/// Finds the matches of many selectors, and evaluates each requirement only once.
pub(super) struct Search<'a, T> {
    index: &'a ByLabel<T>,
    everything: OnceCell<Bits>,
    bits: HashMap<&'a Requirement, Bits>,
}

impl Shared {
    /// A positive requirement on the things of `index`.
    pub(super) fn new<T: Labelled>(requirement: Requirement, index: &ByLabel<T>) -> Self {
        Self {
            count: index.count(&requirement),
            bits: OnceCell::new(),
            requirement,
        }
    }
}

impl<'a, T: Labelled> Search<'a, T> {
    pub(super) fn new(index: &'a ByLabel<T>) -> Self {
        Self {
            index,
            everything: OnceCell::new(),
            bits: HashMap::new(),
        }
    }

    /// The slots of the things that meet all `requirements`, and `shared` if it is given; sorted.
    pub(super) fn find(
        &mut self,
        requirements: &'a [Requirement],
        shared: Option<&Shared>,
    ) -> Vec<Slot> {
        let positive = requirements.iter().filter(|it| it.is_positive());
        let narrowest = positive.map(|it| (self.index.count(it), it));
        let narrowest = narrowest.chain(shared.map(|it| (it.count, &it.requirement)));
        let narrowest = narrowest.min_by_key(|(count, _)| *count);
        if let Some((count, narrowest)) = narrowest
            && count <= FEW
            && count * requirements.len() <= COMPARISONS
        {
            let mut slots = self.index.slots(narrowest);
            slots.retain(|&slot| {
                let wanted = shared.map(|it| &it.requirement).into_iter();
                let mut wanted = requirements.iter().chain(wanted);
                let thing = self.index.get(slot);
                thing.is_some_and(|it| wanted.all(|wanted| met(wanted, it)))
            });
            slots.sort_unstable();
            return slots;
        }
        let mut found = match shared {
            Some(shared) => {
                let bits = || self.index.bits(&shared.requirement);
                shared.bits.get_or_init(bits).clone()
            }
            None => {
                let bits = || self.index.everything();
                self.everything.get_or_init(bits).clone()
            }
        };
        for requirement in requirements {
            self.narrow(&mut found, requirement);
        }
        found.slots()
    }

    fn narrow(&mut self, found: &mut Bits, requirement: &'a Requirement) {
        let positive = requirement.is_positive();
        if self.index.count(requirement) <= FEW {
            let mut named = Bits(vec![0; found.0.len()]);
            for slot in self.index.slots(requirement) {
                let (word, bit) = (slot as usize / 64, 1 << (slot % 64));
                named.0[word] |= found.0[word] & bit;
                found.0[word] &= !bit;
            }
            if positive {
                *found = named;
            }
            return;
        }
        let bits = self.bits_of(requirement);
        for (word, other) in found.0.iter_mut().zip(&bits.0) {
            *word &= if positive { *other } else { !*other };
        }
    }

    fn bits_of(&mut self, requirement: &'a Requirement) -> &Bits {
        let index = self.index;
        self.bits
            .entry(requirement)
            .or_insert_with(|| index.bits(requirement))
    }
}

impl Bits {
    fn slots(&self) -> Vec<Slot> {
        let mut slots = Vec::new();
        for (at, &word) in self.0.iter().enumerate() {
            let mut rest = word;
            while rest != 0 {
                slots.push(slot_of(at * 64) + rest.trailing_zeros());
                rest &= rest - 1;
            }
        }
        slots
    }
}

fn met(requirement: &Requirement, thing: &impl Labelled) -> bool {
    if &*requirement.key == NAMESPACE {
        requirement.test.holds(thing.namespace())
    } else {
        requirement.holds(thing.labels())
    }
}

/// The things fit into memory, so there are far fewer than four billion slots.
fn slot_of(at: usize) -> Slot {
    Slot::try_from(at).unwrap_or(Slot::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::Problems;
    use crate::selector::LabelSelector;

    fn selector(yaml: &str) -> LabelSelector {
        let mut problems = Problems::default();
        let raw = serde_saphyr::from_str(yaml).unwrap();
        let selector = LabelSelector::new(raw, "s", &mut problems);
        problems.or(selector).unwrap()
    }

    fn namespace(number: usize) -> Arc<Namespace> {
        let mut labels = Labels::from([("parity".into(), ["even", "odd"][number % 2].into())]);
        labels.insert("number".into(), number.to_string().into());
        if number.is_multiple_of(3) {
            labels.insert("third".into(), "".into());
        }
        Arc::new(Namespace::new(format!("n{number}"), labels))
    }

    #[test]
    fn search_finds_all_matches_of_each_selector() {
        for things in [0, 1, 10, 63, 64, 65, 300] {
            let mut index = ByLabel::default();
            let mut slots: Vec<Slot> = (0..things).map(|n| index.insert(namespace(n))).collect();
            // Other things reuse the slots.
            for slot in slots.iter().step_by(5) {
                index.remove(*slot);
            }
            slots.retain(|slot| index.get(*slot).is_some());
            slots.extend((things..things + things / 10).map(|n| index.insert(namespace(n))));
            slots.sort_unstable();
            let mut search = Search::new(&index);
            let selectors: Vec<_> = [
                "{}",
                "matchLabels: {parity: even}",
                "matchLabels: {parity: even, number: '4'}",
                "matchLabels: {parity: none}",
                "matchLabels: {none: even}",
                "matchExpressions: [{key: third, operator: Exists}]",
                "matchExpressions: [{key: third, operator: DoesNotExist}]",
                "matchExpressions: [{key: number, operator: NotIn, values: ['1', '2', '299']}]",
                "matchExpressions: [{key: number, operator: In, values: ['1', '7', none]}]",
                "matchExpressions: [{key: number, operator: Exists}, {key: third, operator: DoesNotExist}]",
                "{matchLabels: {parity: odd}, matchExpressions: [{key: third, operator: Exists}]}",
            ]
            .map(selector)
            .into();
            for selector in &selectors {
                let found = search.find(selector.requirements(), None);
                let mut expected = slots.clone();
                expected.retain(|slot| selector.matches(index.get(*slot).unwrap().labels()));
                assert_eq!(found, expected, "{selector:?} of {things}");
                let odd = Requirement {
                    key: "parity".into(),
                    test: Test::In(["odd".into()].into()),
                };
                let found = search.find(selector.requirements(), Some(&Shared::new(odd, &index)));
                expected.retain(|slot| &*index.get(*slot).unwrap().labels()["parity"] == "odd");
                assert_eq!(found, expected, "{selector:?} of {things} odd");
            }
        }
    }

    #[test]
    fn removal_leaves_nothing_behind() {
        let mut index = ByLabel::default();
        let slots: Vec<Slot> = (0..100).map(|n| index.insert(namespace(n))).collect();
        slots.into_iter().for_each(|slot| index.remove(slot));
        assert!(index.keys.is_empty());
        assert_eq!(index.insert(namespace(1)), 99, "slots are given again");
    }
}
