//! Kernel pipes for `splice`, kept for reuse by the thread that made them.
use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;

/// Bytes that a pipe is asked to hold. Beyond `fs.pipe-user-pages-soft` the kernel gives less to
/// a process without `CAP_SYS_RESOURCE`; any size works.
const SIZE: i32 = 1 << 20;
/// Empty pipes that a thread keeps.
const KEPT: usize = 32;

thread_local! {
    static POOL: RefCell<Vec<Rc<Ends>>> = const { RefCell::new(Vec::new()) };
}

/// How many more pipes there may be: they must not use up the descriptors of connections.
static LEFT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Sets how many pipes there may be in all; to be called before the first is created.
pub(crate) fn allow_pipes(most: usize) {
    LEFT.store(most, Ordering::Relaxed);
}

/// The read end of a pipe, and how many bytes are in it.
#[derive(Debug)]
pub(crate) struct Unread {
    pub(crate) read: OwnedFd,
    pub(crate) bytes: usize,
}

struct Ends {
    read: OwnedFd,
    /// `None`: another process has filled it.
    write: Option<OwnedFd>,
    /// `None`: another process had room for it.
    _room: Option<Room>,
}

/// The right to one pipe; released when dropped.
struct Room;

impl Room {
    fn take() -> io::Result<Self> {
        let less = |left: usize| left.checked_sub(1);
        let taken = LEFT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        taken.map(|_| Self).map_err(|_| Errno::EMFILE.into())
    }
}

impl Drop for Room {
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
    /// `EMFILE` or `ENFILE` if there are no descriptors left, or as many pipes as allowed.
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

    /// Moves the bytes that `source` has ready into the pipe, up to a limit; 0 means that it has ended.
    ///
    /// # Errors
    /// `WouldBlock` if it has nothing ready, else the socket's error.
    pub(super) fn fill_from(&self, source: impl AsFd, most: usize) -> io::Result<usize> {
        let write = self.ends.write.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        let moved = splice(source, None, write, None, most, flags())?;
        self.held.set(self.held.get() + moved);
        Ok(moved)
    }

    /// Moves the bytes in the pipe to `sink`, as far as it accepts them.
    ///
    /// # Errors
    /// `WouldBlock` if the sink has no room, `UnexpectedEof` if the pipe has fewer bytes than counted, else the
    /// socket's error.
    pub(super) fn drain_to(&self, sink: impl AsFd) -> io::Result<usize> {
        let moved = splice(&self.ends.read, None, sink, None, self.held(), flags())?;
        if moved == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.held.set(self.held.get() - moved);
        Ok(moved)
    }

    /// Whether all that came in has gone out.
    pub(super) fn is_empty(&self) -> bool {
        self.held.get() == 0
    }

    /// Takes the read end of a pipe that another process has filled with this many bytes.
    pub(super) fn left(Unread { read, bytes }: Unread) -> Self {
        Self {
            ends: Rc::new(Ends {
                read,
                write: None,
                _room: Room::take().ok(),
            }),
            held: Cell::new(bytes),
        }
    }

    /// Bytes in the pipe.
    pub(super) fn held(&self) -> usize {
        self.held.get()
    }

    /// The read end of the pipe with its bytes, for another process; none if it is empty.
    pub(super) fn leave(self) -> Option<Unread> {
        let bytes = self.held.get();
        let ends = Rc::clone(&self.ends);
        drop(self);
        // Otherwise it is in the pool.
        let Ends { read, .. } = Rc::into_inner(ends)?;
        Some(Unread { read, bytes })
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        if self.is_empty() && self.ends.write.is_some() {
            POOL.with_borrow_mut(|pool| {
                if pool.len() < KEPT {
                    pool.push(Rc::clone(&self.ends));
                }
            });
        }
    }
}

fn create() -> io::Result<Rc<Ends>> {
    let room = Room::take()?;
    let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(SIZE));
    Ok(Rc::new(Ends {
        read,
        write: Some(write),
        _room: Some(room),
    }))
}

fn flags() -> SpliceFFlags {
    SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE
}
