//! The counters of decisions: one for each possible combination of labels, created at the start.
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

use crate::telemetry::decision::{Decision, Ground, Spoke, Way, Word};

const WORDS: [Word; 3] = [Word::Allow, Word::Deny, Word::Sever];
const SPOKE: [Spoke; 3] = [Spoke::Egress, Spoke::Ingress, Spoke::Both];
const WAYS: [Way; 2] = [Way::Spliced, Way::Kernel];
const GROUNDS: [Ground; 6] = [
    Ground::Open,
    Ground::Rule,
    Ground::Exempt,
    Ground::NoRule,
    Ground::Contested,
    Ground::Replaced,
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
        for word in WORDS {
            for spoke in SPOKE {
                for way in WAYS {
                    for ground in GROUNDS {
                        counters.push(if can_be(word, spoke, ground) {
                            family.get_or_create_owned(&Labels {
                                verdict: word.name(),
                                direction: spoke.name(),
                                path: way.name(),
                                reason: ground.name(),
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

    pub(super) fn count(&self, word: Word, decision: &Decision, way: Way) {
        let place = place(word, decision.spoke(), way, decision.ground());
        if let Some(counter) = self.0.get(place) {
            counter.inc();
        }
    }
}

/// Whether such a decision is possible; series that are always zero would confuse.
fn can_be(word: Word, spoke: Spoke, ground: Ground) -> bool {
    match ground {
        Ground::Open => word == Word::Allow && spoke == Spoke::Both,
        Ground::Rule | Ground::Exempt => word == Word::Allow,
        Ground::NoRule | Ground::Contested => word != Word::Allow,
        Ground::Replaced => word == Word::Sever && spoke != Spoke::Both,
    }
}

fn place(word: Word, spoke: Spoke, way: Way, ground: Ground) -> usize {
    let upper = (word as usize * SPOKE.len() + spoke as usize) * WAYS.len() + way as usize;
    upper * GROUNDS.len() + ground as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_decision_combination_has_its_own_counter() {
        let mut expected = 0;
        for word in WORDS {
            for spoke in SPOKE {
                for way in WAYS {
                    for ground in GROUNDS {
                        assert_eq!(place(word, spoke, way, ground), expected);
                        expected += 1;
                    }
                }
            }
        }
        assert_eq!(Decisions::new().0.0.len(), expected);
    }
}
