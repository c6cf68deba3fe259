//! A manifest source that follows its files: what changes on disk becomes a batch.
//!
//! Runs on its own thread, so that no runtime ever waits for a disk or a parser; the thread's code
//! is `watch/follower.rs`.
mod follower;
mod notify;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use tokio::sync::mpsc;

use self::follower::Follower;
use super::LoadError;
use crate::{Batch, Problem};

/// Follows a manifest file or a directory of them.
///
/// Dropping it ends its thread within half a second.
#[derive(Debug)]
pub struct ManifestSource {
    path: PathBuf,
    batches: mpsc::Receiver<Batch>,
    last: Option<Arc<Vec<Problem>>>,
}

impl ManifestSource {
    /// Reads `path` and starts to follow it. The batch is the full state; an empty directory is a
    /// valid one, with a warning.
    ///
    /// # Errors
    /// Every problem of every file, if anything is not valid.
    pub fn open(path: &Path) -> Result<(Self, Batch), LoadError> {
        let mut follower = Follower::new(path)?;
        let batch = follower.first()?;
        // One batch waits while the next is gathered; then the thread waits, and gathers the rest
        // into one.
        let (sender, batches) = mpsc::channel(1);
        thread::Builder::new()
            .name("manifests".to_owned())
            .spawn(move || follower.run(&sender))
            .map_err(|error| {
                let remedy = "raise the limit of processes and threads";
                LoadError::of(
                    Problem::error(format!("cannot be watched: {error}"), remedy).in_file(path),
                )
            })?;
        let last = Some(Arc::clone(&batch.problems));
        Ok((
            Self {
                path: path.to_owned(),
                batches,
                last,
            },
            batch,
        ))
    }

    /// Waits for the next change and returns it. Cancel safe.
    pub async fn next(&mut self) -> Batch {
        if let Some(batch) = self.batches.recv().await {
            self.last = Some(Arc::clone(&batch.problems));
            return batch;
        }
        // The thread has panicked. The applied state stays, which is reported once.
        let Some(last) = self.last.take() else {
            return std::future::pending().await;
        };
        let mut problems = last.to_vec();
        problems.push(
            Problem::error(
                "is no longer watched: its thread has died",
                "restart, and report this as a bug",
            )
            .in_file(&self.path),
        );
        Batch {
            events: Vec::new(),
            problems: Arc::new(problems),
        }
    }
}

#[cfg(test)]
mod tests;
