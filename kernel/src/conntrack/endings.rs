//! Receives the conntrack events of flows that end, by mark, with their byte counts.
//!
//! The kernel sends such an event only for entries that were created while a socket listened, or with
//! `net.netfilter.nf_conntrack_events` at 1: a listener has to dump the table too.
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::netlink::messages;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt,
    socket, sockopt,
};
use socket2::{SockFilter, SockRef};
use tokio::io::unix::AsyncFd;

use super::entry::Entry;
use super::{CT_DELETE, CTA_MARK};
use crate::sys;

/// `NF_NETLINK_CONNTRACK_DESTROY`: the group of such events (linux/netfilter/nfnetlink_compat.h).
const DESTROY_EVENTS: u32 = 4;
/// Bytes of one event, with room for attributes that newer kernels add.
const EVENT: usize = 4096;
/// Size of the receive buffer for events, in bytes.
const RECEIVE_BUFFER: usize = 8 << 20;
/// Events that are read before other tasks run.
const BATCH: usize = 256;

/// A socket that receives these events.
pub struct Endings {
    socket: AsyncFd<OwnedFd>,
    buffer: Vec<u8>,
}

/// Whether all events were received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// They were.
    All,
    /// The receive buffer of the socket overflowed.
    SomeLost,
}

impl Endings {
    /// Listens for the ends of flows that have a bit of `mark`; the kernel filters out others.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN`; `ENOENT` from a kernel without `CONFIG_NF_CT_NETLINK`.
    pub fn listen(mark: u32) -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkNetFilter,
        )?;
        SockRef::from(&fd).attach_filter(&marked(mark))?;
        // Without the right to force it, the system's limit has to do.
        if setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            setsockopt(&fd, sockopt::RcvBuf, &RECEIVE_BUFFER)?;
        }
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, DESTROY_EVENTS))?;
        Ok(Self {
            socket: sys::watch(fd)?,
            buffer: vec![0; EVENT],
        })
    }

    /// Waits until flows may have ended, then calls `each` with their entries. Cancel safe.
    ///
    /// # Errors
    /// The error of `recv`; the socket is unusable then.
    pub async fn next(&mut self, mut each: impl FnMut(Entry)) -> io::Result<Heard> {
        let mut ready = self.socket.readable().await?;
        let fd = self.socket.get_ref().as_raw_fd();
        for _ in 0..BATCH {
            match recv(fd, &mut self.buffer, MsgFlags::empty()) {
                Ok(length) => messages(self.buffer.get(..length).unwrap_or_default())
                    .filter(|message| message.kind == CT_DELETE)
                    .filter_map(|message| Entry::read(&message))
                    .for_each(&mut each),
                Err(Errno::EAGAIN) => {
                    ready.clear_ready();
                    break;
                }
                Err(Errno::EINTR) => {}
                Err(Errno::ENOBUFS) => return Ok(Heard::SomeLost),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(Heard::All)
    }
}

/// Classic BPF (linux Documentation/networking/filter.rst) that passes messages whose `CTA_MARK`
/// has a bit of `mark`, and no others.
fn marked(mark: u32) -> [SockFilter; 9] {
    const LOAD: u16 = 0x00;
    const LOAD_X: u16 = 0x01;
    const LOAD_BYTE: u16 = 0x30;
    const LOAD_WORD_AT_X: u16 = 0x40;
    const COPY_TO_X: u16 = 0x07;
    const IF_EQUAL: u16 = 0x15;
    const IF_ANY_BIT: u16 = 0x45;
    const RETURN: u16 = 0x06;
    /// `SKF_AD_OFF + SKF_AD_NLATTR`: where, from A on, the attribute of type X is; 0: nowhere.
    const FIND_ATTRIBUTE: u32 = 0xffff_f00c;
    /// Bytes of `nlmsghdr` and `nfgenmsg`, behind which attributes begin.
    const ATTRIBUTES: u32 = 20;
    [
        SockFilter::new(LOAD, 0, 0, ATTRIBUTES),
        SockFilter::new(LOAD_X, 0, 0, CTA_MARK.into()),
        SockFilter::new(LOAD_BYTE, 0, 0, FIND_ATTRIBUTE),
        SockFilter::new(IF_EQUAL, 4, 0, 0),
        SockFilter::new(COPY_TO_X, 0, 0, 0),
        // Its value follows its header of four bytes, big-endian as BPF reads.
        SockFilter::new(LOAD_WORD_AT_X, 0, 0, 4),
        SockFilter::new(IF_ANY_BIT, 0, 1, mark),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
        SockFilter::new(RETURN, 0, 0, 0),
    ]
}
