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

impl Decision {
    /// Whose policies spoke: `egress`, `ingress` or `both`. Of a denial, those that denied.
    pub(crate) fn direction(&self) -> &'static str {
        let Verdict {
            egress, ingress, ..
        } = &self.verdict;
        let (egress, ingress) = if self.verdict.allowed() {
            (egress.isolated, ingress.isolated)
        } else {
            (!egress.allowed, !ingress.allowed)
        };
        match (egress, ingress) {
            (true, false) => "egress",
            (false, true) => "ingress",
            _ => "both",
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
