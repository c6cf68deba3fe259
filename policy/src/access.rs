//! Which peers may use which ports: the rules of one policy, or of all policies that isolate a pod,
//! merged into one structure. A lookup takes a few binary searches, however many rules there are.
//!
//! Ports are stored as prefixes of their 16 bits, like addresses in a routing table: a range of
//! ports is at most 30 prefixes. Each prefix has the addresses that its rules allow, as sorted
//! ranges with the exceptions cut out, so that one search covers all rules of a port. Peers by
//! selector are stored by id, with the prefixes at which they are allowed. Does not know which
//! policy allows something.
mod match_cache;

use std::net::IpAddr;
use std::sync::Arc;

use self::match_cache::MatchCache;
use crate::compile::{CompiledRule, Question, SelectorId};
use crate::matches::MatchSet;
use crate::model::Protocol;

/// A key in [`Access`]: a prefix of a protocol's ports, a port's name, or [`ANY`]; the protocol is
/// in the upper bits.
pub(crate) type Key = u32;

/// The key of rules without ports: every port of every protocol, and protocols without ports.
const ANY: Key = 0;
/// Keys from here on are names, in the order of [`Access::names`].
const NAMES: Key = 4 << PROTOCOL_SHIFT;
/// A prefix of ports has 17 bits: a one, then the bits of the prefix.
const PROTOCOL_SHIFT: u32 = 17;
/// A port has 17 prefixes, from none of its bits to all.
const PREFIXES: usize = 17;
/// How many names of a pod's port are used; see [`crate::endpoint::Endpoint::port_names`].
pub(crate) const NAMES_OF_A_PORT: usize = 16;
/// If a pod matches more selectors than this, and the rules have more too, their intersection is
/// cached.
const FEW: usize = 16;

/// Everything that one or several lists of rules allow.
#[derive(Debug, Default)]
pub(crate) struct Access {
    /// Whether any rule has the key [`ANY`].
    any: bool,
    /// Of TCP, UDP and SCTP: bit n is set if there is anything at prefixes of n bits.
    lengths: [u32; 3],
    /// Sorted.
    names: Box<[(Protocol, Arc<str>)]>,
    /// The keys at which every peer is allowed; sorted.
    everyone: Box<[Key]>,
    v4: Blocks<u32>,
    v6: Blocks<u128>,
    /// Sorted, each with the index of its first key in `keys`.
    selectors: Box<[(SelectorId, u32)]>,
    keys: Box<[Key]>,
    match_cache: MatchCache,
}

/// Addresses of one family.
#[derive(Debug, Default)]
struct Blocks<A> {
    /// Sorted, each with the index of its first range.
    keys: Box<[(Key, u32)]>,
    /// First and last addresses; sorted and disjoint at each key.
    ranges: Box<[(A, A)]>,
}

/// The parts of an [`Access`], in any order.
#[derive(Default)]
struct Parts {
    names: Vec<(Protocol, Arc<str>)>,
    everyone: Vec<Key>,
    v4: Vec<(Key, u32, u32)>,
    v6: Vec<(Key, u128, u128)>,
    peers: Vec<(SelectorId, Key)>,
}

/// The keys that apply to a connection's port.
struct Asked {
    keys: [Key; 1 + PREFIXES + NAMES_OF_A_PORT],
    count: usize,
}

impl Access {
    /// The merged form of `rules`.
    pub(crate) fn new(rules: &[CompiledRule]) -> Self {
        let mut parts = Parts::default();
        let named = rules.iter().filter_map(|rule| rule.ports.as_ref());
        parts.names = named
            .flat_map(|ports| ports.named.iter().cloned())
            .collect();
        parts.names.sort_unstable();
        parts.names.dedup();
        let mut keys = Vec::new();
        for rule in rules {
            keys.clear();
            match &rule.ports {
                None => keys.push(ANY),
                Some(ports) => {
                    for &(protocol, first, last) in &ports.ranges {
                        prefixes(protocol, first, last, |key| keys.push(key));
                    }
                    let names = ports.named.iter().map(|name| parts.name(name));
                    keys.extend(names);
                }
            }
            for &key in &keys {
                parts.add(key, rule);
            }
        }
        parts.whole()
    }

    /// The merged form of `all`: it allows what any of them allows.
    pub(crate) fn merged(all: &[&Self]) -> Self {
        let mut parts = Parts::of(all.iter().flat_map(|it| &it.names));
        for one in all {
            let names: Vec<Key> = one.names.iter().map(|name| parts.name(name)).collect();
            let moved = |key: Key| match key.checked_sub(NAMES) {
                Some(at) => names[at as usize],
                None => key,
            };
            parts
                .everyone
                .extend(one.everyone.iter().map(|&key| moved(key)));
            one.v4.add_to(&mut parts.v4, moved);
            one.v6.add_to(&mut parts.v6, moved);
            for at in 0..one.selectors.len() {
                let (id, keys) = one.peer(at);
                parts.peers.extend(keys.iter().map(|&key| (id, moved(key))));
            }
        }
        parts.whole()
    }

