//! How much of each resource the policies of one namespace may use, so that no tenant's policies
//! use up the memory and time of others.
//!
//! Counts object by object; knows neither pods nor what happens to a refused policy.
use std::collections::HashSet;

use crate::access::prefixes;
use crate::network_policy::{NetworkPolicy, Peer, PortNumbers, Rule};
use crate::selector::{LabelSelector, NamespaceScope, PeerSelector, Test};

/// A resource of which all policies of a namespace together may use a bounded number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Resource {
    /// NetworkPolicy objects.
    Policies,
    /// Rules of `spec.ingress` and `spec.egress`.
    Rules,
    /// Entries of `from` and `to`; each `except` of an `ipBlock` counts as one too.
    Peers,
    /// Peers by selector; equal ones in one policy count once.
    Selectors,
    /// Those of [`Self::Selectors`] with `matchExpressions` other than `In` with a single value.
    Expressions,
    /// Label requirements, and their values, of all selectors, `spec.podSelector` included.
    Labels,
    /// Entries of `ports`.
    Ports,
    /// Ports of a rule times its peers. A range of ports counts as the prefixes of 16 bits that
    /// cover it, 30 at most; a rule without peers or ports counts as if it had one.
    Pairs,
    /// NetworkPolicy objects that select one pod: the only bound that is not a sum over the
    /// namespace. Beyond it a policy is refused for that pod only.
    OfAPod,
}

const RESOURCES: usize = 9;

/// A number of each [`Resource`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage([u64; RESOURCES]);

/// The limits of a namespace for each [`Resource`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget([u64; RESOURCES]);

/// Why a valid policy is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Excess {
    /// The resource whose bound is exceeded.
    pub resource: Resource,
    /// How much of it the policy uses.
    pub own: u64,
    /// The sum with the namespace's enforced policies whose names sort before it.
    pub count: u64,
    /// How much a namespace may have.
    pub bound: u64,
}

impl Resource {
    /// All of them.
    pub const ALL: [Self; RESOURCES] = [
        Self::Policies,
        Self::Rules,
        Self::Peers,
        Self::Selectors,
        Self::Expressions,
        Self::Labels,
        Self::Ports,
        Self::Pairs,
        Self::OfAPod,
    ];

    /// Its name, in the plural.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Policies => "policies",
            Self::Rules => "rules",
            Self::Peers => "peers and exceptions",
            Self::Selectors => "distinct peer selectors",
            Self::Expressions => "distinct peer selectors with expressions",
            Self::Labels => "label requirements and values",
            Self::Ports => "ports",
            Self::Pairs => "pairs of a port and a peer",
            Self::OfAPod => "policies that select one pod",
        }
    }

    /// The field that it is counted in.
    #[must_use]
    pub fn field(self) -> &'static str {
        match self {
            Self::Policies => "metadata.namespace",
            Self::Rules | Self::Pairs => "spec",
            Self::Peers | Self::Selectors | Self::Expressions => "spec.*[].from, spec.*[].to",
            Self::Labels => "spec.*.matchLabels, spec.*.matchExpressions",
            Self::Ports => "spec.*[].ports",
            Self::OfAPod => "spec.podSelector",
        }
    }
}

/// Bounds far above any hand-written set of policies, with which one namespace takes some tens of
/// MiB at most; see docs/limits.md, "How much one namespace may ask for".
impl Default for Budget {
    fn default() -> Self {
        Self([
            2_000, 50_000, 100_000, 5_000, 500, 200_000, 100_000, 500_000, 500,
        ])
    }
}

impl Budget {
    /// A budget that refuses nothing.
    #[must_use]
    pub fn unbounded() -> Self {
        Self([u64::MAX; RESOURCES])
    }

    /// This budget with another bound for `resource`.
    #[must_use]
    pub fn with(mut self, resource: Resource, bound: u64) -> Self {
        self.0[resource as usize] = bound;
        self
    }

    /// How much of `resource` a namespace may have.
    #[must_use]
    pub fn bound(&self, resource: Resource) -> u64 {
        self.0[resource as usize]
    }

    /// Whether `usage` is within it.
    pub(crate) fn holds(&self, usage: &Usage) -> bool {
        usage
            .0
            .iter()
            .zip(&self.0)
            .all(|(used, bound)| used <= bound)
    }

    /// The first resource of which `used` and `own` together exceed the bound.
    pub(crate) fn excess(&self, used: &Usage, own: &Usage) -> Option<Excess> {
        let mut counts = Resource::ALL.into_iter().map(|resource| Excess {
            resource,
            own: own.0[resource as usize],
            count: used.plus(own).0[resource as usize],
            bound: self.bound(resource),
        });
        counts.find(|it| it.count > it.bound)
    }
}

impl Usage {
    /// The usage of one policy.
    pub(crate) fn of(policy: &NetworkPolicy) -> Self {
        let mut usage = Self::default();
        usage.add(Resource::Policies, 1);
        usage.labels(&policy.pods);
        let rules = [&policy.ingress, &policy.egress];
        for rule in rules.into_iter().flatten().flatten() {
            usage.rule(rule);
        }
        let distinct: HashSet<&PeerSelector> = policy.peer_selectors().collect();
        usage.add(Resource::Selectors, distinct.len());
        let expressions = distinct.iter().filter(|it| has_expressions(it)).count();
        usage.add(Resource::Expressions, expressions);
        usage
    }

