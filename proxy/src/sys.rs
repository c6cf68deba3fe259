//! The only unsafe code of the daemon: a call that no safe crate wraps.
#![expect(unsafe_code, reason = "the one place for calls without a safe wrapper")]
use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

/// Has tokio's reactor watch `fd`.
///
/// # Errors
/// Whatever `epoll_ctl` answers.
///
/// # Panics
/// Outside of a tokio runtime.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open, stays so until it is dropped, and always gives the same
    // descriptor; the AsyncFd owns it, so nobody else can close it meanwhile.
    unsafe { AsyncFd::register(fd) }.map_err(|error| error.into_parts().1)
}
