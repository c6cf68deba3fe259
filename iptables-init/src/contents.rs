//! Digests of our nft tables in the kernel, without the elements of their sets. They show whether a rule, a chain, a
//! hook or a set differs from what was installed.
//!
//! Asks the kernel directly (linux/netfilter/nf_tables.h), in some twenty requests. Values that change by themselves
//! (handles, counters) are left out, and so are the kernel's names of anonymous sets. Changes nothing.
use std::collections::BTreeMap;
use std::fmt;
use std::io;

use kernel::names::TABLE;
use kernel::netlink::{attributes, chunk, find};
use kernel::nf_tables::{BRIDGE, INET, dump, generation};

use crate::nft_table::{LEAVING, STAMP_CHAIN};

const NFT_MSG_GETTABLE: u16 = 1;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFT_MSG_GETRULE: u16 = 7;
const NFT_MSG_GETSET: u16 = 10;

const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_FLAGS: u16 = 2;
const NFTA_TABLE_HANDLE: u16 = 4;

const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
/// Hook and priority, policy, type, flags.
const NFTA_CHAIN_DECLARED: [u16; 4] = [4, 5, 7, 10];

const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_RULE_USERDATA: u16 = 7;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_LOOKUP_SET: u16 = 1;

const NFTA_SET_TABLE: u16 = 1;
const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_FLAGS: u16 = 3;
/// Flags, types and lengths of key and value, description, timeout.
const NFTA_SET_DECLARED: [u16; 7] = [3, 4, 5, 6, 7, 9, 11];
const NFT_SET_ANONYMOUS: u32 = 1;

/// How often a read is repeated because the tables changed meanwhile.
const READS: u32 = 5;

/// A part of a table as nft writes its name, like `chain inet portreeve intercept`.
pub type Part = String;

/// Digests of our tables' parts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// The kernel's handles of the tables, sorted; a table that is created again has another one.
    pub handles: Vec<u64>,
    /// Tables, chains without their rules, sets without their elements.
    declared: BTreeMap<Part, u64>,
    /// The rules of each chain.
    rules: BTreeMap<Part, u64>,
    /// `uninstall` has marked the tables, which it will delete.
    pub(crate) leaving: bool,
}

/// Digests of all declarations, and of all rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest {
    /// Of everything that cannot be changed in place.
    pub declared: u64,
    /// Of the rules.
    pub rules: u64,
}

