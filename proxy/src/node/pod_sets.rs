//! Keeps the nft sets in sync with the policy table: which addresses are pods of this node, and which
//! of them are non-isolated, per direction.
//!
//! The table is always ahead: a pod enters a non-isolated set only after the gate would allow it, and a
//! packet that is queued in between is simply evaluated.
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use controller::{LocalPod, Table};
use ipnet::IpNet;
use iptables_init::ruleset::Kernel;
use kernel::sets::{self, Groups, Sets, SetsError};
use policy::Direction;
use tokio::sync::watch;

/// The addresses of this node's pods: its pod CIDRs, and each other address that one of its pods has.
#[derive(Clone)]
pub(crate) struct LocalPods {
    table: Arc<Table>,
    node: Arc<str>,
    /// `--pod-cidr`; empty: the Node object's.
    given: Vec<IpNet>,
}

impl LocalPods {
    pub(crate) fn new(table: Arc<Table>, node: Arc<str>, given: Vec<IpNet>) -> Self {
        Self { table, node, given }
    }

    /// Notifies of changes of the policy table.
    pub(crate) fn changed(&self) -> watch::Receiver<u64> {
        self.table.changed()
    }

    pub(crate) fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// The current pods of this node.
    pub(crate) fn pods(&self) -> Vec<LocalPod> {
        self.table.local(&self.node)
    }

    /// Whether the pod is terminating or gone.
    pub(crate) fn is_ending(&self, pod: &LocalPod) -> bool {
        let pod = self.table.pod(&pod.identity.key);
        pod.is_none_or(|pod| pod.terminating)
    }

    /// The node's own addresses, as the Node object has them.
    pub(crate) fn node_addresses(&self) -> Vec<IpAddr> {
        self.table.node_addresses(&self.node)
    }

    /// Whether this node's pod addresses are known: there are CIDRs, or its Node object.
    pub(crate) fn are_known(&self) -> bool {
        !self.cidrs().is_empty() || self.table.has_node(&self.node)
    }

    /// The CIDRs of the flag, or those that the Node object has now.
    pub(crate) fn cidrs(&self) -> Vec<IpNet> {
        if self.given.is_empty() {
            self.table.node_pod_cidrs(&self.node)
        } else {
            self.given.clone()
        }
    }

    /// The CIDRs, and each of the `pods`' addresses that lies in none of them.
    pub(crate) fn networks(&self, pods: &[LocalPod]) -> Vec<IpNet> {
        let mut networks = self.cidrs();
        let outside = outside(&networks, pods.iter().map(|pod| pod.address));
        networks.extend(outside.into_iter().map(IpNet::from));
        networks
    }

    /// Whether any pod of the cluster has an address outside of all pod CIDRs.
    pub(crate) fn are_elsewhere(&self) -> bool {
        let mut cidrs = self.table.cluster_cidrs().to_vec();
        cidrs.extend(self.cidrs());
        let cidrs = IpNet::aggregate(&cidrs);
        let outside = |address: IpAddr| !cidrs.iter().any(|cidr| cidr.contains(&address));
        self.table
            .with_cluster(|cluster| cluster.endpoints().any(|(address, _)| outside(address)))
    }
}

/// Those of `addresses` that lie in none of the CIDRs.
pub(crate) fn outside(
    cidrs: &[IpNet],
    addresses: impl IntoIterator<Item = IpAddr>,
) -> BTreeSet<IpAddr> {
    let within = |address: &IpAddr| cidrs.iter().any(|cidr| cidr.contains(address));
    addresses.into_iter().filter(|it| !within(it)).collect()
}

/// The nft sets of pods, with the contents that were last loaded.
pub(crate) struct PodSets {
    pods: LocalPods,
    /// Whether the kernel has a table for bridges.
    bridges: bool,
    loaded: Option<Sets>,
    /// The CIDRs of this node's pods when they were last known.
    known: BTreeSet<IpNet>,
}

impl PodSets {
    /// Loads `--pod-cidr`, if given, as the addresses of this node's pods before a
    /// state is known: pods that an earlier daemon did not list as non-isolated are isolated until then. Knows nothing
    /// else of what the kernel has; the first [`Self::sync`] replaces it.
    ///
    /// # Errors
    /// If `nft` fails; the sets are then unchanged.
    pub(crate) fn closed(pods: LocalPods, kernel: Kernel) -> Result<Self, SetsError> {
        let nothing = Sets {
            bridged: kernel.bridges.then_some(Groups::Pass),
            ..Sets::default()
        };
        let configured = Sets {
            pods: pods.given.iter().copied().collect(),
            ..nothing.clone()
        };
        if let Some(script) = configured.change_script(&nothing) {
            sets::load(&script)?;
        }
        Ok(Self {
            pods,
            bridges: kernel.bridges,
            loaded: None,
            known: BTreeSet::new(),
        })
    }

