//! Decides, by file events, which files are read, and when.
//!
//! inotify reports which files have changed, and only those are checked. All files are checked when
//! events were lost or the directory was replaced, and also at intervals: network file
//! systems and symbolic links to elsewhere send no events, and nothing may stay stale for ever.
//!
//! Three things on disk must not be mistaken for a change: a file that is still being
//! written, a file that is missing for a moment because an editor replaces it, and a directory that
//! cannot be listed. Each leaves the last good state in force.
use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::notify::{Change, Notify};
use super::tracked::Tracked;
use crate::manifest::LoadError;
use crate::manifest::contents::Contents;
use crate::manifest::files::{self, Found, Listing, Look, Name, Stamp};
use crate::manifest::state::State;
use crate::{Batch, Problem};

/// The time between two checks of all files, for each started thousand of them.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A burst of events is over when none has come for this long ...
const QUIET: Duration = Duration::from_millis(5);
/// ... or after this long at the latest.
const BURST: Duration = Duration::from_millis(50);
/// How long a file must stay unchanged before it is read, if no event reported it complete.
const SETTLE: Duration = Duration::from_millis(100);
/// How long a file must be missing before its objects are deleted. Replacing a file in two steps (vim,
/// git, tar) takes some milliseconds.
const GRACE: Duration = Duration::from_millis(250);
/// The same if its objects are all pods: a wrong deletion severs connections, but allows nothing.
const GRACE_FOR_PODS: Duration = Duration::from_millis(50);
/// How long a file may be written to before that is reported.
const PATIENCE: Duration = Duration::from_secs(1);

/// The state of the thread.
pub(super) struct Follower {
    root: PathBuf,
    notify: Notify,
    state: State,
    tracked: HashMap<Name, Tracked, ahash::RandomState>,
    /// Files with changes that are not read yet.
    open: BTreeSet<Name>,
    /// Files that may change without an event of their own.
    links: BTreeSet<Name>,
    /// The warnings of the last check of all files.
    warnings: Vec<Problem>,
    /// The last check of all files found none.
    bare: bool,
    /// Events do not tell what has changed.
    lost: bool,
    /// When to check all files again, regardless of events.
    all_at: Instant,
    /// When to look again because something was not ready yet.
    again: Option<Instant>,
}

impl Follower {
    /// Reads every file of `root`.
    ///
    /// # Errors
    /// If `root` cannot be listed.
    pub(super) fn new(root: &Path) -> Result<Self, LoadError> {
        // Watched before it is read, so that no change falls in between.
        let notify = Notify::new(root);
        let mut follower = Self {
            root: root.to_owned(),
            notify,
            state: State::default(),
            tracked: HashMap::default(),
            open: BTreeSet::new(),
            links: BTreeSet::new(),
            warnings: Vec::new(),
            bare: false,
            lost: false,
            all_at: Instant::now(),
            again: None,
        };
        let Listing { files, warnings } =
            files::list(root).map_err(|problem| LoadError::of(*problem))?;
        for (file, found) in &files {
            let (read, contents) = read(file, found.stamp);
            follower.settled(file, read);
            follower.state.update(file, contents);
            if found.link {
                follower.links.insert(Arc::clone(file));
            }
        }
        (follower.warnings, follower.bare) = (warnings, files.is_empty());
        follower.note(Instant::now());
        Ok(follower)
    }

    /// The full state.
    ///
    /// # Errors
    /// Every problem, if anything is not valid.
    pub(super) fn first(&mut self) -> Result<Batch, LoadError> {
        let batch = self.state.full();
        if self.state.faulty() {
            let problems = batch.problems.to_vec();
            return Err(LoadError { problems });
        }
        Ok(batch)
    }

