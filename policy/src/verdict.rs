//! Decides whether X may connect to Y, and gives the reason.
//!
//! Reads endpoints, changes nothing, and evaluates only the rules of the two ends.
use std::fmt::{self, Display};
use std::net::IpAddr;

use serde::Serialize;

use crate::compile::Question;
use crate::decided::DecidedSide;
use crate::endpoint::Endpoint;
use crate::model::{Direction, Node, PolicyKey, Protocol};

/// How policies apply to traffic between a pod and the node that it runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OwnNode {
    /// Not at all: it is always allowed, as Kubernetes documents it.
    #[default]
    Allow,
    /// A pod's traffic to its node is judged by the pod's egress policies; the node's traffic to its
    /// pods stays exempt, since kubelet probes them.
    Judge,
}

/// Why traffic is allowed whatever policies say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Exempt {
    /// A pod to itself.
    #[serde(rename = "self")]
    SelfTraffic,
    /// A pod and the node that it runs on, either way.
    #[serde(rename = "node")]
    Node,
}

/// One end of a connection: its address after DNAT, and the pod there, if it is one.
#[derive(Clone, Copy, Debug)]
pub struct Party<'a> {
    /// The address on the wire; IPv4-mapped ones are to be unmapped before.
    pub address: IpAddr,
    /// The pod that owns the address.
    pub endpoint: Option<&'a Endpoint>,
}

/// A rule of a policy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct RuleRef {
    /// The policy.
    pub policy: PolicyKey,
    /// Index into `spec.ingress` or `spec.egress`.
    pub index: usize,
}

/// The result for one end: for the source by its egress policies, for the destination by its ingress policies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Side {
    /// Whether any policy isolates this end in this direction.
    pub isolated: bool,
    /// Whether this end allows the connection; always so if it is not isolated.
    pub allowed: bool,
    /// Those that allow if it is allowed, those that isolate if it is not; sorted, unique, and
    /// empty if the end is not isolated.
    pub policies: Vec<PolicyKey>,
    /// The rules that allow; sorted.
    pub rules: Vec<RuleRef>,
    /// Whether the end's address is claimed by more than one running pod, so that no rule may open
    /// it.
    #[serde(skip)]
    pub contested: bool,
}

/// The verdict: both ends must allow, unless the connection is exempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The result for the source, by its egress policies.
    pub egress: Side,
    /// The result for the destination, by its ingress policies.
    pub ingress: Side,
    /// Allowed, whatever the results of the two sides.
    pub exempt: Option<Exempt>,
}

/// Decides a connection and gives the reason. `port` is the destination's after DNAT; `None` stands for a
/// protocol without ports, which only rules without ports allow.
///
/// Both sides are filled in even where the connection is exempt.
pub fn judge(
    from: Party<'_>,
    to: Party<'_>,
    port: Option<u16>,
    protocol: Protocol,
    own_node: OwnNode,
) -> Verdict {
    let ends = Ends {
        from,
        to,
        port,
        protocol,
    };
    Verdict {
        egress: ends.side(Direction::Egress),
        ingress: ends.side(Direction::Ingress),
        exempt: ends.exempt(own_node),
    }
}

/// [`judge`]'s `allowed()` without its reason; allocates nothing.
pub fn allows(
    from: Party<'_>,
    to: Party<'_>,
    port: Option<u16>,
    protocol: Protocol,
    own_node: OwnNode,
) -> bool {
    let ends = Ends {
        from,
        to,
        port,
        protocol,
    };
    (ends.allowed(Direction::Egress) && ends.allowed(Direction::Ingress))
        || ends.exempt(own_node).is_some()
}

impl Verdict {
    /// Whether the connection is allowed.
    pub fn allowed(&self) -> bool {
        self.exempt.is_some() || (self.egress.allowed && self.ingress.allowed)
    }

