//! The only unsafe code of the daemon: calls that no safe crate wraps.
#![expect(unsafe_code, reason = "the one place for calls without a safe wrapper")]
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

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

/// Descriptors that the kernel lets one message have (`SCM_MAX_FD`, net/scm.h).
const MOST_DESCRIPTORS: usize = 253;
/// Room for them: no message has more than fits.
// SAFETY: it calculates.
const CONTROL: usize =
    unsafe { libc::CMSG_SPACE((MOST_DESCRIPTORS * size_of::<RawFd>()) as u32) } as usize;

/// A message as it has arrived.
#[derive(Debug)]
pub(crate) struct Received {
    /// Bytes of it that are in the buffer; 0 means that the peer is gone.
    pub(crate) length: usize,
    pub(crate) descriptors: Vec<OwnedFd>,
    /// Whether all descriptors are here: this process may have no room for more (`RLIMIT_NOFILE`).
    pub(crate) whole: bool,
}

/// Receives a message with the descriptors that come with it (unix(7), `SCM_RIGHTS`), from a socket that keeps
/// messages apart. All that the kernel opens here is closed with what this returns.
///
/// # Errors
/// `WouldBlock` if there is none yet, `InvalidData` if it has more bytes than fit, else what `recvmsg` answers.
pub(crate) fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Received> {
    // Of the alignment of a `cmsghdr`.
    let mut space = [0u64; CONTROL.div_ceil(8)];
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: a `msghdr` is numbers and pointers, for which zero is a value.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = space.as_mut_ptr().cast();
    header.msg_controllen = CONTROL;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the borrow keeps the socket open; `header` points to `part` and `space`, and `part` to `buffer`, with
    // their sizes; all are valid for writes during the call, and the kernel keeps no pointer.
    let length = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut header, flags) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    let descriptors = received(&header);
    if header.msg_flags & libc::MSG_TRUNC != 0 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(Received {
        length,
        descriptors,
        whole: header.msg_flags & libc::MSG_CTRUNC == 0,
    })
}

/// Takes the descriptors out of a message that `recvmsg` has just filled in.
fn received(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: the kernel has written `msg_controllen` bytes of whole control messages, aligned, to where `header`
    // points, so that each of these calls stays within them; each has as many descriptors as its length says.
    // The kernel has just opened them for us, and nobody else knows their numbers.
    unsafe {
        let mut control = libc::CMSG_FIRSTHDR(header);
        while let Some(head) = control.as_ref() {
            if (head.cmsg_level, head.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let data = libc::CMSG_DATA(control).cast::<RawFd>();
                let bytes = head.cmsg_len - libc::CMSG_LEN(0) as usize;
                for at in 0..bytes / size_of::<RawFd>() {
                    let fd = data.add(at).read_unaligned();
                    descriptors.push(OwnedFd::from_raw_fd(fd));
                }
            }
            control = libc::CMSG_NXTHDR(header, control);
        }
    }
    descriptors
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::IoSlice;

    use nix::sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
    };

    use super::*;

    /// Descriptors of this process that are the same open file as `pipe`.
    fn copies_of(pipe: &OwnedFd) -> usize {
        let target = |fd: &str| fs::read_link(format!("/proc/self/fd/{fd}")).ok();
        let own = target(&pipe.as_raw_fd().to_string());
        let all = fs::read_dir("/proc/self/fd").unwrap();
        let names = all.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|fd| target(fd) == own).count()
    }

    #[test]
    fn descriptors_that_nobody_wants_are_closed() {
        let (kind, flags) = (SockType::SeqPacket, SockFlag::empty());
        let (sender, socket) = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
        let (read, _write) = nix::unistd::pipe().unwrap();
        let before = copies_of(&read);
        for (count, room) in [(1, 64), (3, 64), (MOST_DESCRIPTORS, 64), (2, 1)] {
            let raw = vec![read.as_raw_fd(); count];
            let rights = [ControlMessage::ScmRights(&raw)];
            let part = [IoSlice::new(b"message")];
            let to = sender.as_raw_fd();
            sendmsg::<()>(to, &part, &rights, MsgFlags::empty(), None).unwrap();
            let received = receive(&socket, &mut vec![0; room]);
            match room {
                1 => assert_eq!(received.unwrap_err().kind(), io::ErrorKind::InvalidData),
                _ => {
                    let received = received.unwrap();
                    assert!(received.whole && received.length == 7);
                    assert_eq!(received.descriptors.len(), count);
                }
            }
            assert_eq!(copies_of(&read), before, "{count} in a message");
        }
    }
}
