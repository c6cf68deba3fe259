//! A manifest source that follows its files: what changes on disk becomes a batch.
//!
//! A thread of its own waits on inotify and looks at the files every half second besides (network
//! file systems and symbolic links to elsewhere send no events), so that no runtime ever waits for
//! a disk or a parser. Three things on disk must not be mistaken for a change of mind: a file that
//! is still being written, a file that is missing for a moment because an editor replaces it, and a
//! directory that cannot be listed. Each leaves the last good state in force.
mod notify;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use self::notify::{Change, Notify};
use super::LoadError;
use super::contents::Contents;
use super::files::{self, Listing, Stamp};
use super::state::State;
use crate::{Batch, Problem};

/// How long between two looks at all files; an upper bound where no event announces a change.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A burst of events is over when none has come for this long ...
const QUIET: Duration = Duration::from_millis(40);
/// ... or after this long at the latest.
const BURST: Duration = Duration::from_millis(150);
/// How long a change that no event declared complete must have stood still before it is read.
const SETTLE: Duration = Duration::from_millis(100);
/// How long a file must be missing before its objects are.
const GRACE: Duration = Duration::from_millis(250);
/// How long a file may be written to before that is reported.
const PATIENCE: Duration = Duration::from_secs(1);

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
    /// Every problem of every file, if there is anything that cannot be taken as it is.
    pub fn open(path: &Path) -> Result<(Self, Batch), LoadError> {
        let mut follower = Follower::new(path)?;
        let batch = follower.state.full();
        if follower.state.faulty() {
            return Err(LoadError {
                problems: batch.problems.to_vec(),
            });
        }
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
        // The thread has panicked. What is in force stays so, and that is said once.
        let Some(last) = self.last.take() else {
            return std::future::pending().await;
        };
        let mut problems = last.to_vec();
        problems.push(
            Problem::error(
                "is not watched any more: its thread has died",
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

/// What is known of one file's way from the disk into the state.
#[derive(Debug, Default)]
struct Tracked {
    /// What was last read.
    read: Option<Option<Stamp>>,
    /// A change that has not been read yet, and since when it has looked like this.
    unread: Option<(Option<Stamp>, Instant)>,
    missing_since: Option<Instant>,
    /// Since when somebody has it open for writing.
    written_since: Option<Instant>,
    /// An event has said that it is complete as it is.
    complete: bool,
    /// It is new, and its creator has not said yet that it is complete.
    created: bool,
}

/// The state of the thread.
struct Follower {
    root: PathBuf,
    notify: Notify,
    state: State,
    tracked: BTreeMap<PathBuf, Tracked>,
    /// When to look again because something was not ready yet.
    again: Option<Instant>,
}

impl Follower {
    fn new(root: &Path) -> Result<Self, LoadError> {
        // Watched before it is read, so that no change falls in between.
        let notify = Notify::new(root);
        let mut follower = Self {
            root: root.to_owned(),
            notify,
            state: State::default(),
            tracked: BTreeMap::new(),
            again: None,
        };
        let listing = files::list(root).map_err(|problem| LoadError::of(*problem))?;
        for (file, stamp) in &listing.files {
            let (read, contents) = read(file, *stamp);
            follower.tracked.insert(
                file.clone(),
                Tracked {
                    read: Some(read),
                    ..Tracked::default()
                },
            );
            follower.state.update(file.clone(), contents);
        }
        follower.note(listing.warnings, Instant::now());
        Ok(follower)
    }

    fn run(mut self, sender: &mpsc::Sender<Batch>) {
        while !sender.is_closed() {
            let now = Instant::now();
            let due = self
                .again
                .take()
                .unwrap_or(now + LOOK_EVERY)
                .min(now + LOOK_EVERY);
            if self.notify.wait(due.saturating_duration_since(now)) {
                self.gather();
            }
            self.look(Instant::now());
            if let Some(batch) = self.state.changes()
                && sender.blocking_send(batch).is_err()
            {
                return;
            }
        }
    }

    /// Takes events until the burst is over.
    fn gather(&mut self) {
        let end = Instant::now() + BURST;
        loop {
            self.take_events();
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.notify.wait(QUIET.min(left)) {
                return;
            }
        }
    }

    fn take_events(&mut self) {
        let now = Instant::now();
        for change in self.notify.take() {
            match change {
                Change::Created(name) => {
                    let tracked = self.tracked_by_name(&name);
                    (tracked.created, tracked.complete) = (true, false);
                }
                Change::Written(name) => {
                    let tracked = self.tracked_by_name(&name);
                    tracked.complete = false;
                    tracked.written_since.get_or_insert(now);
                }
                Change::Complete(name) => {
                    let tracked = self.tracked_by_name(&name);
                    (tracked.written_since, tracked.created) = (None, false);
                    tracked.complete = true;
                }
                Change::Gone(name) => {
                    let tracked = self.tracked_by_name(&name);
                    (tracked.written_since, tracked.created) = (None, false);
                    tracked.complete = false;
                }
                Change::Lost => {
                    for tracked in self.tracked.values_mut() {
                        (tracked.written_since, tracked.complete) = (None, false);
                    }
                }
            }
        }
    }

    fn tracked_by_name(&mut self, name: &OsString) -> &mut Tracked {
        let path = if self.notify.is_of_file() {
            match self
                .root
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty())
            {
                Some(parent) => parent.join(name),
                None => PathBuf::from(name),
            }
        } else {
            self.root.join(name)
        };
        self.tracked.entry(path).or_default()
    }

    /// Compares the files with what was read, and reads what has changed and is ready.
    fn look(&mut self, now: Instant) {
        self.notify.follow(&self.root);
        let Listing { files, warnings } = match files::list(&self.root) {
            Ok(listing) => listing,
            Err(problem) => {
                // Nothing is deleted because nothing can be seen.
                let remedy = format!(
                    "{}; until then its last good state stays in force",
                    problem.remedy
                );
                return self.note(vec![Problem { remedy, ..*problem }], now);
            }
        };
        let names: BTreeSet<PathBuf> = self.tracked.keys().chain(files.keys()).cloned().collect();
        for name in names {
            match files.get(&name) {
                Some(stamp) => self.present(&name, *stamp, now),
                None => self.absent(&name, now),
            }
        }
        self.note(warnings, now);
    }

    fn present(&mut self, file: &Path, stamp: Option<Stamp>, now: Instant) {
        let tracked = self.tracked.entry(file.to_owned()).or_default();
        tracked.missing_since = None;
        if tracked.read == Some(stamp) && tracked.written_since.is_none() {
            (tracked.unread, tracked.complete) = (None, false);
            return;
        }
        let since = match tracked.unread {
            Some((seen, since)) if seen == stamp => since,
            _ => now,
        };
        tracked.unread = Some((stamp, since));
        // Its creator has yet to write the first byte.
        let blank = tracked.created && stamp.is_some_and(Stamp::is_empty);
        if tracked.written_since.is_some() || blank {
            return self.look_again(now + PATIENCE);
        }
        if !tracked.complete && now.saturating_duration_since(since) < SETTLE {
            return self.look_again(since + SETTLE);
        }
        self.take_in(file, stamp, now);
    }

    /// Reads a file that looks ready, unless it turns out to be written to at the same time.
    fn take_in(&mut self, file: &Path, stamp: Option<Stamp>, now: Instant) {
        let (read, contents) = read(file, stamp);
        self.take_events();
        let tracked = self.tracked.entry(file.to_owned()).or_default();
        if tracked.written_since.is_some() || read != stamp || Stamp::at(file) != stamp {
            return self.look_again(now + SETTLE);
        }
        *tracked = Tracked {
            read: Some(read),
            ..Tracked::default()
        };
        for problem in &contents.problems {
            tracing::warn!(%problem, "manifest");
        }
        self.state.update(file.to_owned(), contents);
    }

    fn absent(&mut self, file: &Path, now: Instant) {
        let Some(tracked) = self.tracked.get_mut(file) else {
            return;
        };
        let since = *tracked.missing_since.get_or_insert(now);
        if tracked.read.is_some() && now.saturating_duration_since(since) < GRACE {
            return self.look_again(since + GRACE);
        }
        self.tracked.remove(file);
        self.state.remove(file);
    }

    fn look_again(&mut self, at: Instant) {
        self.again = Some(self.again.map_or(at, |known| known.min(at)));
    }

    /// Notes what is wrong besides the files' contents.
    fn note(&mut self, mut problems: Vec<Problem>, now: Instant) {
        problems.extend(self.notify.problem().cloned());
        for (file, tracked) in &self.tracked {
            let since = tracked.written_since.or_else(|| {
                let (stamp, since) = tracked.unread?;
                (tracked.created && stamp.is_some_and(Stamp::is_empty)).then_some(since)
            });
            if tracked.unread.is_some()
                && since.is_some_and(|since| now.saturating_duration_since(since) >= PATIENCE)
            {
                problems.push(
                    Problem::warning(
                        "is still open for writing: its last complete state stays in force",
                        "close it; or write to another name and rename it over this one",
                    )
                    .in_file(file),
                );
            }
        }
        self.state.note(problems);
    }
}

/// Reads a file; the stamp is the one it had when it was opened.
fn read(file: &Path, listed: Option<Stamp>) -> (Option<Stamp>, Contents) {
    match files::read(file) {
        Ok((stamp, bytes)) => (Some(stamp), Contents::read(file, bytes)),
        Err(problem) => (listed, Contents::unreadable(*problem)),
    }
}

#[cfg(test)]
mod tests;
