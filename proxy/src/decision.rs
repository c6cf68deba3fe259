//! What a connection was decided by, in the words that records, logs and the admin page share.
use std::sync::Arc;

use policy::{Endpoint, PolicyKey, Verdict};

/// How an allowed flow gets to its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Way {
    /// By two connections, relayed.
    Spliced,
    /// Let through at its first packet and carried by the kernel.
    Kernel,
}

impl Way {
    /// As records and metrics name it (`path`).
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Spliced => "spliced",
            Self::Kernel => "kernel",
        }
    }
}

/// A verdict with the pods that it is about.
#[derive(Debug)]
pub(crate) struct Decision {
    pub(crate) verdict: Verdict,
    /// The client, if it is a pod.
    pub(crate) from: Option<Arc<Endpoint>>,
    /// The server, if it is a pod.
    pub(crate) to: Option<Arc<Endpoint>>,
}

/// Whose policies spoke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spoke {
    Egress,
    Ingress,
    Both,
}

impl Spoke {
    /// As records and metrics name it (`direction`).
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
            Self::Both => "both",
        }
    }
}

/// What a verdict rests on, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ground {
    /// No policy isolates either end.
    Open,
    /// A rule allows it.
    Rule,
    /// A pod to itself, or a pod and its node.
    Exempt,
    /// An end is isolated and no rule allows it.
    NoRule,
    /// Several running pods claim an end's address, so that no rule may open it.
    Contested,
}

impl Ground {
    /// The value of the label `cause` of a decision.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Rule => "rule",
            Self::Exempt => "exempt",
            Self::NoRule => "no_rule",
            Self::Contested => "contested",
        }
    }
}

impl Decision {
    /// Whose policies spoke: `egress`, `ingress` or `both`. Of a denial, those that denied.
    pub(crate) fn direction(&self) -> &'static str {
        self.spoke().name()
    }

    /// Whose policies spoke. Of a denial, those that denied.
    pub(crate) fn spoke(&self) -> Spoke {
        let Verdict {
            egress, ingress, ..
        } = &self.verdict;
        let (egress, ingress) = if self.verdict.allowed() {
            (egress.isolated, ingress.isolated)
        } else {
            (!egress.allowed, !ingress.allowed)
        };
        match (egress, ingress) {
            (true, false) => Spoke::Egress,
            (false, true) => Spoke::Ingress,
            _ => Spoke::Both,
        }
    }

    /// What the verdict rests on.
    pub(crate) fn ground(&self) -> Ground {
        let Verdict {
            egress,
            ingress,
            exempt,
        } = &self.verdict;
        if exempt.is_some() {
            Ground::Exempt
        } else if !self.verdict.allowed() {
            let refuses_contested = |side: &policy::Side| !side.allowed && side.contested;
            if refuses_contested(egress) || refuses_contested(ingress) {
                Ground::Contested
            } else {
                Ground::NoRule
            }
        } else if egress.isolated || ingress.isolated {
            Ground::Rule
        } else {
            Ground::Open
        }
    }

    /// The policies that decided, as `check` names them; sorted.
    pub(crate) fn policies(&self) -> Vec<&PolicyKey> {
        let Verdict {
            egress, ingress, ..
        } = &self.verdict;
        let allowed = self.verdict.allowed();
        let sides = [egress, ingress]
            .into_iter()
            .filter(|side| side.allowed == allowed);
        let mut keys: Vec<_> = sides.flat_map(|side| &side.policies).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }
}
