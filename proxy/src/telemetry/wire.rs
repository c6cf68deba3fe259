//! Protocol buffers, as far as the messages of OTLP need them: written straight into the bytes that are sent,
//! without a tree of values in between.
//!
//! <https://protobuf.dev/programming-guides/encoding/>. Knows no message.

const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const LENGTH: u64 = 2;
const FIXED32: u64 = 5;

/// A message that is being written; later fields follow earlier ones.
pub(super) struct Message<'a>(&'a mut Vec<u8>);

impl<'a> Message<'a> {
    /// Appends the fields of one to `out`.
    pub(super) fn onto(out: &'a mut Vec<u8>) -> Self {
        Self(out)
    }

    /// A field of type `int32`, `int64`, `uint32`, `uint64` or `enum`.
    pub(super) fn varint(&mut self, field: u32, value: u64) {
        self.tag(field, VARINT);
        varint(self.0, value);
    }

    pub(super) fn fixed64(&mut self, field: u32, value: u64) {
        self.tag(field, FIXED64);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn fixed32(&mut self, field: u32, value: u32) {
        self.tag(field, FIXED32);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    /// A field of type `bytes` or `string`.
    pub(super) fn bytes(&mut self, field: u32, value: &[u8]) {
        self.tag(field, LENGTH);
        varint(self.0, value.len() as u64);
        self.0.extend_from_slice(value);
    }

    /// A field whose text is written in place.
    pub(super) fn text(&mut self, field: u32, value: impl std::fmt::Display) {
        self.delimited(field, |out| {
            // Writing to memory cannot fail.
            let _ = std::io::Write::write_fmt(out, format_args!("{value}"));
        });
    }

    /// A field that is a message.
    pub(super) fn message(&mut self, field: u32, body: impl FnOnce(&mut Message<'_>)) {
        self.delimited(field, |out| body(&mut Message(out)));
    }

    /// What comes out short, as most does, stays where it is written; else it makes room for its length.
    fn delimited(&mut self, field: u32, body: impl FnOnce(&mut Vec<u8>)) {
        self.tag(field, LENGTH);
        let at = self.0.len();
        self.0.push(0);
        body(self.0);
        let mut length = self.0.len() - at - 1;
        let mut bytes = [0; 10];
        let mut last = 0;
        while length >= 0x80 {
            bytes[last] = length.to_le_bytes()[0] | 0x80;
            length >>= 7;
            last += 1;
        }
        bytes[last] = length.to_le_bytes()[0];
        self.0[at] = bytes[0];
        if last > 0 {
            self.0
                .splice(at + 1..at + 1, bytes[1..=last].iter().copied());
        }
    }

    fn tag(&mut self, field: u32, kind: u64) {
        varint(self.0, u64::from(field) << 3 | kind);
    }
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

/// The fields of a message that was received: number and value; of a message within, its bytes. Ends at what
/// cannot be read.
pub(super) fn fields(mut bytes: &[u8]) -> impl Iterator<Item = (u64, Value<'_>)> {
    std::iter::from_fn(move || {
        let tag = take_varint(&mut bytes)?;
        let value = match tag & 7 {
            VARINT => Value::Number(take_varint(&mut bytes)?),
            FIXED64 => Value::Number(u64::from_le_bytes(*take(&mut bytes, 8)?.first_chunk()?)),
            FIXED32 => {
                Value::Number(u32::from_le_bytes(*take(&mut bytes, 4)?.first_chunk()?).into())
            }
            LENGTH => {
                let length = usize::try_from(take_varint(&mut bytes)?).ok()?;
                Value::Bytes(take(&mut bytes, length)?)
            }
            _ => return None,
        };
        Some((tag >> 3, value))
    })
}

/// What a field holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(taken)
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(bytes, 1)?[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_as_the_specification_has_it() {
        let mut out = Vec::new();
        let mut message = Message::onto(&mut out);
        message.varint(1, 150);
        message.bytes(2, b"testing");
        message.message(3, |inner| inner.varint(1, 150));
        // The examples of the encoding's page.
        let expected = b"\x08\x96\x01\x12\x07testing\x1a\x03\x08\x96\x01";
        assert_eq!(out, expected);
    }

    #[test]
    fn lengths_of_any_size_are_read_again() {
        for length in [0, 1, 127, 128, 16_383, 16_384, 300_000] {
            let mut out = Vec::new();
            let mut message = Message::onto(&mut out);
            message.message(16, |inner| inner.text(1, "x".repeat(length)));
            message.fixed64(2, u64::MAX);
            message.fixed32(3, 7);
            let read: Vec<_> = fields(&out).collect();
            let [(16, Value::Bytes(inner)), rest @ ..] = &read[..] else {
                panic!("{length}: {read:?}");
            };
            let text = vec![b'x'; length];
            assert_eq!(fields(inner).next(), Some((1, Value::Bytes(&text))));
            assert_eq!(rest, [(2, Value::Number(u64::MAX)), (3, Value::Number(7))]);
        }
    }

    #[test]
    fn nothing_that_is_received_makes_reading_panic_or_go_on_without_end() {
        let mut whole = Vec::new();
        let mut message = Message::onto(&mut whole);
        message.message(1, |inner| inner.bytes(2, b"because"));
        message.varint(3, u64::MAX);
        for at in 0..whole.len() {
            for byte in 0..=255 {
                let mut bent = whole.clone();
                bent[at] = byte;
                assert!(fields(&bent).count() <= whole.len());
            }
            fields(&whole[..at]).count();
        }
    }
}
