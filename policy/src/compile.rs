//! Rules in the form for evaluation: ids, ranges and sorted slices; evaluation does not allocate.
//!
//! Knows neither which pods match an id nor which policies isolate a pod.
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;

use crate::access::Access;
use crate::endpoint::Endpoint;
use crate::model::{Direction, PolicyKey, Protocol};
use crate::network_policy::{Peer, Port, PortNumbers, Rule};
use crate::ranges::AddressSet;
use crate::selector::PeerSelector;

/// Identifies one distinct [`PeerSelector`]; a cluster never reuses it.
pub(crate) type SelectorId = u32;

/// One state of one policy; the next state has another id.
pub(crate) type PolicyId = u64;

/// A policy in the form in which pods refer to it; its id identifies it.
#[derive(Debug)]
pub(crate) struct CompiledPolicy {
    pub(crate) id: PolicyId,
    /// A hash of the id.
    pub(crate) hash: u64,
    pub(crate) key: PolicyKey,
    pub(crate) egress: Option<Arc<Rules>>,
    pub(crate) ingress: Option<Arc<Rules>>,
}

/// The rules of one policy in one direction; equal ones are shared.
#[derive(Debug)]
pub(crate) struct Rules {
    /// At the place that the rule has in `spec.ingress` or `spec.egress`.
    pub(crate) list: Box<[CompiledRule]>,
    /// Their merged form.
    pub(crate) access: Access,
}

#[derive(Debug, PartialEq, Eq, Hash)]
pub(crate) struct CompiledRule {
    /// `None` is everyone.
    pub(crate) peers: Option<Peers>,
    /// `None` is every port of every protocol, and protocols without ports.
    pub(crate) ports: Option<Ports>,
}

#[derive(Debug, PartialEq, Eq, Hash)]
pub(crate) struct Peers {
    /// Sorted and without duplicates.
    pub(crate) selectors: Box<[SelectorId]>,
    pub(crate) blocks: AddressSet,
}

#[derive(Debug, PartialEq, Eq, Hash)]
pub(crate) struct Ports {
    /// Protocol, first and last port; sorted and disjoint.
    pub(crate) ranges: Box<[(Protocol, u16, u16)]>,
    /// Sorted.
    pub(crate) named: Box<[(Protocol, Arc<str>)]>,
}

/// A connection as the rules of one of its ends see it.
#[derive(Clone, Copy)]
pub(crate) struct Question<'a> {
    /// The other end.
    pub(crate) peer: IpAddr,
    /// The pod at the other end.
    pub(crate) peer_endpoint: Option<&'a Endpoint>,
    /// The pod at the connection's destination, on which named ports are resolved.
    pub(crate) destination: Option<&'a Endpoint>,
    pub(crate) port: Option<u16>,
    pub(crate) protocol: Protocol,
}

impl CompiledPolicy {
    /// The rules in `direction`, if it isolates in it.
    pub(crate) fn rules(&self, direction: Direction) -> Option<&Arc<Rules>> {
        match direction {
            Direction::Egress => self.egress.as_ref(),
            Direction::Ingress => self.ingress.as_ref(),
        }
    }
}

impl PartialEq for CompiledPolicy {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for CompiledPolicy {}

impl Rules {
    /// `id_of` gives the id of every selector that the rules have.
    pub(crate) fn new(rules: &[Rule], id_of: impl Fn(&PeerSelector) -> SelectorId) -> Self {
        let rules = rules.iter().map(|rule| CompiledRule::new(rule, &id_of));
        let list: Box<[CompiledRule]> = rules.collect();
        Self {
            access: Access::new(&list),
            list,
        }
    }
}

impl PartialEq for Rules {
    fn eq(&self, other: &Self) -> bool {
        self.list == other.list
    }
}

impl Eq for Rules {}

impl Hash for Rules {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.list.hash(state);
    }
}

impl CompiledRule {
    fn new(rule: &Rule, id_of: impl Fn(&PeerSelector) -> SelectorId) -> Self {
        Self {
            peers: (!rule.peers.is_empty()).then(|| Peers::new(&rule.peers, id_of)),
            ports: (!rule.ports.is_empty()).then(|| Ports::new(&rule.ports)),
        }
    }

    pub(crate) fn allows(&self, question: Question<'_>) -> bool {
        self.ports
            .as_ref()
            .is_none_or(|ports| ports.contain(question))
            && self
                .peers
                .as_ref()
                .is_none_or(|peers| peers.contain(question))
    }
}

impl Peers {
    fn new(peers: &[Peer], id_of: impl Fn(&PeerSelector) -> SelectorId) -> Self {
        let (mut selectors, mut blocks) = (Vec::new(), Vec::new());
        for peer in peers {
            match peer {
                Peer::Pods(selector) => selectors.push(id_of(selector)),
                Peer::Block(block) => blocks.push(block),
            }
        }
        selectors.sort_unstable();
        selectors.dedup();
        Self {
            selectors: selectors.into(),
            blocks: AddressSet::new(blocks),
        }
    }

    fn contain(&self, question: Question<'_>) -> bool {
        let selected = question
            .peer_endpoint
            .is_some_and(|peer| intersect(&self.selectors, &peer.matches));
        selected || self.blocks.contains(question.peer)
    }
}

impl Ports {
    fn new(ports: &[Port]) -> Self {
        let (mut ranges, mut named) = (Vec::new(), Vec::new());
        for port in ports {
            match &port.numbers {
                PortNumbers::All => ranges.push((port.protocol, 0, u16::MAX)),
                &PortNumbers::Range(first, last) => ranges.push((port.protocol, first, last)),
                PortNumbers::Named(name) => named.push((port.protocol, name.clone())),
            }
        }
        named.sort();
        named.dedup();
        Self {
            ranges: merged(ranges),
            named: named.into(),
        }
    }

    fn contain(&self, question: Question<'_>) -> bool {
        let Some(port) = question.port else {
            return false;
        };
        let wanted = (question.protocol, port);
        let after = self
            .ranges
            .partition_point(|&(protocol, first, _)| (protocol, first) <= wanted);
        let in_range = after.checked_sub(1).is_some_and(|before| {
            let (protocol, _, last) = self.ranges[before];
            protocol == question.protocol && port <= last
        });
        in_range || (!self.named.is_empty() && self.contain_name(question, port))
    }

    fn contain_name(&self, question: Question<'_>, port: u16) -> bool {
        let names = question
            .destination
            .map_or(&[][..], |it| it.port_names(question.protocol, port));
        names.iter().any(|named| {
            let wanted = (named.protocol, &named.name);
            self.named
                .binary_search_by(|(protocol, name)| (*protocol, name).cmp(&wanted))
                .is_ok()
        })
    }
}

/// Whether two sorted sets have a member in common; costs the smaller one's size times the
/// logarithm of the other's.
fn intersect(one: &[SelectorId], other: &[SelectorId]) -> bool {
    let (small, large) = if one.len() <= other.len() {
        (one, other)
    } else {
        (other, one)
    };
    small.iter().any(|id| large.binary_search(id).is_ok())
}

fn merged(mut ranges: Vec<(Protocol, u16, u16)>) -> Box<[(Protocol, u16, u16)]> {
    ranges.sort_unstable();
    let mut merged: Vec<(Protocol, u16, u16)> = Vec::with_capacity(ranges.len());
    for (protocol, first, last) in ranges {
        match merged.last_mut() {
            Some(previous) if previous.0 == protocol && first <= previous.2.saturating_add(1) => {
                previous.2 = previous.2.max(last);
            }
            _ => merged.push((protocol, first, last)),
        }
    }
    merged.into()
}
