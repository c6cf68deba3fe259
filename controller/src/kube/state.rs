//! The last good state of every object of the API server, and how it differs from what was sent.
//!
//! The invariants: nothing leaves the state because it could not be read or listed; nothing is sent
//! before every kind was listed in full; after an outage the kinds are applied together, since
//! present pods under old policies are a state that never existed. Knows no network; time is passed in.
use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use policy::PolicyKey;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::turns::{self, Turns};
use super::watch::Update;
use crate::objects::{self, Kind};
use crate::problem_list::ProblemList;
use crate::{Batch, Event, Object, ObjectKey, Problem};

/// How long after an outage the first kinds that are back wait for the others.
const TOGETHER: Duration = Duration::from_secs(10);

/// The state of the API server, and what of it was sent.
#[derive(Debug, Default)]
pub(super) struct State {
    /// The Node that we run on.
    node: Arc<str>,
    progress: [Progress; 4],
    sent: BTreeMap<ObjectKey, Object>,
    /// What is to be sent; `None`: the object is gone.
    waiting: BTreeMap<ObjectKey, Option<Object>>,
    turns: Turns,
    /// A kind was lost: what comes next comes into force together.
    together: bool,
    policies: BTreeMap<PolicyKey, Written>,
    problems: ProblemList<ObjectKey>,
    /// Until when the kinds that are back wait for the others.
    hold: Option<Instant>,
    /// The first full state was sent.
    complete: bool,
}

/// The progress of one kind.
#[derive(Debug, Default)]
struct Progress {
    listed: bool,
    lost: bool,
    list: Option<List>,
}

/// A list that is being read.
#[derive(Debug, Default)]
struct List {
    seen: BTreeSet<ObjectKey>,
    /// An object in it has no valid name, so a missing object may be in it.
    nameless: bool,
    problems: Vec<Problem>,
}

/// A policy as the API server has it.
#[derive(Clone, Debug, Default)]
pub(super) struct Written {
    pub(super) uid: String,
    pub(super) resource_version: String,
    /// `spec` as JSON, of the state that is in force.
    spec: Arc<str>,
    /// Not the policy but its replacement is applied.
    stand_in: bool,
}

/// An object in force, to be kept.
pub(super) struct Kept {
    object: Object,
    /// Of a policy.
    spec: Option<Arc<str>>,
}

impl Kept {
    /// As JSON in the API's form, with only the fields that are read.
    pub(super) fn json(&self) -> String {
        let mut json = objects::to_json(&self.object).to_string();
        // It has a policy's rules as they were written, without parsing them.
        if let Some(spec) = self.spec.as_deref().filter(|spec| !spec.is_empty())
            && json.pop() == Some('}')
        {
            json.push_str(",\"spec\":");
            json.push_str(spec);
            json.push('}');
        }
        json
    }
}

impl State {
    /// Nothing yet, for a daemon on this Node.
    pub(super) fn new(node: &str) -> Self {
        Self {
            node: node.into(),
            ..Self::default()
        }
    }

    /// Takes one thing in.
    pub(super) fn take(&mut self, kind: Kind, update: Update, now: Instant) {
        let progress = &mut self.progress[kind as usize];
        match update {
            Update::Lost => {
                (progress.lost, progress.list) = (true, None);
                self.together = true;
                self.problems.others_changed(true);
            }
            Update::Resumed => self.back(kind, now),
            Update::ListBegins => {
                progress.list = Some(List::default());
                self.problems.others_changed(true);
            }
            Update::Listed(value) => {
                let key = self.upsert(kind, value);
                let list = self.progress[kind as usize].list.get_or_insert_default();
                match key {
                    Ok(key) => drop(list.seen.insert(key)),
                    Err(problem) => {
                        list.nameless = true;
                        list.problems.push(*problem);
                        self.problems.others_changed(true);
                    }
                }
            }
            Update::ListEnds => self.list_ends(kind, now),
            Update::Changed(value) => {
                // An object without a valid name cannot be stored; the next list reports it again.
                if let Err(problem) = self.upsert(kind, value) {
                    tracing::warn!(%problem, "invalid object from the API server");
                }
            }
            Update::Deleted(value) => {
                if let Ok(key) = objects::key_of(kind, &value) {
                    self.remove(key);
                }
            }
        }
    }

