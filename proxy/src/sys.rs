//! The only unsafe code of the daemon: calls that no safe crate wraps.
#![expect(unsafe_code, reason = "the one place for calls without a safe wrapper")]
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
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

/// The clock by which `socket` stamps what it sends now (RFC 7323, TSval). The lowest bit says only
/// how fine that clock is.
///
/// # Errors
/// `ENOPROTOOPT` if it is no TCP socket.
pub(crate) fn tcp_timestamp(socket: impl AsFd) -> io::Result<u32> {
    let fd = socket.as_fd();
    let mut stamp = 0u32;
    let mut length: libc::socklen_t = 4;
    // SAFETY: the borrow keeps `fd` open; `stamp` and `length` are valid for writes during the
    // call, `length` is the size of `stamp`, and the kernel keeps neither pointer.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_TIMESTAMP,
            std::ptr::from_mut(&mut stamp).cast(),
            &raw mut length,
        )
    };
    match result {
        0 => Ok(stamp),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Ends a TCP connection with a reset to its peer, now, whoever else has the socket in use: to them it is as if the
/// peer had reset it (connect(2) with `AF_UNSPEC`, Linux' `tcp_disconnect`).
///
/// # Errors
/// Whatever `connect` answers.
pub(crate) fn disconnect(socket: impl AsFd) -> io::Result<()> {
    let fd = socket.as_fd();
    let nobody = libc::sockaddr {
        sa_family: 0, // AF_UNSPEC
        sa_data: [0; 14],
    };
    // SAFETY: the borrow keeps `fd` open; `nobody` is valid for reads during the call, its size is
    // the one given, and the kernel keeps no pointer.
    let result = unsafe { libc::connect(fd.as_raw_fd(), &raw const nobody, 16) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has the kernel take a dump's request at its word and refuse what it does not know
/// (`NETLINK_GET_STRICT_CHK`, linux/netlink.h; since Linux 4.20).
///
/// # Errors
/// `ENOPROTOOPT` if the kernel is older.
pub(crate) fn check_requests(netlink: impl AsFd) -> io::Result<()> {
    switch_on(netlink, libc::NETLINK_GET_STRICT_CHK)
}

/// Has a socket of netlink(7) hear what is told in every network namespace that this one knows by a
/// number (`NETLINK_LISTEN_ALL_NSID`, since Linux 4.2).
///
/// # Errors
/// `EPERM` without `CAP_NET_BROADCAST`.
pub(crate) fn listen_everywhere(netlink: impl AsFd) -> io::Result<()> {
    switch_on(netlink, libc::NETLINK_LISTEN_ALL_NSID)
}

fn switch_on(netlink: impl AsFd, option: libc::c_int) -> io::Result<()> {
    let fd = netlink.as_fd();
    let on: libc::c_int = 1;
    // SAFETY: the borrow keeps `fd` open; `on` is valid for reads during the call, its size is the
    // one given, and the kernel keeps no pointer.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_NETLINK,
            option,
            std::ptr::from_ref(&on).cast(),
            4,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Receives a message with the descriptors that come with it, two at most (unix(7), `SCM_RIGHTS`), from a
/// socket that keeps messages apart. No byte means that the peer is gone.
///
/// # Errors
/// `WouldBlock` if there is none yet, `InvalidData` if it has more than fits, else what `recvmsg` answers.
pub(crate) fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; 2]);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let socket = socket.as_fd().as_raw_fd();
    let message = recvmsg::<()>(socket, &mut parts, Some(&mut space), flags)?;
    let mut descriptors = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel has just opened them for us, and nobody else knows their numbers.
            let owned = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
            descriptors.extend(received.into_iter().map(owned));
        }
    }
    if message.flags.contains(MsgFlags::MSG_TRUNC) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok((message.bytes, descriptors))
}
