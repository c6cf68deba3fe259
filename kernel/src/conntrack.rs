//! The kernel's connection tracking table: lists flows by their mark, marks and deletes them.
//!
//! Speaks ctnetlink (linux/netfilter/nfnetlink_conntrack.h, nfnetlink.h, linux/netlink.h) to the
//! network namespace of the calling thread. Knows nothing of policy: what a mark means, and which
//! flows must go, is the caller's business.
mod answer;
mod endings;
mod entry;
mod filter;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::netlink::{self, Attributes, Header};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

pub use endings::{Ended, Endings, Heard, Report};
pub use entry::{Entry, FlowId};
pub use filter::each_with_end;

use answer::{Dump, acknowledgement, unreadable};
use filter::Filter;

/// Seconds that the kernel may take for one datagram of its answer.
const PATIENCE: i64 = 5;
/// Attempts at a dump that changes of the table interrupt.
const DUMPS: u32 = 8;
/// Bytes of one datagram; the kernel puts at most 32 KiB of a dump into one.
const DATAGRAM: usize = 64 << 10;

// `NFNL_SUBSYS_CTNETLINK << 8`, or'ed with `IPCTNL_MSG_CT_NEW`, `_GET` and `_DELETE`.
const CT_NEW: u16 = 0x100;
const CT_GET: u16 = 0x101;
const CT_DELETE: u16 = 0x102;
const NFPROTO_UNSPEC: u8 = 0;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const CTA_MARK: u16 = 8;
const CTA_MARK_MASK: u16 = 21;

/// Every entry, IPv4 and IPv6 and of every zone, whose mark under `mask` is `mark`; the kernel
/// filters. `mark` must lie within `mask`; without a bit in both, that is every entry there is.
///
/// Blocks, at most five seconds for each datagram. What the table gains meanwhile may be missing,
/// and what the kernel moves within it may be there twice.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`, `EINVAL` from a kernel without `CONFIG_NF_CT_NETLINK`,
/// `EOPNOTSUPP` from one without `CONFIG_NF_CONNTRACK_MARK`, [`io::ErrorKind::TimedOut`],
/// [`io::ErrorKind::ResourceBusy`] if the table changed during every dump, and
/// [`io::ErrorKind::InvalidData`] for an answer that cannot be parsed: an incomplete list would
/// leave a denied flow alive.
pub fn marked(mark: u32, mask: u32) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    each_marked(mark, mask, |entry| {
        entries.push(entry);
        Ok(())
    })?;
    Ok(entries)
}

/// Calls `each` with every entry that [`marked`] lists, as they arrive, so that only one datagram of them is in memory.
/// If the table changes during a dump, all entries are listed again.
///
/// # Errors
/// As [`marked`], and what `each` returns.
pub fn each_marked(
    mark: u32,
    mask: u32,
    each: impl FnMut(Entry) -> io::Result<()>,
) -> io::Result<()> {
    Conntrack::open()?.each(
        Filter {
            mark,
            mask,
            end: None,
        },
        each,
    )
}

/// Deletes entries and returns how many it deleted. A missing entry is not an error.
///
/// Each goes only if it still has its id (`CTA_ID`), so that a later flow between the same ends
/// stays. The kernel makes the id from the entry's place in memory and its tuples: a later flow in
/// the same place would share it, and would only be evaluated again.
///
/// Blocks, at most five seconds for each entry.
///
/// # Errors
/// The first error, after all entries have been tried: `EPERM` without `CAP_NET_ADMIN`, ... Or at
/// once, as for [`marked`], if the kernel's answers fail to come or cannot be read.
pub fn delete(entries: &[&Entry]) -> io::Result<usize> {
    each(entries, |conntrack, entry| {
        conntrack.tell(CT_DELETE, entry, |_| ())
    })
}

/// Gives entries `mark` for their bits under `mask` and returns how many have it now. One that is gone
/// already is no error; a new flow between the same ends has it instead.
///
/// Blocks, at most five seconds for each entry.
///
/// # Errors
/// As [`delete`].
pub fn set_mark(entries: &[&Entry], mark: u32, mask: u32) -> io::Result<usize> {
    each(entries, |conntrack, entry| {
        conntrack.tell(CT_NEW, entry, |m| {
            m.bytes(CTA_MARK, &mark.to_be_bytes());
            m.bytes(CTA_MARK_MASK, &mask.to_be_bytes());
        })
    })
}

