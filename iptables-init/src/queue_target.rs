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

use crate::netlink::{self, Attributes, Header, Message, messages};
use crate::ruleset::{QUEUE_CHAIN, TABLE};

const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_GETRULE: u16 = 7;
const NFT_MSG_DELRULE: u16 = 8;
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
        nftables(NFT_MSG_GETRULE, netlink::REQUEST | netlink::DUMP),
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
    batch.message(NFT_MSG_NEWTABLE, netlink::CREATE, |m| m.string(1, table));
    batch.message(NFT_MSG_NEWCHAIN, netlink::CREATE, |m| {
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
        self.edge(NFNL_MSG_BATCH_BEGIN);
    }

    fn end(&mut self) {
        self.edge(NFNL_MSG_BATCH_END);
    }

    fn edge(&mut self, kind: u16) {
        let resource = NFNL_SUBSYS_NFTABLES;
        self.frame(
            Header {
                kind,
                flags: netlink::REQUEST,
                resource,
                ..Header::default()
            },
            |_| {},
        );
    }

    fn rule(&mut self, table: &str, target: QueueTarget) {
        let info = target.info();
        self.message(NFT_MSG_NEWRULE, netlink::CREATE | netlink::APPEND, |m| {
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
        let flags = netlink::REQUEST | netlink::ACK | flags;
        self.frame(nftables(kind, flags), body);
    }

    fn frame(&mut self, header: Header, body: impl FnOnce(&mut Attributes<'_>)) {
        self.sequence += 1;
        netlink::write(
            &mut self.bytes,
            Header {
                sequence: self.sequence,
                ..header
            },
            body,
        );
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
                refusal(&message)?;
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
                refusal(&message)?;
                if message.kind == netlink::DONE {
                    return Ok(bodies);
                }
                bodies.push(message.attributes().to_vec());
            }
        }
    }
}

/// Of a message to nf_tables about family `inet`.
fn nftables(kind: u16, flags: u16) -> Header {
    let kind = NFNL_SUBSYS_NFTABLES << 8 | kind;
    Header {
        kind,
        flags,
        family: NFPROTO_INET,
        ..Header::default()
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

/// The error that a message carries, if it carries one.
fn refusal(message: &Message<'_>) -> io::Result<()> {
    match (message.kind, message.code()) {
        (netlink::ERROR | netlink::DONE, Some(code)) if code < 0 => {
            Err(io::Error::from_raw_os_error(-code))
        }
        _ => Ok(()),
    }
}

/// The parameters of the NFQUEUE target in a rule that is nothing but it.
fn target_info(rule: &[u8]) -> Option<&[u8]> {
    let value = |bytes, kind| netlink::find(bytes, kind).map(|attribute| attribute.value);
    let mut expressions = netlink::attributes(value(rule, 4)?);
    let expression = expressions.next()?.value;
    let data = value(expression, 2)?;
    let is_target = value(expression, 1)? == b"target\0" && value(data, 1)? == b"NFQUEUE\0";
    (is_target && expressions.next().is_none()).then_some(value(data, 3)?)
}