    /// Follows the files until nobody listens any more.
    pub(super) fn run(mut self, sender: &mpsc::Sender<Batch>) {
        while !sender.is_closed() {
            let now = Instant::now();
            let tick = now + LOOK_EVERY;
            let due = self.again.take().unwrap_or(tick).min(tick);
            if self.notify.wait(due.saturating_duration_since(now)) {
                self.gather(due.min(now + BURST));
            }
            if let Some(batch) = self.changes(Instant::now())
                && sender.blocking_send(batch).is_err()
            {
                return;
            }
        }
    }

    /// What has changed since the last call, as far as it is ready at `now`.
    pub(super) fn changes(&mut self, now: Instant) -> Option<Batch> {
        self.take_events(now);
        self.look(now);
        self.note(now);
        self.state.changes()
    }

    /// Takes events until the burst is over.
    fn gather(&mut self, end: Instant) {
        loop {
            self.take_events(Instant::now());
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.notify.wait(QUIET.min(left)) {
                return;
            }
        }
    }

    fn take_events(&mut self, now: Instant) {
        for change in self.notify.take() {
            match &change {
                Change::Lost => self.lose_track(),
                // A subdirectory that is not hidden causes a warning.
                Change::Directory(name) if !files::is_hidden(name) => self.lost = true,
                Change::Directory(_) => self.open.extend(self.links.iter().cloned()),
                Change::Created(name)
                | Change::Written(name)
                | Change::Complete(name)
                | Change::Gone(name)
                | Change::Touched(name) => match self.path_of(name) {
                    Some(file) => {
                        let tracked = self.tracked.entry(Arc::clone(&file)).or_default();
                        tracked.learn(&change, now);
                        self.open.insert(file);
                    }
                    // A link may lead there, as a ConfigMap's do.
                    None => self.open.extend(self.links.iter().cloned()),
                },
            }
        }
    }

    fn lose_track(&mut self) {
        self.lost = true;
        for tracked in self.tracked.values_mut() {
            (tracked.written_since, tracked.complete) = (None, false);
        }
    }

    /// The file of the source that has this name in the directory that is watched, if one has.
    fn path_of(&self, name: &OsStr) -> Option<Name> {
        if self.notify.is_of_file() {
            let ours = self.root.file_name() == Some(name);
            return ours.then(|| self.root.as_os_str().into());
        }
        files::is_read(name).then(|| self.root.join(name).as_os_str().into())
    }

    /// Compares files with what was read of them, and reads what has changed and is ready.
    fn look(&mut self, now: Instant) {
        self.lost |= self.notify.follow(&self.root) || now >= self.all_at;
        if !self.lost {
            for file in mem::take(&mut self.open) {
                self.look_at(&file, now);
            }
        }
        // The warning that there is no file is updated by the check of all files only.
        if self.lost || self.bare || self.tracked.is_empty() {
            self.look_at_all(now);
        }
    }

    fn look_at(&mut self, file: &Name, now: Instant) {
        match files::look_at(file) {
            Ok(Look::File(found)) => self.present(file, found, now),
            // A file that is missing with its whole directory is not deleted.
            Ok(Look::Nothing) if !self.notify.follow(&self.root) => self.absent(file, now),
            Ok(Look::Nothing | Look::Directory) | Err(_) => self.lost = true,
        }
    }

    fn look_at_all(&mut self, now: Instant) {
        let Listing { files, warnings } = match files::list(&self.root) {
            Ok(listing) => listing,
            Err(problem) => {
                // A directory that cannot be listed deletes nothing.
                let remedy = format!(
                    "{}; until then its last good state stays in force",
                    problem.remedy
                );
                self.lost = true;
                self.warnings = vec![Problem { remedy, ..*problem }];
                return;
            }
        };
        self.lost = false;
        self.open.clear();
        let listed = |name: &Name| files.binary_search_by(|(file, _)| file.cmp(name)).is_ok();
        let missing: Vec<Name> = self
            .tracked
            .keys()
            .filter(|name| !listed(name))
            .cloned()
            .collect();
        for (file, found) in &files {
            self.present(file, *found, now);
        }
        for file in missing {
            self.absent(&file, now);
        }
        (self.warnings, self.bare) = (warnings, files.is_empty());
        let thousands = u32::try_from(files.len() / 1000).unwrap_or(u32::MAX);
        self.all_at = now + LOOK_EVERY * thousands.saturating_add(1);
    }

