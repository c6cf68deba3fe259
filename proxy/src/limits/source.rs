//! The source whose share a packet counts against.
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use controller::Holder;
use policy::Endpoint;

/// A user of common resources. A pod is one source, however many addresses it has.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    /// A pod of any node, by uid, or by namespace and name where manifests have no uid.
    Pod(Arc<str>),
    /// A node's address, or an unknown one in the cluster's CIDRs.
    Address(IpAddr),
    /// Outside of the cluster: an IPv4 address, or the first address of an IPv6 /64, since one host commonly has a
    /// whole /64 (RFC 6177).
    Outside(IpAddr),
}

/// A source with the namespace that it belongs to, if it is a pod.
#[derive(Clone, Debug)]
pub(crate) struct Party {
    pub(crate) source: Source,
    pub(crate) namespace: Option<Arc<str>>,
}

impl Party {
    /// The user behind `address`, of which the table says `holder`.
    pub(crate) fn new(address: IpAddr, holder: &Holder) -> Self {
        Self {
            source: Source::new(address, holder),
            namespace: match holder {
                Holder::Pod(pod) => Some(Arc::clone(&pod.identity.key.namespace)),
                _ => None,
            },
        }
    }
}

impl Source {
    /// The user behind `address`, of which the table says `holder`.
    pub(crate) fn new(address: IpAddr, holder: &Holder) -> Self {
        match holder {
            Holder::Pod(endpoint) => Self::of(endpoint),
            Holder::Node | Holder::Unknown => Self::Address(address),
            Holder::Outside => Self::behind(None, address),
        }
    }

    /// The user behind `address` by a decision, which names the pod there, if any.
    pub(crate) fn behind(pod: Option<&Endpoint>, address: IpAddr) -> Self {
        match (pod, address) {
            (Some(pod), _) => Self::of(pod),
            (None, IpAddr::V4(_)) => Self::Outside(address),
            (None, IpAddr::V6(v6)) => Self::Outside(network(v6).into()),
        }
    }

    /// The source of this pod.
    pub(crate) fn of(pod: &Endpoint) -> Self {
        let identity = &pod.identity;
        Self::Pod(match &*identity.uid {
            "" => identity.key.to_string().into(),
            _ => Arc::clone(&identity.uid),
        })
    }
}

/// The /64 of an address.
fn network(address: Ipv6Addr) -> Ipv6Addr {
    Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64))
}

#[cfg(test)]
mod tests {
    use policy::{Identity, PodKey};

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn pod(uid: &str) -> Holder {
        Holder::Pod(Arc::new(Endpoint::bare(Identity {
            key: PodKey {
                namespace: "x".into(),
                name: "a".into(),
            },
            uid: uid.into(),
            node_name: "".into(),
            node: None,
        })))
    }

    #[test]
    fn one_source_is_one_pod_or_one_prefix() {
        let source = |address, holder: &Holder| Source::new(ip(address), holder);
        for (one, other, same, why) in [
            (
                source("10.0.0.1", &pod("u1")),
                source("fd00::1", &pod("u1")),
                true,
                "both addresses of a pod",
            ),
            (
                source("10.0.0.1", &pod("u1")),
                source("10.0.0.1", &pod("u2")),
                false,
                "its successor at the address",
            ),
            (
                source("192.0.2.1", &Holder::Outside),
                source("192.0.2.2", &Holder::Outside),
                false,
                "two IPv4 addresses outside",
            ),
            (
                source("2001:db8::1", &Holder::Outside),
                source("2001:db8::ffff:0:0:2", &Holder::Outside),
                true,
                "a /64 outside",
            ),
            (
                source("2001:db8::1", &Holder::Outside),
                source("2001:db8:0:1::1", &Holder::Outside),
                false,
                "two of them",
            ),
            (
                source("fd00::1", &Holder::Unknown),
                source("fd00::2", &Holder::Unknown),
                false,
                "two new pods of a node",
            ),
            (
                source("fd00::1", &Holder::Node),
                source("fd00::2", &Holder::Node),
                false,
                "two nodes of a subnet",
            ),
        ] {
            assert_eq!(one == other, same, "{why}: {one:?}, {other:?}");
        }
    }
}