    fn rule(&mut self, rule: &Rule) {
        self.add(Resource::Rules, 1);
        self.add(Resource::Ports, rule.ports.len());
        let (mut ports, mut peers) = (0_usize, 0_usize);
        for port in &rule.ports {
            match port.numbers {
                PortNumbers::All | PortNumbers::Named(_) => ports += 1,
                PortNumbers::Range(first, last) => {
                    prefixes(port.protocol, first, last, |_| ports += 1);
                }
            }
        }
        for peer in &rule.peers {
            peers += 1;
            match peer {
                Peer::Block(block) => peers += block.except.len(),
                Peer::Pods(selector) => {
                    self.labels(&selector.pods);
                    if let NamespaceScope::Matching(scope) = &selector.namespaces {
                        self.labels(scope);
                    }
                }
            }
        }
        self.add(Resource::Peers, peers);
        self.add(Resource::Pairs, ports.max(1).saturating_mul(peers.max(1)));
    }

    fn labels(&mut self, selector: &LabelSelector) {
        let labels = selector.requirements().iter().map(|it| match &it.test {
            Test::In(values) | Test::NotIn(values) => 1 + values.len(),
            Test::Exists | Test::DoesNotExist => 1,
        });
        self.add(Resource::Labels, labels.sum());
    }

    fn add(&mut self, resource: Resource, count: usize) {
        let used = &mut self.0[resource as usize];
        *used = used.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
    }

    /// The sum of both.
    pub(crate) fn plus(mut self, other: &Self) -> Self {
        for (used, more) in self.0.iter_mut().zip(other.0) {
            *used = used.saturating_add(more);
        }
        self
    }

    /// The difference to `other`, which is part of it.
    pub(crate) fn minus(mut self, other: &Self) -> Self {
        for (used, less) in self.0.iter_mut().zip(other.0) {
            *used = used.saturating_sub(less);
        }
        self
    }
}

fn has_expressions(selector: &PeerSelector) -> bool {
    let scope = match &selector.namespaces {
        NamespaceScope::Named(_) => None,
        NamespaceScope::Matching(scope) => Some(scope),
    };
    let mut requirements = scope.into_iter().chain([&selector.pods]);
    requirements.any(|it| !it.requirements().iter().all(is_one_value))
}

fn is_one_value(requirement: &crate::selector::Requirement) -> bool {
    matches!(&requirement.test, Test::In(values) if values.len() == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PolicyKey;

    fn usage(spec: &str) -> Usage {
        let key = PolicyKey {
            namespace: "x".into(),
            name: "p".into(),
        };
        let spec = serde_saphyr::from_str(spec).unwrap();
        Usage::of(&NetworkPolicy::new(key, spec).unwrap())
    }

    #[test]
    fn a_policys_resources_are_counted() {
        use Resource::{Expressions, Labels, Pairs, Peers, Policies, Ports, Rules, Selectors};
        for (spec, expected, why) in [
            ("{}", vec![(Policies, 1)], "nothing but itself"),
            (
                "podSelector: {matchLabels: {a: x}, matchExpressions: [{key: b, operator: In, values: [x, z]}, {key: c, operator: Exists}]}",
                vec![(Policies, 1), (Labels, 2 + 3 + 1)],
                "its own selector",
            ),
            (
                "ingress: [{}]",
                vec![(Policies, 1), (Rules, 1), (Pairs, 1)],
                "a rule for all",
            ),
            (
                "ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16, 10.2.0.0/16]}}, {ipBlock: {cidr: 192.0.2.0/24}}], ports: [{port: 80}, {port: 1, endPort: 65534}, {port: web}, {}]}]",
                vec![
                    (Policies, 1),
                    (Rules, 1),
                    (Peers, 4),
                    (Ports, 4),
                    (Pairs, 4 * (1 + 30 + 1 + 1)),
                ],
                "blocks, exceptions and ranges",
            ),
            (
                "{egress: [{to: [{podSelector: {matchLabels: {a: x}}}, {podSelector: {matchLabels: {a: x}}}]}, {to: [{podSelector: {}, namespaceSelector: {matchExpressions: [{key: a, operator: NotIn, values: [x]}]}}]}], policyTypes: [Egress]}",
                vec![
                    (Policies, 1),
                    (Rules, 2),
                    (Peers, 3),
                    (Selectors, 2),
                    (Expressions, 1),
                    (Labels, 6),
                    (Pairs, 3),
                ],
                "equal selectors are one",
            ),
            (
                "{egress: [{to: [{podSelector: {}}]}], policyTypes: [Ingress]}",
                vec![(Policies, 1)],
                "rules that are not in force",
            ),
        ] {
            let mut wanted = Usage::default();
            expected
                .iter()
                .for_each(|&(resource, count)| wanted.add(resource, count));
            assert_eq!(usage(spec), wanted, "{spec}: {why}");
        }
    }

    #[test]
    fn an_excess_names_resource_count_and_bound() {
        let budget = Budget::default().with(Resource::Rules, 2);
        let (one, two) = (usage("ingress: [{}]"), usage("ingress: [{}, {}]"));
        assert!(budget.holds(&two) && !budget.holds(&one.plus(&two)));
        assert_eq!(budget.excess(&one, &one), None);
        let excess = Excess {
            resource: Resource::Rules,
            own: 2,
            count: 3,
            bound: 2,
        };
        assert_eq!(budget.excess(&one, &two), Some(excess));
        assert_eq!(one.plus(&two).minus(&two), one);
    }
}
