//! Keeps the kernel's sets in step with the table: which addresses are pods of this node, and which
//! of them are released, direction by direction.
//!
//! The table is always ahead: a pod is released only after the gate would let it through, and a
//! packet that is taken in between is simply judged.
use std::collections::BTreeSet;
use std::sync::Arc;

use controller::Table;
use ipnet::IpNet;
use iptables_init::sets::{self, Sets, SetsError};

/// The sets as the kernel has them, as far as we know.
pub(crate) struct Released {
    table: Arc<Table>,
    node: Arc<str>,
    /// `--pod-cidr`; empty: the Node object's.
    pod_cidrs: Vec<IpNet>,
    loaded: Option<Sets>,
    /// The addresses of this node's pods when they were last known.
    known: Vec<IpNet>,
}

impl Released {
    /// Knows nothing of what the kernel has; the first [`Self::sync`] replaces it.
    pub(crate) fn new(table: Arc<Table>, node: Arc<str>, pod_cidrs: Vec<IpNet>) -> Self {
        Self {
            table,
            node,
            pod_cidrs,
            loaded: None,
            known: Vec::new(),
        }
    }

    /// The addresses of this node's pods, as told or from the Node object.
    pub(crate) fn pod_cidrs(&self) -> Vec<IpNet> {
        if self.pod_cidrs.is_empty() {
            self.table.node_pod_cidrs(&self.node)
        } else {
            self.pod_cidrs.clone()
        }
    }

    /// Brings the kernel's sets in step, in one transaction; blocks for as long as `nft` takes.
    ///
    /// # Errors
    /// If `nft` refuses; the kernel's sets are then as they were, and the next call replaces all.
    pub(crate) fn sync(&mut self) -> Result<(), SetsError> {
        let wanted = self.wanted();
        let script = match &self.loaded {
            None => Some(wanted.replace_script()),
            Some(loaded) => wanted.change_script(loaded),
        };
        // Until the kernel has said yes we know nothing.
        self.loaded = None;
        if let Some(script) = script {
            sets::load(&script)?;
        }
        self.loaded = Some(wanted);
        Ok(())
    }

    fn wanted(&mut self) -> Sets {
        // A Node object that is gone, or has lost its CIDRs, takes no pod out from under policy.
        let cidrs = self.pod_cidrs();
        if !cidrs.is_empty() {
            self.known = cidrs;
        }
        let local = self.table.local(&self.node);
        let addresses = |keep: &dyn Fn(&controller::LocalPod) -> bool| {
            local
                .iter()
                .filter(|pod| keep(pod))
                .map(|pod| pod.address)
                .collect::<BTreeSet<_>>()
        };
        Sets {
            pods: self.known.iter().copied().collect(),
            egress_released: addresses(&|pod| !pod.egress_isolated),
            ingress_released: addresses(&|pod| !pod.ingress_isolated),
            selves: addresses(&|_| true),
            own_node_judged: self.table.settings().own_node == policy::OwnNode::Judge,
        }
    }
}
