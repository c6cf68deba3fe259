//! A NetworkPolicy that is valid by construction, and its validation.
//!
//! Validation and defaulting are the API server's (`pkg/apis/networking`), stricter only where a
//! value could not have the intended effect. Knows nothing of pods, nor how rules are evaluated.
mod closed;

use std::sync::Arc;

use ipnet::IpNet;

use crate::model::{Direction, PolicyKey, Protocol};
use crate::problem::{Problem, Problems};
use crate::ranges::IpBlock;
use crate::selector::{LabelSelector, NamespaceScope, PeerSelector};
use crate::{syntax, v1};

/// A validated `networking.k8s.io/v1` NetworkPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkPolicy {
    key: PolicyKey,
    pub(crate) pods: LabelSelector,
    /// `None`: the policy does not isolate for ingress, whatever rules it has.
    pub(crate) ingress: Option<Vec<Rule>>,
    pub(crate) egress: Option<Vec<Rule>>,
}

/// One of `spec.ingress` or `spec.egress`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    /// `from` or `to`; empty is everyone.
    pub(crate) peers: Box<[Peer]>,
    /// Empty is every port of every protocol.
    pub(crate) ports: Box<[Port]>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    Pods(PeerSelector),
    Block(IpBlock),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    pub(crate) protocol: Protocol,
    pub(crate) numbers: PortNumbers,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PortNumbers {
    /// `port` is missing.
    All,
    /// Inclusive; `endPort` is the last.
    Range(u16, u16),
    /// Resolved on the destination pod.
    Named(Arc<str>),
}

impl NetworkPolicy {
    /// Validates `spec` and fills in the API server's defaults.
    ///
    /// # Errors
    /// Every problem of the object, each with its field.
    pub fn new(key: PolicyKey, spec: v1::NetworkPolicySpec) -> Result<Self, Vec<Problem>> {
        let mut problems = Problems::default();
        check_key(&key, &mut problems);
        let directions = directions(&spec, &mut problems);
        let pods = LabelSelector::new(spec.pod_selector, "spec.podSelector", &mut problems);
        let mut validator = Validator {
            namespace: &key.namespace,
            problems: &mut problems,
        };
        let ingress = spec.ingress.into_iter().enumerate().map(|(index, rule)| {
            validator.rule(
                rule.from,
                rule.ports,
                &format!("spec.ingress[{index}]"),
                "from",
            )
        });
        let ingress: Vec<Rule> = ingress.collect();
        let egress = spec.egress.into_iter().enumerate().map(|(index, rule)| {
            validator.rule(rule.to, rule.ports, &format!("spec.egress[{index}]"), "to")
        });
        let egress: Vec<Rule> = egress.collect();
        problems.or(Self {
            pods,
            ingress: directions.contains(&Direction::Ingress).then_some(ingress),
            egress: directions.contains(&Direction::Egress).then_some(egress),
            key,
        })
    }

    /// Namespace and name.
    pub fn key(&self) -> &PolicyKey {
        &self.key
    }

    /// Whether `direction` is among the policy's `policyTypes`, given or defaulted: the pods that it
    /// selects are isolated in it.
    pub fn isolates(&self, direction: Direction) -> bool {
        self.rules(direction).is_some()
    }

    /// How many rules the policy has in `direction`; 0 if it does not isolate in it.
    pub fn rule_count(&self, direction: Direction) -> usize {
        self.rules(direction).map_or(0, <[_]>::len)
    }

    pub(crate) fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Egress => self.egress.as_deref(),
            Direction::Ingress => self.ingress.as_deref(),
        }
    }

    /// Every peer selector of its rules in force, with repetitions.
    pub(crate) fn peer_selectors(&self) -> impl Iterator<Item = &PeerSelector> {
        let rules = [&self.ingress, &self.egress]
            .into_iter()
            .flatten()
            .flatten();
        rules
            .flat_map(|rule| rule.peers.iter())
            .filter_map(|peer| match peer {
                Peer::Pods(selector) => Some(selector),
                Peer::Block(_) => None,
            })
    }
}