    /// The number of entries, which is the cost of a copy: 8 to 16 bytes each, up to 40 for IPv6.
    pub(crate) fn entries(&self) -> usize {
        let blocks = self.v4.ranges.len() + self.v6.ranges.len();
        self.everyone.len() + blocks + self.selectors.len() + self.keys.len()
    }

    /// Whether any rule allows the connection.
    pub(crate) fn allows(&self, question: Question<'_>) -> bool {
        let asked = self.asked(question);
        let asked = &asked.keys[..asked.count];
        let everyone = &self.everyone;
        if !everyone.is_empty() && asked.iter().any(|key| everyone.binary_search(key).is_ok()) {
            return true;
        }
        let by_address = match question.peer {
            IpAddr::V4(peer) => self.v4.contain(asked, peer.to_bits()),
            IpAddr::V6(peer) => self.v6.contain(asked, peer.to_bits()),
        };
        by_address
            || question
                .peer_endpoint
                .is_some_and(|peer| self.allows_selected(&peer.matches, asked))
    }

    fn allows_selected(&self, matches: &MatchSet, asked: &[Key]) -> bool {
        let (ids, own): (&[SelectorId], _) = (matches, &self.selectors);
        if ids.len().min(own.len()) > FEW {
            return self
                .match_cache
                .meet(matches.number(), asked, || self.common(ids));
        }
        let granted = |at: usize| meet(self.peer(at).1, asked);
        if ids.len() <= own.len() {
            ids.iter().any(|id| {
                let at = own.binary_search_by_key(id, |(id, _)| *id);
                at.is_ok_and(granted)
            })
        } else {
            let mut own = own.iter().enumerate();
            own.any(|(at, (id, _))| ids.binary_search(id).is_ok() && granted(at))
        }
    }

    /// The keys of all selectors that are among `ids`, which are sorted; sorted too.
    fn common(&self, ids: &[SelectorId]) -> Box<[Key]> {
        let own = self.selectors.iter().enumerate();
        let among = own.filter(|(_, (id, _))| ids.binary_search(id).is_ok());
        let mut keys: Vec<Key> = among.flat_map(|(at, _)| self.peer(at).1).copied().collect();
        keys.sort_unstable();
        keys.dedup();
        keys.into()
    }

    fn peer(&self, at: usize) -> (SelectorId, &[Key]) {
        let (id, first) = self.selectors[at];
        let next = self.selectors.get(at + 1);
        let end = next.map_or(self.keys.len(), |(_, next)| *next as usize);
        (id, &self.keys[first as usize..end])
    }

    fn asked(&self, question: Question<'_>) -> Asked {
        let mut asked = Asked {
            keys: [ANY; 1 + PREFIXES + NAMES_OF_A_PORT],
            count: usize::from(self.any),
        };
        let Some(port) = question.port else {
            return asked;
        };
        if let Some(protocol) = number_of(question.protocol) {
            let mut lengths = self.lengths[protocol as usize - 1];
            while lengths != 0 {
                asked.push(prefix(protocol, lengths.trailing_zeros(), port));
                lengths &= lengths - 1;
            }
        }
        if !self.names.is_empty()
            && let Some(destination) = question.destination
        {
            for named in destination.port_names(question.protocol, port) {
                let wanted = (named.protocol, &named.name);
                let names = &self.names;
                let at = names.binary_search_by(|(protocol, name)| (*protocol, name).cmp(&wanted));
                if let Ok(at) = at {
                    asked.push(name_key(at));
                }
            }
        }
        asked
    }
}

impl Asked {
    fn push(&mut self, key: Key) {
        if let Some(place) = self.keys.get_mut(self.count) {
            *place = key;
            self.count += 1;
        }
    }
}

