//! Enters kernel flows into the list, and records them when they leave it.
use std::sync::Arc;
use std::time::SystemTime;

use controller::{Decision, Unknown};
use kernel::conntrack::FlowId;

use super::Enforcer;
use crate::kernel_flows::{KernelFlow, Listed};

impl Enforcer {
    /// Decides a kernel flow by the newest table.
    ///
    /// # Errors
    /// If an end is unknown.
    pub(crate) fn decide(&self, flow: &FlowId) -> Result<Decision, Unknown> {
        let (client, server) = (flow.client.ip(), flow.server.ip());
        self.table
            .decide(client, server, flow.port(), flow.protocol)
    }

    /// Evaluates a flow and lists it if it is allowed, so that a later change finds it. Returns the result of listing
    /// and the decision.
    ///
    /// # Errors
    /// If an endpoint is unknown.
    pub(crate) fn enter_kernel_flow(
        &self,
        flow: FlowId,
        opened: SystemTime,
    ) -> Result<(Arc<Decision>, Option<Listed>), Unknown> {
        loop {
            let generation = self.table.generation();
            let decision = Arc::new(self.decide(&flow)?);
            if !decision.verdict.allowed() {
                return Ok((decision, None));
            }
            let listed = self.kernel_flows.enter(flow, opened, &decision);
            if self.table.generation() == generation {
                return Ok((decision, Some(listed)));
            }
            // A concurrent change may have searched the list before the flow was in it.
            if listed == Listed::New {
                self.kernel_flows.remove(&flow);
            }
        }
    }

    /// Counts and records a kernel flow that has ended and left the list.
    pub(crate) fn kernel_flow_ended(&self, flow: &KernelFlow) {
        let subject = flow.subject();
        self.metrics
            .kernel_flow_bytes(subject.sent, subject.received);
        match flow.severance() {
            Some(severance) => self.severed(subject, severance),
            None => self
                .recorder
                .ended(subject, &flow.decision(), flow.outcome()),
        }
    }
}
