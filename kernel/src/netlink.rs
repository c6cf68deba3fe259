//! The part of netlink that netfilter's subsystems share: messages and their attributes
//! (linux/netlink.h, linux/netfilter/nfnetlink.h).
//!
//! Writing cannot fail; reading expects truncated input. Knows no subsystem; [`asking`] is all that
//! it knows of sockets.
use std::os::fd::OwnedFd;
use std::{io, iter};

use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket};
use nix::sys::time::TimeVal;

/// `NLM_F_REQUEST`.
pub const REQUEST: u16 = 0x1;
/// `NLM_F_ACK`: acknowledge success too.
pub const ACK: u16 = 0x4;
/// `NLM_F_DUMP_INTR`: the objects changed during the dump.
pub const DUMP_INTERRUPTED: u16 = 0x10;
/// `NLM_F_DUMP`: list everything.
pub const DUMP: u16 = 0x300;
/// `NLM_F_CREATE`.
pub const CREATE: u16 = 0x400;
/// `NLM_F_APPEND`.
pub const APPEND: u16 = 0x800;
/// `NLMSG_ERROR`, which also acknowledges success.
pub const ERROR: u16 = 2;
/// `NLMSG_DONE`: the end of a dump.
pub const DONE: u16 = 3;

/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;
/// The bits of an attribute's type without flags.
const TYPE: u16 = 0x3fff;
/// How long the kernel may take to answer, in seconds.
const PATIENCE: i64 = 2;
/// Bytes of `nlmsghdr`.
const HEADER: usize = 16;
/// Bytes of `nfgenmsg`.
const NETFILTER_HEADER: usize = 4;

/// A socket on which the kernel answers questions to a part of it. The wait for an answer is bounded:
/// the kernel may answer less than once a message.
///
/// # Errors
/// What `socket` answers.
pub fn asking(part: SockProtocol) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, part)?;
    setsockopt(&fd, ReceiveTimeout, &TimeVal::new(PATIENCE, 0))?;
    Ok(fd)
}

/// What `nlmsghdr` and `nfgenmsg` say of a message.
#[derive(Clone, Copy, Debug, Default)]
pub struct Header {
    /// Subsystem and message type.
    pub kind: u16,
    /// Like [`REQUEST`] and [`ACK`].
    pub flags: u16,
    /// Matches responses to requests.
    pub sequence: u32,
    /// `NFPROTO_*`; 0 where it does not matter.
    pub family: u8,
    /// Of NFQUEUE the queue's number; of a batch the subsystem.
    pub resource: u16,
}

/// Appends a message to `out`; its length is filled in once the body is written.
pub fn write(out: &mut Vec<u8>, header: Header, body: impl FnOnce(&mut Attributes<'_>)) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&header.kind.to_ne_bytes());
    out.extend_from_slice(&header.flags.to_ne_bytes());
    out.extend_from_slice(&header.sequence.to_ne_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&[header.family, 0]);
    out.extend_from_slice(&header.resource.to_be_bytes());
    body(&mut Attributes(out));
    let length = u32::try_from(out.len() - start).unwrap_or(u32::MAX);
    out[start..start + 4].copy_from_slice(&length.to_ne_bytes());
}

/// Writes attributes (`nlattr`), each padded to 4 bytes.
#[derive(Debug)]
pub struct Attributes<'a>(&'a mut Vec<u8>);

impl Attributes<'_> {
    /// One with this value.
    pub fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.attribute(kind, |out| out.0.extend_from_slice(value));
    }

    /// Writes an attribute with this NUL-terminated text.
    pub fn string(&mut self, kind: u16, value: &str) {
        self.attribute(kind, |out| {
            out.0.extend_from_slice(value.as_bytes());
            out.0.push(0);
        });
    }

    /// One that holds others.
    pub fn nested(&mut self, kind: u16, body: impl FnOnce(&mut Attributes<'_>)) {
        self.attribute(kind | NESTED, body);
    }

    /// Attributes as they came, [`Attribute::whole`].
    pub fn raw(&mut self, whole: &[u8]) {
        self.0.extend_from_slice(whole);
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

/// A message that was received.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// Subsystem and message type, or [`ERROR`], [`DONE`].
    pub kind: u16,
    /// Like [`DUMP_INTERRUPTED`].
    pub flags: u16,
    /// That of the request.
    pub sequence: u32,
    /// The bytes after `nlmsghdr`.
    body: &'a [u8],
}

impl<'a> Message<'a> {
    /// The first message of a datagram, and what follows it; `None` if it is not whole.
    #[must_use]
    pub fn split(datagram: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let length = usize::try_from(u32::from_ne_bytes(chunk(datagram, 0)?)).ok()?;
        let message = Self {
            kind: u16::from_ne_bytes(chunk(datagram, 4)?),
            flags: u16::from_ne_bytes(chunk(datagram, 6)?),
            sequence: u32::from_ne_bytes(chunk(datagram, 8)?),
            body: datagram.get(HEADER..length)?,
        };
        let rest = datagram.get(length.next_multiple_of(4)..);
        Some((message, rest.unwrap_or_default()))
    }

    /// The number that [`ERROR`] and [`DONE`] begin with: 0, or a negative errno.
    #[must_use]
    pub fn code(&self) -> Option<i32> {
        chunk(self.body, 0).map(i32::from_ne_bytes)
    }

    /// The errno of that number; 0 means success. Accepts any number.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        self.code().map(i32::wrapping_neg)
    }

    /// Whether it is the last answer to a request that wants an acknowledgement or a list.
    ///
    /// # Errors
    /// The error that it carries, if any.
    pub fn is_last(&self) -> io::Result<bool> {
        match (self.kind, self.errno()) {
            (ERROR | DONE, Some(errno)) if errno != 0 => Err(io::Error::from_raw_os_error(errno)),
            (kind, _) => Ok([ERROR, DONE].contains(&kind)),
        }
    }

    /// The bytes after `nfgenmsg`.
    #[must_use]
    pub fn attributes(&self) -> &'a [u8] {
        self.body.get(NETFILTER_HEADER..).unwrap_or_default()
    }
}