/// Whether each entry still has the mark that it was read with. A missing entry does not.
///
/// Blocks, at most five seconds for each entry.
///
/// # Errors
/// As [`marked`].
pub fn keep_their_marks(entries: &[&Entry]) -> io::Result<Vec<bool>> {
    if entries.is_empty() {
        return Ok(Vec::new());
    }
    let mut conntrack = Conntrack::open()?;
    let mut keeps = |entry: &&Entry| {
        let now = conntrack.same(entry)?;
        Ok(now.is_some_and(|now| entry.has_mark_of(&now)))
    };
    entries.iter().map(&mut keeps).collect()
}

/// Whether there is an entry between the ends of this one: itself, or that of a later flow.
///
/// Blocks, at most five seconds.
///
/// # Errors
/// As [`marked`].
pub fn has_entry_between(ends: &Entry) -> io::Result<bool> {
    Ok(Conntrack::open()?
        .get(ends.without_id(), family(ends))?
        .is_some())
}

/// Sends a request for every entry and returns how many succeeded.
fn each(
    entries: &[&Entry],
    todo: impl Fn(&mut Conntrack, &Entry) -> io::Result<Result<(), Errno>>,
) -> io::Result<usize> {
    if entries.is_empty() {
        return Ok(0);
    }
    let mut conntrack = Conntrack::open()?;
    let mut done = 0;
    let mut refused = None;
    for entry in entries {
        match todo(&mut conntrack, entry)? {
            Ok(()) => done += 1,
            Err(Errno::ENOENT) => {}
            Err(errno) => refused = refused.or(Some(errno)),
        }
    }
    refused.map_or(Ok(done), |errno| Err(errno.into()))
}

/// A ctnetlink socket with one request at a time.
struct Conntrack {
    socket: OwnedFd,
    /// Distinguishes the answer to one request from a late answer to another.
    sequence: u32,
    buffer: Vec<u8>,
}

