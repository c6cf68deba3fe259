//! The last good state of every object, and how it differs from what was sent.
//!
//! The invariant: nothing leaves the state because it could not be read. An object goes only when
//! its file is gone, or was read to the end and does not hold it any more. A change costs what the
//! files concerned hold, however many others there are. Knows no disk, no time.
use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::mem;
use std::sync::Arc;

use super::contents::{Contents, Entry};
use super::files::Name;
use crate::problem_list::ProblemList;
use crate::{Batch, Event, Object, ObjectKey, Problem, Severity};

/// The state of the files, and what of it was sent.
#[derive(Debug, Default)]
pub(super) struct State {
    /// The objects of each file, in the order in which they stand there.
    files: HashMap<Name, Box<[ObjectKey]>, ahash::RandomState>,
    objects: HashMap<ObjectKey, Known, ahash::RandomState>,
    /// What may differ from what was sent.
    to_compare: BTreeSet<ObjectKey>,
    /// What is given more than once.
    repeated: BTreeSet<ObjectKey>,
    problems: ProblemList<Name>,
    /// Problems that belong to no file's contents.
    notes: Vec<Problem>,
}

#[derive(Debug, Default)]
struct Known {
    sent: Option<Object>,
    /// Where it is given, in the order of file names and within a file of documents; rarely more
    /// than one.
    places: Vec<Place>,
}

#[derive(Debug)]
struct Place {
    file: Name,
    document: usize,
    /// `None` if it is not valid.
    object: Option<Object>,
}

impl State {
    /// Applies the contents of a file. If a fault makes them incomplete, its objects stay as
    /// they were, all of them.
    pub(super) fn update(&mut self, file: &Name, contents: Contents) {
        if !contents.incomplete {
            self.forget_objects(file);
            let keys = contents.entries.iter().map(|entry| entry.key.clone());
            self.files.insert(Arc::clone(file), keys.collect());
            for entry in contents.entries {
                self.insert(file, entry);
            }
        }
        self.problems.set(Arc::clone(file), contents.problems);
    }

    /// Forgets a file: its objects are deleted.
    pub(super) fn remove(&mut self, file: &Name) {
        self.forget_objects(file);
        self.problems.set(Arc::clone(file), Vec::new());
    }

    /// Sets the problems that belong to no file's contents.
    pub(super) fn note(&mut self, notes: Vec<Problem>) {
        self.problems.others_changed(self.notes != notes);
        self.notes = notes;
    }

    /// Whether anything that was read is not applied.
    pub(super) fn faulty(&self) -> bool {
        let mut all = self.problems.all();
        all.any(|problem| problem.severity == Severity::Error)
    }

    /// Whether a file holds nothing but pods, so that access can only become narrower without it.
    pub(super) fn only_pods(&self, file: &OsStr) -> bool {
        let mut keys = self.files.get(file).into_iter().flatten();
        keys.all(|key| matches!(key, ObjectKey::Pod(_)))
    }

    /// Everything, as the first batch.
    pub(super) fn full(&mut self) -> Batch {
        self.changes().unwrap_or_default()
    }

    /// What has changed since the last call, or `None` if nothing has.
    pub(super) fn changes(&mut self) -> Option<Batch> {
        let (mut events, mut gone) = (Vec::new(), Vec::new());
        for key in mem::take(&mut self.to_compare) {
            let Some(known) = self.objects.get_mut(&key) else {
                continue;
            };
            let repeated = known.places.len() > 1;
            let was_repeated = self.repeated.contains(&key);
            self.problems.others_changed(repeated || was_repeated);
            if repeated {
                self.repeated.insert(key.clone());
            } else {
                self.repeated.remove(&key);
            }
            if let Some(object) = known.settle() {
                events.push(Event::Upsert(object));
            }
            if known.places.is_empty() {
                if known.sent.is_some() {
                    gone.push(Event::Delete(key.clone()));
                }
                self.objects.remove(&key);
            }
        }
        events.extend(gone);
        let mut problems = mem::take(&mut self.problems);
        let batch = problems.batch(events, || {
            let mut others = self.duplicates();
            others.extend(self.notes.iter().cloned());
            others
        });
        self.problems = problems;
        batch
    }

    fn forget_objects(&mut self, file: &OsStr) {
        for key in self.files.remove(file).into_iter().flatten() {
            if let Some(known) = self.objects.get_mut(&key) {
                known.places.retain(|place| *place.file != *file);
            }
            self.to_compare.insert(key);
        }
    }

    fn insert(&mut self, file: &Name, entry: Entry) {
        let places = &mut self.objects.entry(entry.key.clone()).or_default().places;
        let at = places.partition_point(|place| place.file <= *file);
        places.reserve_exact(1);
        places.insert(
            at,
            Place {
                file: Arc::clone(file),
                document: entry.document,
                object: entry.object,
            },
        );
        self.to_compare.insert(entry.key);
    }

    /// The last definition of an object applies; each later one is a warning.
    fn duplicates(&self) -> Vec<Problem> {
        let mut duplicates = Vec::new();
        for key in &self.repeated {
            let places = self.objects.get(key).map_or(&[][..], |known| &known.places);
            for (earlier, place) in places.iter().zip(places.iter().skip(1)) {
                let other = if earlier.file == place.file {
                    "this file".into()
                } else {
                    earlier.file.to_string_lossy()
                };
                duplicates.push(
                    Problem::warning(
                        format!(
                            "given twice: {other}, document {} has it too",
                            earlier.document
                        ),
                        "this one, the later by file name and document, counts; remove one of them",
                    )
                    .in_file(&*place.file)
                    .in_document(place.document)
                    .of(key),
                );
            }
        }
        duplicates.sort();
        duplicates
    }
}

impl Known {
    /// The object to send, if it has changed. An invalid one keeps its last good state:
    /// nothing is sent.
    fn settle(&mut self) -> Option<Object> {
        let object = &mut self.places.last_mut()?.object;
        if object.is_none() {
            return None;
        }
        if *object == self.sent {
            // One of two equal ones is enough.
            object.clone_from(&self.sent);
            return None;
        }
        self.sent.clone_from(object);
        object.clone()
    }
}

#[cfg(test)]
mod tests;
