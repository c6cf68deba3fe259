//! Asks the kernel by a route lookup (rtnetlink(7), `RTM_GETROUTE`) whether packets with the divert mark come to this
//! host. That detects any cause for which they do not.
//!
//! One request and its answer, so that it can be repeated often. Changes nothing.
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use kernel::marks::Marks;
use kernel::netlink::{self, Header, chunk, find, messages};
use nix::sys::socket::{MsgFlags, NetlinkAddr, SockProtocol, recv, sendto};

use crate::routes::{Family, ROUTE_TABLE};

const RTM_GETROUTE: u16 = 26;
/// The answer names the table that the route is in.
const RTM_F_LOOKUP_TABLE: u32 = 0x1000;
const RTN_LOCAL: u8 = 2;
const RTA_DST: u16 = 1;
const RTA_TABLE: u16 = 15;
const RTA_MARK: u16 = 16;
/// Offsets in `rtmsg`: of the type, and of the attributes.
const TYPE: usize = 3;
const ATTRIBUTES: usize = 8;

/// Addresses that no host has, from RFC 7600 and RFC 6666.
const ANYWHERE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 8)),
    IpAddr::V6(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 8)),
];

/// Whether our route delivers a packet with the divert mark and a foreign destination to this host. Blocks for some
/// microseconds.
///
/// # Errors
/// What `socket`, `sendto` and `recv` answer; a missing route is no error.
pub(crate) fn diverts(family: Family, marks: Marks) -> io::Result<bool> {
    let (number, address) = match family {
        Family::V4 => (nix::libc::AF_INET, ANYWHERE[0]),
        Family::V6 => (nix::libc::AF_INET6, ANYWHERE[1]),
    };
    let mut request = Vec::with_capacity(64);
    let header = Header {
        kind: RTM_GETROUTE,
        flags: netlink::REQUEST | netlink::ACK,
        family: u8::try_from(number).unwrap_or_default(),
        ..Header::default()
    };
    netlink::write(&mut request, header, |m| {
        m.raw(&[0; 4]);
        m.raw(&RTM_F_LOOKUP_TABLE.to_ne_bytes());
        match address {
            IpAddr::V4(v4) => m.bytes(RTA_DST, &v4.octets()),
            IpAddr::V6(v6) => m.bytes(RTA_DST, &v6.octets()),
        }
        m.bytes(RTA_MARK, &marks.divert().to_ne_bytes());
    });
    let socket = netlink::asking(SockProtocol::NetlinkRoute)?;
    let kernel = NetlinkAddr::new(0, 0);
    sendto(socket.as_raw_fd(), &request, &kernel, MsgFlags::empty())?;
    let mut answer = vec![0; 4096];
    let mut ours = false;
    loop {
        let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        for message in messages(answer.get(..length).unwrap_or_default()) {
            match message.is_last() {
                // The kernel reports a missing route as an error.
                Err(_) => return Ok(false),
                Ok(true) => return Ok(ours),
                Ok(false) => ours = is_ours(message.attributes()),
            }
        }
    }
}

fn is_ours(route: &[u8]) -> bool {
    let attributes = route.get(ATTRIBUTES..).unwrap_or_default();
    let table = find(attributes, RTA_TABLE).and_then(|it| chunk(it.value, 0));
    let table = table.map(u32::from_ne_bytes);
    route.get(TYPE) == Some(&RTN_LOCAL) && table.is_some_and(|it| it.to_string() == ROUTE_TABLE)
}
