//! The counters of decisions: one for each possible combination of labels, created at the start.
use controller::{DecidedBy, Decision, Reason};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

use crate::telemetry::decision::{DataPath, VerdictKind};

const KINDS: [VerdictKind; 3] = [VerdictKind::Allow, VerdictKind::Deny, VerdictKind::Sever];
const DECIDED_BY: [DecidedBy; 3] = [DecidedBy::Egress, DecidedBy::Ingress, DecidedBy::Both];
const PATHS: [DataPath; 2] = [DataPath::Spliced, DataPath::Kernel];
const REASONS: [Reason; 6] = [
    Reason::NoPolicy,
    Reason::Rule,
    Reason::Exempt,
    Reason::NoRule,
    Reason::DuplicateIp,
    Reason::EndpointReplaced,
];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Labels {
    verdict: &'static str,
    direction: &'static str,
    path: &'static str,
    reason: &'static str,
}

/// Every counter of a decision, in the order of [`place`].
pub(super) struct Decisions(Vec<Counter>);

impl Decisions {
    /// All at zero, with the family to register.
    pub(super) fn new() -> (Self, Family<Labels, Counter>) {
        let family = Family::<Labels, Counter>::default();
        let mut counters = Vec::new();
        for kind in KINDS {
            for decided_by in DECIDED_BY {
                for path in PATHS {
                    for reason in REASONS {
                        counters.push(if can_be(kind, decided_by, reason) {
                            family.get_or_create_owned(&Labels {
                                verdict: kind.name(),
                                direction: decided_by.name(),
                                path: path.name(),
                                reason: reason.name(),
                            })
                        } else {
                            Counter::default()
                        });
                    }
                }
            }
        }
        (Self(counters), family)
    }

    pub(super) fn count(&self, kind: VerdictKind, decision: &Decision, path: DataPath) {
        let place = place(kind, decision.decided_by(), path, decision.reason_label());
        if let Some(counter) = self.0.get(place) {
            counter.inc();
        }
    }
}

/// Whether such a decision is possible; series that are always zero would confuse.
fn can_be(kind: VerdictKind, decided_by: DecidedBy, reason: Reason) -> bool {
    match reason {
        Reason::NoPolicy => kind == VerdictKind::Allow && decided_by == DecidedBy::Both,
        Reason::Rule | Reason::Exempt => kind == VerdictKind::Allow,
        Reason::NoRule | Reason::DuplicateIp => kind != VerdictKind::Allow,
        Reason::EndpointReplaced => kind == VerdictKind::Sever && decided_by != DecidedBy::Both,
    }
}

fn place(kind: VerdictKind, decided_by: DecidedBy, path: DataPath, reason: Reason) -> usize {
    let upper =
        (kind as usize * DECIDED_BY.len() + decided_by as usize) * PATHS.len() + path as usize;
    upper * REASONS.len() + reason as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_decision_combination_has_its_own_counter() {
        let mut expected = 0;
        for kind in KINDS {
            for decided_by in DECIDED_BY {
                for path in PATHS {
                    for reason in REASONS {
                        assert_eq!(place(kind, decided_by, path, reason), expected);
                        expected += 1;
                    }
                }
            }
        }
        assert_eq!(Decisions::new().0.0.len(), expected);
    }
}
