//! The elements of our sets: what the kernel has, and what this process has loaded.
//!
//! [`sets::load`](crate::sets::load) notes here what every script does to the sets. So a set that other software
//! flushes or changes is found without a list of all elements that it should have. A set is tracked from the first
//! script that flushes it, since its contents are known only then.
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use parking_lot::{Mutex, MutexGuard};

use crate::names::TABLE;
use crate::netlink::{attributes, chunk, find};
use crate::nf_tables::{BRIDGE, INET, dump};

const NFT_MSG_GETSETELEM: u16 = 13;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_SET_ELEM_FLAGS: u16 = 3;
const NFTA_DATA_VALUE: u16 = 1;
const NFT_SET_ELEM_INTERVAL_END: u32 = 1;

/// An element as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Element {
    /// The key, as the kernel writes it.
    pub key: Vec<u8>,
    /// The value of the key in a map; empty in a set.
    pub value: Vec<u8>,
    /// `NFT_SET_ELEM_*`.
    pub flags: u32,
}

/// The elements of a set of our table, sorted; none if there is no such set.
///
/// # Errors
/// What the kernel answers, `ENOENT` apart.
pub fn read(family: u8, set: &str) -> io::Result<Vec<Element>> {
    let lists = dump(NFT_MSG_GETSETELEM, family, |m| {
        m.string(NFTA_SET_ELEM_LIST_TABLE, TABLE);
        m.string(NFTA_SET_ELEM_LIST_SET, set);
    });
    let lists = match lists {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(Vec::new()),
        lists => lists?,
    };
    let mut elements: Vec<_> = lists
        .iter()
        .filter_map(|list| find(list, NFTA_SET_ELEM_LIST_ELEMENTS))
        .flat_map(|list| attributes(list.value))
        .filter_map(|element| parse(element.value))
        .collect();
    elements.sort_unstable();
    Ok(elements)
}

fn parse(element: &[u8]) -> Option<Element> {
    let value = |kind| {
        Some(
            find(find(element, kind)?.value, NFTA_DATA_VALUE)?
                .value
                .to_vec(),
        )
    };
    let flags = find(element, NFTA_SET_ELEM_FLAGS).and_then(|it| chunk(it.value, 0));
    Some(Element {
        key: value(NFTA_SET_ELEM_KEY)?,
        value: value(NFTA_SET_ELEM_DATA).unwrap_or_default(),
        flags: flags.map_or(0, u32::from_be_bytes),
    })
}

/// What this process has loaded, by set (`inet portreeve pods4`), as the scripts wrote it.
#[derive(Debug, Default)]
struct Noted {
    sets: BTreeMap<String, BTreeSet<String>>,
    /// How many scripts are being loaded now, and how many have been loaded.
    loading: usize,
    loaded: u64,
}

static NOTED: Mutex<Noted> = Mutex::new(Noted {
    sets: BTreeMap::new(),
    loading: 0,
    loaded: 0,
});

fn noted() -> MutexGuard<'static, Noted> {
    NOTED.lock()
}

/// Forgets what was loaded: another process may have changed the sets since.
pub fn forget() {
    noted().sets.clear();
}

/// Calls `load` to load a script, and notes the changes if it succeeds.
pub(crate) fn noting<E>(script: &str, load: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
    noted().loading += 1;
    let result = load();
    let mut noted = noted();
    noted.loading -= 1;
    noted.loaded += 1;
    if result.is_ok() {
        noted.apply(script);
    }
    result
}

/// The sets (such as `inet portreeve pods4`) whose elements differ from those that this process has loaded; `None` if
/// this process is changing sets now. Blocks for some ten microseconds a set.
///
/// # Errors
/// What the kernel answers.
pub fn differing() -> io::Result<Option<Vec<String>>> {
    let (sets, before) = {
        let noted = noted();
        if noted.loading > 0 {
            return Ok(None);
        }
        (noted.sets.clone(), noted.loaded)
    };
    let mut differing = Vec::new();
    for (set, wanted) in sets {
        let mut words = set.split(' ');
        let family = match words.next() {
            Some("bridge") => BRIDGE,
            _ => INET,
        };
        let there = read(family, words.next_back().unwrap_or_default())?;
        if !holds(&there, &wanted) {
            differing.push(set);
        }
    }
    let noted = noted();
    let quiet = noted.loading == 0 && noted.loaded == before;
    Ok(quiet.then_some(differing))
}

/// The sets whose elements are known.
#[must_use]
pub fn watched() -> Vec<String> {
    noted().sets.keys().cloned().collect()
}

impl Noted {
    fn apply(&mut self, script: &str) {
        for line in script.lines() {
            let words: Vec<_> = line.splitn(3, ' ').collect();
            match words[..] {
                ["flush", "set" | "map", set] => {
                    self.sets.insert(set.to_owned(), BTreeSet::new());
                }
                [verb @ ("add" | "delete"), "element", rest] => self.change(verb, rest),
                _ => {}
            }
        }
    }

