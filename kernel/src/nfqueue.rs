//! One NFQUEUE: packets in, verdicts out (linux/netfilter/nfnetlink_queue.h).
//!
//! Many verdicts are sent in one system call, each for one packet: a batch verdict would
//! apply to every packet up to its number, held ones too; it is used only to drop these in a handover.
//! Knows nothing of what a packet means.
use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use crate::netlink::{self, Header, Message, messages};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, send, setsockopt,
    socket, sockopt,
};
use tokio::io::unix::AsyncFd;

use crate::sys;

/// Bytes of each packet that are copied to us: every header that we read, with room for options.
const COPY_RANGE: u32 = 160;
/// Packets that may wait in the queue; more are dropped by the kernel, which counts them.
const QUEUE_LENGTH: u32 = 16_384;
/// Size of the socket's receive buffer, in bytes.
const RECEIVE_BUFFER: usize = 8 << 20;

// Message and attribute types as linux/netfilter/nfnetlink_queue.h numbers them, in the width that
// they have in a message.
const PACKET: u16 = 3 << 8;
const VERDICT: u16 = 3 << 8 | 1;
const CONFIG: u16 = 3 << 8 | 2;
const VERDICT_BATCH: u16 = 3 << 8 | 3;
const NFQA_PACKET_HDR: u16 = 1;
const NFQA_VERDICT_HDR: u16 = 2;
const NFQA_MARK: u16 = 3;
const NFQA_PAYLOAD: u16 = 10;
const NFQA_CAP_LEN: u16 = 13;
const NFQA_CFG_CMD: u16 = 1;
const NFQA_CFG_PARAMS: u16 = 2;
const NFQA_CFG_QUEUE_MAXLEN: u16 = 3;
const NFQA_CFG_MASK: u16 = 4;
const NFQA_CFG_FLAGS: u16 = 5;
const NFQNL_CFG_CMD_BIND: u8 = 1;
const NFQNL_COPY_PACKET: u8 = 2;
const NFQA_CFG_F_GSO: u32 = 4;
const NF_DROP: u32 = 0;
const NF_REPEAT: u32 = 4;

/// The number by which the kernel knows a waiting packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PacketId(u32);

/// A packet that waits for its verdict. Dropping this leaves it waiting.
#[derive(Debug)]
pub struct Queued<'a> {
    /// By which a verdict names it.
    pub id: PacketId,
    /// As the rules have marked it.
    pub mark: u32,
    /// The packet from its IP header on, cut to what was copied.
    pub payload: &'a [u8],
    /// Length of the whole packet in bytes.
    pub length: usize,
}

/// The verdict on a waiting packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PacketVerdict {
    /// It is dropped.
    Drop,
    /// `NF_REPEAT`: the packet traverses the chain that queued it again, with this mark.
    Repeat {
        /// The whole mark.
        mark: u32,
    },
}

/// A bound queue. Closing it drops every packet that still waits.
pub struct Queue {
    socket: AsyncFd<OwnedFd>,
    number: u16,
    verdicts: RefCell<Vec<u8>>,
    /// The last packet that came.
    last: Cell<Option<PacketId>>,
}

