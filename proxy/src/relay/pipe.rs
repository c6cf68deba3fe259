//! Kernel pipes for `splice`, kept for reuse by the thread that made them.
use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::{pipe2, read};

/// Bytes that a pipe is asked to hold. Beyond `fs.pipe-user-pages-soft` the kernel gives less to
/// who lacks `CAP_SYS_RESOURCE`; everything works with any size.
const SIZE: i32 = 1 << 20;
/// Empty pipes that a thread keeps.
const KEPT: usize = 32;

thread_local! {
    static POOL: RefCell<Vec<Rc<Ends>>> = const { RefCell::new(Vec::new()) };
}

/// How many more there may be: their descriptors must not be those that connections count on.
static LEFT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Says how many pipes there may be in all; to be called before the first is made.
pub(crate) fn allow_pipes(most: usize) {
    LEFT.store(most, Ordering::Relaxed);
}

struct Ends {
    read: OwnedFd,
    write: OwnedFd,
}

impl Drop for Ends {
    fn drop(&mut self) {
        LEFT.fetch_add(1, Ordering::Relaxed);
    }
}

/// A pipe that is empty when taken. Dropped empty it goes back to the pool; with bytes still in
/// it, it is closed.
pub(super) struct Pipe {
    ends: Rc<Ends>,
    held: Cell<usize>,
}

impl Pipe {
    /// Takes a pipe from the pool or makes one.
    ///
    /// # Errors
    /// `EMFILE` or `ENFILE` if there are no descriptors left, or as many pipes as there may be.
    pub(super) fn take() -> io::Result<Self> {
        let ends = match POOL.with_borrow_mut(Vec::pop) {
            Some(ends) => ends,
            None => create()?,
        };
        Ok(Self {
            ends,
            held: Cell::new(0),
        })
    }

    /// Moves what `source` has ready into the pipe; 0 means that it has ended.
    ///
    /// # Errors
    /// `WouldBlock` if it has nothing ready, else the socket's error.
    pub(super) fn fill_from(&self, source: impl AsFd) -> io::Result<usize> {
        let moved = splice(source, None, &self.ends.write, None, SIZE as usize, flags())?;
        self.held.set(self.held.get() + moved);
        Ok(moved)
    }

    /// Moves up to `most` bytes from the pipe to `sink`.
    ///
    /// # Errors
    /// `WouldBlock` if it has no room, else the socket's error.
    pub(super) fn drain_to(&self, sink: impl AsFd, most: usize) -> io::Result<usize> {
        let moved = splice(&self.ends.read, None, sink, None, most, flags())?;
        self.held.set(self.held.get() - moved);
        Ok(moved)
    }

    /// Whether all that came in has gone out.
    pub(super) fn is_empty(&self) -> bool {
        self.held.get() == 0
    }

    /// Appends what is in the pipe to `bytes`, and leaves it empty.
    ///
    /// # Errors
    /// What `read` answers.
    pub(super) fn empty_into(&self, bytes: &mut Vec<u8>) -> io::Result<()> {
        let mut at = bytes.len();
        bytes.resize(at + self.held.get(), 0);
        while !self.is_empty() {
            let moved = read(&self.ends.read, &mut bytes[at..])?;
            at += moved;
            self.held.set(self.held.get() - moved);
        }
        Ok(())
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        if self.is_empty() {
            POOL.with_borrow_mut(|pool| {
                if pool.len() < KEPT {
                    pool.push(Rc::clone(&self.ends));
                }
            });
        }
    }
}

fn create() -> io::Result<Rc<Ends>> {
    let less = |left: usize| left.checked_sub(1);
    if LEFT
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
        .is_err()
    {
        return Err(Errno::EMFILE.into());
    }
    let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).inspect_err(|_| {
        LEFT.fetch_add(1, Ordering::Relaxed);
    })?;
    let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(SIZE));
    Ok(Rc::new(Ends { read, write }))
}

fn flags() -> SpliceFFlags {
    SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE
}