    /// Takes objects of the last run as the state in force, and returns them as the first batch.
    pub(super) fn restore(&mut self, objects: Vec<Value>) -> Batch {
        for value in objects {
            let kind = Kind::ALL
                .into_iter()
                .find(|kind| value["kind"] == kind.name());
            if let Some(kind) = kind {
                // Every object that we wrote has a name.
                let _ = self.upsert(kind, value);
            }
        }
        let waiting = mem::take(&mut self.waiting);
        self.send(waiting).unwrap_or_default()
    }

    /// What has changed since the last call, or as much of it as has its turn; `None` if nothing has
    /// or it must wait.
    pub(super) fn changes(&mut self, now: Instant) -> Option<Batch> {
        if !self.progress.iter().all(|kind| kind.listed) {
            return None;
        }
        if self.hold.is_some_and(|until| now < until) {
            return None;
        }
        let first = !mem::replace(&mut self.complete, true);
        let waiting = if first || self.together {
            self.together = self.progress.iter().any(|kind| kind.lost);
            mem::take(&mut self.waiting)
        } else {
            let spec = |key: &PolicyKey| self.policies.get(key).map_or(0, |it| it.spec.len());
            let pairs = |namespace: &Arc<str>| turns::pairs(&self.sent, namespace);
            self.turns.next(&mut self.waiting, spec, pairs)
        };
        self.send(waiting).or_else(|| first.then(Batch::default))
    }

