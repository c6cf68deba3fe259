//! What a Kubernetes NetworkPolicy means: objects in, verdicts out.
//!
//! Pure: no clock, socket, file, log or async. [`NetworkPolicy::new`] validates, [`Cluster`] takes
//! the objects one by one and gives out an [`Endpoint`] per pod address, [`judge`] takes the two
//! ends of a connection and returns whether it is allowed, and why.
//!
//! ```text
//! v1::NetworkPolicySpec --validate--> NetworkPolicy --compile--> Rules (peer selectors as ids)
//!                                                                  |
//! Pod, Namespace, Node, NetworkPolicy --> Cluster --> Endpoint { ids it matches, isolation }
//!                                                                  |
//!                                     judge(from, to, port, protocol) --> Verdict
//! ```
//!
//! Two invariants hold everywhere. Invalid input never widens access: it is rejected with its
//! name. And the cost of a verdict depends on the rules of the pods at its two ends, not on the
//! size of the cluster: selectors are matched in advance, when an object changes.
mod access;
mod budget;
mod cluster;
mod compile;
mod decided;
mod decider;
mod endpoint;
mod isolation;
mod matches;
mod model;
mod network_policy;
mod problem;
mod ranges;
mod selector;
mod syntax;
pub mod v1;
mod verdict;

pub use budget::{Budget, Excess, Resource};
pub use cluster::{Claim, Cluster, Selected, Touched};
pub use decided::{Decided, DecidedSide, decide};
pub use endpoint::{Endpoint, Identity};
pub use model::{
    Direction, Labels, Namespace, Node, Pod, PodKey, PodPort, PolicyKey, Protocol, UnknownProtocol,
};
pub use network_policy::NetworkPolicy;
pub use problem::{Problem, Severity};
pub use verdict::{Exempt, OwnNode, Party, RuleRef, Side, Verdict, allows, judge};
