//! Decides which files are read, and when.
//!
//! A file is read once it has looked the same for 100 ms, or at once if an event says that its writer has closed it or
//! renamed it into place; never while an event says that it is open for writing. It counts as deleted once it has
//! been missing for some time, since an editor may replace it. A directory that cannot be listed deletes nothing.
//!
//! inotify reports which files have changed, and only those are checked. All files are checked when
//! events were lost or the directory was replaced, and also at intervals: network file
//! systems and symbolic links to elsewhere send no events, and nothing may stay stale for ever.
use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::inotify::{AddWatchFlags, InotifyEvent};
use tokio::sync::mpsc;

use super::notify::Notify;
use crate::manifest::LoadError;
use crate::manifest::contents::Contents;
use crate::manifest::files::{self, Found, Listing, Name, Stamp};
use crate::manifest::state::State;
use crate::{Batch, Problem};

/// The time between two checks of all files, for each started thousand of them.
const CHECK_EVERY: Duration = Duration::from_millis(500);
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
const REPORT_OPEN_AFTER: Duration = Duration::from_secs(1);

/// The progress of one file from the disk into the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// It was read when it had this stamp.
    Read(Option<Stamp>),
    /// It differs from what was read, and has looked like this since then.
    Changed(Option<Stamp>, Instant),
    /// Its writer has closed it, or it was renamed into place.
    Complete,
    /// It has been open for writing since then.
    Open(Instant),
    /// It has been missing since then.
    Missing(Instant),
}

