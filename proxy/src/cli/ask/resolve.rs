//! Resolves the name of an endpoint in a query to its address.
//!
//! Knows nothing of verdicts.
use std::net::IpAddr;

use policy::{Cluster, Pod, PodKey};

/// Why a name cannot be resolved.
#[derive(Debug, thiserror::Error)]
pub(super) enum ResolveError {
    #[error(
        "{0:?} is neither namespace/pod nor an IP address; write it as default/web or 10.0.0.1"
    )]
    NotAName(String),
    #[error("there is no pod {pod}; {}", nearest_text(nearest.as_deref()))]
    NoSuchPod {
        pod: String,
        nearest: Option<String>,
    },
    #[error("the pod {0} has ended and owns no address any more; ask about a running one")]
    Finished(PodKey),
    #[error("the pod {0} has no address yet; its manifest needs status.podIPs or status.podIP")]
    NoAddress(PodKey),
    #[error(
        "the pod {pod} is on the host network of {node:?}, whose address is not known; add the Node with its status.addresses"
    )]
    NoNodeAddress { pod: PodKey, node: String },
    #[error(
        "{from} and {to} have no address family in common, so they cannot talk at all; ask about addresses of one family"
    )]
    NoCommonFamily { from: String, to: String },
}

fn nearest_text(nearest: Option<&str>) -> String {
    match nearest {
        Some(name) => format!("did you mean {name}?"),
        None => "pods are named namespace/pod, as `kubectl get pods -A` shows them".to_owned(),
    }
}

/// One endpoint of a query.
#[derive(Debug)]
pub(super) struct End {
    /// The name as given.
    pub(super) name: String,
    /// In the order of the object; never empty.
    addresses: Vec<IpAddr>,
}

impl End {
    /// Never empty.
    pub(super) fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Resolves `name`, a `namespace/pod` or an IP address.
    pub(super) fn new(cluster: &Cluster, name: &str) -> Result<Self, ResolveError> {
        if let Ok(address) = name.parse::<IpAddr>() {
            return Ok(Self {
                name: name.to_owned(),
                addresses: vec![address.to_canonical()],
            });
        }
        let (namespace, pod) = match name.split_once('/') {
            Some((namespace, pod))
                if !namespace.is_empty() && !pod.is_empty() && !pod.contains('/') =>
            {
                (namespace, pod)
            }
            _ => return Err(ResolveError::NotAName(name.to_owned())),
        };
        let key = PodKey {
            namespace: namespace.into(),
            name: pod.into(),
        };
        let pod = cluster.pod(&key).ok_or_else(|| ResolveError::NoSuchPod {
            pod: name.to_owned(),
            nearest: nearest(cluster, name),
        })?;
        Self::of(cluster, pod)
    }

    /// The endpoint of this pod; a hostNetwork pod has its node's addresses.
    pub(super) fn of(cluster: &Cluster, pod: &Pod) -> Result<Self, ResolveError> {
        if pod.finished {
            return Err(ResolveError::Finished(pod.key.clone()));
        }
        let node = || cluster.nodes().find(|node| node.name == pod.node);
        let addresses = match node().filter(|_| pod.host_network) {
            Some(node) if !node.addresses.is_empty() => node.addresses.clone(),
            _ => pod.addresses.clone(),
        };
        if addresses.is_empty() {
            let (pod, node) = (pod.key.clone(), pod.node.to_string());
            return Err(
                match cluster.pod(&pod).is_some_and(|pod| pod.host_network) {
                    true => ResolveError::NoNodeAddress { pod, node },
                    false => ResolveError::NoAddress(pod),
                },
            );
        }
        Ok(Self {
            name: pod.key.to_string(),
            addresses,
        })
    }
}

/// The addresses at which `from` and `to` talk: of the first family of `from` that `to` has too.
pub(super) fn common(from: &End, to: &End) -> Result<(IpAddr, IpAddr), ResolveError> {
    let pairs = from.addresses.iter().filter_map(|source| {
        let same = |candidate: &&IpAddr| candidate.is_ipv4() == source.is_ipv4();
        to.addresses
            .iter()
            .find(same)
            .map(|destination| (*source, *destination))
    });
    pairs
        .into_iter()
        .next()
        .ok_or_else(|| ResolveError::NoCommonFamily {
            from: from.name.clone(),
            to: to.name.clone(),
        })
}

/// The pod with the name most similar to `wanted`: in another namespace, or with a typo or two.
fn nearest(cluster: &Cluster, wanted: &str) -> Option<String> {
    const SLIPS: usize = 3;
    let same_pod = |key: &PodKey| wanted.split('/').nth(1) == Some(&*key.name);
    cluster
        .pods()
        .map(|pod| {
            let name = pod.key.to_string();
            let slips = strsim::levenshtein(&name, wanted);
            (
                if same_pod(&pod.key) {
                    slips.min(SLIPS)
                } else {
                    slips
                },
                name,
            )
        })
        .min()
        .filter(|(slips, _)| *slips <= SLIPS)
        .map(|(_, name)| name)
}
