//! The address plan of a cluster, and the `ip` scripts that build it.
//!
//! Pure: values in, text out. Every cluster lives in namespaces of its own, so all use the same
//! plan.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::spec::{Between, Gateway};

/// All pods of all nodes, IPv4.
pub(crate) const CLUSTER_V4: &str = "10.244.0.0/16";
/// All pods of all nodes, IPv6; node N has fd00:10:244:N::/64.
pub(crate) const CLUSTER_V6: &str = "fd00:10:244::/48";
/// The fabric's addresses: the nodes' gateway and the outside host's.
const FABRIC: (&str, &str) = ("172.18.0.1", "fd00:172:18::1");
const FABRIC_OUTSIDE: (&str, &str) = ("203.0.113.1", "2001:db8:113::1");
/// The outside host's own addresses (TEST-NET-3, RFC 5737, and RFC 3849).
pub(super) const OUTSIDE_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
pub(super) const OUTSIDE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0x10);
/// The fabric answers "unreachable" for these (TEST-NET-2, RFC 5737) ...
const UNREACHABLE: (&str, &str) = ("198.51.100.0/25", "2001:db8:51:a::/64");
/// ... and is silent for these.
const BLACKHOLE: (&str, &str) = ("198.51.100.128/25", "2001:db8:51:b::/64");
/// An address of each of these nets.
pub(super) const UNREACHABLE_HOSTS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x51, 0xa, 0, 0, 0, 7)),
];
pub(super) const BLACKHOLE_HOSTS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(198, 51, 100, 135)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x51, 0xb, 0, 0, 0, 7)),
];
/// The MAC address of every pod link's host side, as in Calico: the links do not share a segment.
const GATEWAY_MAC: &str = "ee:ee:ee:ee:ee:ee";
const GATEWAY_LINK_LOCAL: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
const GATEWAY_V6: &str = "fe80::1";

/// The bridge of a node's pods, as flannel and the CNI plugin `bridge` name it.
pub(super) const BRIDGE: &str = "cni0";
/// A node's end of the tunnel, as flannel names it.
const TUNNEL: &str = "flannel.1";
/// What is left of 1500 bytes in a tunnel over IPv4.
const TUNNEL_MTU: u16 = 1450;

/// How many nodes the plan has room for.
pub(super) const MAX_NODES: usize = 200;

/// A node's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NodePlan {
    pub(super) index: u8,
    pub(super) v4: Ipv4Addr,
    pub(super) v6: Ipv6Addr,
    pub(super) pods_v4: Ipv4Net,
    pub(super) pods_v6: Ipv6Net,
}

impl NodePlan {
    pub(super) fn new(index: u8) -> Self {
        let segment = u16::from(index);
        let host = segment + 10;
        Self {
            index,
            // At most 200 nodes: 10 + 199 is a host number.
            v4: Ipv4Addr::new(172, 18, 0, index.saturating_add(10)),
            v6: Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0, host),
            pods_v4: Ipv4Net::new_assert(Ipv4Addr::new(10, 244, index, 0), 24),
            pods_v6: Ipv6Net::new_assert(
                Ipv6Addr::new(0xfd00, 0x10, 0x244, segment, 0, 0, 0, 0),
                64,
            ),
        }
    }

    /// The pod addresses with host number `host`, 2 to 254; 1 is the gateway's.
    pub(super) fn pod(&self, host: u8) -> (Ipv4Addr, Ipv6Addr) {
        let v6 = u128::from(self.pods_v6.network()) | u128::from(host);
        (Ipv4Addr::new(10, 244, self.index, host), Ipv6Addr::from(v6))
    }

    /// What pods of this node have as their IPv4 gateway.
    fn gateway(&self, gateway: Gateway) -> Ipv4Addr {
        match gateway {
            Gateway::LinkLocal => GATEWAY_LINK_LOCAL,
            Gateway::NodeAddress | Gateway::Bridge { .. } => self.first().0,
        }
    }

    /// The first addresses of the pod CIDRs.
    fn first(&self) -> (Ipv4Addr, Ipv6Addr) {
        self.pod(1)
    }

    /// The other nodes' neighbour behind the tunnel, as flannel numbers it.
    fn tunnel_mac(&self) -> String {
        format!("0e:00:00:00:00:{:02x}", self.index)
    }
}