    /// When waiting changes are due, even without further events.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        let waits = !self.waiting.is_empty() && self.complete;
        self.hold.filter(|until| waits && *until > now)
    }

    /// Whether every kind was listed in full at least once.
    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    /// The policy as the API server has it, if it has.
    pub(super) fn written(&self, key: &PolicyKey) -> Option<&Written> {
        self.policies.get(key)
    }

    /// Every object in force, shared: cheap to take, and written to disk elsewhere.
    pub(super) fn objects(&self) -> Vec<Kept> {
        let kept = self.sent.values().map(|object| Kept {
            object: object.clone(),
            spec: match object {
                Object::NetworkPolicy(policy) => {
                    let written = self.policies.get(policy.key());
                    written.map(|written| Arc::clone(&written.spec))
                }
                _ => None,
            },
        });
        kept.collect()
    }

    fn send(&mut self, waiting: BTreeMap<ObjectKey, Option<Object>>) -> Option<Batch> {
        let mut events = Vec::with_capacity(waiting.len());
        for (key, object) in waiting {
            match object {
                Some(object) => {
                    self.sent.insert(key, object.clone());
                    events.push(Event::Upsert(object));
                }
                None => {
                    self.sent.remove(&key);
                    events.push(Event::Delete(key));
                }
            }
        }
        let lists = self.progress.iter().filter_map(|kind| kind.list.as_ref());
        let nameless = lists.flat_map(|list| list.problems.iter().cloned());
        self.problems.batch(events, || nameless.collect())
    }

    /// Takes in an object as it is now.
    fn upsert(&mut self, kind: Kind, value: Value) -> Result<ObjectKey, Box<Problem>> {
        let key = match objects::key_of(kind, &value) {
            Ok(key) => key,
            Err(problem) => return Err(Box::new(problem.of(kind.name()))),
        };
        let object = match &key {
            ObjectKey::NetworkPolicy(policy) => self.policy(policy, value),
            _ => self.plain(&key, value),
        };
        if let Some(object) = object {
            if self.sent.get(&key) == Some(&object) {
                self.waiting.remove(&key);
            } else {
                self.waiting.insert(key.clone(), Some(object));
            }
        }
        Ok(key)
    }

    /// `None`: it cannot be read, and keeps its last good state if it has one.
    fn plain(&mut self, key: &ObjectKey, value: Value) -> Option<Object> {
        let read = objects::read(key, value);
        self.note(key, read)
    }

    fn note(&mut self, key: &ObjectKey, read: Result<Object, Vec<Problem>>) -> Option<Object> {
        match read {
            Ok(object) => {
                self.problems.set(key.clone(), Vec::new());
                Some(object)
            }
            Err(problems) => {
                let problems = problems.into_iter().map(|problem| problem.of(key));
                self.problems.set(key.clone(), problems.collect());
                None
            }
        }
    }

    /// As [`Self::plain`]; a policy that never was valid is not left out, which would widen access,
    /// but replaced by one that allows nothing.
    fn policy(&mut self, key: &PolicyKey, value: Value) -> Option<Object> {
        let metadata = |field: &str| {
            value["metadata"][field]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        let mut written = self.policies.get(key).cloned().unwrap_or_default();
        written.uid = metadata("uid");
        written.resource_version = metadata("resourceVersion");
        let object_key = ObjectKey::NetworkPolicy(key.clone());
        let spec: Arc<str> = value["spec"].to_string().into();
        let good_before = !written.spec.is_empty() && !written.stand_in;
        let object = match self.plain(&object_key, value) {
            Some(object) => {
                (written.spec, written.stand_in) = (spec, false);
                Some(object)
            }
            None if good_before => None,
            None => {
                let read = serde_json::from_str(&spec).unwrap_or(Value::Null);
                (written.spec, written.stand_in) = (spec, true);
                self.say_closed(&object_key);
                let closed = objects::closed_policy(key, &json!({ "spec": read }));
                closed.map(Object::from)
            }
        };
        self.policies.insert(key.clone(), written);
        object
    }

    fn say_closed(&mut self, key: &ObjectKey) {
        for problem in self.problems.of_mut(key) {
            let closed = "; until then the pods that it selects are closed";
            problem.remedy.push_str(closed);
        }
    }

    /// This node's own object stays: while we run on it the node is there, and without its CIDRs its
    /// pods would not be known as pods.
    fn remove(&mut self, key: ObjectKey) {
        if matches!(&key, ObjectKey::Node(name) if *name == self.node) {
            tracing::warn!(
                "{key}, the Node of this daemon, was deleted; its last state stays in force"
            );
            return;
        }
        self.problems.set(key.clone(), Vec::new());
        if let ObjectKey::NetworkPolicy(policy) = &key {
            self.policies.remove(policy);
        }
        if self.sent.contains_key(&key) {
            self.waiting.insert(key, None);
        } else {
            self.waiting.remove(&key);
        }
    }

    /// Objects that were not listed are gone, unless an object in the list had no name.
    fn list_ends(&mut self, kind: Kind, now: Instant) {
        let progress = &mut self.progress[kind as usize];
        progress.listed = true;
        let list = progress.list.get_or_insert_default();
        let seen = mem::take(&mut list.seen);
        if !list.nameless {
            let known = self
                .sent
                .keys()
                .chain(self.waiting.keys())
                .chain(self.problems.owners());
            let gone = known.filter(|key| Kind::of(key) == kind && !seen.contains(*key));
            for key in gone.cloned().collect::<Vec<_>>() {
                self.remove(key);
            }
        }
        self.back(kind, now);
    }

    /// The kind's watch works again: it waits for the others, but not for ever.
    fn back(&mut self, kind: Kind, now: Instant) {
        let was_lost = mem::take(&mut self.progress[kind as usize].lost);
        if self.progress.iter().all(|kind| !kind.lost) {
            self.hold = None;
        } else if was_lost {
            self.hold.get_or_insert(now + TOGETHER);
        }
    }
}

#[cfg(test)]
mod tests;