impl Queue {
    /// Binds queue `number` of this network namespace.
    ///
    /// # Errors
    /// `EBUSY` if someone else has it, `EPERM` without `CAP_NET_ADMIN`.
    pub fn bind(number: u16) -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkNetFilter,
        )?;
        nix::sys::socket::bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        // Without the right to force it, the system's limit has to do.
        if setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            setsockopt(&fd, sockopt::RcvBuf, &RECEIVE_BUFFER)?;
        }
        configure(&fd, number)?;
        Self::of(fd, number)
    }

    /// Takes over queue `number`, which another process has bound to this socket. Call within a tokio runtime.
    ///
    /// # Errors
    /// Whatever `epoll_ctl` answers.
    pub fn of(socket: OwnedFd, number: u16) -> io::Result<Self> {
        Ok(Self {
            socket: sys::watch(socket)?,
            number,
            verdicts: RefCell::new(Vec::with_capacity(4096)),
            last: Cell::new(None),
        })
    }

    /// Drops the received packets without a verdict, and returns the socket for another process: packets that have not
    /// been received wait in the queue.
    ///
    /// # Errors
    /// If there are no free descriptors.
    pub fn leave(&self) -> io::Result<(u16, OwnedFd)> {
        self.flush()?;
        if let Some(last) = self.last.get() {
            let mut out = Vec::with_capacity(32);
            write_verdict(
                &mut out,
                VERDICT_BATCH,
                self.number,
                last,
                PacketVerdict::Drop,
            );
            send(self.socket.as_fd().as_raw_fd(), &out, MsgFlags::empty())?;
        }
        Ok((self.number, self.socket.get_ref().try_clone()?))
    }

    /// Waits until there may be a packet, then calls `each` for the packets of up to `most` messages. Returns how many
    /// messages there were.
    ///
    /// # Errors
    /// What `recv` answers; the queue is of no use then.
    pub async fn receive(
        &self,
        buffer: &mut [u8],
        most: usize,
        each: impl FnMut(Queued<'_>),
    ) -> io::Result<usize> {
        let mut ready = self.socket.readable().await?;
        let came = self.receive_waiting(buffer, most, each)?;
        if came < most {
            ready.clear_ready();
        }
        Ok(came)
    }

    /// Calls `each` for the packets of up to `most` messages that are there. Returns how many messages there were:
    /// fewer than `most` if there are no more.
    ///
    /// # Errors
    /// What `recv` answers; the queue is of no use then.
    pub fn receive_waiting(
        &self,
        buffer: &mut [u8],
        most: usize,
        mut each: impl FnMut(Queued<'_>),
    ) -> io::Result<usize> {
        let mut came = 0;
        while came < most {
            match recv(self.socket.get_ref().as_raw_fd(), buffer, MsgFlags::empty()) {
                Ok(length) => {
                    came += 1;
                    for queued in messages(&buffer[..length]).filter_map(|message| queued(&message))
                    {
                        self.last.set(Some(queued.id));
                        each(queued);
                    }
                }
                Err(nix::errno::Errno::EAGAIN) => break,
                // The kernel dropped packets for want of room and says so once; it goes on.
                Err(nix::errno::Errno::ENOBUFS | nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(came)
    }

    /// Queues the verdict on a packet; [`Self::flush`] sends it.
    pub fn decide(&self, id: PacketId, verdict: PacketVerdict) {
        write_packet_verdict(&mut self.verdicts.borrow_mut(), self.number, id, verdict);
    }

    /// Sends all queued verdicts to the kernel, in one call.
    ///
    /// # Errors
    /// The error of `send`. The packets keep waiting.
    pub fn flush(&self) -> io::Result<()> {
        let mut out = self.verdicts.borrow_mut();
        if out.is_empty() {
            return Ok(());
        }
        let sent = send(self.socket.as_fd().as_raw_fd(), &out, MsgFlags::empty());
        out.clear();
        sent?;
        Ok(())
    }
}

/// Binds, sizes and configures in one message: a packet can come as soon as the queue is bound.
fn configure(fd: &OwnedFd, number: u16) -> io::Result<()> {
    let mut params = [0; 5];
    params[..4].copy_from_slice(&COPY_RANGE.to_be_bytes());
    params[4] = NFQNL_COPY_PACKET;
    let flags = NFQA_CFG_F_GSO.to_be_bytes();
    let mut out = Vec::with_capacity(80);
    netlink::write(&mut out, header(CONFIG, netlink::ACK, number), |m| {
        m.bytes(NFQA_CFG_CMD, &[NFQNL_CFG_CMD_BIND, 0, 0, 0]);
        m.bytes(NFQA_CFG_PARAMS, &params);
        m.bytes(NFQA_CFG_QUEUE_MAXLEN, &QUEUE_LENGTH.to_be_bytes());
        m.bytes(NFQA_CFG_MASK, &flags);
        m.bytes(NFQA_CFG_FLAGS, &flags);
    });
    send(fd.as_raw_fd(), &out, MsgFlags::empty())?;
    // The kernel answers within `send`; a packet may come before the answer and would be
    // lost here, so it is dropped by its id.
    let mut answer = [0; 4096];
    loop {
        let length = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        for message in messages(&answer[..length]) {
            if let Some(early) = queued(&message) {
                let mut verdict = Vec::with_capacity(32);
                write_packet_verdict(&mut verdict, number, early.id, PacketVerdict::Drop);
                send(fd.as_raw_fd(), &verdict, MsgFlags::empty())?;
            }
            match message.errno().filter(|_| message.kind == netlink::ERROR) {
                Some(0) => return Ok(()),
                // EBUSY if another socket has the queue; older kernels say EPERM.
                Some(errno) => return Err(io::Error::from_raw_os_error(errno)),
                None => {}
            }
        }
    }
}

/// The header of a message about queue `number`.
fn header(kind: u16, flags: u16, number: u16) -> Header {
    Header {
        kind,
        flags: netlink::REQUEST | flags,
        resource: number,
        ..Header::default()
    }
}

/// A verdict on one packet.
fn write_packet_verdict(out: &mut Vec<u8>, number: u16, id: PacketId, verdict: PacketVerdict) {
    write_verdict(out, VERDICT, number, id, verdict);
}

/// A verdict on one packet, or on all up to it.
fn write_verdict(out: &mut Vec<u8>, kind: u16, number: u16, id: PacketId, verdict: PacketVerdict) {
    let (verdict, mark) = match verdict {
        PacketVerdict::Drop => (NF_DROP, None),
        PacketVerdict::Repeat { mark } => (NF_REPEAT, Some(mark)),
    };
    let mut both = [0; 8];
    both[..4].copy_from_slice(&verdict.to_be_bytes());
    both[4..].copy_from_slice(&id.0.to_be_bytes());
    netlink::write(out, header(kind, 0, number), |m| {
        m.bytes(NFQA_VERDICT_HDR, &both);
        if let Some(mark) = mark {
            m.bytes(NFQA_MARK, &mark.to_be_bytes());
        }
    });
}

/// The packet in a message: its number is required, its payload may be missing.
fn queued<'a>(message: &Message<'a>) -> Option<Queued<'a>> {
    if message.kind != PACKET {
        return None;
    }
    let (mut id, mut mark, mut payload, mut whole) = (None, 0, &[][..], None);
    for attribute in netlink::attributes(message.attributes()) {
        match attribute.kind {
            NFQA_PACKET_HDR => id = netlink::chunk(attribute.value, 0),
            NFQA_MARK => {
                mark = netlink::chunk(attribute.value, 0).map_or(0, u32::from_be_bytes);
            }
            NFQA_PAYLOAD => payload = attribute.value,
            // Present only if the payload is truncated.
            NFQA_CAP_LEN => whole = netlink::chunk(attribute.value, 0).map(u32::from_be_bytes),
            _ => {}
        }
    }
    Some(Queued {
        id: PacketId(u32::from_be_bytes(id?)),
        mark,
        payload,
        length: whole.map_or(payload.len(), |whole| whole as usize),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet_message(id: u32, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        netlink::write(&mut out, header(PACKET, 0, 100), |m| {
            m.bytes(
                NFQA_PACKET_HDR,
                &[&id.to_be_bytes()[..], &[0, 0, 1]].concat(),
            );
            m.bytes(9, &[0; 10]);
            m.bytes(NFQA_PAYLOAD, payload);
        });
        out
    }

    fn read(bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let queued = messages(bytes).filter_map(|message| queued(&message));
        queued
            .map(|queued| (queued.id.0, queued.payload.to_vec()))
            .collect()
    }

    #[test]
    fn every_packet_of_a_datagram_is_found() {
        let both = [packet_message(1, b"one"), packet_message(2, b"second")].concat();
        assert_eq!(read(&both), [(1, b"one".to_vec()), (2, b"second".to_vec())]);
    }

    #[test]
    fn packet_mark_is_read_or_zero() {
        let marks = |bytes: &[u8]| -> Vec<u32> {
            let queued = messages(bytes).filter_map(|message| queued(&message));
            queued.map(|queued| queued.mark).collect()
        };
        let mut out = packet_message(1, b"one");
        netlink::write(&mut out, header(PACKET, 0, 100), |m| {
            m.bytes(NFQA_PACKET_HDR, &[0, 0, 0, 2, 8, 0, 1]);
            m.bytes(NFQA_MARK, &0xc00u32.to_be_bytes());
        });
        assert_eq!(marks(&out), [0, 0xc00]);
    }

    #[test]
    fn a_truncated_packet_reports_its_full_length() {
        let lengths = |bytes: &[u8]| -> Vec<usize> {
            let queued = messages(bytes).filter_map(|message| queued(&message));
            queued.map(|queued| queued.length).collect()
        };
        let mut out = packet_message(1, b"one");
        netlink::write(&mut out, header(PACKET, 0, 100), |m| {
            m.bytes(NFQA_PACKET_HDR, &[0, 0, 0, 2, 8, 0, 1]);
            m.bytes(NFQA_PAYLOAD, b"begin");
            m.bytes(NFQA_CAP_LEN, &60_000u32.to_be_bytes());
        });
        assert_eq!(lengths(&out), [3, 60_000]);
    }

    #[test]
    fn damaged_nfqueue_messages_are_skipped_without_panic() {
        let message = packet_message(7, b"payload");
        for length in 0..message.len() {
            read(&message[..length]);
            for value in 0..=255 {
                let mut bent = message.clone();
                bent[length] = value;
                read(&bent);
            }
        }
    }
}