impl Conntrack {
    fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )?;
        setsockopt(
            &socket,
            sockopt::ReceiveTimeout,
            &TimeVal::seconds(PATIENCE),
        )?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: vec![0; DATAGRAM],
        })
    }

    fn each(
        &mut self,
        filter: Filter,
        mut each: impl FnMut(Entry) -> io::Result<()>,
    ) -> io::Result<()> {
        for _ in 0..DUMPS {
            if !self.dump(filter, &mut each)? {
                return Ok(());
            }
        }
        Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "the conntrack table changed during every dump; list it again later",
        ))
    }

    /// Whether the table changed during the dump.
    fn dump(
        &mut self,
        filter: Filter,
        each: &mut impl FnMut(Entry) -> io::Result<()>,
    ) -> io::Result<bool> {
        self.request(CT_GET, netlink::DUMP, filter.family(), |m| filter.write(m))?;
        let mut dump = Dump::default();
        while !dump.done {
            let sequence = self.sequence;
            dump.read(self.receive()?, sequence)?;
            dump.entries.drain(..).try_for_each(&mut *each)?;
        }
        Ok(dump.interrupted)
    }

    /// This entry as it is now; `None` if it is gone.
    fn same(&mut self, entry: &Entry) -> io::Result<Option<Entry>> {
        let found = self.get(entry.name(), family(entry))?;
        // Before Linux 5.1 a request ignores the id.
        Ok(found.filter(|now| entry.is_same(now)))
    }

    /// The entry of this name, if there is one.
    fn get(&mut self, name: &[u8], family: u8) -> io::Result<Option<Entry>> {
        self.request(CT_GET, 0, family, |m| m.raw(name))?;
        let mut answer = Dump::default();
        while answer.entries.is_empty() {
            let sequence = self.sequence;
            match answer.read(self.receive()?, sequence) {
                Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => break,
                read => read?,
            }
        }
        Ok(answer.entries.pop())
    }

    /// The inner result is the kernel's reply.
    fn tell(
        &mut self,
        kind: u16,
        entry: &Entry,
        more: impl FnOnce(&mut Attributes<'_>),
    ) -> io::Result<Result<(), Errno>> {
        self.request(kind, netlink::ACK, family(entry), |m| {
            m.raw(entry.name());
            more(m);
        })?;
        loop {
            let sequence = self.sequence;
            if let Some(answer) = acknowledgement(self.receive()?, sequence)? {
                return Ok(answer);
            }
        }
    }

    fn request(
        &mut self,
        kind: u16,
        flags: u16,
        family: u8,
        body: impl FnOnce(&mut Attributes<'_>),
    ) -> io::Result<()> {
        self.sequence += 1;
        let message = request(kind, flags, self.sequence, family, body);
        while let Err(errno) = send(self.socket.as_raw_fd(), &message, MsgFlags::empty()) {
            if errno != Errno::EINTR {
                return Err(errno.into());
            }
        }
        Ok(())
    }

    /// The next datagram of the kernel's answer.
    fn receive(&mut self) -> io::Result<&[u8]> {
        loop {
            // With this flag the length is that of the datagram, even if it was truncated.
            match recv(
                self.socket.as_raw_fd(),
                &mut self.buffer,
                MsgFlags::MSG_TRUNC,
            ) {
                Ok(length) => return self.buffer.get(..length).ok_or_else(unreadable),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(late()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// A message to ctnetlink.
fn request(
    kind: u16,
    flags: u16,
    sequence: u32,
    family: u8,
    body: impl FnOnce(&mut Attributes<'_>),
) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    let flags = netlink::REQUEST | flags;
    netlink::write(
        &mut out,
        Header {
            kind,
            flags,
            sequence,
            family,
            resource: 0,
        },
        body,
    );
    out
}

fn family(entry: &Entry) -> u8 {
    match entry.flow.client {
        SocketAddr::V4(_) => NFPROTO_IPV4,
        SocketAddr::V6(_) => NFPROTO_IPV6,
    }
}

fn late() -> io::Error {
    io::Error::new(
        io::ErrorKind::TimedOut,
        format!("ctnetlink did not answer within {PATIENCE} s; retry"),
    )
}

#[cfg(test)]
mod tests {
    use crate::netlink::find;
    use policy::Protocol;

    use super::entry::{CTA_ID, CTA_TUPLE_ORIG, CTA_TUPLE_REPLY};
    use super::*;

    /// Bytes of `nlmsghdr` alone, and with the `nfgenmsg` behind it.
    const NLMSG_HEADER: usize = 16;
    const HEADER: usize = 20;

    /// The answer of Linux 6.18 (little-endian) to request 7: an ICMPv6 echo in zone 6, and a UDP
    /// flow of the original zone 5 whose server, 10.9.0.99:53, is 10.9.0.2:5353 by DNAT.
    const DUMP: &str = "\
        ec0000000001220007000000513100000a000000540001802c00018014000300fd00000000000000\
        000000000000000114000400fd00000000000000000000000000000224000280050001003a000000\
        06000700004e000005000800800000000500090000000000540002802c00018014000300fd000000\
        00000000000000000000000214000400fd0000000000000000000000000000012400028005000100\
        3a00000006000700004e000005000800810000000500090000000000060012000006000008000300\
        00000188080008000000004108000c0097c802be08000b0000000001080007000000001dac000000\
        000122000700000051310000020000003c00018014000180080001000a090001080002000a090063\
        1c0002800500010011000000060002000fa100000600030000350000060003000005000034000280\
        14000180080001000a090002080002000a0900011c00028005000100110000000600020014e90000\
        060003000fa1000008000300000001a8080008000000004108000c00a7ee67e208000b0000000001\
        080007000000001d";
    const DONE: &str = "1400000003000200070000005131000000000000";
    const REQUEST: u32 = 7;
    /// Where the second message of `DUMP` begins.
    const SECOND: usize = 0xec;

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
            .collect()
    }

    fn read(datagrams: &[&[u8]]) -> io::Result<Dump> {
        let mut dump = Dump::default();
        for datagram in datagrams {
            dump.read(datagram, REQUEST)?;
        }
        Ok(dump)
    }

    /// A message of `kind` that begins with an errno, as the kernel sends it.
    fn answer(kind: u16, sequence: u32, code: i32) -> Vec<u8> {
        let mut out = request(kind, 0, sequence, 0, |m| m.raw(&[0; 16]));
        out[NLMSG_HEADER..HEADER].copy_from_slice(&code.to_ne_bytes());
        out
    }

    #[test]
    fn entry_has_original_client_and_translated_server() {
        let dump = bytes(DUMP);
        let read = read(&[&dump, &bytes(DONE)]).unwrap();
        let ends: Vec<_> = read
            .entries
            .iter()
            .map(|entry| {
                let flow = entry.flow;
                (flow.protocol, flow.client, flow.server, flow.identifier)
            })
            .collect();
        let end = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert_eq!(
            ends,
            [
                (
                    Protocol::Other(58),
                    end("[fd00::1]:0"),
                    end("[fd00::2]:0"),
                    0x4e
                ),
                (Protocol::Udp, end("10.9.0.1:4001"), end("10.9.0.2:5353"), 0),
            ]
        );
        assert!(read.done && !read.interrupted);
    }

    #[test]
    fn entry_is_identified_by_tuple_zone_and_id() {
        let names: Vec<_> = read(&[&bytes(DUMP)])
            .unwrap()
            .entries
            .into_iter()
            .map(|entry| entry.name().to_vec())
            .collect();
        for (name, tuple, others, why) in [
            (
                &names[0],
                0x54,
                "060012000006000008000c0097c802be",
                "zone 6 of the entry",
            ),
            (
                &names[1],
                0x3c,
                "08000c00a7ee67e2",
                "zone 5 stands in the tuple",
            ),
        ] {
            assert_eq!(name[tuple..], bytes(others), "{why}");
            assert_eq!(
                find(name, CTA_TUPLE_ORIG).unwrap().whole.len(),
                tuple,
                "{why}"
            );
        }
        let tuple = find(&names[1], CTA_TUPLE_ORIG).unwrap().value;
        assert_eq!(find(tuple, 3).unwrap().value, [0, 5], "CTA_TUPLE_ZONE");
    }

    #[test]
    fn entries_with_different_marks_do_not_match() {
        let dump = bytes(DUMP);
        let entry = |dump: &[u8]| read(&[dump]).unwrap().entries.remove(0);
        let now = entry(&dump);
        assert!(now.has_mark_of(&entry(&dump)));
        let marked = dump
            .windows(8)
            .position(|it| it == bytes("0800080000000041"));
        let mut other = dump.clone();
        other[marked.unwrap() + 7] = 0x40;
        assert!(!now.has_mark_of(&entry(&other)));
    }

    #[test]
    fn dump_interrupted_by_a_change_is_flagged() {
        let mut dump = bytes(DUMP);
        dump[6] |= 0x10;
        assert!(read(&[&dump, &bytes(DONE)]).unwrap().interrupted);
    }

    #[test]
    fn truncated_dump_is_an_error() {
        let dump = bytes(DUMP);
        for length in 0..dump.len() {
            let cut = read(&[&dump[..length]]);
            match length {
                0 | SECOND => assert!(!cut.unwrap().done, "whole messages, but no end"),
                _ => assert_eq!(
                    cut.unwrap_err().kind(),
                    io::ErrorKind::InvalidData,
                    "{length}"
                ),
            }
        }
    }

    #[test]
    fn entry_without_tuples_or_id_is_an_error() {
        let dump = bytes(DUMP);
        let needed = [CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_ID];
        let without = |missing: Option<u16>| {
            let attributes: Vec<u8> = needed
                .into_iter()
                .filter(|kind| Some(*kind) != missing)
                .flat_map(|kind| find(&dump[SECOND + HEADER..], kind).unwrap().whole)
                .copied()
                .collect();
            read(&[&request(CT_NEW, 0, REQUEST, NFPROTO_IPV4, |m| {
                m.raw(&attributes);
            })])
        };
        assert_eq!(without(None).unwrap().entries.len(), 1);
        for kind in needed {
            let error = without(Some(kind)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "attribute {kind}");
        }
    }

    #[test]
    fn damaged_answer_is_handled_without_panic() {
        let dump = bytes(DUMP);
        let mut bent = dump.clone();
        for at in 0..dump.len() {
            for value in 0..=255 {
                bent[at] = value;
                if let Ok(read) = read(&[&bent]) {
                    assert!(read.entries.len() <= 2);
                }
                let _answer = acknowledgement(&bent, REQUEST);
            }
            bent[at] = dump[at];
        }
    }

    #[test]
    fn failed_dump_returns_the_kernel_error() {
        for (kind, code, why) in [
            (netlink::ERROR, Errno::EPERM, "refused at once"),
            (netlink::DONE, Errno::ENOMEM, "given up on the way"),
        ] {
            let refusal = answer(kind, REQUEST, -(code as i32));
            let error = read(&[&bytes(DUMP), &refusal]).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(code as i32), "{why}");
        }
    }

    #[test]
    fn answer_to_another_request_is_skipped() {
        let mut dump = Dump::default();
        for datagram in [
            bytes(DUMP),
            answer(netlink::ERROR, REQUEST, -1),
            bytes(DONE),
        ] {
            dump.read(&datagram, REQUEST + 1).unwrap();
        }
        assert!(dump.entries.is_empty() && !dump.done);
    }

    #[test]
    fn deletion_matches_its_acknowledgement_by_sequence_number() {
        let late = answer(netlink::ERROR, REQUEST - 1, 0);
        let gone = answer(netlink::ERROR, REQUEST, -(Errno::ENOENT as i32));
        for (datagram, expected, why) in [
            (answer(netlink::ERROR, REQUEST, 0), Some(Ok(())), "deleted"),
            (gone.clone(), Some(Err(Errno::ENOENT)), "there no more"),
            (late.clone(), None, "another deletion's"),
            (
                [late, gone].concat(),
                Some(Err(Errno::ENOENT)),
                "behind another's",
            ),
        ] {
            assert_eq!(
                acknowledgement(&datagram, REQUEST).unwrap(),
                expected,
                "{why}"
            );
        }
    }
}