    fn change(&mut self, verb: &str, rest: &str) {
        let Some((set, list)) = rest.split_once(" { ") else {
            return;
        };
        let Some(elements) = self.sets.get_mut(set) else {
            return;
        };
        for element in list.trim_end_matches(" }").split(", ") {
            match verb {
                "add" => elements.insert(element.to_owned()),
                _ => elements.remove(element),
            };
        }
    }
}

/// Whether `there` equals `wanted`. An element that we cannot parse does not count as a difference.
fn holds(there: &[Element], wanted: &BTreeSet<String>) -> bool {
    let is_end = |it: &Element| it.flags & NFT_SET_ELEM_INTERVAL_END != 0;
    if there.iter().any(is_end) || wanted.iter().any(|it| it.contains('/')) {
        let networks: Option<Vec<_>> = wanted.iter().map(|it| network(it)).collect();
        return networks.is_none_or(|networks| ranges(there) == merged(&networks));
    }
    let there = there.iter().map(|it| (it.key.clone(), it.value.clone()));
    let there: BTreeSet<_> = there.collect();
    let wanted: Option<BTreeSet<_>> = wanted.iter().map(|it| encoded(it)).collect();
    wanted.is_none_or(|wanted| wanted == there)
}

fn network(text: &str) -> Option<IpNet> {
    let address = || Some(IpNet::from(text.parse::<IpAddr>().ok()?));
    text.parse().ok().or_else(address)
}

/// The first address of a range, and the first one after it, if there is one.
type Range = (Vec<u8>, Option<Vec<u8>>);

/// The ranges of a set, which the kernel stores as start and end elements; adjacent ranges are merged.
fn ranges(there: &[Element]) -> Vec<Range> {
    let mut ranges = Vec::<Range>::new();
    // By key; an end sorts before a start at the same address.
    let mut all: Vec<_> = there.iter().collect();
    all.sort_unstable_by_key(|it| (&it.key, it.flags & NFT_SET_ELEM_INTERVAL_END == 0));
    for element in all {
        let begins = element.flags & NFT_SET_ELEM_INTERVAL_END == 0;
        match ranges.last_mut() {
            // The range continues: nft can leave out an end where the next range starts.
            Some((_, end)) if begins && end.as_ref().is_none_or(|it| *it == element.key) => {
                *end = None;
            }
            Some((_, end @ None)) if !begins => *end = Some(element.key.clone()),
            _ if begins => ranges.push((element.key.clone(), None)),
            _ => {}
        }
    }
    ranges
}