    /// Syncs the nft sets in one transaction; blocks for as long as `nft` takes, and costs next to
    /// nothing if none of `touched`, the addresses whose endpoint has changed since the last call that succeeded, is in
    /// another state than the kernel has it. Returns the addresses that have become isolated in a direction;
    /// if the kernel's sets are unknown, the addresses of all pods that are isolated in a direction.
    ///
    /// # Errors
    /// If `nft` fails; the sets are then unchanged, and the next call replaces all.
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
        let isolated = match known {
            None => isolated(&wanted),
            Some(loaded) => newly_evaluated(loaded, &wanted),
        };
        // Until the kernel has said yes we know nothing.
        self.loaded = None;
        if let Some(script) = script {
            sets::load(&script)?;
        }
        self.loaded = Some(wanted);
        Ok(isolated)
    }

    /// The nft sets have changed: the next [`Self::sync`] replaces all.
    pub(crate) fn forget(&mut self) {
        self.loaded = None;
    }

    fn is_in_step(&self, touched: &BTreeSet<IpAddr>) -> bool {
        let Some(loaded) = &self.loaded else {
            return false;
        };
        let cidrs: BTreeSet<IpNet> = self.pods.cidrs().into_iter().collect();
        let uncertain = self.pods.table.uncertain();
        let in_cidrs = |address: &IpAddr| self.known.iter().any(|cidr| cidr.contains(address));
        let same = |address: &IpAddr| {
            let endpoint = self.pods.table.endpoint(*address);
            let local = endpoint.filter(|it| it.identity.node_name == self.pods.node);
            let non_isolated = |direction| local.as_ref().is_some_and(|it| !it.isolated(direction));
            let taken = || {
                let pod = local.is_some() || uncertain.awaited.contains(address);
                loaded.pods.contains(&IpNet::from(*address)) == pod
            };
            loaded.selves.contains(address) == local.is_some()
                && loaded.egress_non_isolated.contains(address) == non_isolated(Direction::Egress)
                && loaded.ingress_non_isolated.contains(address) == non_isolated(Direction::Ingress)
                && (in_cidrs(address) || taken())
        };
        (cidrs.is_empty() || cidrs == self.known)
            && loaded.cluster == self.pods.table.cluster_cidrs()
            && touched.iter().all(same)
    }

    fn wanted(&mut self) -> Sets {
        // A Node object that is deleted, or has lost its CIDRs, makes no pod non-isolated.
        let cidrs = self.pods.cidrs();
        if !cidrs.is_empty() {
            self.known = cidrs.into_iter().collect();
        }
        let local = self.pods.pods();
        let settled = local.iter().filter(|pod| !pod.vacant);
        let addresses = |keep: &dyn Fn(&LocalPod) -> bool| {
            let kept = settled.clone().filter(|pod| keep(pod));
            kept.map(|pod| pod.address).collect::<BTreeSet<_>>()
        };
        let isolated = local
            .iter()
            .any(|pod| pod.egress_isolated || pod.ingress_isolated);
        let groups = if isolated { Groups::Stay } else { Groups::Pass };
        Sets {
            pods: self.networks(&local),
            cluster: self.pods.table.cluster_cidrs(),
            egress_non_isolated: addresses(&|pod| !pod.egress_isolated),
            ingress_non_isolated: addresses(&|pod| !pod.ingress_isolated),
            selves: addresses(&|_| true),
            own_node_judged: self.pods.table.settings().own_node == policy::OwnNode::Judge,
            bridged: self.bridges.then_some(groups),
        }
    }

    /// The networks that the rules treat as pods. This host's own addresses are left out even if a pod claims them:
    /// their packets are the node's.
    fn networks(&self, local: &[LocalPod]) -> BTreeSet<IpNet> {
        let awaited = self.pods.table.uncertain().awaited.clone();
        let known: Vec<IpNet> = self.known.iter().copied().collect();
        let claimed = local.iter().map(|pod| pod.address).chain(awaited);
        let mut outside = outside(&known, claimed);
        if !outside.is_empty() {
            for own in own_addresses() {
                outside.remove(&own);
            }
        }
        known
            .into_iter()
            .chain(outside.into_iter().map(IpNet::from))
            .collect()
    }
}

