//! Filters a dump of conntrack's table: by mark, and by an address at one end.
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::netlink::Attributes;

use super::entry::{CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, Entry, write_source};
use super::{
    CTA_MARK, CTA_MARK_MASK, Conntrack, NFPROTO_IPV4, NFPROTO_IPV6, NFPROTO_UNSPEC, each_marked,
};

const CTA_FILTER: u16 = 25;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
/// `CTA_FILTER_FLAG(CTA_IP_SRC)`.
const BY_SOURCE: u32 = 1;

/// Entries of the table for each address that is worth a filtered dump: a filter takes the kernel two walks through the
/// table, with some nanoseconds an entry, while an entry that we receive takes a microsecond or more.
const WORTH_A_QUESTION: usize = 4096;
/// The number of entries in the table.
const COUNT: &str = "/proc/sys/net/netfilter/nf_conntrack_count";
/// Whether the kernel supports `CTA_FILTER` (Linux 5.8); older ones ignore it.
static FILTERS: AtomicBool = AtomicBool::new(true);

/// Like [`each_marked`], for the entries whose client, or server behind DNAT, is among `addresses`. The kernel filters
/// them if it can and the addresses are few.
///
/// # Errors
/// As [`each_marked`].
pub fn each_with_end(
    addresses: &BTreeSet<IpAddr>,
    mark: u32,
    mask: u32,
    mut each: impl FnMut(Entry) -> io::Result<()>,
) -> io::Result<()> {
    let ends = |entry: &Entry| [entry.flow.client.ip(), entry.flow.server.ip()];
    let count = std::fs::read_to_string(COUNT).ok();
    let count = count.and_then(|it| it.trim().parse::<usize>().ok());
    let worth = count.unwrap_or(0) / WORTH_A_QUESTION;
    if addresses.len() <= worth && FILTERS.load(Ordering::Relaxed) {
        let mut conntrack = Conntrack::open()?;
        let sides = [Side::Client, Side::Server];
        for (address, side) in addresses
            .iter()
            .flat_map(|it| sides.map(|side| (*it, side)))
        {
            let end = Some((address, side));
            conntrack.each(Filter { mark, mask, end }, |entry| {
                let [client, server] = ends(&entry);
                let (asked, by_client) = match side {
                    Side::Client => (client, false),
                    Side::Server => (server, addresses.contains(&client)),
                };
                if asked != address {
                    FILTERS.store(false, Ordering::Relaxed);
                    return Ok(());
                }
                // It is listed by the address of its client.
                if by_client { Ok(()) } else { each(entry) }
            })?;
        }
        return Ok(());
    }
    each_marked(mark, mask, |entry| {
        match ends(&entry).iter().any(|end| addresses.contains(end)) {
            true => each(entry),
            false => Ok(()),
        }
    })
}

/// The filter of a dump.
#[derive(Clone, Copy)]
pub(super) struct Filter {
    pub(super) mark: u32,
    pub(super) mask: u32,
    /// An address, and the end of the flow that has it.
    pub(super) end: Option<(IpAddr, Side)>,
}

/// An end of a flow.
#[derive(Clone, Copy)]
pub(super) enum Side {
    Client,
    Server,
}

impl Filter {
    pub(super) fn family(&self) -> u8 {
        match self.end {
            None => NFPROTO_UNSPEC,
            Some((IpAddr::V4(_), _)) => NFPROTO_IPV4,
            Some((IpAddr::V6(_), _)) => NFPROTO_IPV6,
        }
    }

    pub(super) fn write(&self, m: &mut Attributes<'_>) {
        m.bytes(CTA_MARK, &self.mark.to_be_bytes());
        m.bytes(CTA_MARK_MASK, &self.mask.to_be_bytes());
        let Some((address, side)) = self.end else {
            return;
        };
        let (tuple, flags) = match side {
            Side::Client => (CTA_TUPLE_ORIG, [BY_SOURCE, 0]),
            Side::Server => (CTA_TUPLE_REPLY, [0, BY_SOURCE]),
        };
        m.nested(tuple, |tuple| write_source(tuple, address));
        m.nested(CTA_FILTER, |filter| {
            filter.bytes(CTA_FILTER_ORIG_FLAGS, &flags[0].to_ne_bytes());
            filter.bytes(CTA_FILTER_REPLY_FLAGS, &flags[1].to_ne_bytes());
        });
    }
}