/// The ranges of networks; adjacent ones are merged.
fn merged(networks: &[IpNet]) -> Vec<Range> {
    let mut ranges = Vec::<Range>::new();
    for network in IpNet::aggregate(&networks.to_vec()) {
        let (first, last) = (octets(network.network()), octets(network.broadcast()));
        let end = successor(last);
        match ranges.last_mut() {
            Some((_, before)) if before.as_ref() == Some(&first) => *before = end,
            _ => ranges.push((first, end)),
        }
    }
    ranges
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// The next address; `None` after the last.
fn successor(mut number: Vec<u8>) -> Option<Vec<u8>> {
    for byte in number.iter_mut().rev() {
        *byte = byte.wrapping_add(1);
        if *byte != 0 {
            return Some(number);
        }
    }
    None
}

/// Key and value of an element of our scripts in the kernel's form: in a concatenated key each field fills whole
/// registers of 4 bytes.
fn encoded(element: &str) -> Option<(Vec<u8>, Vec<u8>)> {
    let (key, value) = match element.split_once(" : ") {
        Some((key, value)) => (key, field(value)?),
        None => (element, Vec::new()),
    };
    let fields: Vec<_> = key.split(" . ").map(field).collect::<Option<_>>()?;
    let pad = fields.len() > 1;
    let key = fields.into_iter().flat_map(|mut field| {
        if pad {
            field.resize(field.len().next_multiple_of(4), 0);
        }
        field
    });
    Some((key.collect(), value))
}

fn field(text: &str) -> Option<Vec<u8>> {
    if let Ok(address) = text.parse() {
        return Some(octets(address));
    }
    if let Some(name) = text.strip_prefix('"') {
        let mut name = name.strip_suffix('"')?.as_bytes().to_vec();
        name.resize(16, 0); // IFNAMSIZ
        return Some(name);
    }
    if let Some(number) = text.strip_prefix("0x") {
        return Some(
            u128::from_str_radix(number, 16)
                .ok()?
                .to_be_bytes()
                .to_vec(),
        );
    }
    if let Ok(index) = text.parse::<u32>() {
        return Some(index.to_ne_bytes().to_vec());
    }
    match text {
        // NFPROTO_IPV4, NFPROTO_IPV6; ETH_P_IP, ETH_P_IPV6.
        "ipv4" => Some(vec![2]),
        "ipv6" => Some(vec![10]),
        "ip" => Some(vec![0x08, 0x00]),
        "ip6" => Some(vec![0x86, 0xdd]),
        link => {
            let bytes = link.split(':').map(|it| u8::from_str_radix(it, 16).ok());
            bytes.collect::<Option<Vec<_>>>().filter(|it| it.len() == 6)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn element(key: &[u8], flags: u32) -> Element {
        Element {
            key: key.to_vec(),
            value: Vec::new(),
            flags,
        }
    }

    fn set(elements: &[&str]) -> BTreeSet<String> {
        elements.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn every_element_is_encoded_as_the_kernel_does() {
        let name = |text: &str| {
            let mut name = text.as_bytes().to_vec();
            name.resize(16, 0);
            name
        };
        for (text, key, value) in [
            ("10.0.0.1", vec![10, 0, 0, 1], vec![]),
            (
                "10.0.0.1 . 10.0.0.2",
                vec![10, 0, 0, 1, 10, 0, 0, 2],
                vec![],
            ),
            (
                "7 . 10.0.0.1",
                [7u32.to_ne_bytes(), [10, 0, 0, 1]].concat(),
                vec![],
            ),
            ("\"cni0\"", name("cni0"), vec![]),
            (
                "02:00:00:00:00:05 . \"p\"",
                [vec![2, 0, 0, 0, 0, 5, 0, 0], name("p")].concat(),
                vec![],
            ),
            (
                "\"p\" : 02:00:00:00:00:05",
                name("p"),
                vec![2, 0, 0, 0, 0, 5],
            ),
            ("ipv6", vec![10], vec![]),
            ("ip6", vec![0x86, 0xdd], vec![]),
        ] {
            assert_eq!(encoded(text), Some((key, value)), "{text}");
        }
        assert_eq!(encoded("unheard of"), None);
    }

    #[test]
    fn a_set_is_tracked_from_its_first_flush() {
        let mut noted = Noted::default();
        noted.apply("add element inet portreeve a { 1.1.1.1 }\n");
        assert!(noted.sets.is_empty(), "what else it holds is not known");
        noted.apply(
            "flush set inet portreeve a\nadd element inet portreeve a { 1.1.1.1, 1.1.1.2 }\n",
        );
        noted.apply("delete element inet portreeve a { 1.1.1.1 }\nflush map inet portreeve b\n");
        assert_eq!(noted.sets["inet portreeve a"], set(&["1.1.1.2"]));
        assert_eq!(noted.sets["inet portreeve b"], set(&[]));
    }

    #[test]
    fn networks_are_compared_as_ranges() {
        let null = element(&[0; 4], NFT_SET_ELEM_INTERVAL_END);
        let there = [
            null.clone(),
            element(&[10, 1, 1, 0], 0),
            element(&[10, 1, 4, 0], NFT_SET_ELEM_INTERVAL_END),
        ];
        for (wanted, same) in [
            (&["10.1.1.0/24", "10.1.2.0/23"][..], true),
            (
                &["10.1.1.0/24", "10.1.2.0/24", "10.1.3.0/24", "10.1.3.9/32"],
                true,
            ),
            (&["10.1.1.0/24"], false),
            (&[], false),
        ] {
            assert_eq!(holds(&there, &set(wanted)), same, "{wanted:?}");
        }
        assert!(holds(&[null], &set(&[])));
        // A set without auto-merge keeps neighbours apart.
        let apart = [
            element(&[10, 1, 1, 0], 0),
            element(&[10, 1, 2, 0], NFT_SET_ELEM_INTERVAL_END),
            element(&[10, 1, 2, 0], 0),
            element(&[10, 1, 4, 0], NFT_SET_ELEM_INTERVAL_END),
        ];
        let wanted = set(&["10.1.1.0/24", "10.1.2.0/23"]);
        assert!(holds(&apart, &wanted));
        assert!(holds(
            &[apart[0].clone(), apart[2].clone(), apart[3].clone()],
            &wanted
        ));
        assert!(!holds(&apart[..2], &wanted));
        let all = [element(&[0; 4], 0)];
        assert!(holds(&all, &set(&["0.0.0.0/0"])));
    }

    #[test]
    fn a_missing_and_a_foreign_element_are_found() {
        let wanted = set(&["10.0.0.1", "10.0.0.2"]);
        let [one, two, three] = [1, 2, 3].map(|last| element(&[10, 0, 0, last], 0));
        assert!(holds(&[one.clone(), two.clone()], &wanted));
        assert!(!holds(std::slice::from_ref(&one), &wanted));
        assert!(!holds(&[one, two, three], &wanted));
        assert!(!holds(&[], &wanted));
    }
}
