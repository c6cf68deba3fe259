//! Bulk data that the receiver can verify: every byte follows from its offset.
//!
//! The pattern repeats after a prime number of bytes, so a lost, doubled or swapped buffer of any
//! usual size shows at its first byte.

use std::fmt;
use std::io::{self, Read, Write};
use std::sync::OnceLock;

/// The pattern's period: a prime below 64 Ki.
const PERIOD: usize = 65_521;
const CHUNK: usize = 256 * 1024;

/// Writes the bytes that belong at `offset` into `buffer`.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the remainder is below the period"
)]
pub fn fill(offset: u64, buffer: &mut [u8]) {
    let pattern = pattern();
    let mut at = (offset % PERIOD as u64) as usize;
    let mut rest = buffer;
    while !rest.is_empty() {
        let count = rest.len().min(PERIOD - at);
        let (now, later) = rest.split_at_mut(count);
        now.copy_from_slice(&pattern[at..at + count]);
        rest = later;
        at = 0;
    }
}

/// Sends `total` bytes of the pattern; closing the sending side is the caller's.
///
/// # Errors
/// What the writer answers.
pub fn send(mut to: impl Write, total: u64) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut sent = 0;
    while sent < total {
        let count = usize::try_from(total - sent).unwrap_or(CHUNK).min(CHUNK);
        fill(sent, &mut buffer[..count]);
        to.write_all(&buffer[..count])?;
        sent += count as u64;
    }
    Ok(())
}

/// Receives to the end and compares with the pattern.
///
/// # Errors
/// What the reader answers, a reset for one; what came before is lost then.
pub fn receive(mut from: impl Read) -> io::Result<Verifier> {
    let mut buffer = vec![0; CHUNK];
    let mut seen = Verifier::default();
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(seen),
            Ok(count) => seen.take(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// How much came, and whether it was what was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Verifier {
    count: u64,
    wrong_at: Option<u64>,
}

impl Verifier {
    /// Takes the next bytes.
    pub fn take(&mut self, bytes: &[u8]) {
        let mut expected = vec![0; bytes.len()];
        fill(self.count, &mut expected);
        if self.wrong_at.is_none() && bytes != expected {
            let same = bytes
                .iter()
                .zip(&expected)
                .take_while(|(got, want)| got == want)
                .count();
            self.wrong_at = Some(self.count + same as u64);
        }
        self.count += bytes.len() as u64;
    }

    /// How many bytes came.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The offset of the first wrong byte.
    #[must_use]
    pub fn wrong_at(&self) -> Option<u64> {
        self.wrong_at
    }

    /// Whether exactly `total` bytes came and all were right.
    #[must_use]
    pub fn is_all_of(&self, total: u64) -> bool {
        self.count == total && self.wrong_at.is_none()
    }
}

impl fmt::Display for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.wrong_at {
            None => write!(f, "{} ok", self.count),
            Some(offset) => write!(f, "{} wrong at {offset}", self.count),
        }
    }
}

fn pattern() -> &'static [u8] {
    static PATTERN: OnceLock<Vec<u8>> = OnceLock::new();
    PATTERN.get_or_init(|| {
        // xorshift64 (Marsaglia 2003): no run of the pattern looks like another.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[0]
        };
        (0..PERIOD).map(|_| next()).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_verifies_in_chunks_of_any_size() {
        let mut data = Vec::new();
        send(&mut data, 200_000).unwrap();
        let mut seen = Verifier::default();
        data.chunks(7_001).for_each(|chunk| seen.take(chunk));
        assert!(seen.is_all_of(200_000), "{seen}");
        assert!(receive(&data[..]).unwrap().is_all_of(200_000));
    }

    #[test]
    fn verifier_locates_damaged_bytes() {
        let mut sent = Vec::new();
        send(&mut sent, 300_000).unwrap();
        let flipped = |at: usize| {
            let mut data = sent.clone();
            data[at] ^= 1;
            data
        };
        let without = |from: usize, count: usize| {
            let mut data = sent.clone();
            data.drain(from..from + count);
            data
        };
        for (data, least, most, why) in [
            (flipped(0), 0, 0, "the first byte"),
            (flipped(299_999), 299_999, 299_999, "the last byte"),
            (without(4_096, 4_096), 4_096, 4_106, "a lost page"),
            (without(65_536, 65_536), 65_536, 65_546, "a lost buffer"),
        ] {
            let wrong = receive(&data[..]).unwrap().wrong_at().unwrap();
            assert!((least..=most).contains(&wrong), "{why}: {wrong}");
        }
    }
}
