//! Reads the addresses of the pods' veth interfaces on a bridge by rtnetlink(7), which can read
//! other network namespaces without entering them. So these are the configured addresses, not what
//! the pod puts into its packets.
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::bridge_addresses::{End, LinkAddress};
use crate::bridges::{Bridge, Peer};
use crate::netlink::{self, Attributes, Header, Message, messages};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockProtocol, recv, send};

use crate::sys;

// As linux/rtnetlink.h, linux/if_link.h and linux/if_addr.h number them.
const GET_LINK: u16 = 18;
const GET_ADDRESSES: u16 = 22;
const LINK_ADDRESS: u16 = 1;
const LINK_EXT_MASK: u16 = 29;
const SKIP_STATS: u32 = 1 << 3;
const LINK_TARGET_NETNS: u16 = 46;
const ADDRESS: u16 = 1;
const ADDRESS_TARGET_NETNS: u16 = 10;

/// The veth peer of each port of `bridges` that leads to another network namespace, in the order of the
/// ports. Blocks for some microseconds a port.
///
/// # Errors
/// The error of the kernel; a pod that is gone meanwhile is not an error.
pub fn of(bridges: &[Bridge]) -> io::Result<Vec<End>> {
    if bridges.is_empty() {
        return Ok(Vec::new());
    }
    let kernel = Kernel::open()?;
    let mut ends = Vec::new();
    for port in bridges.iter().flat_map(|bridge| &bridge.ports) {
        let Some(peer) = port.peer else { continue };
        match kernel.end(peer) {
            Ok(Some((link, addresses))) => ends.push(End {
                port: port.name.clone(),
                link,
                addresses,
            }),
            Ok(None) => {}
            Err(error) if has_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(ends)
}

fn has_gone(error: &io::Error) -> bool {
    let gone = [Errno::EINVAL, Errno::ENODEV].map(|errno| errno as i32);
    error
        .raw_os_error()
        .is_some_and(|errno| gone.contains(&errno))
}

struct Kernel(OwnedFd);

impl Kernel {
    fn open() -> io::Result<Self> {
        let fd = netlink::asking(SockProtocol::NetlinkRoute)?;
        // Otherwise the kernel ignores the filter of a dump.
        sys::check_requests(&fd)?;
        Ok(Self(fd))
    }

    /// The MAC address and the IP addresses of an interface.
    fn end(&self, peer: Peer) -> io::Result<Option<(LinkAddress, Vec<IpAddr>)>> {
        let target = peer.netns.to_ne_bytes();
        // Behind the first 4 bytes of each header: index, flags and change; index.
        let index = peer.index.to_ne_bytes();
        let mut link = None;
        self.ask(
            GET_LINK,
            0,
            |m| {
                m.raw(&[index, [0; 4], [0; 4]].concat());
                m.bytes(LINK_EXT_MASK, &SKIP_STATS.to_ne_bytes());
                m.bytes(LINK_TARGET_NETNS, &target);
            },
            |message| {
                let attributes = message.attributes().get(12..).unwrap_or_default();
                link =
                    netlink::find(attributes, LINK_ADDRESS).and_then(|it| it.value.try_into().ok());
            },
        )?;
        let mut addresses = Vec::new();
        self.ask(
            GET_ADDRESSES,
            netlink::DUMP,
            |m| {
                m.raw(&index);
                m.bytes(ADDRESS_TARGET_NETNS, &target);
            },
            |message| addresses.extend(address(message, index)),
        )?;
        Ok(link.map(|link| (link, addresses)))
    }

    /// Sends one request and calls `each` with every answer.
    fn ask(
        &self,
        kind: u16,
        flags: u16,
        request: impl FnOnce(&mut Attributes<'_>),
        mut each: impl FnMut(&Message<'_>),
    ) -> io::Result<()> {
        let flags = netlink::REQUEST | netlink::ACK | flags;
        let mut out = Vec::with_capacity(64);
        netlink::write(
            &mut out,
            Header {
                kind,
                flags,
                ..Header::default()
            },
            request,
        );
        send(self.0.as_raw_fd(), &out, MsgFlags::empty())?;
        let mut answer = vec![0; 32 * 1024];
        loop {
            let length = recv(self.0.as_raw_fd(), &mut answer, MsgFlags::empty())?;
            for message in messages(&answer[..length]) {
                if message.is_last()? {
                    return Ok(());
                }
                each(&message);
            }
        }
    }
}

/// The address in a message, if it belongs to the interface with this index.
fn address(message: &Message<'_>, index: [u8; 4]) -> Option<IpAddr> {
    let body = message.attributes();
    let of_link = netlink::chunk(body, 0) == Some(index);
    let value = netlink::find(body.get(4..)?, ADDRESS)
        .filter(|_| of_link)?
        .value;
    let v4 = || Some(IpAddr::from(<[u8; 4]>::try_from(value).ok()?));
    let v6 = || Some(IpAddr::from(<[u8; 16]>::try_from(value).ok()?));
    v4().or_else(v6)
}