/// The messages of a datagram, up to the first that is not whole.
pub fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    iter::from_fn(move || {
        let (message, rest) = Message::split(datagram)?;
        datagram = rest;
        Some(message)
    })
}

/// An attribute that was received.
#[derive(Clone, Copy, Debug)]
pub struct Attribute<'a> {
    /// Its type without flags.
    pub kind: u16,
    /// Without header and padding.
    pub value: &'a [u8],
    /// With both: what a request can repeat.
    pub whole: &'a [u8],
}

/// Splits attributes; stops at a malformed one.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = Attribute<'_>> {
    iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(chunk(bytes, 0)?));
        let value = bytes.get(4..length)?;
        let whole = bytes.get(..length.next_multiple_of(4)).unwrap_or(bytes);
        let kind = u16::from_ne_bytes(chunk(bytes, 2)?) & TYPE;
        bytes = &bytes[whole.len()..];
        Some(Attribute { kind, value, whole })
    })
}

/// The first attribute of a kind.
#[must_use]
pub fn find(bytes: &[u8], kind: u16) -> Option<Attribute<'_>> {
    attributes(bytes).find(|attribute| attribute.kind == kind)
}

/// `N` bytes at an offset.
#[must_use]
pub fn chunk<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written() -> Vec<u8> {
        let mut out = Vec::new();
        for sequence in [7, 8] {
            write(
                &mut out,
                Header {
                    kind: 0x301,
                    sequence,
                    resource: 5,
                    ..Header::default()
                },
                |m| {
                    m.string(1, "abc");
                    m.nested(2, |inner| inner.bytes(3, &[1, 2, 3, 4, 5]));
                },
            );
        }
        out
    }

    #[test]
    fn written_netlink_messages_read_back() {
        let out = written();
        let read: Vec<_> = messages(&out).collect();
        assert_eq!(
            read.iter()
                .map(|m| (m.kind, m.sequence))
                .collect::<Vec<_>>(),
            [(0x301, 7), (0x301, 8)]
        );
        for message in read {
            let attributes = message.attributes();
            assert_eq!(find(attributes, 1).unwrap().value, b"abc\0");
            let nested = find(attributes, 2).unwrap();
            assert_eq!(find(nested.value, 3).unwrap().value, [1, 2, 3, 4, 5]);
            assert_eq!(nested.whole.len() % 4, 0);
            assert!(find(attributes, 9).is_none());
        }
    }

    #[test]
    fn any_error_number_can_be_read() {
        for (code, refused) in [
            (0, false),
            (-1, true),
            (i32::MIN + 1, true),
            (i32::MIN, true),
        ] {
            let mut out = Vec::new();
            let header = Header {
                kind: ERROR,
                ..Header::default()
            };
            write(&mut out, header, |m| m.raw(&[0; 4]));
            out[HEADER..HEADER + 4].copy_from_slice(&code.to_ne_bytes());
            let (message, _) = Message::split(&out).unwrap();
            assert_eq!(message.is_last().is_err(), refused, "{code}");
            assert_eq!(message.errno(), Some(code.wrapping_neg()));
        }
    }

    #[test]
    fn damaged_netlink_messages_never_panic_or_loop() {
        let out = written();
        let read = |bytes: &[u8]| {
            messages(bytes)
                .map(|m| attributes(m.attributes()).count())
                .take(1000)
                .sum::<usize>()
        };
        for length in 0..out.len() {
            read(&out[..length]);
            for value in 0..=255 {
                let mut bent = out.clone();
                bent[length] = value;
                assert!(read(&bent) < 1000);
            }
        }
    }
}
