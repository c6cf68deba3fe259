//! inotify events about the completeness of the files of one directory.
//!
//! Where inotify is unavailable (limits, exotic file systems) there are no events, a problem reports that,
//! and only the regular check finds changes.
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use super::super::files::Stamp;
use crate::Problem;

/// What happened to a name in the directory.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// It is new, but not by renaming: somebody creates it, or links it.
    Created(OsString),
    /// It was written to (or cut) and not closed since.
    Written(OsString),
    /// Its writer has closed it, or it was renamed into place.
    Complete(OsString),
    /// It was deleted or renamed away.
    Gone(OsString),
    /// Its attributes changed: permissions or times.
    Touched(OsString),
    /// Something happened to a directory of this name.
    Directory(OsString),
    /// Events were lost, or the directory was replaced.
    Lost,
}

/// Watches the directory that a source's files are in.
#[derive(Debug)]
pub(super) struct Notify {
    inotify: Option<Inotify>,
    watched: Option<(WatchDescriptor, (u64, u64))>,
    of_file: bool,
    pending: Vec<Change>,
    problem: Option<Problem>,
}

impl Notify {
    /// Starts to watch `root`, or the directory it is in if it is a file.
    pub(super) fn new(root: &Path) -> Self {
        let (inotify, problem) = match Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
        {
            Ok(inotify) => (Some(inotify), None),
            Err(error) => (None, Some(slower(root, error))),
        };
        let mut notify = Self {
            inotify,
            watched: None,
            of_file: false,
            pending: Vec::new(),
            problem,
        };
        let _first = notify.follow(root);
        notify.pending.clear();
        notify
    }

    /// Whether the source is one file, and events are about names beside it.
    pub(super) fn is_of_file(&self) -> bool {
        self.of_file
    }

    /// Why changes are noticed later than they could be.
    pub(super) fn problem(&self) -> Option<&Problem> {
        self.problem.as_ref()
    }

    /// Watches what `root` leads to now, if that is another directory than before. True if it is, or
    /// if nothing is there: events do not tell then what has changed.
    pub(super) fn follow(&mut self, root: &Path) -> bool {
        let Some(inotify) = &self.inotify else {
            return false;
        };
        let of_file = root.is_file();
        let directory: PathBuf = if of_file {
            match root
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty())
            {
                Some(parent) => parent.to_owned(),
                None => PathBuf::from("."),
            }
        } else {
            root.to_owned()
        };
        let Some(identity) = Stamp::at(&directory).map(Stamp::identity) else {
            return true;
        };
        if self.watched.is_some_and(|(_, known)| known == identity) && self.of_file == of_file {
            return false;
        }
        if let Some((descriptor, _)) = self.watched.take() {
            // It fails if the directory is gone, and then the kernel has ended the watch itself.
            let _gone = inotify.rm_watch(descriptor);
        }
        let flags = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_ONLYDIR;
        self.of_file = of_file;
        match inotify.add_watch(&directory, flags) {
            Ok(descriptor) => {
                self.watched = Some((descriptor, identity));
                self.problem = None;
                self.pending.push(Change::Lost);
                true
            }
            Err(error) => {
                self.problem = Some(slower(root, error));
                false
            }
        }
    }

    /// Waits for an event, at most for `limit`; true if there is one.
    pub(super) fn wait(&mut self, limit: Duration) -> bool {
        let Some(inotify) = &self.inotify else {
            std::thread::sleep(limit);
            return false;
        };
        // Rounded up, or the last millisecond would be spent in a busy loop.
        let limit = u16::try_from(limit.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
        let mut ready = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut ready, PollTimeout::from(limit)), Ok(1..))
    }

    /// Takes what has happened so far, in order.
    pub(super) fn take(&mut self) -> Vec<Change> {
        let mut changes = std::mem::take(&mut self.pending);
        let Some(inotify) = &self.inotify else {
            return changes;
        };
        let current = self.watched.map(|(descriptor, _)| descriptor);
        loop {
            let events = match inotify.read_events() {
                Ok(events) => events,
                Err(Errno::EINTR) => continue,
                Err(_) => return changes,
            };
            for event in events {
                if event.mask.intersects(AddWatchFlags::IN_Q_OVERFLOW) {
                    changes.push(Change::Lost);
                } else if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                    if Some(event.wd) == current {
                        self.watched = None;
                    }
                } else if let (true, Some(name)) = (Some(event.wd) == current, event.name) {
                    changes.push(change(event.mask, name));
                }
            }
        }
    }
}

fn change(mask: AddWatchFlags, name: OsString) -> Change {
    if mask.contains(AddWatchFlags::IN_ISDIR) {
        Change::Directory(name)
    } else if mask.intersects(AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO) {
        Change::Complete(name)
    } else if mask.intersects(AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVED_FROM) {
        Change::Gone(name)
    } else if mask.contains(AddWatchFlags::IN_MODIFY) {
        Change::Written(name)
    } else if mask.contains(AddWatchFlags::IN_CREATE) {
        Change::Created(name)
    } else {
        Change::Touched(name)
    }
}

fn slower(root: &Path, error: Errno) -> Problem {
    Problem::warning(
        format!(
            "changes are noticed up to half a second later: inotify is not available ({error})"
        ),
        "raise the sysctls fs.inotify.max_user_instances and fs.inotify.max_user_watches",
    )
    .in_file(root)
}
