//! One NFQUEUE: packets in, verdicts out (linux/netfilter/nfnetlink_queue.h).
//!
//! Verdicts are gathered and sent many to a call, each for one packet: a batch verdict would
//! release every packet up to its number, held ones too. Knows nothing of what a packet means.
use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

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
/// Bytes that packets on their way to us may take.
const RECEIVE_BUFFER: usize = 8 << 20;

const HEADER: usize = 20;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;
// Message and attribute types as linux/netfilter/nfnetlink_queue.h numbers them, in the width that
// they have in a message.
const PACKET: u16 = 3 << 8;
const VERDICT: u16 = 3 << 8 | 1;
const CONFIG: u16 = 3 << 8 | 2;
const NFQA_PACKET_HDR: u16 = 1;
const NFQA_VERDICT_HDR: u16 = 2;
const NFQA_MARK: u16 = 3;
const NFQA_PAYLOAD: u16 = 10;
const NFQA_CFG_CMD: u16 = 1;
const NFQA_CFG_PARAMS: u16 = 2;
const NFQA_CFG_QUEUE_MAXLEN: u16 = 3;
const NFQA_CFG_MASK: u16 = 4;
const NFQA_CFG_FLAGS: u16 = 5;
const NFQNL_CFG_CMD_BIND: u8 = 1;
const NFQNL_COPY_PACKET: u8 = 2;
const NFQA_CFG_F_GSO: u32 = 4;
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;

/// The number by which the kernel knows a waiting packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PacketId(u32);

/// A packet that waits for its verdict. Dropping this leaves it waiting.
#[derive(Debug)]
pub(crate) struct Queued<'a> {
    pub(crate) id: PacketId,
    /// The packet from its IP header on, cut to what was copied.
    pub(crate) payload: &'a [u8],
}

/// What becomes of a waiting packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ruling {
    Drop,
    /// Goes on at the hook's next chain with this packet mark.
    Accept {
        mark: u32,
    },
}

/// A bound queue. Closing it drops every packet that still waits.
pub(crate) struct Queue {
    socket: AsyncFd<OwnedFd>,
    number: u16,
    rulings: RefCell<Vec<u8>>,
}

impl Queue {
    /// Binds queue `number` of this network namespace.
    ///
    /// # Errors
    /// `EBUSY` if someone else has it, `EPERM` without `CAP_NET_ADMIN`.
    pub(crate) fn bind(number: u16) -> io::Result<Self> {
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
        Ok(Self {
            socket: sys::watch(fd)?,
            number,
            rulings: RefCell::new(Vec::with_capacity(4096)),
        })
    }

