//! Receives the conntrack events of flows that end, by mark, with their byte counts: entries that are deleted, and TCP
//! connections that are closed, whose entries the kernel keeps for up to two minutes.
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

use super::entry::{
    CTA_PROTOINFO, CTA_PROTOINFO_TCP, CTA_PROTOINFO_TCP_STATE, Entry, TCP_CLOSE, TCP_TIME_WAIT,
};
use super::{CT_DELETE, CT_NEW, CTA_MARK, Conntrack};
use crate::sys;

/// `NF_NETLINK_CONNTRACK_DESTROY`: the group of such events (linux/netfilter/nfnetlink_compat.h).
const DESTROY_EVENTS: u32 = 4;
/// `NF_NETLINK_CONNTRACK_UPDATE`: the group of events of entries that change.
const UPDATE_EVENTS: u32 = 2;
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
    conntrack: Conntrack,
}

/// How a flow ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Its entry was deleted.
    Deleted,
    /// It is a TCP connection that both ends have closed or one has reset. Its entry is deleted later.
    Closed,
}

/// Which ends are reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// Deleted entries.
    Deleted,
    /// Closed TCP connections too. The kernel then makes an event of every change of every entry.
    Closed,
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
    pub fn listen(mark: u32, report: Report) -> io::Result<Self> {
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
        let groups = match report {
            Report::Deleted => DESTROY_EVENTS,
            Report::Closed => DESTROY_EVENTS | UPDATE_EVENTS,
        };
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        Ok(Self {
            socket: sys::watch(fd)?,
            buffer: vec![0; EVENT],
            conntrack: Conntrack::open()?,
        })
    }

    /// Waits until flows may have ended, then calls `each` with their entries. Cancel safe.
    ///
    /// # Errors
    /// The error of `recv`; the socket is unusable then.
    pub async fn next(&mut self, mut each: impl FnMut(Entry, Ended)) -> io::Result<Heard> {
        let mut ready = self.socket.readable().await?;
        let fd = self.socket.get_ref().as_raw_fd();
        for _ in 0..BATCH {
            match recv(fd, &mut self.buffer, MsgFlags::empty()) {
                Ok(length) => {
                    for message in messages(self.buffer.get(..length).unwrap_or_default()) {
                        let Some(entry) = Entry::read(&message) else {
                            continue;
                        };
                        match message.kind {
                            CT_DELETE => each(entry, Ended::Deleted),
                            // Only the entry itself has its counters. A new SYN may have reopened it.
                            CT_NEW => {
                                let now = self.conntrack.same(&entry)?;
                                if let Some(now) = now.filter(|now| now.over) {
                                    each(now, Ended::Closed);
                                }
                            }
                            _ => {}
                        }
                    }
                }
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

/// Classic BPF (linux Documentation/networking/filter.rst) that passes messages whose `CTA_MARK` has a bit of `mark`, if
/// they are of a deleted entry or of a closed TCP connection, and no others.
fn marked(mark: u32) -> [SockFilter; 24] {
    const LOAD: u16 = 0x00;
    const LOAD_X: u16 = 0x01;
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    const LOAD_WORD_AT_X: u16 = 0x40;
    const LOAD_BYTE_AT_X: u16 = 0x50;
    const COPY_TO_X: u16 = 0x07;
    const IF_EQUAL: u16 = 0x15;
    const IF_ANY_BIT: u16 = 0x45;
    const RETURN: u16 = 0x06;
    /// `SKF_AD_OFF + SKF_AD_NLATTR`: where, from A on, the attribute of type X is; 0: nowhere.
    const FIND_ATTRIBUTE: u32 = 0xffff_f00c;
    /// `SKF_AD_OFF + SKF_AD_NLATTR_NEST`: the same within the attribute at A.
    const FIND_NESTED: u32 = 0xffff_f010;
    /// Where `nlmsghdr` has the message's type, which is in the byte order of the host, while BPF reads big-endian.
    const KIND: u32 = 4;
    const DELETED: u16 = u16::from_be_bytes(CT_DELETE.to_ne_bytes());
    /// Bytes of `nlmsghdr` and `nfgenmsg`, behind which attributes begin.
    const ATTRIBUTES: u32 = 20;
    let instruction = SockFilter::new;
    [
        instruction(LOAD, 0, 0, ATTRIBUTES),
        instruction(LOAD_X, 0, 0, CTA_MARK.into()),
        instruction(LOAD_BYTE, 0, 0, FIND_ATTRIBUTE),
        instruction(IF_EQUAL, 19, 0, 0),
        instruction(COPY_TO_X, 0, 0, 0),
        // An attribute's value follows its header of four bytes.
        instruction(LOAD_WORD_AT_X, 0, 0, 4),
        instruction(IF_ANY_BIT, 0, 16, mark),
        instruction(LOAD_HALF, 0, 0, KIND),
        instruction(IF_EQUAL, 13, 0, DELETED.into()),
        instruction(LOAD, 0, 0, ATTRIBUTES),
        instruction(LOAD_X, 0, 0, CTA_PROTOINFO.into()),
        instruction(LOAD_BYTE, 0, 0, FIND_ATTRIBUTE),
        instruction(IF_EQUAL, 10, 0, 0),
        instruction(LOAD_X, 0, 0, CTA_PROTOINFO_TCP.into()),
        instruction(LOAD_BYTE, 0, 0, FIND_NESTED),
        instruction(IF_EQUAL, 7, 0, 0),
        instruction(LOAD_X, 0, 0, CTA_PROTOINFO_TCP_STATE.into()),
        instruction(LOAD_BYTE, 0, 0, FIND_NESTED),
        instruction(COPY_TO_X, 0, 0, 0),
        instruction(LOAD_BYTE_AT_X, 0, 0, 4),
        instruction(IF_EQUAL, 1, 0, TCP_TIME_WAIT.into()),
        instruction(IF_EQUAL, 0, 1, TCP_CLOSE.into()),
        instruction(RETURN, 0, 0, u32::MAX),
        instruction(RETURN, 0, 0, 0),
    ]
}