fn check_key(key: &PolicyKey, problems: &mut Problems) {
    if let Some(fault) = syntax::dns_label_fault(&key.namespace) {
        let problem = format!("the namespace {:?} {fault}", &*key.namespace);
        problems.push("metadata.namespace", problem, "name an existing namespace");
    }
    if let Some(fault) = syntax::dns_subdomain_fault(&key.name) {
        let problem = format!("the name {:?} {fault}", &*key.name);
        problems.push("metadata.name", problem, "write a name such as deny-all");
    }
}

/// `policyTypes`, or the API server's default: Ingress always, Egress only where
/// there is an egress rule.
fn directions(spec: &v1::NetworkPolicySpec, problems: &mut Problems) -> Vec<Direction> {
    if spec.policy_types.is_empty() {
        let egress = (!spec.egress.is_empty()).then_some(Direction::Egress);
        return [Direction::Ingress].into_iter().chain(egress).collect();
    }
    if spec.policy_types.len() > 2 {
        let problem = format!("{} policy types", spec.policy_types.len());
        problems.push(
            "spec.policyTypes",
            problem,
            "list Ingress and Egress at most once each",
        );
    }
    let mut directions = Vec::new();
    for (index, name) in spec.policy_types.iter().enumerate() {
        match name.as_str() {
            "Ingress" => directions.push(Direction::Ingress),
            "Egress" => directions.push(Direction::Egress),
            unknown => problems.push(
                format!("spec.policyTypes[{index}]"),
                format!("unknown policy type {unknown:?}"),
                "use Ingress or Egress",
            ),
        }
    }
    directions
}

struct Validator<'a> {
    /// The policy's own namespace, for peers without `namespaceSelector`.
    namespace: &'a Arc<str>,
    problems: &'a mut Problems,
}

