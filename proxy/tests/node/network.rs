//! What CNI plugins make of a pod's network, beside the veth that the other tests have.
use lab::kubernetes::Network;
use lab::{Host, Outcome};
use serde_json::json;
use testbed::runner::Test;

use crate::enforcement::policed;
use crate::pods::{namespace, ready, server};
use crate::room::{Room, room};
use testbed::SEVERAL_SYNS;

pub(crate) const TESTS: &[Test] = &testbed::tests![
    host_port_is_judged_by_client_address,
    policies_hold_on_the_cni_bridge_plugin,
];

/// Of the node, mapped by the plugin `portmap`.
const HOST_PORT: u16 = 8081;

fn host_port_is_judged_by_client_address() {
    let room = room();
    namespace(&room, "ports");
    let mut pod = server("ports", "web");
    pod["spec"]["containers"][0]["ports"] =
        json!([{ "containerPort": 8080, "hostPort": HOST_PORT }]);
    room.apply(&pod);
    ready(&room, &pod);
    let [outside, near] = [room.lab.outside(), room.lab.node(1)];
    for from in [&outside, &near] {
        assert_eq!(open(&room, from), [true, true], "{}", from.name());
    }
    let cidrs = [
        format!("{}/32", outside.ipv4()),
        format!("{}/128", outside.ipv6()),
    ];
    room.apply(&json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": { "namespace": "ports", "name": "only-outside" },
        "spec": {
            "podSelector": {},
            "policyTypes": ["Ingress"],
            "ingress": [{ "from": cidrs.map(|cidr| json!({ "ipBlock": { "cidr": cidr } })) }],
        },
    }));
    room.in_force("only-outside");
    assert_eq!(open(&room, &outside), [true, true]);
    assert_eq!(open(&room, &near), [false, false]);
}

/// Whether the node's port answers, by IPv4 and by IPv6.
fn open(room: &Room, from: &Host) -> [bool; 2] {
    let to = room.lab.node(0).addrs(HOST_PORT);
    let outcomes = from.connect_all(&to, SEVERAL_SYNS).unwrap();
    [0, 1].map(|at| match &outcomes[at] {
        Outcome::Connected { .. } => true,
        Outcome::TimedOut => false,
        other => panic!("{} to {}: {other}", from.name(), to[at]),
    })
}

/// The plugin `bridge` makes its bridge with the first pod, and kubelet's node looks into bridged packets.
fn policies_hold_on_the_cni_bridge_plugin() {
    let room = room();
    let node = room.lab.node(0);
    node.netns()
        .set_sysctls(&[
            ("bridge/bridge-nf-call-iptables", "1"),
            ("bridge/bridge-nf-call-ip6tables", "1"),
        ])
        .unwrap();
    // The network is the bridge's own then.
    node.ip("route del blackhole 10.244.0.0/24\nroute del blackhole fd00:10:244::/64\n")
        .unwrap();
    room.install("overlays/bridge");
    room.rolled_out();
    room.node.network(Network::Bridge).unwrap();
    policed(&room, "bridge");
    let ports = room.said("ip -brief link show master cni0");
    assert_eq!(ports.lines().count(), 3, "{ports}");
    room.kubectl(&["-n", "bridge", "delete", "pods", "--all"]);
    room.node.network(Network::Ptp).unwrap();
    node.ip("link del cni0\n").unwrap();
    room.install("base");
    room.rolled_out();
}