impl Parts {
    fn of<'a>(names: impl Iterator<Item = &'a (Protocol, Arc<str>)>) -> Self {
        let mut names: Vec<_> = names.cloned().collect();
        names.sort_unstable();
        names.dedup();
        Self {
            names,
            ..Self::default()
        }
    }

    fn name(&self, name: &(Protocol, Arc<str>)) -> Key {
        let at = self.names.partition_point(|known| known < name);
        name_key(at)
    }

    fn add(&mut self, key: Key, rule: &CompiledRule) {
        let Some(peers) = &rule.peers else {
            return self.everyone.push(key);
        };
        let (v4, v6) = (peers.blocks.v4(), peers.blocks.v6());
        self.v4
            .extend(v4.iter().map(|&(first, last)| (key, first, last)));
        self.v6
            .extend(v6.iter().map(|&(first, last)| (key, first, last)));
        self.peers
            .extend(peers.selectors.iter().map(|&id| (id, key)));
    }

    fn whole(mut self) -> Access {
        // The stable sort is fast here: its input is a few sorted runs.
        self.everyone.sort();
        self.everyone.dedup();
        let v4 = Blocks::joined(self.v4, |last| last.checked_add(1));
        let v6 = Blocks::joined(self.v6, |last| last.checked_add(1));
        self.peers.sort();
        self.peers.dedup();
        let (mut any, mut lengths) = (false, [0; 3]);
        let used = self.everyone.iter().copied();
        let used = used.chain(v4.keys.iter().map(|it| it.0));
        let used = used.chain(v6.keys.iter().map(|it| it.0));
        for key in used.chain(self.peers.iter().map(|it| it.1)) {
            any |= key == ANY;
            if key != ANY && key < NAMES {
                let bits = key & ((1 << PROTOCOL_SHIFT) - 1);
                lengths[(key >> PROTOCOL_SHIFT) as usize - 1] |= 1 << bits.ilog2();
            }
        }
        let (mut selectors, mut keys) = (Vec::new(), Vec::with_capacity(self.peers.len()));
        for (id, key) in self.peers {
            if selectors.last().is_none_or(|(last, _)| *last != id) {
                selectors.push((id, at(keys.len())));
            }
            keys.push(key);
        }
        Access {
            any,
            lengths,
            names: self.names.into(),
            everyone: self.everyone.into(),
            v4,
            v6,
            selectors: selectors.into(),
            keys: keys.into(),
            match_cache: MatchCache::default(),
        }
    }
}

impl<A: Ord + Copy> Blocks<A> {
    /// Takes ranges in any order, and merges those that touch or overlap at the same key.
    fn joined(mut all: Vec<(Key, A, A)>, after: impl Fn(A) -> Option<A>) -> Self {
        all.sort();
        let mut keys: Vec<(Key, u32)> = Vec::new();
        let mut ranges: Vec<(A, A)> = Vec::with_capacity(all.len());
        for (key, first, last) in all {
            if keys.last().is_none_or(|(known, _)| *known != key) {
                keys.push((key, at(ranges.len())));
            } else if let Some(known) = ranges.last_mut()
                && after(known.1).is_none_or(|next| first <= next)
            {
                known.1 = known.1.max(last);
                continue;
            }
            ranges.push((first, last));
        }
        let (keys, ranges) = (keys.into(), ranges.into());
        Self { keys, ranges }
    }

    fn add_to(&self, all: &mut Vec<(Key, A, A)>, moved: impl Fn(Key) -> Key) {
        for (place, (key, _)) in self.keys.iter().enumerate() {
            let ranges = self.of(place).iter();
            all.extend(ranges.map(|&(first, last)| (moved(*key), first, last)));
        }
    }

    fn of(&self, place: usize) -> &[(A, A)] {
        let end = self.keys.get(place + 1);
        let end = end.map_or(self.ranges.len(), |(_, next)| *next as usize);
        &self.ranges[self.keys[place].1 as usize..end]
    }

    fn contain(&self, asked: &[Key], address: A) -> bool {
        asked.iter().any(|key| {
            let Ok(place) = self.keys.binary_search_by_key(key, |(key, _)| *key) else {
                return false;
            };
            let ranges = self.of(place);
            let after = ranges.partition_point(|&(first, _)| first <= address);
            after > 0 && address <= ranges[after - 1].1
        })
    }
}

/// Whether the two have a key in common; `keys` are sorted, `asked` are few.
fn meet(keys: &[Key], asked: &[Key]) -> bool {
    asked.iter().any(|key| keys.binary_search(key).is_ok())
}

/// Protocols with ports, counted from 1.
fn number_of(protocol: Protocol) -> Option<u32> {
    match protocol {
        Protocol::Tcp => Some(1),
        Protocol::Udp => Some(2),
        Protocol::Sctp => Some(3),
        Protocol::Other(_) => None,
    }
}

/// The key of the first `length` bits of `port`, of a protocol by its number.
fn prefix(protocol: u32, length: u32, port: u16) -> Key {
    let bits = (1 << length) | (u32::from(port) >> (16 - length));
    (protocol << PROTOCOL_SHIFT) | bits
}

/// Calls `each` with the keys of the fewest prefixes that together are a range of ports.
pub(crate) fn prefixes(protocol: Protocol, first: u16, last: u16, mut each: impl FnMut(Key)) {
    let Some(protocol) = number_of(protocol) else {
        return;
    };
    let (mut next, last) = (u32::from(first), u32::from(last));
    while next <= last {
        // The widest prefix that begins here and does not reach beyond the last port.
        let aligned = if next == 0 { 16 } else { next.trailing_zeros() };
        let fits = (last - next + 1).ilog2();
        let free = aligned.min(fits).min(16);
        let port = u16::try_from(next).unwrap_or(u16::MAX);
        each(prefix(protocol, 16 - free, port));
        next += 1 << free;
    }
}

fn name_key(at: usize) -> Key {
    NAMES.saturating_add(self::at(at))
}

/// An index into lists that are bounded far below four billion entries.
fn at(place: usize) -> u32 {
    u32::try_from(place).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