impl Validator<'_> {
    fn rule(
        &mut self,
        peers: Vec<v1::NetworkPolicyPeer>,
        ports: Vec<v1::NetworkPolicyPort>,
        path: &str,
        peers_field: &str,
    ) -> Rule {
        let ports = ports.into_iter().enumerate();
        let ports =
            ports.filter_map(|(index, port)| self.port(port, &format!("{path}.ports[{index}]")));
        let ports = ports.collect();
        let peers = peers.into_iter().enumerate();
        let peers = peers
            .filter_map(|(index, peer)| self.peer(peer, &format!("{path}.{peers_field}[{index}]")));
        Rule {
            peers: peers.collect(),
            ports,
        }
    }

    fn peer(&mut self, raw: v1::NetworkPolicyPeer, path: &str) -> Option<Peer> {
        let selects = raw.pod_selector.is_some() || raw.namespace_selector.is_some();
        let mut selector = |raw: Option<v1::LabelSelector>, field: &str| {
            raw.map(|raw| LabelSelector::new(raw, &format!("{path}.{field}"), self.problems))
        };
        let pods = selector(raw.pod_selector, "podSelector");
        let namespaces = selector(raw.namespace_selector, "namespaceSelector");
        let Some(raw_block) = raw.ip_block else {
            if !selects {
                self.problems.push(
                    path,
                    "the peer is empty",
                    "give it a podSelector, a namespaceSelector or an ipBlock",
                );
                return None;
            }
            let namespaces = match namespaces {
                Some(selector) => NamespaceScope::Matching(selector),
                None => NamespaceScope::Named(self.namespace.clone()),
            };
            return Some(Peer::Pods(PeerSelector {
                namespaces,
                pods: pods.unwrap_or_default(),
            }));
        };
        if selects {
            self.problems.push(
                path,
                "the peer has an ipBlock together with a selector",
                "split it into two peers",
            );
        }
        self.block(raw_block, &format!("{path}.ipBlock"))
            .map(Peer::Block)
    }

    fn block(&mut self, raw: v1::IpBlock, path: &str) -> Option<IpBlock> {
        let cidr = self.cidr(&raw.cidr, &format!("{path}.cidr"));
        let mut except = Vec::with_capacity(raw.except.len());
        for (index, text) in raw.except.iter().enumerate() {
            let field = format!("{path}.except[{index}]");
            let Some(exception) = self.cidr(text, &field) else {
                continue;
            };
            except.push(exception);
            let Some(cidr) = cidr else { continue };
            if !cidr.contains(&exception) || exception.prefix_len() <= cidr.prefix_len() {
                self.problems.push(
                    field,
                    format!("{text} does not lie strictly within {}", raw.cidr),
                    format!("name a part of {}, with a longer prefix", raw.cidr),
                );
            }
        }
        Some(IpBlock {
            cidr: cidr?,
            except,
        })
    }

    /// A block of either family. Bits after the prefix are cut off, as the API server does.
    fn cidr(&mut self, text: &str, field: &str) -> Option<IpNet> {
        let remedy = "write a block such as 10.0.0.0/8 or 2001:db8::/32";
        if text.is_empty() {
            self.problems.push(field, "no block is given", remedy);
            return None;
        }
        let Ok(net) = text.parse::<IpNet>() else {
            self.problems
                .push(field, format!("{text:?} is no address block"), remedy);
            return None;
        };
        if let IpNet::V6(v6) = net
            && v6.prefix_len() >= 96
            && v6.addr().to_ipv4_mapped().is_some()
        {
            // Addresses are unmapped before they are judged: as a block it would match nothing, as
            // an exception it would except nothing.
            self.problems.push(
                field,
                format!("{text} is an IPv4-mapped IPv6 block"),
                "write it as an IPv4 block",
            );
            return None;
        }
        Some(net.trunc())
    }

    fn port(&mut self, raw: v1::NetworkPolicyPort, path: &str) -> Option<Port> {
        let protocol = match raw.protocol.as_deref() {
            None => Some(Protocol::Tcp),
            Some(name) => name.parse().ok(),
        };
        if protocol.is_none() {
            self.problems.push(
                format!("{path}.protocol"),
                format!("unknown protocol {:?}", raw.protocol.unwrap_or_default()),
                "use TCP, UDP or SCTP",
            );
        }
        let numbers = self.port_numbers(raw.port, raw.end_port, path);
        Some(Port {
            protocol: protocol?,
            numbers: numbers?,
        })
    }

    fn port_numbers(
        &mut self,
        port: Option<v1::IntOrString>,
        end: Option<i64>,
        path: &str,
    ) -> Option<PortNumbers> {
        let (port_field, end_field) = (format!("{path}.port"), format!("{path}.endPort"));
        match (port, end) {
            (None, None) => Some(PortNumbers::All),
            (None, Some(_)) => {
                let problem = "endPort without port";
                self.problems.push(
                    end_field,
                    problem,
                    "give the first port of the range as port",
                );
                None
            }
            (Some(v1::IntOrString::Int(number)), None) => {
                let number = self.port_number(number, &port_field)?;
                Some(PortNumbers::Range(number, number))
            }
            (Some(v1::IntOrString::Int(first)), Some(last)) => {
                let numbers = (
                    self.port_number(first, &port_field),
                    self.port_number(last, &end_field),
                );
                if last < first {
                    self.problems.push(
                        end_field,
                        format!("endPort {last} is below port {first}"),
                        "give the lower port as port, the higher as endPort",
                    );
                }
                Some(PortNumbers::Range(numbers.0?, numbers.1?))
            }
            (Some(v1::IntOrString::String(name)), end) => {
                if end.is_some() {
                    let problem = format!("endPort with the named port {name:?}");
                    self.problems.push(
                        end_field,
                        problem,
                        "give port as a number, or remove endPort",
                    );
                }
                self.port_name(name, &port_field).map(PortNumbers::Named)
            }
        }
    }

    fn port_number(&mut self, number: i64, field: &str) -> Option<u16> {
        let valid = u16::try_from(number).ok().filter(|&number| number != 0);
        if valid.is_none() {
            self.problems.push(
                field,
                format!("{number} is not a port"),
                "use a number from 1 to 65535",
            );
        }
        valid
    }

    fn port_name(&mut self, name: String, field: &str) -> Option<Arc<str>> {
        let Some(fault) = syntax::port_name_fault(&name) else {
            return Some(name.into());
        };
        let remedy = if name.parse::<u16>().is_ok() {
            "write the number without quotes"
        } else {
            "write up to 15 of a-z, 0-9 and single hyphens, with at least one letter"
        };
        self.problems
            .push(field, format!("the port name {name:?} {fault}"), remedy);
        None
    }
}

#[cfg(test)]
mod tests;