/// The addresses of this network namespace's links.
fn own_addresses() -> impl Iterator<Item = IpAddr> {
    let links = nix::ifaddrs::getifaddrs().into_iter().flatten();
    links.filter_map(|link| {
        let address = link.address?;
        let v4 = address.as_sockaddr_in().map(|it| IpAddr::from(it.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|it| it.ip().into()))
    })
}

/// Addresses whose existing flows have to be evaluated: those that became isolated, and those that the rules did
/// not treat as pods until now, whether their pods are known or not.
fn newly_evaluated(before: &Sets, now: &Sets) -> BTreeSet<IpAddr> {
    let mut evaluated = newly_isolated(before, now);
    if before.pods != now.pods {
        let single = |net: &&IpNet| net.prefix_len() == net.max_prefix_len();
        let added = now.pods.difference(&before.pods).filter(single);
        let added = added.map(IpNet::addr).chain(now.selves.iter().copied());
        let was = |pod: &IpAddr| before.pods.iter().any(|net| net.contains(pod));
        evaluated.extend(added.filter(|pod| !was(pod) && !is_non_isolated(now, pod)));
    }
    evaluated
}

fn newly_isolated(before: &Sets, now: &Sets) -> BTreeSet<IpAddr> {
    let egress = before
        .egress_non_isolated
        .difference(&now.egress_non_isolated);
    let ingress = before
        .ingress_non_isolated
        .difference(&now.ingress_non_isolated);
    egress.chain(ingress).copied().collect()
}

fn isolated(now: &Sets) -> BTreeSet<IpAddr> {
    let pods = now.selves.iter().copied();
    pods.filter(|pod| !is_non_isolated(now, pod)).collect()
}

/// In both directions.
fn is_non_isolated(now: &Sets, pod: &IpAddr) -> bool {
    now.egress_non_isolated.contains(pod) && now.ingress_non_isolated.contains(pod)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sets(pods: &[&str], known: &[&str], non_isolated: &[&str]) -> Sets {
        let addresses = |list: &[&str]| list.iter().map(|it| it.parse().unwrap()).collect();
        Sets {
            pods: pods.iter().map(|it| it.parse().unwrap()).collect(),
            selves: addresses(known),
            egress_non_isolated: addresses(non_isolated),
            ingress_non_isolated: addresses(non_isolated),
            ..Sets::default()
        }
    }

    #[test]
    fn flows_of_newly_isolated_addresses_are_evaluated() {
        const CIDR: &str = "10.0.0.0/24";
        let before = sets(&[CIDR], &["10.0.0.2", "10.0.0.3"], &["10.0.0.2"]);
        for (now, expected, why) in [
            (before.clone(), &[][..], "nothing changes"),
            (
                sets(&[CIDR], &["10.0.0.2"], &[]),
                &["10.0.0.2"],
                "isolated now",
            ),
            (
                sets(
                    &[CIDR, "192.168.77.5/32"],
                    &["10.0.0.2", "10.0.0.3", "192.168.77.5"],
                    &["10.0.0.2"],
                ),
                &["192.168.77.5"],
                "an isolated pod outside of the CIDRs",
            ),
            (
                sets(
                    &[CIDR, "192.168.77.5/32"],
                    &["10.0.0.2", "10.0.0.3"],
                    &["10.0.0.2"],
                ),
                &["192.168.77.5"],
                "an unknown pod outside of the CIDRs",
            ),
            (
                sets(
                    &[CIDR, "192.168.77.5/32"],
                    &["10.0.0.2", "192.168.77.5"],
                    &["10.0.0.2", "192.168.77.5"],
                ),
                &[],
                "one that is free",
            ),
            (
                sets(
                    &[CIDR, "10.0.1.0/24"],
                    &["10.0.0.2", "10.0.1.2"],
                    &["10.0.0.2"],
                ),
                &["10.0.1.2"],
                "another CIDR",
            ),
        ] {
            let expected = expected.iter().map(|it| it.parse().unwrap()).collect();
            assert_eq!(newly_evaluated(&before, &now), expected, "{why}");
        }
    }
}