impl Contents {
    /// Reads them and the generation of the kernel's tables. Blocks for some hundred microseconds.
    ///
    /// # Errors
    /// What the kernel answers, such as `EPERM` without `CAP_NET_ADMIN`;
    /// [`io::ErrorKind::ResourceBusy`] if the tables changed during every read.
    pub fn read() -> io::Result<(u32, Self)> {
        for _ in 0..READS {
            let before = generation()?;
            match Self::read_once() {
                Ok(contents) if generation()? == before => return Ok((before, contents)),
                // It may have been deleted between two requests.
                Err(error) if error.raw_os_error() != Some(nix::libc::ENOENT) => return Err(error),
                _ => {}
            }
        }
        Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "nft tables changed during every attempt to read them",
        ))
    }

    fn read_once() -> io::Result<Self> {
        let mut contents = Self::default();
        for (family, name) in [(INET, "inet"), (BRIDGE, "bridge")] {
            contents.add_family(family, name)?;
        }
        contents.handles.sort_unstable();
        Ok(contents)
    }

    fn add_family(&mut self, family: u8, word: &str) -> io::Result<()> {
        let tables = dump(NFT_MSG_GETTABLE, family, |_| {})?;
        let Some(table) = tables.iter().find(|it| is_ours(it, NFTA_TABLE_NAME)) else {
            return Ok(());
        };
        let handle = find(table, NFTA_TABLE_HANDLE).and_then(|it| chunk(it.value, 0));
        self.handles.extend(handle.map(u64::from_be_bytes));
        let mut digest = Fnv::new();
        digest.attributes(table, &[NFTA_TABLE_FLAGS]);
        self.declared
            .insert(format!("table {word} {TABLE}"), digest.0);
        self.add_chains(family, word)?;
        let unnamed = self.add_sets(family, word)?;
        self.add_rules(family, word, &unnamed)
    }

    fn add_chains(&mut self, family: u8, word: &str) -> io::Result<()> {
        for chain in dump(NFT_MSG_GETCHAIN, family, |_| {})? {
            let Some(name) = text(&chain, NFTA_CHAIN_NAME) else {
                continue;
            };
            if !is_ours(&chain, NFTA_CHAIN_TABLE) || name == STAMP_CHAIN {
                continue;
            }
            let part = format!("chain {word} {TABLE} {name}");
            let mut digest = Fnv::new();
            digest.attributes(&chain, &NFTA_CHAIN_DECLARED);
            self.declared.insert(part.clone(), digest.0);
            self.rules.insert(part, Fnv::new().0);
        }
        Ok(())
    }

    /// Returns a digest of each anonymous set, with its elements.
    fn add_sets(&mut self, family: u8, word: &str) -> io::Result<BTreeMap<String, u64>> {
        let mut unnamed = BTreeMap::new();
        let sets = dump(NFT_MSG_GETSET, family, |m| m.string(NFTA_SET_TABLE, TABLE))?;
        for set in sets {
            let Some(name) = text(&set, NFTA_SET_NAME) else {
                continue;
            };
            if !is_ours(&set, NFTA_SET_TABLE) {
                continue;
            }
            let mut digest = Fnv::new();
            digest.attributes(&set, &NFTA_SET_DECLARED);
            let flags = find(&set, NFTA_SET_FLAGS).and_then(|it| chunk(it.value, 0));
            if flags.map_or(0, u32::from_be_bytes) & NFT_SET_ANONYMOUS == 0 {
                let part = format!("set {word} {TABLE} {name}");
                self.declared.insert(part, digest.0);
                continue;
            }
            for element in kernel::elements::read(family, name)? {
                digest.bytes(&element.key);
                digest.bytes(&element.value);
                digest.bytes(&element.flags.to_be_bytes());
            }
            unnamed.insert(name.to_owned(), digest.0);
        }
        Ok(unnamed)
    }

    fn add_rules(
        &mut self,
        family: u8,
        word: &str,
        unnamed: &BTreeMap<String, u64>,
    ) -> io::Result<()> {
        let rules = dump(NFT_MSG_GETRULE, family, |m| {
            m.string(NFTA_RULE_TABLE, TABLE);
        })?;
        for rule in rules.iter().filter(|it| is_ours(it, NFTA_RULE_TABLE)) {
            let chain = text(rule, NFTA_RULE_CHAIN).unwrap_or_default();
            self.leaving |= chain == STAMP_CHAIN && says(rule, LEAVING);
            let part = format!("chain {word} {TABLE} {chain}");
            // Rules come in the order of their chain.
            if let Some(before) = self.rules.get_mut(&part) {
                let mut digest = Fnv(*before);
                digest.rule(rule, unnamed);
                *before = digest.0;
            }
        }
        Ok(())
    }

    /// Of everything.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let all = |parts: &BTreeMap<Part, u64>| {
            let mut digest = Fnv::new();
            for (part, of_part) in parts {
                digest.bytes(part.as_bytes());
                digest.bytes(&of_part.to_be_bytes());
            }
            digest.0
        };
        Digest {
            declared: all(&self.declared),
            rules: all(&self.rules),
        }
    }

    /// The parts that differ between `self` and `wanted`, or that only one of them has.
    #[must_use]
    pub fn differing(&self, wanted: &Self) -> Vec<Part> {
        let pairs = [
            (&self.declared, &wanted.declared),
            (&self.rules, &wanted.rules),
        ];
        let mut parts: Vec<Part> = pairs
            .iter()
            .flat_map(|(now, before)| {
                let differs = |part: &&Part| now.get(*part) != before.get(*part);
                now.keys().chain(before.keys()).filter(differs)
            })
            .cloned()
            .collect();
        parts.sort_unstable();
        parts.dedup();
        parts
    }
}

