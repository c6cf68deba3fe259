//! Keeps the kernel's sets in step with the table: which addresses are pods of this node, and which
//! of them are released, direction by direction.
//!
//! The table is always ahead: a pod is released only after the gate would let it through, and a
//! packet that is taken in between is simply judged.
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use controller::Table;
use ipnet::IpNet;
use iptables_init::ruleset::Kernel;
use iptables_init::sets::{self, Groups, Sets, SetsError};
use policy::Direction;
use tokio::sync::watch;

/// Which addresses are pods of this node.
#[derive(Clone)]
pub(crate) struct PodCidrs {
    table: Arc<Table>,
    node: Arc<str>,
    /// `--pod-cidr`; empty: the Node object's.
    told: Vec<IpNet>,
}

impl PodCidrs {
    pub(crate) fn new(table: Arc<Table>, node: Arc<str>, told: Vec<IpNet>) -> Self {
        Self { table, node, told }
    }

    /// Follows the table that says so.
    pub(crate) fn changed(&self) -> watch::Receiver<u64> {
        self.table.changed()
    }

    /// The addresses that pods of this node have by now.
    pub(crate) fn taken(&self) -> BTreeSet<IpAddr> {
        let local = self.table.local(&self.node).into_iter();
        local.map(|pod| pod.address).collect()
    }

    /// As told, or as the Node object has them by now.
    pub(crate) fn now(&self) -> Vec<IpNet> {
        if self.told.is_empty() {
            self.table.node_pod_cidrs(&self.node)
        } else {
            self.told.clone()
        }
    }
}

/// The sets as the kernel has them, as far as we know.
pub(crate) struct Released {
    pods: PodCidrs,
    /// Whether the kernel has a table for bridges.
    bridges: bool,
    loaded: Option<Sets>,
    /// The addresses of this node's pods when they were last known.
    known: Vec<IpNet>,
}

impl Released {
    /// Has the kernel take the addresses of `--pod-cidr`, if there are any, for this node's pods before a
    /// state is known: who was not released by an earlier daemon is closed until one is. Knows nothing
    /// else of what the kernel has; the first [`Self::sync`] replaces it.
    ///
    /// # Errors
    /// If `nft` refuses; the kernel's sets are then as they were.
    pub(crate) fn closed(pods: PodCidrs, kernel: Kernel) -> Result<Self, SetsError> {
        let nothing = Sets {
            bridged: kernel.bridges.then_some(Groups::Pass),
            ..Sets::default()
        };
        let told = Sets {
            pods: pods.told.iter().copied().collect(),
            ..nothing.clone()
        };
        if let Some(script) = told.change_script(&nothing) {
            sets::load(&script)?;
        }
        Ok(Self {
            pods,
            bridges: kernel.bridges,
            loaded: None,
            known: Vec::new(),
        })
    }

    /// Brings the kernel's sets in step, in one transaction; blocks for as long as `nft` takes, and
    /// costs next to nothing if none of `touched`, the addresses whose endpoint has changed since the
    /// last call that succeeded, is in another state than the kernel has it. Returns the addresses that were released in a direction and are no longer; if what the kernel
    /// had is not known or was for other pod CIDRs, all pods' that are not released in both.
    ///
    /// # Errors
    /// If `nft` refuses; the kernel's sets are then as they were, and the next call replaces all.
    pub(crate) fn sync(
        &mut self,
        touched: &BTreeSet<IpAddr>,
    ) -> Result<BTreeSet<IpAddr>, SetsError> {
        if self.is_in_step(touched) {
            return Ok(BTreeSet::new());
        }
        let wanted = self.wanted();
        let known = self.loaded.as_ref();
        let script = match known {
            None => Some(wanted.replace_script()),
            Some(loaded) => wanted.change_script(loaded),
        };
        let isolated = match known.filter(|loaded| loaded.pods == wanted.pods) {
            None => unreleased(&wanted),
            Some(loaded) => no_longer_released(loaded, &wanted),
        };
        // Until the kernel has said yes we know nothing.
        self.loaded = None;
        if let Some(script) = script {
            sets::load(&script)?;
        }
        self.loaded = Some(wanted);
        Ok(isolated)
    }

    /// The kernel's sets are others by now: the next [`Self::sync`] replaces all.
    pub(crate) fn forget(&mut self) {
        self.loaded = None;
    }

    fn is_in_step(&self, touched: &BTreeSet<IpAddr>) -> bool {
        let Some(loaded) = &self.loaded else {
            return false;
        };
        let cidrs: BTreeSet<IpNet> = self.pods.now().into_iter().collect();
        let same = |address: &IpAddr| {
            let endpoint = self.pods.table.endpoint(*address);
            let local = endpoint.filter(|it| it.identity.node_name == self.pods.node);
            let released = |direction| local.as_ref().is_some_and(|it| !it.isolated(direction));
            loaded.selves.contains(address) == local.is_some()
                && loaded.egress_released.contains(address) == released(Direction::Egress)
                && loaded.ingress_released.contains(address) == released(Direction::Ingress)
        };
        (cidrs.is_empty() || cidrs == loaded.pods)
            && loaded.cluster == self.pods.table.cluster_cidrs()
            && touched.iter().all(same)
    }

    fn wanted(&mut self) -> Sets {
        // A Node object that is gone, or has lost its CIDRs, takes no pod out from under policy.
        let cidrs = self.pods.now();
        if !cidrs.is_empty() {
            self.known = cidrs;
        }
        let local = self.pods.table.local(&self.pods.node);
        let addresses = |keep: &dyn Fn(&controller::LocalPod) -> bool| {
            local
                .iter()
                .filter(|pod| keep(pod))
                .map(|pod| pod.address)
                .collect::<BTreeSet<_>>()
        };
        let isolated = local
            .iter()
            .any(|pod| pod.egress_isolated || pod.ingress_isolated);
        let groups = if isolated { Groups::Stay } else { Groups::Pass };
        Sets {
            pods: self.known.iter().copied().collect(),
            cluster: self.pods.table.cluster_cidrs(),
            egress_released: addresses(&|pod| !pod.egress_isolated),
            ingress_released: addresses(&|pod| !pod.ingress_isolated),
            selves: addresses(&|_| true),
            own_node_judged: self.pods.table.settings().own_node == policy::OwnNode::Judge,
            bridged: self.bridges.then_some(groups),
        }
    }
}

fn no_longer_released(before: &Sets, now: &Sets) -> BTreeSet<IpAddr> {
    let egress = before.egress_released.difference(&now.egress_released);
    let ingress = before.ingress_released.difference(&now.ingress_released);
    egress.chain(ingress).copied().collect()
}

fn unreleased(now: &Sets) -> BTreeSet<IpAddr> {
    let released =
        |pod: &IpAddr| now.egress_released.contains(pod) && now.ingress_released.contains(pod);
    let pods = now.selves.iter().copied();
    pods.filter(|pod| !released(pod)).collect()
}
