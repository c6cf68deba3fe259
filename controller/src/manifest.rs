//! Manifests on disk as a source of cluster state.
//!
//! A source is one file, or a directory of which every `*.yaml`, `*.yml` and `*.json` file is read.
//! As with `kubectl apply -f DIRECTORY`, subdirectories are not entered; hidden files (`.x`,
//! `..data`) and `kustomization.yaml` are passed over; symbolic links are followed, so a mounted
//! ConfigMap is a valid source. A file may hold several documents, `kind: List` and typed lists
//! (`PodList`), and up to 64 MiB.
//!
//! Other kinds than Namespace, Pod, Node and NetworkPolicy are ignored, policies of other systems with a warning. An
//! object without a namespace is in `default`.
mod contents;
mod document;
mod files;
mod state;
mod watch;

use std::fmt;
use std::path::Path;

use crate::{Loaded, Problem, Severity};
use contents::Contents;
use state::State;

pub use watch::ManifestSource;

/// The manifests are not valid.
///
/// `Display` is one line per problem, errors and warnings.
#[derive(Debug, Clone, thiserror::Error)]
pub struct LoadError {
    /// What is wrong; at least one of them is an error.
    pub problems: Vec<Problem>,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            let line_break = if index == 0 { "" } else { "\n" };
            write!(f, "{line_break}{problem}")?;
        }
        Ok(())
    }
}

/// Reads `path`, a manifest file or a directory of them, once.
///
/// # Errors
/// Every problem of every file, if anything in them is not valid, or if
/// they are empty.
pub fn load(path: &Path) -> Result<Loaded, LoadError> {
    let mut state = State::default();
    let listing = files::list(path).map_err(|problem| LoadError::of(*problem))?;
    for (file, _) in &listing.files {
        state.update(file, read(Path::new(file)));
    }
    let empty = listing.files.is_empty();
    state.note(listing.warnings);
    let faulty = state.faulty();
    let full = state.full();
    if faulty || empty {
        return Err(LoadError {
            problems: full.problems.to_vec(),
        });
    }
    Ok(Loaded::of(full))
}

fn read(file: &Path) -> Contents {
    match files::read(file) {
        Ok((_, bytes)) => Contents::read(file, bytes),
        Err(problem) => Contents::unreadable(*problem),
    }
}

impl LoadError {
    fn of(problem: Problem) -> Self {
        debug_assert_eq!(problem.severity, Severity::Error);
        Self {
            problems: vec![problem],
        }
    }
}

#[cfg(test)]
mod tests;