impl fmt::Display for Digest {
    /// Two numbers of 16 digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x} {:016x}", self.declared, self.rules)
    }
}

impl Digest {
    /// As [`fmt::Display`] writes it.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (declared, rules) = text.split_once(' ')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        Some(Self {
            declared: number(declared)?,
            rules: number(rules)?,
        })
    }
}

fn text(object: &[u8], kind: u16) -> Option<&str> {
    std::str::from_utf8(find(object, kind)?.value.strip_suffix(&[0])?).ok()
}

/// Whether a rule's comment contains `text`; nft keeps comments in the rule's user data.
fn says(rule: &[u8], text: &str) -> bool {
    let data = find(rule, NFTA_RULE_USERDATA).map_or(&[][..], |it| it.value);
    data.windows(text.len()).any(|it| it == text.as_bytes())
}

/// Whether the attribute `kind` names our table.
fn is_ours(object: &[u8], kind: u16) -> bool {
    text(object, kind) == Some(TABLE)
}

/// FNV-1a, 64 bits (draft-eastlake-fnv).
struct Fnv(u64);

impl Fnv {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    /// With its length, so that the next value cannot be mistaken for a part of it.
    fn bytes(&mut self, bytes: &[u8]) {
        let length = (bytes.len() as u64).to_be_bytes();
        for byte in length.iter().chain(bytes) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }

    /// Adds the attributes of these kinds that are present.
    fn attributes(&mut self, object: &[u8], kinds: &[u16]) {
        for kind in kinds {
            if let Some(attribute) = find(object, *kind) {
                self.bytes(&kind.to_be_bytes());
                self.bytes(attribute.value);
            }
        }
    }

    fn rule(&mut self, rule: &[u8], unnamed: &BTreeMap<String, u64>) {
        let expressions = find(rule, NFTA_RULE_EXPRESSIONS);
        let expressions = expressions.map_or(&[][..], |it| it.value);
        self.bytes(b"rule");
        for expression in attributes(expressions) {
            let name = find(expression.value, NFTA_EXPR_NAME).map_or(&[][..], |it| it.value);
            let data = find(expression.value, NFTA_EXPR_DATA).map_or(&[][..], |it| it.value);
            self.bytes(name);
            let set = text(data, NFTA_LOOKUP_SET).filter(|_| name == b"lookup\0");
            match set.and_then(|set| unnamed.get(set)) {
                None => self.bytes(data),
                Some(digest) => {
                    self.bytes(&digest.to_be_bytes());
                    for other in attributes(data).filter(|it| it.kind != NFTA_LOOKUP_SET) {
                        self.bytes(other.whole);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(chain: u64, rules: u64) -> Contents {
        let part = || "chain inet portreeve intercept".to_owned();
        Contents {
            handles: vec![1],
            declared: [(part(), chain)].into(),
            rules: [(part(), rules)].into(),
            leaving: false,
        }
    }

    #[test]
    fn a_part_that_differs_is_named_once() {
        let before = contents(1, 2);
        for (now, expected) in [
            (contents(1, 2), 0),
            (contents(1, 3), 1),
            (contents(2, 3), 1),
            (Contents::default(), 1),
        ] {
            let differing = now.differing(&before);
            assert_eq!(differing.len(), expected, "{now:?}");
            assert_eq!(now.digest() == before.digest(), expected == 0, "{now:?}");
        }
    }

    #[test]
    fn digest_reads_back_as_written() {
        let digest = contents(1, 2).digest();
        assert_eq!(Digest::parse(&digest.to_string()), Some(digest));
        assert_eq!(Digest::parse("1"), None);
    }
}
