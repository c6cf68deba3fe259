//! What a connection was decided by, in the words that records, logs and the admin page share.
use std::net::IpAddr;
use std::sync::Arc;

use controller::Judgement;
use policy::{Endpoint, PolicyKey, Side, Verdict};

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

/// The word of a verdict, as records have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    Allow,
    Deny,
    /// Allowed once, cut by a later change.
    Sever,
}

impl Word {
    /// As records and metrics have it (`verdict`).
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Sever => "sever",
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
    /// The pod of a live flow is no longer the one at its address.
    Replaced,
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
            Self::Replaced => "replaced",
        }
    }
}

/// Why a flow that was allowed once is cut.
#[derive(Clone, Debug)]
pub(crate) struct Severance {
    /// What denies the flow now, with its pods.
    pub(crate) decision: Arc<Decision>,
    /// If no policy did it: what became of the pod at one of its ends, as a sentence.
    pub(crate) replaced: Option<String>,
}

/// An end of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Client,
    Server,
}

impl Severance {
    /// By policy.
    pub(crate) fn denied(decision: Arc<Decision>) -> Self {
        Self {
            decision,
            replaced: None,
        }
    }
}

impl Decision {
    /// Whether a later judgement lets no flow be that rests on this one, and why.
    ///
    /// A flow belongs to the pods that it was judged with. If another pod has an address of it, its
    /// socket is gone: the flow is cut though policy may allow the new pod the same. So it is if
    /// the pod is gone or has finished and nobody has the address.
    pub(crate) fn overturned(
        &self,
        client: IpAddr,
        server: IpAddr,
        now: Judgement,
    ) -> Option<Severance> {
        let ends = [
            (End::Client, client, self.from.as_deref()),
            (End::Server, server, self.to.as_deref()),
        ];
        match now {
            Judgement::Settled { verdict, from, to } => {
                let replaced = ends
                    .iter()
                    .zip([from.as_deref(), to.as_deref()])
                    .find_map(|(&(end, address, was), now)| self.replaced(end, address, was, now));
                replaced.or_else(|| {
                    let denied = !verdict.allowed();
                    denied.then(|| Severance::denied(Arc::new(Self { verdict, from, to })))
                })
            }
            Judgement::Unknown(unknown) => ends
                .iter()
                .filter(|(_, address, _)| *address == unknown)
                .find_map(|&(end, address, was)| self.replaced(end, address, was, None)),
        }
    }

