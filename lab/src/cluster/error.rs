//! Errors in a cluster's description, and failures while it is built.

use std::io;
use std::net::IpAddr;

use crate::netns::NetnsError;
use crate::tools::ToolError;
use crate::wait::WaitTimedOut;

/// Why a cluster could not be built or changed.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// A namespace could not be made or set up.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// `ip` or `nft` failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// A server could not be started.
    #[error("{host} could not start a server; see whether the port is in use there")]
    Serve {
        /// Who.
        host: String,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// Links or addresses did not come up.
    #[error("the links of {host} did not come up; see `ip -s link` in its namespace")]
    NotUp {
        /// Whose links.
        host: String,
        /// How long they were given.
        #[source]
        source: WaitTimedOut,
    },
    /// There is no such node.
    #[error("pod {pod} is to run on node {node}, which there is not; nodes are {known}")]
    UnknownNode {
        /// The pod.
        pod: String,
        /// The node as it was asked for.
        node: String,
        /// All nodes.
        known: String,
    },
    /// There is no such pod.
    #[error("there is no pod {pod}; pods are {known}")]
    UnknownPod {
        /// The pod, `namespace/name`.
        pod: String,
        /// All pods.
        known: String,
    },
    /// Two things have one name.
    #[error("there are two {kind}s {name}; give one of them another name")]
    Duplicate {
        /// Node, pod or Service.
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// A pod asks for an address that another pod of its node has.
    #[error("pod {pod} requests {address}, which {holder} has on the same node; choose another")]
    AddressTaken {
        /// The pod.
        pod: String,
        /// The address.
        address: IpAddr,
        /// The one that has it.
        holder: String,
    },
    /// A pod asks for an address that is no pod's.
    #[error("pod {pod} requests {address}, which is outside of the pod CIDR {cluster}")]
    AddressOutside {
        /// The pod.
        pod: String,
        /// The address.
        address: IpAddr,
        /// All pods' addresses.
        cluster: &'static str,
    },
    /// A node's pod CIDR, or the list of nodes or Services, is full.
    #[error("there is no room for more {what}; a lab has at most {most}")]
    Full {
        /// Of what there are too many.
        what: String,
        /// How many there may be.
        most: usize,
    },
    /// A cluster without a node.
    #[error("the cluster has no node; ask the builder for .nodes(1)")]
    NoNode,
}
