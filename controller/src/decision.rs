//! The decision on a connection, and which later decisions sever it.
use std::net::IpAddr;
use std::sync::Arc;

use policy::{Decided, DecidedSide, Endpoint, PolicyKey, Verdict};

/// A verdict with the pods that it is about. The reason is derived from them only when it is needed.
#[derive(Clone, Debug)]
pub struct Decision {
    /// The verdict; its reason can be derived from both ends later.
    pub verdict: Decided,
    /// The client, if it is a pod.
    pub from: Option<Arc<Endpoint>>,
    /// The server, if it is a pod.
    pub to: Option<Arc<Endpoint>>,
}

/// The owner of this address of the cluster is not known yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the pod at {0} is not known yet")]
pub struct Unknown(pub IpAddr);

/// Whose policies decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecidedBy {
    /// The egress policies of the client.
    Egress,
    /// The ingress policies of the server.
    Ingress,
    /// Policies of both, or none.
    Both,
}

impl DecidedBy {
    /// The value of `direction` in records and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
            Self::Both => "both",
        }
    }
}

/// The reason for a verdict, as a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No policy isolates either end.
    NoPolicy,
    /// A rule allows it.
    Rule,
    /// A pod to itself, or a pod and its node.
    Exempt,
    /// An end is isolated and no rule allows it.
    NoRule,
    /// Several running pods claim an endpoint's address, so no rule can allow it.
    DuplicateIp,
    /// The pod of a live flow has lost its address.
    EndpointReplaced,
}

impl Reason {
    /// The value of the label `reason` of a decision.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NoPolicy => "no_policy",
            Self::Rule => "rule",
            Self::Exempt => "exempt",
            Self::NoRule => "no_rule",
            Self::DuplicateIp => "duplicate_ip",
            Self::EndpointReplaced => "endpoint_replaced",
        }
    }
}

/// Why an allowed flow is severed.
#[derive(Clone, Debug)]
pub struct Severance {
    /// What denies the flow now, with its pods.
    pub decision: Arc<Decision>,
    /// If not by policy: what happened to the pod of an endpoint, as a sentence.
    pub replaced: Option<String>,
}

/// An end of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Client,
    Server,
}

impl Severance {
    /// By policy.
    #[must_use]
    pub fn denied(decision: Arc<Decision>) -> Self {
        Self {
            decision,
            replaced: None,
        }
    }
}

impl Decision {
    /// Whether the table, asked again, severs the flows that this decision allowed, and why.
    ///
    /// A flow belongs to the pods of its decision. If another pod now has one of their addresses, its
    /// socket is gone: the flow is severed even if policy allows the new pod the same. This also holds if
    /// the pod is deleted or finished and no pod has the address.
    #[must_use]
    pub fn overturned(
        &self,
        client: IpAddr,
        server: IpAddr,
        now: &Result<Self, Unknown>,
    ) -> Option<Severance> {
        let ends = [
            (End::Client, client, self.from.as_deref()),
            (End::Server, server, self.to.as_deref()),
        ];
        match now {
            Ok(now) => {
                let replaced = ends
                    .iter()
                    .zip([now.from.as_deref(), now.to.as_deref()])
                    .find_map(|(&(end, address, was), now)| self.replaced(end, address, was, now));
                replaced.or_else(|| {
                    let denied = !now.verdict.allowed();
                    denied.then(|| Severance::denied(Arc::new(now.clone())))
                })
            }
            Err(Unknown(unknown)) => ends
                .iter()
                .filter(|(_, address, _)| address == unknown)
                .find_map(|&(end, address, was)| self.replaced(end, address, was, None)),
        }
    }

    /// Severs a flow if its pod `was` at `address` and another pod, or none, is there `now`.
    fn replaced(
        &self,
        end: End,
        address: IpAddr,
        was: Option<&Endpoint>,
        now: Option<&Endpoint>,
    ) -> Option<Severance> {
        let was = &was?.identity;
        let sentence = match now.map(|now| &now.identity) {
            Some(now) if now.is_same_pod(was) => return None,
            Some(now) => format!(
                "Severed: {address} was {} (uid {}) and is {} (uid {}) now.",
                was.key, was.uid, now.key, now.uid
            ),
            None => format!(
                "Severed: {} (uid {}) no longer has {address}.",
                was.key, was.uid
            ),
        };
        // No policy decided this.
        let side = |side: End| DecidedSide {
            allowed: side != end,
            ..DecidedSide::default()
        };
        let verdict = Decided::of(side(End::Client), side(End::Server));
        Some(Severance {
            decision: Arc::new(Self {
                verdict,
                from: self.from.clone(),
                to: self.to.clone(),
            }),
            replaced: Some(sentence),
        })
    }

    /// The deciding policies: `egress`, `ingress` or `both`. For a denial, those that denied.
    #[must_use]
    pub fn direction(&self) -> &'static str {
        self.decided_by().name()
    }

    /// The direction of the deciding policies. For a denial, those that denied.
    #[must_use]
    pub fn decided_by(&self) -> DecidedBy {
        let Decided {
            egress, ingress, ..
        } = &self.verdict;
        let (egress, ingress) = if self.verdict.allowed() {
            (egress.isolated, ingress.isolated)
        } else {
            (!egress.allowed, !ingress.allowed)
        };
        match (egress, ingress) {
            (true, false) => DecidedBy::Egress,
            (false, true) => DecidedBy::Ingress,
            _ => DecidedBy::Both,
        }
    }

    /// The reason for the verdict.
    #[must_use]
    pub fn reason_label(&self) -> Reason {
        let Decided {
            egress,
            ingress,
            exempt,
            ..
        } = &self.verdict;
        if exempt.is_some() {
            Reason::Exempt
        } else if !self.verdict.allowed() {
            let mut refusing = [egress, ingress].into_iter().filter(|side| !side.allowed);
            // A policy denies only if it isolates the endpoint.
            if refusing.clone().any(|side| !side.isolated) {
                Reason::EndpointReplaced
            } else if refusing.any(|side| side.contested) {
                Reason::DuplicateIp
            } else {
                Reason::NoRule
            }
        } else if egress.isolated || ingress.isolated {
            Reason::Rule
        } else {
            Reason::NoPolicy
        }
    }

    /// The verdict with its reason. Too slow for the workers.
    #[must_use]
    pub fn explained(&self) -> Verdict {
        self.verdict
            .explain(self.from.as_deref(), self.to.as_deref())
    }

    /// The verdict and its reason as one English sentence.
    #[must_use]
    pub fn reason(&self) -> String {
        self.explained().reason()
    }

    /// The policies that decided, as `check` names them; sorted.
    #[must_use]
    pub fn policies(&self) -> Vec<PolicyKey> {
        let allowed = self.verdict.allowed();
        let Verdict {
            egress, ingress, ..
        } = self.explained();
        let sides = [egress, ingress].into_iter();
        let sides = sides.filter(|side| side.allowed == allowed);
        let mut keys: Vec<_> = sides.flat_map(|side| side.policies).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// The decision on a denied connection without the contents of its pods' policies, to be kept in memory.
    #[must_use]
    pub fn to_keep(&self) -> Self {
        let named = |end: &Option<Arc<Endpoint>>| {
            let end = end.as_ref()?;
            Some(Arc::new(end.without_rules()))
        };
        Self {
            verdict: self.verdict,
            from: named(&self.from),
            to: named(&self.to),
        }
    }
}

#[cfg(test)]
mod tests;
