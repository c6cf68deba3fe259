//! inotify events of the directory that a source's files are in.
//!
//! Where inotify is unavailable (limits, exotic file systems) there are no events, a problem reports that,
//! and only the regular check finds changes.
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};

use crate::Problem;

/// Watches one directory.
#[derive(Debug)]
pub(super) struct Notify {
    inotify: Option<Inotify>,
    watched: Option<WatchDescriptor>,
    of_file: bool,
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
            problem,
        };
        let _first = notify.follow(root);
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

    /// Watches what `root` leads to now. True if that is another directory than before, or nothing:
    /// then there are no events of what has changed.
    pub(super) fn follow(&mut self, root: &Path) -> bool {
        let Some(inotify) = &self.inotify else {
            return false;
        };
        self.of_file = root.is_file();
        let directory = match root.parent() {
            Some(parent) if self.of_file && parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) if self.of_file => parent,
            _ => root,
        };
        let flags = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_ONLYDIR;
        match inotify.add_watch(directory, flags) {
            // The kernel gives a directory that is watched already the same descriptor (inotify_add_watch(2)).
            Ok(descriptor) => {
                self.problem = None;
                let before = self.watched.replace(descriptor);
                if let Some(other) = before.filter(|before| *before != descriptor) {
                    // It fails if the directory is gone, and then the kernel has ended the watch itself.
                    let _gone = inotify.rm_watch(other);
                }
                before != Some(descriptor)
            }
            Err(Errno::ENOENT | Errno::ENOTDIR) => true,
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

    /// The events since the last call, in order: of names in the directory, or `IN_Q_OVERFLOW`.
    pub(super) fn take(&mut self) -> Vec<InotifyEvent> {
        let mut taken = Vec::new();
        let Some(inotify) = &self.inotify else {
            return taken;
        };
        loop {
            match inotify.read_events() {
                Ok(events) => taken.extend(events),
                Err(Errno::EINTR) => {}
                Err(_) => break,
            }
        }
        taken.retain(|event| {
            Some(event.wd) == self.watched || event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW)
        });
        taken
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
