//! What all parts of the data path share: the table, the flows, the bounds, the counts.
use std::sync::Arc;
use std::time::Duration;

use controller::Table;
use iptables_init::marks::Marks;
use policy::Endpoint;

use crate::flows::{Flow, Flows};
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::records::{Outcome, Recorder};

/// What a refused client sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Deny {
    /// Nothing: it runs into its timeout.
    #[default]
    Drop,
    /// A TCP reset at once; ICMP administratively prohibited for other protocols.
    Reject,
}

/// One node's enforcement, shared by all its workers.
pub(crate) struct Enforcer {
    /// `metadata.name` of the Node.
    pub(crate) node: Arc<str>,
    pub(crate) table: Arc<Table>,
    pub(crate) flows: Flows,
    pub(crate) limits: Arc<Limits>,
    pub(crate) marks: Marks,
    pub(crate) deny: Deny,
    /// How long a first packet waits for a pod that is not known yet.
    pub(crate) hold: Duration,
    pub(crate) metrics: Metrics,
    pub(crate) recorder: Recorder,
}

impl Enforcer {
    /// Whether the pod runs on this node.
    pub(crate) fn is_local(&self, endpoint: &Endpoint) -> bool {
        endpoint
            .identity
            .node
            .as_ref()
            .is_some_and(|node| node.name == self.node)
    }

    /// Takes a denied connection out of the table, counts it and records it.
    pub(crate) fn denied(&self, flow: &Arc<Flow>) {
        self.flows.remove(flow);
        if let Some(decision) = flow.decision() {
            self.metrics.decided(&decision);
            self.recorder.denied(&self.node, flow, &decision);
        }
    }

    /// Counts a connection that policy allows.
    pub(crate) fn allowed(&self, flow: &Flow) {
        if let Some(decision) = flow.decision() {
            self.metrics.decided(&decision);
        }
    }

    /// Takes an allowed connection that is over out of the table, counts it and records it.
    pub(crate) fn ended(&self, flow: &Arc<Flow>, outcome: Outcome) {
        self.flows.remove(flow);
        if let Some(decision) = flow.decision() {
            self.metrics.moved(&flow.moved);
            self.recorder.ended(&self.node, flow, &decision, &outcome);
        }
    }
}
