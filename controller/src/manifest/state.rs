//! The last good state of every file, and how it differs from what was sent.
//!
//! The invariant: nothing leaves the state because it could not be read. An object goes only when
//! its file is gone, or was read to the end and does not hold it any more. Knows no disk, no time.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::contents::{Contents, Entry};
use crate::{Batch, Event, Object, ObjectKey, Problem};

/// What the files say, and what of it was sent.
#[derive(Debug, Default)]
pub(super) struct State {
    files: BTreeMap<PathBuf, Contents>,
    notes: Vec<Problem>,
    sent: BTreeMap<ObjectKey, Object>,
    problems: Arc<Vec<Problem>>,
}

impl State {
    /// Takes in what was read of a file. If a fault hides what the file means, its objects stay as
    /// they were, all of them.
    pub(super) fn update(&mut self, file: PathBuf, mut contents: Contents) {
        if contents.incomplete {
            let last_good = self.files.remove(&file).unwrap_or_default();
            contents.entries = last_good.entries;
        }
        self.files.insert(file, contents);
    }

    /// Forgets a file: its objects are deleted.
    pub(super) fn remove(&mut self, file: &Path) {
        self.files.remove(file);
    }

    /// Sets the problems that belong to no file's contents.
    pub(super) fn note(&mut self, notes: Vec<Problem>) {
        self.notes = notes;
    }

    /// Whether anything that was read is not in force.
    pub(super) fn faulty(&self) -> bool {
        self.files.values().any(Contents::faulty)
    }

    /// Everything, as the first batch.
    pub(super) fn full(&mut self) -> Batch {
        self.changes().unwrap_or_default()
    }

    /// What has changed since the last call, or `None` if nothing has.
    pub(super) fn changes(&mut self) -> Option<Batch> {
        let (winners, duplicates) = winners(&self.files);
        let mut events: Vec<Event> = winners
            .iter()
            .filter_map(|(key, (_, entry))| {
                // An invalid object keeps its last good state: what was sent stays sent.
                let object = entry.object.as_ref()?;
                (self.sent.get(key) != Some(object)).then(|| Event::Upsert(object.clone()))
            })
            .collect();
        let gone = self.sent.keys().filter(|key| !winners.contains_key(key));
        events.extend(gone.cloned().map(Event::Delete));

        let of_files = self
            .files
            .values()
            .flat_map(|contents| contents.problems.iter().cloned());
        let problems: Vec<Problem> = of_files
            .chain(duplicates)
            .chain(self.notes.iter().cloned())
            .collect();
        if events.is_empty() && problems == *self.problems {
            return None;
        }
        for event in &events {
            match event {
                Event::Upsert(object) => drop(self.sent.insert(object.key(), object.clone())),
                Event::Delete(key) => drop(self.sent.remove(key)),
            }
        }
        self.problems = Arc::new(problems);
        Some(Batch {
            events,
            problems: Arc::clone(&self.problems),
        })
    }
}

type Winners<'a> = BTreeMap<&'a ObjectKey, (&'a Path, &'a Entry)>;

/// Of an object that is given more than once the last one counts, in the order of file names and
/// within a file of documents; each earlier one is a warning.
fn winners(files: &BTreeMap<PathBuf, Contents>) -> (Winners<'_>, Vec<Problem>) {
    let mut winners = Winners::new();
    let mut duplicates = Vec::new();
    for (file, contents) in files {
        for entry in &contents.entries {
            let Some((other, earlier)) = winners.insert(&entry.key, (file, entry)) else {
                continue;
            };
            let place = if other == file {
                "this file".into()
            } else {
                other.to_string_lossy()
            };
            duplicates.push(
                Problem::warning(
                    format!(
                        "given twice: {place}, document {} has it too",
                        earlier.document
                    ),
                    "this one, the later by file name and document, counts; remove one of them",
                )
                .in_file(file)
                .in_document(entry.document)
                .of(&entry.key),
            );
        }
    }
    (winners, duplicates)
}

#[cfg(test)]
mod tests;
