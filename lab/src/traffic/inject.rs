//! Sends crafted packets on a host's link, past its IP stack, which would correct or reject them.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{LinkAddr, MsgFlags, sendto};
use socket2::{Domain, Socket, Type};

use crate::cluster::host::io_error;
use crate::netns::Netns;

/// A packet socket on a link, to the host's neighbour there.
#[derive(Debug)]
pub struct Injector {
    socket: Socket,
    link: LinkAddr,
    /// Destination and source.
    addresses: [u8; 12],
}

impl Injector {
    /// Opens `interface`, towards the neighbour that the host has used or been given there.
    pub(crate) fn open(netns: &Netns, interface: &str) -> io::Result<Self> {
        let open = || -> io::Result<_> {
            let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
            Ok((socket, link(interface)?, neighbour(interface)?))
        };
        let (socket, link, neighbour) = netns.run(open).map_err(io_error)??;
        let own = link.addr().unwrap_or_default();
        let mut addresses = [0; 12];
        addresses[..6].copy_from_slice(&neighbour);
        addresses[6..].copy_from_slice(&own);
        Ok(Self {
            socket,
            link,
            addresses,
        })
    }

    /// The same link, with another destination: the MAC address of a neighbour or a group.
    #[must_use]
    pub fn towards(mut self, neighbour: [u8; 6]) -> Self {
        self.addresses[..6].copy_from_slice(&neighbour);
        self
    }

    /// The same link, with another source MAC address.
    #[must_use]
    pub fn in_the_name_of(mut self, link: [u8; 6]) -> Self {
        self.addresses[6..].copy_from_slice(&link);
        self
    }

    /// Sends a packet that begins with its IP header.
    ///
    /// # Errors
    /// What the kernel answers: `EMSGSIZE` for one longer than the link takes, ...
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        let v6 = packet.first().is_some_and(|first| first >> 4 == 6);
        let kind: u16 = if v6 { 0x86dd } else { 0x0800 };
        self.send_frame(kind, packet)
    }

    /// Sends a frame with an EtherType of its own.
    ///
    /// # Errors
    /// As [`Injector::send`].
    pub fn send_frame(&self, kind: u16, payload: &[u8]) -> io::Result<()> {
        let frame = [&self.addresses[..], &kind.to_be_bytes(), payload].concat();
        sendto(
            self.socket.as_raw_fd(),
            &frame,
            &self.link,
            MsgFlags::empty(),
        )?;
        Ok(())
    }
}

fn link(interface: &str) -> io::Result<LinkAddr> {
    let of_it = getifaddrs()?.filter(|entry| entry.interface_name == interface);
    of_it
        .filter_map(|entry| entry.address?.as_link_addr().copied())
        .next()
        .ok_or_else(|| {
            let text = format!("there is no interface {interface}");
            io::Error::new(io::ErrorKind::NotFound, text)
        })
}

/// The first neighbour on `interface` (proc_net(5), `arp`).
fn neighbour(interface: &str) -> io::Result<[u8; 6]> {
    let table = fs::read_to_string("/proc/thread-self/net/arp")?;
    let known = table.lines().skip(1).find_map(|line| {
        let columns: Vec<_> = line.split_whitespace().collect();
        let usable = columns.get(5) == Some(&interface) && columns.get(2) != Some(&"0x0");
        let mut bytes = columns.get(3).filter(|_| usable)?.split(':');
        let mut address = [0; 6];
        for byte in &mut address {
            *byte = u8::from_str_radix(bytes.next()?, 16).ok()?;
        }
        Some(address)
    });
    known.ok_or_else(|| {
        let text = format!("no neighbour is known on {interface}; send something there first");
        io::Error::new(io::ErrorKind::NotFound, text)
    })
}