/// Links of the fabric: a bridge for the nodes, a routed link to the outside, and no way to
/// some addresses.
pub(super) fn fabric(nodes: &[(NodePlan, &Path)], outside: &Path) -> String {
    let mut out = String::new();
    let mut line = |text: String| out.push_str(&(text + "\n"));
    line("link set lo up".into());
    line("link add underlay type bridge mcast_snooping 0".into());
    line("link set underlay addrgenmode none".into());
    line("link set underlay up".into());
    line(format!("addr add {}/24 dev underlay", FABRIC.0));
    line(format!("addr add {}/64 dev underlay nodad", FABRIC.1));
    // A router solicits its neighbours from a link-local address.
    line(format!("addr add {GATEWAY_V6}/64 dev underlay nodad"));
    for (node, netns) in nodes {
        let port = format!("node{}", node.index);
        line(format!(
            "link add {port} type veth peer name eth0 netns {}",
            netns.display()
        ));
        line(format!(
            "link set {port} addrgenmode none master underlay up"
        ));
        line(format!("route add {} via {}", node.pods_v4, node.v4));
        line(format!("route add {} via {}", node.pods_v6, node.v6));
    }
    line(format!(
        "link add outside type veth peer name eth0 netns {}",
        outside.display()
    ));
    line("link set outside addrgenmode none up".into());
    line(format!("addr add {}/24 dev outside", FABRIC_OUTSIDE.0));
    line(format!(
        "addr add {}/64 dev outside nodad",
        FABRIC_OUTSIDE.1
    ));
    line(format!("addr add {GATEWAY_V6}/64 dev outside nodad"));
    for net in [UNREACHABLE.0, UNREACHABLE.1] {
        line(format!("route add unreachable {net}"));
    }
    for net in [BLACKHOLE.0, BLACKHOLE.1] {
        line(format!("route add blackhole {net}"));
    }
    out
}

/// The outside host's side of its link.
pub(super) fn outside() -> String {
    format!(
        "link set lo up\nlink set eth0 up\naddr add {OUTSIDE_V4}/24 dev eth0\n\
         addr add {OUTSIDE_V6}/64 dev eth0 nodad\n\
         route add default via {}\nroute add default via {}\n",
        FABRIC_OUTSIDE.0, FABRIC_OUTSIDE.1
    )
}

/// A node's side of the underlay.
pub(super) fn node(own: &NodePlan) -> String {
    format!(
        "link set lo up\nlink set eth0 up\naddr add {}/24 dev eth0\n\
         addr add {}/64 dev eth0 nodad\nroute add default via {}\nroute add default via {}\n",
        own.v4, own.v6, FABRIC.0, FABRIC.1
    )
}

/// Packets to an unused address of the node's pod CIDR must not go back to the fabric, as in Calico. A
/// bridge has a route of its own for it.
pub(super) fn own_pods(own: &NodePlan, gateway: Gateway) -> String {
    match gateway {
        Gateway::Bridge { .. } => String::new(),
        Gateway::LinkLocal | Gateway::NodeAddress => format!(
            "route add blackhole {}\nroute add blackhole {}\n",
            own.pods_v4, own.pods_v6
        ),
    }
}

/// A node's routes to the other nodes' pods.
pub(super) fn routes(others: &[&NodePlan]) -> String {
    let mut out = String::new();
    for other in others {
        let _ = writeln!(out, "route add {} via {}", other.pods_v4, other.v4);
        let _ = writeln!(out, "route add {} via {}", other.pods_v6, other.v6);
    }
    out
}

/// A node's tunnel to the other nodes, and its routes to their pods, as flannel writes them: each
/// node is a neighbour with the network address of its pod CIDR.
pub(super) fn tunnel(own: &NodePlan, others: &[&NodePlan]) -> String {
    let mut out = String::new();
    let mut line = |text: String| out.push_str(&(text + "\n"));
    line(format!(
        "link add {TUNNEL} address {} type vxlan id 1 dstport 8472 local {} dev eth0 nolearning",
        own.tunnel_mac(),
        own.v4
    ));
    line(format!("link set {TUNNEL} addrgenmode none up"));
    line(format!(
        "addr add {}/32 dev {TUNNEL}",
        own.pods_v4.network()
    ));
    line(format!(
        "addr add {}/128 dev {TUNNEL} nodad",
        own.pods_v6.network()
    ));
    for other in others {
        let mac = other.tunnel_mac();
        for (net, via) in [
            (
                IpNet::V4(other.pods_v4),
                IpAddr::V4(other.pods_v4.network()),
            ),
            (
                IpNet::V6(other.pods_v6),
                IpAddr::V6(other.pods_v6.network()),
            ),
        ] {
            line(format!(
                "neigh replace {via} lladdr {mac} dev {TUNNEL} nud permanent"
            ));
            line(format!("route add {net} via {via} dev {TUNNEL} onlink"));
        }
    }
    out
}

/// Where the other nodes' ends of the tunnel are: lines for `bridge -batch`.
pub(super) fn tunnel_ends(others: &[&NodePlan]) -> String {
    let mut out = String::new();
    for other in others {
        let mac = other.tunnel_mac();
        let _ = writeln!(out, "fdb append {mac} dev {TUNNEL} dst {}", other.v4);
    }
    out
}

/// The bridge of a node's pods. Its own address is fixed, or it would change with its
/// ports; CNI plugins do the same. A router solicits its neighbours from a link-local address.
pub(super) fn bridge(node: &NodePlan) -> String {
    let (v4, v6) = node.first();
    format!(
        "link add {BRIDGE} address 0a:58:0a:f4:{:02x}:01 type bridge\n\
         link set {BRIDGE} addrgenmode none up\naddr add {v4}/24 dev {BRIDGE}\n\
         addr add {v6}/64 dev {BRIDGE} nodad\naddr add {GATEWAY_V6}/64 dev {BRIDGE} nodad\n",
        node.index
    )
}

