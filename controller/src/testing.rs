//! Objects for this crate's tests.
use std::net::IpAddr;

use policy::{Labels, Pod, PodKey};

/// An address as text.
pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A running pod of namespace x on node n1, without labels and ports.
pub(crate) fn pod(name: &str, address: &str) -> Pod {
    Pod {
        key: PodKey {
            namespace: "x".into(),
            name: name.into(),
        },
        uid: "".into(),
        labels: Labels::new(),
        node: "n1".into(),
        host_network: false,
        ports: Vec::new(),
        addresses: vec![ip(address)],
        finished: false,
        terminating: false,
        started: "".into(),
        oversized: false,
    }
}
