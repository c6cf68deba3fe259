//! The one rule that `nft` cannot write: the iptables target `NFQUEUE` inside an nft chain.
//!
//! Kernels without `CONFIG_NFT_QUEUE` still have xt_NFQUEUE, and nf_tables can hold it as a
//! `target` expression (`CONFIG_NFT_COMPAT`); iptables-nft builds its rules the same way. Message
//! layout: linux/netfilter/nf_tables.h, nf_tables_compat.h, nfnetlink.h, xt_NFQUEUE.h.
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

use crate::ruleset::{QUEUE_CHAIN, TABLE};

const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_GETRULE: u16 = 7;
const NFT_MSG_DELRULE: u16 = 8;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;
const NLA_F_NESTED: u16 = 0x8000;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NFPROTO_UNSPEC: u8 = 0;
const NFPROTO_INET: u8 = 1;
const NFQ_FLAG_BYPASS: u16 = 1;
const NFQ_FLAG_CPU_FANOUT: u16 = 2;

/// Where the rule sends packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QueueTarget {
    pub(crate) first: u16,
    pub(crate) count: u16,
    /// Packets pass when nobody listens on the queue.
    pub(crate) bypass: bool,
}

/// Makes the rule the only one of our queue chain, in one transaction.
///
/// # Errors
/// What the kernel answered: `ENOENT` without the table or without xt_NFQUEUE, `EPERM`, ...
pub(crate) fn load(target: QueueTarget) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.begin();
    batch.message(NFT_MSG_DELRULE, 0, |m| {
        m.string(1, TABLE);
        m.string(2, QUEUE_CHAIN);
    });
    batch.rule(TABLE, target);
    batch.end();
    batch.send()
}

/// Whether the rule is the only one of our queue chain.
///
/// # Errors
/// What the kernel answered, but for a missing table or chain: then it is not there.
pub(crate) fn is_loaded(target: QueueTarget) -> io::Result<bool> {
    let mut request = Batch::new();
    request.frame(
        NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETRULE,
        NLM_F_REQUEST | NLM_F_DUMP,
        NFPROTO_INET,
        0,
        |m| {
            m.string(1, TABLE);
            m.string(2, QUEUE_CHAIN);
        },
    );
    let rules = match request.dump() {
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => return Ok(false),
        rules => rules?,
    };
    Ok(rules.len() == 1 && target_info(&rules[0]) == Some(&target.info()[..]))
}

/// Asks the kernel whether it could hold the rule; changes nothing, since the batch has no end.
///
/// # Errors
/// What the kernel answered.
pub(crate) fn probe() -> io::Result<()> {
    let mut batch = Batch::new();
    let table = "portreeve_probe";
    batch.begin();
    batch.message(NFT_MSG_NEWTABLE, NLM_F_CREATE, |m| m.string(1, table));
    batch.message(NFT_MSG_NEWCHAIN, NLM_F_CREATE, |m| {
        m.string(1, table);
        m.string(3, QUEUE_CHAIN);
    });
    batch.rule(
        table,
        QueueTarget {
            first: 0,
            count: 1,
            bypass: false,
        },
    );
    batch.send()
}

impl std::fmt::Display for QueueTarget {
    /// As iptables writes it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let last = self.first.saturating_add(self.count - 1);
        write!(
            f,
            "-j NFQUEUE --queue-balance {}:{last} --queue-cpu-fanout",
            self.first
        )?;
        if self.bypass {
            f.write_str(" --queue-bypass")
        } else {
            Ok(())
        }
    }
}

impl QueueTarget {
    /// `struct xt_NFQ_info_v3 { u16 queuenum, queues_total, flags; }`, aligned to 8.
    fn info(self) -> [u8; 8] {
        let flags = NFQ_FLAG_CPU_FANOUT | if self.bypass { NFQ_FLAG_BYPASS } else { 0 };
        let mut info = [0; 8];
        info[0..2].copy_from_slice(&self.first.to_ne_bytes());
        info[2..4].copy_from_slice(&self.count.to_ne_bytes());
        info[4..6].copy_from_slice(&flags.to_ne_bytes());
        info
    }
}

/// Netlink messages that the kernel takes or refuses together.
struct Batch {
    bytes: Vec<u8>,
    acks: u32,
    sequence: u32,
}

impl Batch {
    fn new() -> Self {
        Self {
            bytes: Vec::with_capacity(512),
            acks: 0,
            sequence: 0,
        }
    }

    fn begin(&mut self) {
        self.frame(
            NFNL_MSG_BATCH_BEGIN,
            NLM_F_REQUEST,
            NFPROTO_UNSPEC,
            NFNL_SUBSYS_NFTABLES,
            |_| {},
        );
    }

    fn end(&mut self) {
        self.frame(
            NFNL_MSG_BATCH_END,
            NLM_F_REQUEST,
            NFPROTO_UNSPEC,
            NFNL_SUBSYS_NFTABLES,
            |_| {},
        );
    }