/// The node's side of a pod's link.
pub(super) fn pod_on_node(
    node: &NodePlan,
    gateway: Gateway,
    link: &str,
    netns: &Path,
    pod: (Ipv4Addr, Ipv6Addr),
) -> String {
    let mut out = String::new();
    let netns = netns.display();
    if let Gateway::Bridge { hairpin } = gateway {
        let hairpin = if hairpin { "on" } else { "off" };
        return format!(
            "link add {link} type veth peer name eth0 netns {netns}\n\
             link set {link} addrgenmode none master {BRIDGE} up\n\
             link set {link} type bridge_slave hairpin {hairpin}\n"
        );
    }
    let _ = writeln!(
        out,
        "link add {link} address {GATEWAY_MAC} type veth peer name eth0 netns {netns}"
    );
    let _ = writeln!(out, "link set {link} addrgenmode none up");
    let _ = writeln!(out, "addr add {GATEWAY_V6}/64 dev {link} nodad");
    let source = match gateway {
        Gateway::LinkLocal => node.v4,
        Gateway::NodeAddress | Gateway::Bridge { .. } => {
            let _ = writeln!(out, "addr add {}/32 dev {link}", node.gateway(gateway));
            node.gateway(gateway)
        }
    };
    let _ = writeln!(
        out,
        "route add {}/32 dev {link} scope link src {source}",
        pod.0
    );
    let _ = writeln!(out, "route add {}/128 dev {link}", pod.1);
    out
}

/// The pod's side of its link.
pub(super) fn pod(
    node: &NodePlan,
    gateway: Gateway,
    between: Between,
    pod: (Ipv4Addr, Ipv6Addr),
) -> String {
    let mut out = String::from("link set lo up\n");
    if between == Between::Vxlan {
        let _ = writeln!(out, "link set eth0 mtu {TUNNEL_MTU}");
    }
    let via = node.gateway(gateway);
    if let Gateway::Bridge { .. } = gateway {
        let _ = write!(
            out,
            "link set eth0 up\naddr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\n\
             route add default via {via}\nroute add default via {}\n",
            pod.0,
            pod.1,
            node.first().1
        );
        return out;
    }
    // The neighbour is fixed: proxy ARP answers after a random delay of up to 0.8 s, and the
    // parameter for it is not there in user namespaces.
    let _ = write!(
        out,
        "link set eth0 up\naddr add {}/32 dev eth0\naddr add {}/128 dev eth0 nodad\n\
         neigh replace {via} lladdr {GATEWAY_MAC} dev eth0 nud permanent\n\
         route add {via}/32 dev eth0 scope link\nroute add default via {via} dev eth0\n\
         route add default via {GATEWAY_V6} dev eth0\n",
        pod.0, pod.1
    );
    out
}

/// Masquerades packets that leave the pods' network, as CNI plugins do.
pub(super) fn masquerade() -> String {
    let mut out = String::new();
    for (family, cluster) in [("ip", CLUSTER_V4), ("ip6", CLUSTER_V6)] {
        let _ = writeln!(
            out,
            "table {family} lab-cni {{\n\tchain postrouting {{\n\
             \t\ttype nat hook postrouting priority srcnat; policy accept;\n\
             \t\t{family} saddr {cluster} {family} daddr != {cluster} masquerade\n\t}}\n}}"
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_node_and_last_pod_have_unique_addresses() {
        let last = NodePlan::new(199);
        assert_eq!(last.v4.to_string(), "172.18.0.209");
        assert_eq!(last.pods_v6.to_string(), "fd00:10:244:c7::/64");
        let (v4, v6) = last.pod(254);
        assert_eq!(
            (v4.to_string(), v6.to_string()),
            ("10.244.199.254".into(), "fd00:10:244:c7::fe".into())
        );
    }

    #[test]
    fn node_routes_only_to_pods_of_other_nodes() {
        let nodes = [NodePlan::new(0), NodePlan::new(1)];
        let script = routes(&[&nodes[1]]) + &own_pods(&nodes[0], Gateway::LinkLocal);
        assert!(
            script.contains("route add 10.244.1.0/24 via 172.18.0.11\n"),
            "{script}"
        );
        assert!(
            script.contains("route add fd00:10:244:1::/64 via fd00:172:18::b\n"),
            "{script}"
        );
        assert!(!script.contains("route add 10.244.0.0/24"), "{script}");
    }

    #[test]
    fn node_address_gateway_belongs_to_the_node() {
        let node = NodePlan::new(1);
        let addresses = node.pod(2);
        let host = pod_on_node(
            &node,
            Gateway::NodeAddress,
            "pod1",
            Path::new("/n"),
            addresses,
        );
        assert!(host.contains("addr add 10.244.1.1/32 dev pod1\n"), "{host}");
        assert!(
            pod(&node, Gateway::NodeAddress, Between::Routes, addresses)
                .contains("default via 10.244.1.1 ")
        );
    }
}
