//! Reads ctnetlink's answers: the entries of a dump, and the kernel's reply to a request.
use std::io;

use nix::errno::Errno;

use super::CT_NEW;
use super::entry::Entry;
use crate::netlink::{self, Message};

/// The result of a dump so far.
#[derive(Debug, Default)]
pub(super) struct Dump {
    pub(super) entries: Vec<Entry>,
    /// The table changed under the dump: something may be missing.
    pub(super) interrupted: bool,
    pub(super) done: bool,
}

impl Dump {
    /// Reads one datagram of the answer to request `sequence`.
    pub(super) fn read(&mut self, mut datagram: &[u8], sequence: u32) -> io::Result<()> {
        while !datagram.is_empty() && !self.done {
            let (message, rest) = Message::split(datagram).ok_or_else(unreadable)?;
            datagram = rest;
            if message.sequence != sequence {
                continue;
            }
            self.interrupted |= message.flags & netlink::DUMP_INTERRUPTED != 0;
            match message.kind {
                CT_NEW => {
                    let entry = Entry::read(&message).ok_or_else(unreadable)?;
                    self.entries.push(entry);
                }
                // The end message has the result of the dump; without an errno it is success.
                netlink::DONE => {
                    errno(&message).unwrap_or(Ok(()))?;
                    self.done = true;
                }
                netlink::ERROR => errno(&message).ok_or_else(unreadable)??,
                _ => {}
            }
        }
        Ok(())
    }
}

/// The kernel's reply to request `sequence`, if this datagram has it.
pub(super) fn acknowledgement(
    mut datagram: &[u8],
    sequence: u32,
) -> io::Result<Option<Result<(), Errno>>> {
    while !datagram.is_empty() {
        let (message, rest) = Message::split(datagram).ok_or_else(unreadable)?;
        if message.sequence == sequence && message.kind == netlink::ERROR {
            return errno(&message).map(Some).ok_or_else(unreadable);
        }
        datagram = rest;
    }
    Ok(None)
}

/// The errno that `NLMSG_ERROR` and `NLMSG_DONE` begin with.
fn errno(message: &Message<'_>) -> Option<Result<(), Errno>> {
    Some(match message.errno()? {
        0 => Ok(()),
        errno => Err(Errno::from_raw(errno)),
    })
}

pub(super) fn unreadable() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "cannot parse the answer of ctnetlink; report this with the kernel version",
    )
}
