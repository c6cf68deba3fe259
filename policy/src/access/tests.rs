//! Compares the merged structure with every rule evaluated alone.
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::*;
use crate::endpoint::{Endpoint, NamedPort};
use crate::model::PodKey;
use crate::network_policy::{Peer, Port, PortNumbers, Rule};
use crate::ranges::IpBlock;
use crate::selector::{LabelSelector, NamespaceScope, PeerSelector};
use crate::{Identity, compile::Rules};

/// The selector of an id.
fn selector(id: SelectorId) -> PeerSelector {
    PeerSelector {
        namespaces: NamespaceScope::Named(id.to_string().into()),
        pods: LabelSelector::default(),
    }
}

fn id_of(selector: &PeerSelector) -> SelectorId {
    match &selector.namespaces {
        NamespaceScope::Named(name) => name.parse().unwrap(),
        NamespaceScope::Matching(_) => unreachable!("selectors here are named"),
    }
}

fn compiled(rules: &[Rule]) -> Rules {
    Rules::new(rules, id_of)
}

fn endpoint(ids: &[SelectorId], names: &[(u16, &str)]) -> Endpoint {
    let key = PodKey {
        namespace: "x".into(),
        name: "a".into(),
    };
    let mut endpoint = Endpoint::bare(Identity {
        key,
        uid: "".into(),
        node_name: "".into(),
        node: None,
    });
    let number = 1 + ids.iter().map(|id| u64::from(*id) + 1).sum::<u64>();
    endpoint.matches = Arc::new(MatchSet::new(number, ids.into()));
    let mut named: Vec<NamedPort> = names
        .iter()
        .map(|&(number, name)| NamedPort {
            protocol: Protocol::Tcp,
            number,
            name: name.into(),
        })
        .collect();
    named.sort();
    endpoint.named_ports = named.into();
    endpoint
}

fn protocols() -> impl Strategy<Value = Protocol> {
    prop_oneof![
        Just(Protocol::Tcp),
        Just(Protocol::Udp),
        Just(Protocol::Sctp)
    ]
}

/// Ports near the edges of prefixes.
fn numbers() -> impl Strategy<Value = u16> {
    prop_oneof![
        0_u16..6,
        126_u16..131,
        32_766..=32_769_u16,
        65_533..=65_535_u16
    ]
}

fn ports() -> impl Strategy<Value = Port> {
    let numbers = prop_oneof![
        1 => Just(PortNumbers::All),
        3 => (numbers(), numbers()).prop_map(|(a, b)| PortNumbers::Range(a.min(b), a.max(b))),
        3 => numbers().prop_map(|port| PortNumbers::Range(port, port)),
        2 => prop_oneof![Just("web"), Just("dns"), Just("none")]
            .prop_map(|name| PortNumbers::Named(name.into())),
    ];
    (protocols(), numbers).prop_map(|(protocol, numbers)| Port { protocol, numbers })
}

fn cidr(v4: bool, bits: u8, length: u8) -> ipnet::IpNet {
    let text = if v4 {
        format!("10.0.0.{bits}/{}", 24 + length)
    } else {
        format!("fd00::{bits:x}/{}", 120 + length)
    };
    text.parse::<ipnet::IpNet>().unwrap().trunc()
}

fn peers() -> impl Strategy<Value = Peer> {
    let except = proptest::collection::vec((any::<u8>(), 1_u8..=8), 0..3);
    let block =
        (any::<bool>(), any::<u8>(), 0_u8..=8, except).prop_map(|(v4, bits, length, except)| {
            let cidr_of = |bits, length| cidr(v4, bits, length);
            let whole = cidr_of(bits, length);
            let within =
                |it: &ipnet::IpNet| whole.contains(it) && it.prefix_len() > whole.prefix_len();
            let except = except
                .into_iter()
                .map(|(bits, length)| cidr_of(bits, length));
            Peer::Block(IpBlock {
                cidr: whole,
                except: except.filter(within).collect(),
            })
        });
    prop_oneof![
        3 => block,
        2 => (0_u32..60).prop_map(|id| Peer::Pods(selector(id))),
    ]
}