    /// Waits until there may be a packet, then hands out up to `most` of them.
    ///
    /// # Errors
    /// What `recv` answers; the queue is of no use then.
    pub(crate) async fn receive(
        &self,
        buffer: &mut [u8],
        most: usize,
        mut each: impl FnMut(Queued<'_>),
    ) -> io::Result<()> {
        let mut ready = self.socket.readable().await?;
        for _ in 0..most {
            match recv(self.socket.get_ref().as_raw_fd(), buffer, MsgFlags::empty()) {
                Ok(length) => messages(&buffer[..length], &mut each),
                Err(nix::errno::Errno::EAGAIN) => {
                    ready.clear_ready();
                    break;
                }
                // The kernel dropped packets for want of room and says so once; it goes on.
                Err(nix::errno::Errno::ENOBUFS | nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Notes the ruling on a packet; [`Self::flush`] tells the kernel.
    pub(crate) fn rule(&self, id: PacketId, ruling: Ruling) {
        let (verdict, mark) = match ruling {
            Ruling::Drop => (NF_DROP, None),
            Ruling::Accept { mark } => (NF_ACCEPT, Some(mark)),
        };
        let mut out = self.rulings.borrow_mut();
        let length: u32 = if mark.is_some() { 40 } else { 32 };
        header(&mut out, length, VERDICT, NLM_F_REQUEST, self.number);
        attribute(
            &mut out,
            NFQA_VERDICT_HDR,
            &[verdict.to_be_bytes(), id.0.to_be_bytes()].concat(),
        );
        if let Some(mark) = mark {
            attribute(&mut out, NFQA_MARK, &mark.to_be_bytes());
        }
    }

    /// Tells the kernel all rulings noted so far, in one call.
    ///
    /// # Errors
    /// What `send` answers. The packets concerned keep waiting.
    pub(crate) fn flush(&self) -> io::Result<()> {
        let mut out = self.rulings.borrow_mut();
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
    let mut out = Vec::with_capacity(80);
    header(&mut out, 72, CONFIG, NLM_F_REQUEST | NLM_F_ACK, number);
    attribute(&mut out, NFQA_CFG_CMD, &[NFQNL_CFG_CMD_BIND, 0, 0, 0]);
    let mut params = [0; 5];
    params[..4].copy_from_slice(&COPY_RANGE.to_be_bytes());
    params[4] = NFQNL_COPY_PACKET;
    attribute(&mut out, NFQA_CFG_PARAMS, &params);
    attribute(&mut out, NFQA_CFG_QUEUE_MAXLEN, &QUEUE_LENGTH.to_be_bytes());
    let flags = NFQA_CFG_F_GSO.to_be_bytes();
    attribute(&mut out, NFQA_CFG_MASK, &flags);
    attribute(&mut out, NFQA_CFG_FLAGS, &flags);
    let length = u32::try_from(out.len()).unwrap_or(u32::MAX);
    out[..4].copy_from_slice(&length.to_ne_bytes());
    send(fd.as_raw_fd(), &out, MsgFlags::empty())?;
    // The kernel answers within `send`; a packet may stand before the answer, and its verdict is
    // then lost to us, so it is dropped by name.
    let mut answer = [0; 4096];
    loop {
        let length = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        let mut refused = None;
        let mut early = Vec::new();
        messages_or_error(
            &answer[..length],
            &mut |q: Queued<'_>| early.push(q.id),
            &mut |code| refused = Some(code),
        );
        for id in early {
            let mut verdict = Vec::with_capacity(32);
            header(&mut verdict, 32, VERDICT, NLM_F_REQUEST, number);
            attribute(
                &mut verdict,
                NFQA_VERDICT_HDR,
                &[NF_DROP.to_be_bytes(), id.0.to_be_bytes()].concat(),
            );
            send(fd.as_raw_fd(), &verdict, MsgFlags::empty())?;
        }
        match refused {
            Some(0) => return Ok(()),
            // What bind answers when another socket has the queue is EBUSY; older kernels say EPERM.
            Some(code) => return Err(io::Error::from_raw_os_error(-code)),
            None => {}
        }
    }
}

/// `nlmsghdr` and `nfgenmsg`.
fn header(out: &mut Vec<u8>, length: u32, kind: u16, flags: u16, queue: u16) {
    out.extend_from_slice(&length.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&flags.to_ne_bytes());
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&[0, 0]);
    out.extend_from_slice(&queue.to_be_bytes());
}

/// `nlattr`, padded to 4 bytes.
fn attribute(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    out.extend_from_slice(&length.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

fn messages(bytes: &[u8], each: &mut impl FnMut(Queued<'_>)) {
    messages_or_error(bytes, each, &mut |_| {});
}

/// Walks the messages of one datagram; what is not understood is passed over.
fn messages_or_error(
    bytes: &[u8],
    each: &mut impl FnMut(Queued<'_>),
    answer: &mut impl FnMut(i32),
) {
    let mut rest = bytes;
    while rest.len() >= HEADER {
        let length = u32_at(rest, 0).map_or(0, |l| l as usize);
        if length < HEADER || length > rest.len() {
            return;
        }
        let (message, after) = rest.split_at(length);
        match u16::from_ne_bytes([message[4], message[5]]) {
            NLMSG_ERROR => answer(u32_at(message, 16).map_or(0, u32::cast_signed)),
            PACKET => {
                if let Some(queued) = queued(&message[HEADER..]) {
                    each(queued);
                }
            }
            _ => {}
        }
        rest = after
            .get(length.next_multiple_of(4) - length..)
            .unwrap_or_default();
    }
}

/// Reads the attributes of a packet message: its number is a must, its payload may be missing.
fn queued(mut attributes: &[u8]) -> Option<Queued<'_>> {
    let mut id = None;
    let mut payload: &[u8] = &[];
    while attributes.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([attributes[0], attributes[1]]));
        let kind = u16::from_ne_bytes([attributes[2], attributes[3]]) & 0x3fff;
        let value = attributes.get(4..length)?;
        match kind {
            NFQA_PACKET_HDR => {
                id = value
                    .first_chunk()
                    .map(|id| PacketId(u32::from_be_bytes(*id)));
            }
            NFQA_PAYLOAD => payload = value,
            _ => {}
        }
        attributes = attributes
            .get(length.next_multiple_of(4)..)
            .unwrap_or_default();
    }
    Some(Queued { id: id?, payload })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..at + 4)
        .map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet_message(id: u32, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        header(&mut out, 0, PACKET, 0, 100);
        attribute(
            &mut out,
            NFQA_PACKET_HDR,
            &[&id.to_be_bytes()[..], &[0, 0, 1]].concat(),
        );
        attribute(&mut out, 9, &[0; 10]);
        attribute(&mut out, NFQA_PAYLOAD, payload);
        let length = u32::try_from(out.len()).unwrap();
        out[..4].copy_from_slice(&length.to_ne_bytes());
        out
    }

    fn read(bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let mut found = Vec::new();
        messages(bytes, &mut |queued| {
            found.push((queued.id.0, queued.payload.to_vec()));
        });
        found
    }

    #[test]
    fn every_packet_of_a_datagram_is_found() {
        let both = [packet_message(1, b"one"), packet_message(2, b"second")].concat();
        assert_eq!(read(&both), [(1, b"one".to_vec()), (2, b"second".to_vec())]);
    }

    #[test]
    fn a_message_that_is_cut_or_bent_is_passed_over_without_panic() {
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

    #[test]
    fn an_error_says_its_code() {
        let mut out = Vec::new();
        header(&mut out, 36, NLMSG_ERROR, 0, 0);
        out.truncate(16);
        out.extend_from_slice(&(-16i32).to_ne_bytes());
        out.resize(36, 0);
        let mut code = None;
        messages_or_error(&out, &mut |_| panic!("no packet here"), &mut |found| {
            code = Some(found);
        });
        assert_eq!(code, Some(-16));
    }
}
