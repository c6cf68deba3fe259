//! The only unsafe code: calls that no safe crate wraps.
#![expect(unsafe_code, reason = "the one place for calls without a safe wrapper")]
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use tokio::io::unix::AsyncFd;

/// Has tokio's reactor watch `fd`.
///
/// # Errors
/// Whatever `epoll_ctl` answers.
///
/// # Panics
/// Outside of a tokio runtime.
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open, stays so until it is dropped, and always gives the same
    // descriptor; the AsyncFd owns it, so nobody else can close it meanwhile.
    unsafe { AsyncFd::register(fd) }.map_err(|error| error.into_parts().1)
}

/// The clock by which `socket` stamps what it sends now (RFC 7323, TSval). The lowest bit says only
/// how fine that clock is.
///
/// # Errors
/// `ENOPROTOOPT` if it is no TCP socket.
pub fn tcp_timestamp(socket: impl AsFd) -> io::Result<u32> {
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

/// Resets a TCP connection at once, even if others use the socket: to them it is as if the
/// peer had reset it (connect(2) with `AF_UNSPEC`, Linux' `tcp_disconnect`).
///
/// # Errors
/// Whatever `connect` answers.
pub fn disconnect(socket: impl AsFd) -> io::Result<()> {
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

/// Bytes of memory that a socket takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Received, and not read yet.
    pub received: usize,
    /// The bound of these.
    pub receive_buffer: usize,
    /// Written, and not acknowledged yet.
    pub sent: usize,
    /// The bound of these.
    pub send_buffer: usize,
}

/// The memory of `socket`, with the kernel's overhead (`SO_MEMINFO`, linux/sock_diag.h; since Linux 4.12).
///
/// # Errors
/// `ENOPROTOOPT` if the kernel is older.
pub fn socket_memory(socket: impl AsFd) -> io::Result<Memory> {
    const SO_MEMINFO: libc::c_int = 55;
    let mut values = [0u32; 9];
    let mut length: libc::socklen_t = 36;
    // SAFETY: the borrow keeps the socket open; `values` and `length` are valid for writes during the call, `length`
    // is the size of `values`, and the kernel keeps neither pointer.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_MEMINFO,
            values.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    // SK_MEMINFO_RMEM_ALLOC, _RCVBUF, _WMEM_ALLOC, _SNDBUF, _FWD_ALLOC, _WMEM_QUEUED, _OPTMEM, _BACKLOG.
    let [
        received,
        receive_buffer,
        _,
        send_buffer,
        _,
        sent,
        _,
        backlog,
        _,
    ] = values.map(|value| usize::try_from(value).unwrap_or(usize::MAX));
    match result {
        0 => Ok(Memory {
            received: received + backlog,
            receive_buffer,
            sent,
            send_buffer,
        }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes the kernel size a socket's buffers again (`SO_BUF_LOCK`, since Linux 5.14).
///
/// # Errors
/// `ENOPROTOOPT` if the kernel is older.
pub fn unlock_buffers(socket: impl AsFd) -> io::Result<()> {
    const SO_BUF_LOCK: libc::c_int = 72;
    set(socket, libc::SOL_SOCKET, SO_BUF_LOCK, 0)
}

/// The smoothed round-trip time of a TCP socket (`TCP_INFO`, `tcpi_rtt`).
///
/// # Errors
/// `ENOPROTOOPT` if it is no TCP socket.
pub fn round_trip(socket: impl AsFd) -> io::Result<Duration> {
    // SAFETY: a `tcp_info` is numbers, for which zero is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of_val(&info)).unwrap_or_default();
    // SAFETY: the borrow keeps the socket open; `info` and `length` are valid for writes during the call, `length` is
    // the size of `info`, and the kernel keeps neither pointer.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            std::ptr::from_mut(&mut info).cast(),
            &raw mut length,
        )
    };
    match result {
        0 => Ok(Duration::from_micros(info.tcpi_rtt.into())),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes the kernel validate dump requests strictly and reject what it does not know
/// (`NETLINK_GET_STRICT_CHK`, linux/netlink.h; since Linux 4.20).
///
/// # Errors
/// `ENOPROTOOPT` if the kernel is older.
pub fn check_requests(netlink: impl AsFd) -> io::Result<()> {
    switch_on(netlink, libc::NETLINK_GET_STRICT_CHK)
}

/// Makes a netlink(7) socket receive the notifications of every network namespace that has an id in this
/// one (`NETLINK_LISTEN_ALL_NSID`, since Linux 4.2).
///
/// # Errors
/// `EPERM` without `CAP_NET_BROADCAST`.
pub fn listen_everywhere(netlink: impl AsFd) -> io::Result<()> {
    switch_on(netlink, libc::NETLINK_LISTEN_ALL_NSID)
}

fn switch_on(netlink: impl AsFd, option: libc::c_int) -> io::Result<()> {
    set(netlink, libc::SOL_NETLINK, option, 1)
}

fn set(
    socket: impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    let fd = socket.as_fd();
    // SAFETY: the borrow keeps `fd` open; `value` is valid for reads during the call, its size is the
    // one given, and the kernel keeps no pointer.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(&value).cast(),
            4,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Descriptors that the kernel lets one message have (`SCM_MAX_FD`, net/scm.h).
const MOST_DESCRIPTORS: u32 = 253;
/// Room for them, of four bytes each: no message has more.
// SAFETY: it calculates.
const CONTROL: usize = unsafe { libc::CMSG_SPACE(MOST_DESCRIPTORS * 4) } as usize;

/// A message as it has arrived.
#[derive(Debug)]
pub struct Received {
    /// Bytes of it that are in the buffer; 0 means that the peer is gone.
    pub length: usize,
    /// Those that came with it.
    pub descriptors: Vec<OwnedFd>,
    /// Whether all descriptors are here: this process may have no room for more (`RLIMIT_NOFILE`).
    pub whole: bool,
}

/// Receives a message with the descriptors that come with it (unix(7), `SCM_RIGHTS`), from a socket that keeps messages
/// apart. Dropping the result closes the descriptors that the kernel opened here.
///
/// # Errors
/// `WouldBlock` if there is none yet, `InvalidData` if it has more bytes than fit, else what `recvmsg` answers.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Received> {
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

/// Takes the descriptors out of a message that `recvmsg` has just filled in: `msg_controllen` bytes of whole control
/// messages are where `header` points, aligned.
fn received(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: `header` is as said above.
    let mut control = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: it is null, or points to a control message, which lives as long as `header`.
    while let Some(head) = unsafe { control.as_ref() } {
        if (head.cmsg_level, head.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: it calculates.
            let empty = unsafe { libc::CMSG_LEN(0) } as usize;
            // SAFETY: `control` points to a control message.
            let data = unsafe { libc::CMSG_DATA(control) };
            // SAFETY: that has so many bytes of data by its length, which the kernel has written.
            let data = unsafe { std::slice::from_raw_parts(data, head.cmsg_len - empty) };
            let (numbers, _) = data.as_chunks();
            descriptors.extend(numbers.iter().map(|number| {
                let fd = RawFd::from_ne_bytes(*number);
                // SAFETY: the kernel has just opened it for us, and nobody else knows its number.
                unsafe { OwnedFd::from_raw_fd(fd) }
            }));
        }
        // SAFETY: `control` points to a control message of `header`.
        control = unsafe { libc::CMSG_NXTHDR(header, control) };
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

    /// How many descriptors of this process refer to the same open file as `pipe`.
    fn copies_of(pipe: &OwnedFd) -> usize {
        let target = |fd: &str| fs::read_link(format!("/proc/self/fd/{fd}")).ok();
        let own = target(&pipe.as_raw_fd().to_string());
        let all = fs::read_dir("/proc/self/fd").unwrap();
        let names = all.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|fd| target(fd) == own).count()
    }

    #[test]
    fn unwanted_descriptors_are_closed() {
        let (kind, flags) = (SockType::SeqPacket, SockFlag::empty());
        let (sender, socket) = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
        let (read, _write) = nix::unistd::pipe().unwrap();
        let before = copies_of(&read);
        for (count, room) in [(1, 64), (3, 64), (MOST_DESCRIPTORS as usize, 64), (2, 1)] {
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