    /// The verdict and its reason as one English sentence.
    pub fn reason(&self) -> String {
        match self.exempt {
            Some(Exempt::SelfTraffic) => "Allowed: a pod always reaches itself.".to_owned(),
            Some(Exempt::Node) => {
                "Allowed: a pod and the node it runs on always reach each other.".to_owned()
            }
            None if self.allowed() => self.grounds(),
            None => {
                let sides = [
                    (Direction::Egress, &self.egress),
                    (Direction::Ingress, &self.ingress),
                ];
                let denials = sides.iter().filter(|(_, side)| !side.allowed);
                let denials: Vec<_> = denials
                    .map(|&(direction, side)| side.denial(direction))
                    .collect();
                format!("Denied: {}.", denials.join("; and "))
            }
        }
    }

    fn grounds(&self) -> String {
        if !self.egress.isolated && !self.ingress.isolated {
            return "Allowed: no policy isolates the source for egress or the destination for \
                    ingress."
                .to_owned();
        }
        format!(
            "Allowed: {}, and {}.",
            self.egress.grant(Direction::Egress),
            self.ingress.grant(Direction::Ingress)
        )
    }
}

impl Side {
    fn grant(&self, direction: Direction) -> String {
        let (end, field) = spoken(direction);
        if !self.isolated {
            return format!("the {end} is not isolated for {field}");
        }
        let rules = self.rules.iter();
        let rules = rules.map(|rule| format!("{} (spec.{field}[{}])", rule.policy, rule.index));
        let of = |policy: &PolicyKey| self.rules.partition_point(|rule| rule.policy < *policy);
        let named = |policy: &PolicyKey| {
            self.rules.get(of(policy)).map(|rule| &rule.policy) == Some(policy)
        };
        let others = self.policies.iter().filter(|policy| !named(policy));
        let allowing = rules.chain(others.map(ToString::to_string));
        format!("the {end}'s {field} is allowed by {}", listed(allowing))
    }

    fn denial(&self, direction: Direction) -> String {
        let (end, field) = spoken(direction);
        let policies = listed(self.policies.iter());
        if self.contested {
            return format!(
                "more than one running pod claims the {end}'s address, which {policies} isolates \
                 for {field}"
            );
        }
        format!("the {end} is isolated for {field} by {policies}, and no rule allows this")
    }
}

fn spoken(direction: Direction) -> (&'static str, &'static str) {
    match direction {
        Direction::Egress => ("source", "egress"),
        Direction::Ingress => ("destination", "ingress"),
    }
}

fn listed(mut items: impl Iterator<Item = impl Display>) -> String {
    let shown = items.by_ref().take(SHOWN);
    let mut shown: Vec<String> = shown.map(|item| item.to_string()).collect();
    let more = items.count();
    if more > 0 {
        shown.push(format!("{more} more"));
    }
    match shown.pop() {
        Some(last) if !shown.is_empty() => format!("{} and {last}", shown.join(", ")),
        last => last.unwrap_or_default(),
    }
}

/// The connection in question.
#[derive(Clone, Copy)]
pub(crate) struct Ends<'a> {
    pub(crate) from: Party<'a>,
    pub(crate) to: Party<'a>,
    pub(crate) port: Option<u16>,
    pub(crate) protocol: Protocol,
}

/// Policies or rules that a sentence names at most.
const SHOWN: usize = 32;
/// Rules of one end that are evaluated one by one, at most, to explain a decision.
const EXPLAINED: usize = 4096;

impl<'a> Ends<'a> {
    /// The end whose policies apply in `direction`, and the query for its rules.
    fn question(&self, direction: Direction) -> (Option<&'a Endpoint>, Question<'a>) {
        let (own, peer) = match direction {
            Direction::Egress => (self.from, self.to),
            Direction::Ingress => (self.to, self.from),
        };
        let question = Question {
            peer: peer.address,
            peer_endpoint: peer.endpoint,
            destination: self.to.endpoint,
            port: self.port,
            protocol: self.protocol,
        };
        (own.endpoint, question)
    }