fn rules() -> impl Strategy<Value = Vec<Rule>> {
    let rule = (
        proptest::collection::vec(peers(), 0..6),
        proptest::collection::vec(ports(), 0..4),
    );
    let rule = rule.prop_map(|(peers, ports)| Rule {
        peers: peers.into(),
        ports: ports.into(),
    });
    proptest::collection::vec(rule, 0..12)
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(20),
        ..ProptestConfig::default()
    }
}

/// Whether any rule allows it, each evaluated alone.
fn one_by_one(all: &[Rules], question: Question<'_>) -> bool {
    let mut rules = all.iter().flat_map(|rules| &rules.list);
    rules.any(|rule| rule.allows(question))
}

proptest! {
    #![proptest_config(config(400))]

    #[test]
    fn merged_rules_allow_what_any_rule_allows(
        lists in proptest::collection::vec(rules(), 1..4),
        ids in proptest::collection::btree_set(0_u32..60, 0..40),
        asked in proptest::collection::vec((any::<bool>(), any::<u8>(), numbers(), protocols()), 24),
    ) {
        let lists: Vec<Rules> = lists.iter().map(|rules| compiled(rules)).collect();
        let parts: Vec<_> = lists.iter().map(|rules| &rules.access).collect();
        let merged = Access::merged(&parts);
        let ids: Vec<_> = ids.into_iter().collect();
        let peer = endpoint(&ids, &[]);
        let destination = endpoint(&[], &[(80, "web"), (1, "web"), (1, "dns"), (65_535, "dns")]);
        for (v4, bits, port, protocol) in asked {
            let address = cidr(v4, bits, 8).addr();
            for (port, protocol) in [(Some(port), protocol), (None, protocol), (Some(port), Protocol::Other(1))] {
                for peer_endpoint in [None, Some(&peer)] {
                    let question = Question {
                        peer: address,
                        peer_endpoint,
                        destination: Some(&destination),
                        port,
                        protocol,
                    };
                    let expected = one_by_one(&lists, question);
                    prop_assert_eq!(merged.allows(question), expected, "{:?} {:?} {}", address, port, protocol);
                    prop_assert_eq!(parts.iter().any(|it| it.allows(question)), expected);
                }
            }
        }
    }
}

#[test]
fn a_port_range_is_at_most_thirty_prefixes() {
    for (first, last, expected) in [
        (0, 65_535, 1),
        (80, 80, 1),
        (1, 65_535, 16),
        (1, 65_534, 30),
        (8000, 9000, 7),
        (32_768, 65_535, 1),
    ] {
        let mut keys = Vec::new();
        prefixes(Protocol::Tcp, first, last, |key| keys.push(key));
        assert_eq!(keys.len(), expected, "{first}-{last}");
    }
}

#[test]
fn prefixes_cover_the_ports_of_their_ranges_only() {
    for (first, last) in [
        (0, 0),
        (1, 6),
        (3, 3),
        (255, 257),
        (0, 65_535),
        (1, 65_534),
        (65_535, 65_535),
    ] {
        let rule = Rule {
            peers: [].into(),
            ports: [Port {
                protocol: Protocol::Udp,
                numbers: PortNumbers::Range(first, last),
            }]
            .into(),
        };
        let access = compiled(&[rule]).access;
        for port in 0..=u16::MAX {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let question = Question {
                    peer: IpAddr::from([10, 0, 0, 1]),
                    peer_endpoint: None,
                    destination: None,
                    port: Some(port),
                    protocol,
                };
                let expected = protocol == Protocol::Udp && (first..=last).contains(&port);
                assert_eq!(
                    access.allows(question),
                    expected,
                    "{port} of {first}-{last}"
                );
            }
        }
    }
}