    /// The end of a flow whose pod `was` is not the one that has its address `now`.
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
                "Cut: {address} was {} (uid {}) and is {} (uid {}) now.",
                was.key, was.uid, now.key, now.uid
            ),
            None => format!(
                "Cut: {} (uid {}) no longer has {address}.",
                was.key, was.uid
            ),
        };
        // No policy decided this.
        let side = |side: End| Side {
            allowed: side != end,
            ..Side::default()
        };
        let verdict = Verdict {
            egress: side(End::Client),
            ingress: side(End::Server),
            exempt: None,
        };
        Some(Severance {
            decision: Arc::new(Self {
                verdict,
                from: self.from.clone(),
                to: self.to.clone(),
            }),
            replaced: Some(sentence),
        })
    }

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
            let mut refusing = [egress, ingress].into_iter().filter(|side| !side.allowed);
            // Policies refuse only where they isolate.
            if refusing.clone().any(|side| !side.isolated) {
                Ground::Replaced
            } else if refusing.any(|side| side.contested) {
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

#[cfg(test)]
mod tests {
    use controller::{Batch, Event, Index, Object, ObjectKey, Table, TableSettings};
    use policy::{Labels, NetworkPolicy, Node, Pod, PodKey, Protocol};
    use serde_json::json;

    use super::*;

    const A: &str = "10.0.0.1";
    const B: &str = "10.0.0.2";
    const OUTSIDE: &str = "192.0.2.1";

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn pod(name: &str, uid: &str, address: &str) -> Pod {
        Pod {
            key: PodKey {
                namespace: "x".into(),
                name: name.into(),
            },
            uid: uid.into(),
            labels: Labels::new(),
            node: "n1".into(),
            host_network: false,
            ports: Vec::new(),
            addresses: vec![ip(address)],
            finished: false,
            terminating: false,
            started: "".into(),
        }
    }

    fn upsert(pod: Pod) -> Event {
        Event::Upsert(Object::from(pod))
    }

    fn gone(name: &str) -> Event {
        Event::Delete(ObjectKey::Pod(pod(name, "", A).key))
    }

    /// Isolates a both ways.
    fn deny() -> Event {
        let key = PolicyKey {
            namespace: "x".into(),
            name: "deny".into(),
        };
        let spec = json!({"policyTypes": ["Ingress", "Egress"]});
        let spec = serde_json::from_value(spec).unwrap();
        Event::Upsert(Object::from(NetworkPolicy::new(key, spec).unwrap()))
    }

    fn node() -> Event {
        Event::Upsert(Object::Node(Node {
            name: "n1".into(),
            addresses: Vec::new(),
            pod_cidrs: vec!["10.0.0.0/24".parse().unwrap()],
        }))
    }

    /// What becomes of a flow between two addresses when `events` come after its verdict.
    fn after(events: Vec<Event>, client: &str, server: &str) -> Option<Severance> {
        let table = Table::new(TableSettings::default());
        let mut index = Index::new(Arc::clone(&table));
        let first = vec![node(), upsert(pod("a", "a1", A)), upsert(pod("b", "b1", B))];
        let mut apply = |events| {
            index.apply(Batch {
                events,
                ..Batch::default()
            })
        };
        let judge = || table.judge(ip(client), ip(server), Some(80), Protocol::Tcp);
        apply(first);
        let Judgement::Settled { verdict, from, to } = judge() else {
            panic!("both ends are known")
        };
        let rests_on = Decision { verdict, from, to };
        apply(events);
        rests_on.overturned(ip(client), ip(server), judge())
    }

    #[test]
    fn a_flow_outlives_what_concerns_neither_its_verdict_nor_its_pods() {
        let relabelled = Pod {
            labels: Labels::from([("seen".into(), "twice".into())]),
            ..pod("a", "a1", A)
        };
        let terminating = Pod {
            terminating: true,
            ..pod("a", "a1", A)
        };
        for (events, why) in [
            (vec![], "nothing happened"),
            (vec![upsert(relabelled)], "the same pod with other labels"),
            (
                vec![upsert(terminating)],
                "it still serves what it has begun",
            ),
            (vec![upsert(pod("c", "c1", "10.0.0.3"))], "a third pod"),
        ] {
            assert!(after(events.clone(), A, B).is_none(), "{why}");
            assert!(after(events, OUTSIDE, A).is_none(), "{why}");
        }
        assert!(after(vec![gone("b")], A, OUTSIDE).is_none(), "not its pod");
    }

    #[test]
    fn a_flow_ends_with_its_pod_even_if_the_next_one_were_allowed_it() {
        let finished = Pod {
            finished: true,
            ..pod("a", "a1", A)
        };
        for (events, reason) in [
            (vec![gone("a")], "Cut: x/a (uid a1) no longer has 10.0.0.1."),
            (
                vec![upsert(finished)],
                "Cut: x/a (uid a1) no longer has 10.0.0.1.",
            ),
            (
                vec![upsert(pod("a", "a2", A))],
                "Cut: 10.0.0.1 was x/a (uid a1) and is x/a (uid a2) now.",
            ),
            (
                vec![gone("a"), upsert(pod("d", "d1", A))],
                "Cut: 10.0.0.1 was x/a (uid a1) and is x/d (uid d1) now.",
            ),
            (
                vec![upsert(pod("a", "a1", "10.0.0.9"))],
                "Cut: x/a (uid a1) no longer has 10.0.0.1.",
            ),
        ] {
            for (client, server, direction) in [(A, B, "egress"), (B, A, "ingress")] {
                let severance = after(events.clone(), client, server).expect(reason);
                assert_eq!(severance.replaced.as_deref(), Some(reason));
                assert_eq!(severance.decision.direction(), direction);
                assert!(severance.decision.policies().is_empty(), "no policy did it");
                assert_eq!(severance.decision.ground(), Ground::Replaced);
                let from = severance.decision.from.as_ref().unwrap();
                let was = if client == A { "a1" } else { "b1" };
                assert_eq!(&*from.identity.uid, was, "the flow's own pods");
            }
            assert!(after(events.clone(), A, OUTSIDE).is_some(), "to outside");
            assert!(after(events, OUTSIDE, A).is_some(), "from outside");
        }
        let both = vec![gone("a"), gone("b")];
        assert!(after(both, A, B).is_some(), "only one unknown end is named");
    }

    #[test]
    fn a_flow_that_policy_denies_by_now_is_cut_in_its_name() {
        let severance = after(vec![deny()], A, B).unwrap();
        assert_eq!(severance.decision.policies()[0].to_string(), "x/deny");
        assert_eq!(severance.decision.direction(), "both");
        assert_eq!(severance.decision.ground(), Ground::NoRule);
        assert_eq!(severance.replaced, None);
    }
}