    fn present(&mut self, file: &Name, found: Found, now: Instant) {
        if found.link {
            self.links.insert(Arc::clone(file));
        } else {
            self.links.remove(file);
        }
        if !self.tracked.contains_key(file) {
            self.tracked.insert(Arc::clone(file), Tracked::default());
        }
        let Some(tracked) = self.tracked.get_mut(file) else {
            return;
        };
        let stamp = found.stamp;
        tracked.missing_since = None;
        // Two writings within a tick of the file system's clock have one stamp.
        let written = tracked.written_since.is_some() || tracked.complete;
        if tracked.read == Some(stamp) && !written {
            tracked.unread = None;
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
            return self.look_again(file, now + PATIENCE);
        }
        if !tracked.complete && now.saturating_duration_since(since) < SETTLE {
            return self.look_again(file, since + SETTLE);
        }
        tracked.complete = false;
        self.take_in(file, stamp, now);
    }

    /// Reads a file that looks ready, unless it turns out to be written to at the same time.
    fn take_in(&mut self, file: &Name, stamp: Option<Stamp>, now: Instant) {
        let (read, contents) = read(file, stamp);
        self.take_events(now);
        // These events may be about other files, and do not come again.
        self.again = Some(now);
        let written = |tracked: &Tracked| tracked.written_since.is_some() || tracked.complete;
        if self.tracked.get(file).is_some_and(written)
            || read != stamp
            || Stamp::at(Path::new(file)) != stamp
        {
            return self.look_again(file, now + SETTLE);
        }
        self.settled(file, read);
        for problem in &contents.problems {
            tracing::warn!(%problem, "invalid manifest");
        }
        self.state.update(file, contents);
    }

    fn settled(&mut self, file: &Name, read: Option<Stamp>) {
        let tracked = Tracked {
            read: Some(read),
            ..Tracked::default()
        };
        self.tracked.insert(Arc::clone(file), tracked);
    }

    fn absent(&mut self, file: &Name, now: Instant) {
        let Some(tracked) = self.tracked.get_mut(file) else {
            return;
        };
        let since = *tracked.missing_since.get_or_insert(now);
        let known = tracked.read.is_some();
        let grace = if self.state.only_pods(file) {
            GRACE_FOR_PODS
        } else {
            GRACE
        };
        if known && now.saturating_duration_since(since) < grace {
            return self.look_again(file, since + grace);
        }
        self.tracked.remove(file);
        self.links.remove(file);
        self.state.remove(file);
    }

    fn look_again(&mut self, file: &Name, at: Instant) {
        self.open.insert(Arc::clone(file));
        self.again = Some(self.again.map_or(at, |known| known.min(at)));
    }

    /// Notes what is wrong besides the files' contents.
    fn note(&mut self, now: Instant) {
        let mut problems = self.warnings.clone();
        problems.extend(self.notify.problem().cloned());
        for file in &self.open {
            let tracked = self.tracked.get(file);
            let since = tracked.and_then(Tracked::open_since);
            if since.is_some_and(|since| now.saturating_duration_since(since) >= PATIENCE) {
                problems.push(
                    Problem::warning(
                        "is still open for writing: its last complete state stays in force",
                        "close it; or write to another name and rename it over this one",
                    )
                    .in_file(&**file),
                );
            }
        }
        self.state.note(problems);
    }
}

/// Reads a file; the stamp is the one it had when it was opened.
fn read(file: &OsStr, listed: Option<Stamp>) -> (Option<Stamp>, Contents) {
    let file = Path::new(file);
    match files::read(file) {
        Ok((stamp, bytes)) => (Some(stamp), Contents::read(file, bytes)),
        Err(problem) => (listed, Contents::unreadable(*problem)),
    }
}
