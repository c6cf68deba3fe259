//! The policies that isolate a pod in one direction, and what their rules allow.
//!
//! Refers to the list of all policies that select the pod, which both directions share, so that a
//! policy on a pod takes the eight bytes of its place in that list. Knows neither labels nor pods.
use std::ptr;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, OnceLock};

use crate::compile::{CompiledPolicy, Question, Rules};
use crate::decider::Decider;
use crate::model::{Direction, PolicyKey};

/// The policies that isolate a pod in one direction; never without any.
#[derive(Debug)]
pub(crate) struct Isolation {
    direction: Direction,
    /// All that select the pod, sorted by key; empty if no rule may open its address.
    selecting: Arc<[Arc<CompiledPolicy>]>,
    /// How many of them are enforced as written. A further one isolates in both directions and allows
    /// nothing.
    in_force: usize,
    decider: Decider,
    names: OnceLock<Arc<[PolicyKey]>>,
}

impl Isolation {
    /// The isolation of a pod by the policies that select it, if any isolates it. The namespace has
    /// `taken` merged entries now.
    pub(crate) fn new(
        direction: Direction,
        selecting: &Arc<[Arc<CompiledPolicy>]>,
        in_force: usize,
        taken: Arc<AtomicUsize>,
    ) -> Option<Self> {
        let isolation = Self {
            direction,
            selecting: selecting.clone(),
            in_force,
            decider: Decider::new(taken),
            names: OnceLock::new(),
        };
        isolation.policies().next()?;
        Some(isolation)
    }

    /// Isolation by policies with these names, of which no rule is known; `None` if there are none.
    pub(crate) fn closed(names: Arc<[PolicyKey]>) -> Option<Self> {
        (!names.is_empty()).then(|| Self {
            direction: Direction::Ingress,
            selecting: Arc::default(),
            in_force: 0,
            decider: Decider::default(),
            names: names.into(),
        })
    }

    /// The names of the policies; sorted and without duplicates.
    pub(crate) fn names(&self) -> &Arc<[PolicyKey]> {
        let names = || self.policies().map(|(key, _)| key.clone()).collect();
        self.names.get_or_init(names)
    }

    /// The policies with rules, sorted by key.
    pub(crate) fn rules(&self) -> impl Iterator<Item = (&PolicyKey, &Arc<Rules>)> {
        self.policies()
            .filter_map(|(key, rules)| Some((key, rules?)))
    }

    /// Whether any rule allows the connection.
    pub(crate) fn allows(&self, question: Question<'_>) -> bool {
        self.decider.allows(question, || self.lists())
    }

    /// Merges the rules as [`Decider::prepare`] does.
    pub(crate) fn prepare(&self, work: &mut usize) {
        self.decider.prepare(|| self.lists(), work);
    }

    /// How many lists of rules are evaluated one by one.
    #[cfg(test)]
    pub(crate) fn evaluated(&self) -> usize {
        self.decider.evaluated(self.lists())
    }

    fn lists(&self) -> impl Iterator<Item = &Arc<Rules>> {
        self.rules().map(|(_, rules)| rules)
    }

    fn policies(&self) -> impl Iterator<Item = (&PolicyKey, Option<&Arc<Rules>>)> {
        let named = self.names.get().filter(|_| self.selecting.is_empty());
        let named = named.into_iter().flat_map(|names| names.iter());
        let selecting = self.selecting.iter().enumerate();
        let isolating = selecting.filter_map(|(at, policy)| {
            let rules = policy.rules(self.direction);
            match at < self.in_force {
                true => rules.map(|rules| (&policy.key, Some(rules))),
                false => Some((&policy.key, None)),
            }
        });
        named.map(|key| (key, None)).chain(isolating)
    }
}

impl PartialEq for Isolation {
    /// Equal rules of a cluster share an allocation, so their contents need no comparison.
    fn eq(&self, other: &Self) -> bool {
        let shared = Arc::ptr_eq(&self.selecting, &other.selecting);
        if shared && self.direction == other.direction && !self.selecting.is_empty() {
            return true;
        }
        let identity = |(key, rules): (_, Option<_>)| Identity(rules.map(Arc::as_ptr), key);
        self.policies()
            .map(identity)
            .eq(other.policies().map(identity))
    }
}

impl Eq for Isolation {}

/// What identifies a policy with its rules.
struct Identity<'a>(Option<*const Rules>, &'a PolicyKey);

impl PartialEq for Identity<'_> {
    /// Most policies of two lists are the same object, so that their names need no comparison.
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0 && (ptr::eq(self.1, other.1) || self.1 == other.1)
    }
}