    fn allowed(&self, direction: Direction) -> bool {
        let (own, question) = self.question(direction);
        own.and_then(|own| own.isolation(direction))
            .is_none_or(|isolation| isolation.allows(question))
    }

    /// The result of one end, without its reason.
    pub(crate) fn decided(&self, direction: Direction) -> DecidedSide {
        let (own, question) = self.question(direction);
        let isolation = own.and_then(|own| own.isolation(direction));
        DecidedSide {
            isolated: isolation.is_some(),
            allowed: isolation.is_none_or(|isolation| isolation.allows(question)),
            contested: own.is_some_and(Endpoint::contested),
        }
    }

    /// Evaluates every rule alone, to check the merged structure.
    fn side(&self, direction: Direction) -> Side {
        let (own, question) = self.question(direction);
        let contested = own.is_some_and(Endpoint::contested);
        let Some(isolation) = own.and_then(|own| own.isolation(direction)) else {
            return Side {
                allowed: true,
                contested,
                ..Side::default()
            };
        };
        let mut side = Side {
            isolated: true,
            contested,
            ..Side::default()
        };
        for (policy, rules) in isolation.rules() {
            let allowing = rules
                .list
                .iter()
                .enumerate()
                .filter(|(_, rule)| rule.allows(question));
            let known = side.rules.len();
            side.rules.extend(allowing.map(|(index, _)| RuleRef {
                policy: policy.clone(),
                index,
            }));
            if side.rules.len() > known {
                side.policies.push(policy.clone());
            }
        }
        side.allowed = !side.rules.is_empty();
        if !side.allowed {
            side.policies = isolation.names().to_vec();
        }
        side
    }

    /// The result of one end with its reason, found with bounded work.
    pub(crate) fn explained(&self, direction: Direction, said: DecidedSide) -> Side {
        let (own, question) = self.question(direction);
        let mut side = Side::from(said);
        let Some(isolation) = own.and_then(|own| own.isolation(direction)) else {
            return side;
        };
        if !said.allowed {
            side.policies = isolation.names().to_vec();
            return side;
        }
        let mut left = EXPLAINED;
        for (policy, rules) in isolation.rules() {
            if !rules.access.allows(question) {
                continue;
            }
            side.policies.push(policy.clone());
            let asked = rules.list.iter().take(left).enumerate();
            let allowing = asked.filter(|(_, rule)| rule.allows(question));
            let allowing = allowing.take(SHOWN.saturating_sub(side.rules.len()));
            side.rules.extend(allowing.map(|(index, _)| RuleRef {
                policy: policy.clone(),
                index,
            }));
            left = left.saturating_sub(rules.list.len());
        }
        side
    }

    pub(crate) fn exempt(&self, own_node: OwnNode) -> Option<Exempt> {
        if self.is_self() {
            return Some(Exempt::SelfTraffic);
        }
        let to_own_node = own_node == OwnNode::Allow && runs_on(self.from, self.to);
        (to_own_node || runs_on(self.to, self.from)).then_some(Exempt::Node)
    }

    /// The same address is the same pod, whichever pods claim it. Two addresses of a pod are the same only if
    /// no other pod claims either.
    fn is_self(&self) -> bool {
        let (Some(from), Some(to)) = (self.from.endpoint, self.to.endpoint) else {
            return false;
        };
        let same_pod = || {
            !from.contested
                && !to.contested
                && from.identity.key == to.identity.key
                && from.identity.uid == to.identity.uid
        };
        self.from.address == self.to.address || same_pod()
    }
}

/// Whether `pod` is a pod and `node` the node that it runs on; an address that a pod owns is no
/// node's.
fn runs_on(pod: Party<'_>, node: Party<'_>) -> bool {
    let holds = |own: &Node| own.addresses.contains(&node.address);
    node.endpoint.is_none()
        && pod
            .endpoint
            .and_then(|pod| pod.own_node.as_deref())
            .is_some_and(holds)
}

impl Display for Exempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::SelfTraffic => "self",
            Self::Node => "node",
        })
    }
}

#[cfg(test)]
mod tests;
