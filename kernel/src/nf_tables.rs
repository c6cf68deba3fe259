//! Messages to nf_tables: atomic batches, and requests.
//!
//! linux/netfilter/nfnetlink.h, nf_tables.h. Uses the network namespace of the calling thread; must
//! not know what tables hold.
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{MsgFlags, NetlinkAddr, SockProtocol, recv, sendto};

use crate::netlink::{self, Attributes, Header, messages};

/// `NFPROTO_UNSPEC`: in a question, every family.
pub const ANY_FAMILY: u8 = 0;
/// `NFPROTO_INET`.
pub const INET: u8 = 1;
/// `NFPROTO_BRIDGE`.
pub const BRIDGE: u8 = 7;

const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETGEN: u16 = 16;
const NFTA_GEN_ID: u16 = 1;

/// Asks nf_tables to list what `body` asks for, and returns the attributes of each.
///
/// # Errors
/// What the kernel answered, such as `EPERM` without `CAP_NET_ADMIN`.
pub fn dump(
    kind: u16,
    family: u8,
    body: impl FnOnce(&mut Attributes<'_>),
) -> io::Result<Vec<Vec<u8>>> {
    let mut request = Vec::with_capacity(64);
    let flags = netlink::REQUEST | netlink::DUMP;
    netlink::write(&mut request, header(kind, flags, family), body);
    let socket = ask(&request)?;
    let mut bodies = Vec::new();
    loop {
        for message in messages(&receive(&socket)?) {
            if message.is_last()? {
                return Ok(bodies);
            }
            bodies.push(message.attributes().to_vec());
        }
    }
}

/// The generation of this network namespace's tables, which every change increments.
///
/// # Errors
/// What the kernel answered, such as `EPERM` without `CAP_NET_ADMIN`.
pub fn generation() -> io::Result<u32> {
    let mut request = Vec::with_capacity(32);
    let flags = netlink::REQUEST | netlink::ACK;
    let header = header(NFT_MSG_GETGEN, flags, ANY_FAMILY);
    netlink::write(&mut request, header, |_| {});
    let socket = ask(&request)?;
    let mut generation = None;
    loop {
        for message in messages(&receive(&socket)?) {
            if message.is_last()? {
                return generation.ok_or_else(|| io::ErrorKind::InvalidData.into());
            }
            let id = netlink::find(message.attributes(), NFTA_GEN_ID);
            generation = id
                .and_then(|id| netlink::chunk(id.value, 0))
                .map(u32::from_be_bytes);
        }
    }
}

/// Netlink messages that the kernel applies or rejects together.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    acks: u32,
    sequence: u32,
}

impl Batch {
    /// Adds the message that a batch begins with.
    pub fn begin(&mut self) {
        self.edge(NFNL_MSG_BATCH_BEGIN);
    }

    /// Adds the message that a batch ends with; without it the kernel only checks the others.
    pub fn end(&mut self) {
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

    /// Adds a message about family `inet`.
    pub fn message(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Attributes<'_>)) {
        self.acks += 1;
        let flags = netlink::REQUEST | netlink::ACK | flags;
        self.frame(header(kind, flags, INET), body);
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
    ///
    /// # Errors
    /// The first refusal, such as `EPERM` without `CAP_NET_ADMIN`.
    pub fn send(self) -> io::Result<()> {
        let socket = ask(&self.bytes)?;
        let mut outstanding = self.acks;
        while outstanding > 0 {
            for message in messages(&receive(&socket)?) {
                message.is_last()?;
                outstanding = outstanding.saturating_sub(1);
            }
        }
        Ok(())
    }
}

fn header(kind: u16, flags: u16, family: u8) -> Header {
    let kind = NFNL_SUBSYS_NFTABLES << 8 | kind;
    Header {
        kind,
        flags,
        family,
        ..Header::default()
    }
}

/// Sends on a new socket, on which the kernel answers.
fn ask(request: &[u8]) -> io::Result<OwnedFd> {
    let fd = netlink::asking(SockProtocol::NetlinkNetFilter)?;
    let kernel = NetlinkAddr::new(0, 0);
    sendto(fd.as_raw_fd(), request, &kernel, MsgFlags::empty())?;
    Ok(fd)
}

fn receive(socket: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut answer = vec![0; 32 * 1024];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    answer.truncate(length);
    Ok(answer)
}