/// The state of the thread.
pub(super) struct Follower {
    root: PathBuf,
    notify: Notify,
    state: State,
    files: HashMap<Name, Progress, ahash::RandomState>,
    /// Files to check next time.
    pending: BTreeSet<Name>,
    /// Files that may change without an event of their own.
    links: BTreeSet<Name>,
    /// The warnings of the last check of all files.
    warnings: Vec<Problem>,
    /// The last check of all files found none.
    empty: bool,
    /// When to check all files again, regardless of events.
    all_at: Instant,
    /// When to check the pending files, even without an event.
    next_check: Option<Instant>,
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
            files: HashMap::default(),
            pending: BTreeSet::new(),
            links: BTreeSet::new(),
            warnings: Vec::new(),
            empty: false,
            all_at: Instant::now(),
            next_check: None,
        };
        let Listing { files, warnings } =
            files::list(root).map_err(|problem| LoadError::of(*problem))?;
        for (file, found) in &files {
            let (stamp, contents) = read(file, found.stamp);
            follower.set(file, Progress::Read(stamp));
            follower.state.update(file, contents);
            if found.link {
                follower.links.insert(Arc::clone(file));
            }
        }
        (follower.warnings, follower.empty) = (warnings, files.is_empty());
        follower.report(Instant::now());
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

    /// Follows the files until the receiver is gone.
    pub(super) fn run(mut self, sender: &mpsc::Sender<Batch>) {
        while !sender.is_closed() {
            let now = Instant::now();
            let tick = now + CHECK_EVERY;
            let due = self.next_check.take().unwrap_or(tick).min(tick);
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
        if self.notify.follow(&self.root) {
            self.lose_track(now);
        }
        if now < self.all_at {
            for file in mem::take(&mut self.pending) {
                self.check(&file, now);
            }
        }
        // Only the check of all files updates the warning that there is no file.
        if now >= self.all_at || self.empty || self.files.is_empty() {
            self.check_all(now);
        }
        self.report(now);
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
        for InotifyEvent { mask, name, .. } in self.notify.take() {
            if mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                self.lose_track(now);
            }
            let Some(name) = name else { continue };
            let directory = mask.contains(AddWatchFlags::IN_ISDIR);
            match self.path_of(&name) {
                Some(file) if !directory => {
                    self.take_event(&file, mask, now);
                    self.pending.insert(file);
                }
                // A subdirectory that is not hidden causes a warning.
                _ if directory && !files::is_hidden(&name) => self.all_at = now,
                // A link may lead there, as a ConfigMap's do.
                _ => self.pending.extend(self.links.iter().cloned()),
            }
        }
    }

    /// Updates a file's progress by an event about it.
    fn take_event(&mut self, file: &Name, mask: AddWatchFlags, now: Instant) {
        let complete = AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO;
        let gone = AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVED_FROM;
        // A program that creates an empty file has yet to write the first byte.
        let created =
            || fs::symlink_metadata(&**file).is_ok_and(|found| found.is_file() && found.len() == 0);
        match self.files.get(file) {
            _ if mask.intersects(complete) => self.set(file, Progress::Complete),
            Some(Progress::Missing(_)) if mask.intersects(gone) => {}
            _ if mask.intersects(gone) => self.set(file, Progress::Missing(now)),
            Some(Progress::Open(_)) => {}
            _ if mask.contains(AddWatchFlags::IN_MODIFY)
                || mask.contains(AddWatchFlags::IN_CREATE) && created() =>
            {
                self.set(file, Progress::Open(now));
            }
            _ => {}
        }
    }

    fn set(&mut self, file: &Name, progress: Progress) {
        self.files.insert(Arc::clone(file), progress);
    }

    /// Events were lost: they do not show any more which files are open for writing.
    fn lose_track(&mut self, now: Instant) {
        self.all_at = now;
        for progress in self.files.values_mut() {
            if matches!(progress, Progress::Open(_) | Progress::Complete) {
                *progress = Progress::Changed(None, now);
            }
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

    fn check(&mut self, file: &Name, now: Instant) {
        match files::find(file) {
            Ok(Some(found)) => self.present(file, found, now),
            // A file that is missing with its whole directory is not deleted.
            Ok(None) if self.notify.follow(&self.root) => self.lose_track(now),
            Ok(None) => self.absent(file, now),
            Err(_) => self.all_at = now,
        }
    }

    fn check_all(&mut self, now: Instant) {
        let Listing { files, warnings } = match files::list(&self.root) {
            Ok(listing) => listing,
            Err(problem) => {
                // A directory that cannot be listed deletes nothing.
                let remedy = format!(
                    "{}; until then its last good state stays in force",
                    problem.remedy
                );
                self.all_at = now;
                self.warnings = vec![Problem { remedy, ..*problem }];
                return;
            }
        };
        self.pending.clear();
        let listed = |name: &Name| files.binary_search_by(|(file, _)| file.cmp(name)).is_ok();
        let known = self.files.keys();
        let missing: Vec<Name> = known.filter(|name| !listed(name)).cloned().collect();
        for (file, found) in &files {
            self.present(file, *found, now);
        }
        for file in missing {
            self.absent(&file, now);
        }
        (self.warnings, self.empty) = (warnings, files.is_empty());
        let thousands = u32::try_from(files.len() / 1000).unwrap_or(u32::MAX);
        self.all_at = now + CHECK_EVERY * thousands.saturating_add(1);
    }

    fn present(&mut self, file: &Name, Found { stamp, link }: Found, now: Instant) {
        if link {
            self.links.insert(Arc::clone(file));
        } else {
            self.links.remove(file);
        }
        match self.files.get(file) {
            Some(Progress::Read(read)) if *read == stamp => {}
            Some(Progress::Complete) => self.read(file, stamp, now),
            Some(Progress::Open(_)) => self.check_again(file, now + REPORT_OPEN_AFTER),
            Some(&Progress::Changed(seen, since)) if seen == stamp => {
                if now.saturating_duration_since(since) < SETTLE {
                    return self.check_again(file, since + SETTLE);
                }
                self.read(file, stamp, now);
            }
            _ => {
                self.set(file, Progress::Changed(stamp, now));
                self.check_again(file, now + SETTLE);
            }
        }
    }

    /// Reads a file that looks ready, unless it turns out to be written to at the same time.
    fn read(&mut self, file: &Name, found: Option<Stamp>, now: Instant) {
        self.set(file, Progress::Read(found));
        let (stamp, contents) = read(file, found);
        self.take_events(now);
        // These events may be about other files, and do not come again.
        self.next_check = Some(now);
        if self.files.get(file) != Some(&Progress::Read(stamp))
            || Stamp::at(Path::new(file)) != stamp
        {
            return self.check_again(file, now + SETTLE);
        }
        for problem in &contents.problems {
            tracing::warn!(%problem, "invalid manifest");
        }
        self.state.update(file, contents);
    }

    fn absent(&mut self, file: &Name, now: Instant) {
        let since = match self.files.get(file) {
            None => return,
            Some(Progress::Missing(since)) => *since,
            Some(_) => {
                self.set(file, Progress::Missing(now));
                now
            }
        };
        let grace = if self.state.only_pods(file) {
            GRACE_FOR_PODS
        } else {
            GRACE
        };
        if now.saturating_duration_since(since) < grace {
            return self.check_again(file, since + grace);
        }
        self.files.remove(file);
        self.links.remove(file);
        self.state.remove(file);
    }

    fn check_again(&mut self, file: &Name, at: Instant) {
        self.pending.insert(Arc::clone(file));
        self.next_check = Some(self.next_check.map_or(at, |known| known.min(at)));
    }

    /// Reports what is wrong besides the files' contents.
    fn report(&mut self, now: Instant) {
        let mut problems = self.warnings.clone();
        problems.extend(self.notify.problem().cloned());
        for file in &self.pending {
            if let Some(Progress::Open(since)) = self.files.get(file)
                && now.saturating_duration_since(*since) >= REPORT_OPEN_AFTER
            {
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