    fn rule(&mut self, table: &str, target: QueueTarget) {
        let info = target.info();
        self.message(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, |m| {
            m.string(1, table);
            m.string(2, QUEUE_CHAIN);
            m.nested(4, |expressions| {
                expressions.nested(1, |expression| {
                    expression.string(1, "target");
                    expression.nested(2, |data| {
                        data.string(1, "NFQUEUE");
                        data.bytes(2, &3u32.to_be_bytes());
                        data.bytes(3, &info);
                    });
                });
            });
        });
    }

    fn message(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Attributes<'_>)) {
        self.acks += 1;
        self.frame(
            NFNL_SUBSYS_NFTABLES << 8 | kind,
            NLM_F_REQUEST | NLM_F_ACK | flags,
            NFPROTO_INET,
            0,
            body,
        );
    }

    /// One `nlmsghdr` with its `nfgenmsg`; lengths are filled in once the body is written.
    fn frame(
        &mut self,
        kind: u16,
        flags: u16,
        family: u8,
        resource: u16,
        body: impl FnOnce(&mut Attributes<'_>),
    ) {
        let start = self.bytes.len();
        self.sequence += 1;
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&self.sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&[family, 0]);
        self.bytes.extend_from_slice(&resource.to_be_bytes());
        body(&mut Attributes(&mut self.bytes));
        let length = u32::try_from(self.bytes.len() - start).unwrap_or(u32::MAX);
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// Sends all and reads an answer a message; the first refusal is the result.
    fn send(self) -> io::Result<()> {
        let socket = netfilter_socket()?;
        sendto(
            socket.as_raw_fd(),
            &self.bytes,
            &NetlinkAddr::new(0, 0),
            MsgFlags::empty(),
        )?;
        let mut outstanding = self.acks;
        while outstanding > 0 {
            for message in messages(&receive(&socket)?) {
                message.refusal()?;
                outstanding = outstanding.saturating_sub(1);
            }
        }
        Ok(())
    }

    /// Sends the one request and collects the bodies of all answers, without their `nfgenmsg`.
    fn dump(self) -> io::Result<Vec<Vec<u8>>> {
        let socket = netfilter_socket()?;
        sendto(
            socket.as_raw_fd(),
            &self.bytes,
            &NetlinkAddr::new(0, 0),
            MsgFlags::empty(),
        )?;
        let mut bodies = Vec::new();
        loop {
            for message in messages(&receive(&socket)?) {
                message.refusal()?;
                if message.kind == NLMSG_DONE {
                    return Ok(bodies);
                }
                bodies.push(message.body.get(4..).unwrap_or_default().to_vec());
            }
        }
    }
}

/// A netlink socket for netfilter with a bounded wait, since a refused batch may answer less than once a message.
fn netfilter_socket() -> io::Result<OwnedFd> {
    let fd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    let wait = nix::sys::time::TimeVal::new(2, 0);
    nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::ReceiveTimeout, &wait)?;
    Ok(fd)
}

fn receive(socket: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut answer = vec![0; 32 * 1024];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    answer.truncate(length);
    Ok(answer)
}

/// One received netlink message.
struct Message<'a> {
    kind: u16,
    body: &'a [u8],
}

impl Message<'_> {
    /// The error that the message carries, if it carries one.
    fn refusal(&self) -> io::Result<()> {
        let code = self
            .body
            .get(0..4)
            .and_then(|code| code.try_into().ok())
            .map(i32::from_ne_bytes);
        match (self.kind, code) {
            (NLMSG_ERROR | NLMSG_DONE, Some(code)) if code < 0 => {
                Err(io::Error::from_raw_os_error(-code))
            }
            _ => Ok(()),
        }
    }
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(bytes.get(0..4)?.try_into().ok()?);
        let length = usize::try_from(length).ok()?;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let body = bytes.get(16..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message { kind, body })
    })
}

/// The parameters of the NFQUEUE target in a rule that is nothing but it.
fn target_info(rule: &[u8]) -> Option<&[u8]> {
    let mut expressions = attributes(attribute(rule, 4)?);
    let (_, expression) = expressions.next()?;
    let data = attribute(expression, 2)?;
    let is_target = attribute(expression, 1)? == b"target\0" && attribute(data, 1)? == b"NFQUEUE\0";
    (is_target && expressions.next().is_none()).then_some(attribute(data, 3)?)
}

fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(kind, value)| (kind == wanted).then_some(value))
}

/// Splits netlink attributes into their types, without flags, and their values.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(0..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & !NLA_F_NESTED;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Writes netlink attributes (`nlattr`), each padded to 4 bytes.
struct Attributes<'a>(&'a mut Vec<u8>);

impl Attributes<'_> {
    fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.attribute(kind, |out| out.0.extend_from_slice(value));
    }

    fn string(&mut self, kind: u16, value: &str) {
        self.attribute(kind, |out| {
            out.0.extend_from_slice(value.as_bytes());
            out.0.push(0);
        });
    }

    fn nested(&mut self, kind: u16, body: impl FnOnce(&mut Attributes<'_>)) {
        self.attribute(kind | NLA_F_NESTED, body);
    }

    fn attribute(&mut self, kind: u16, body: impl FnOnce(&mut Attributes<'_>)) {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(&kind.to_ne_bytes());
        body(&mut Attributes(self.0));
        let length = u16::try_from(self.0.len() - start).unwrap_or(u16::MAX);
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}
