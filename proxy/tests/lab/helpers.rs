//! Flows that a conntrack helper expects: they inherit the mark of the flow that announced them.
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use lab::Host;
use serde_json::json;
use testbed::runner::Test;

use testbed::{TestCluster, policy, small};

pub(crate) const TESTS: &[Test] = &testbed::tests![a_flow_that_a_helper_expects_is_judged];

const SOON: Duration = Duration::from_millis(300);
const TFTP: u16 = 69;

/// A read request (RFC 1350, 5): the server answers from another port.
const REQUEST: &[u8] = b"\x00\x01file\x00octet\x00";

fn a_flow_that_a_helper_expects_is_judged() {
    let mut bed = TestCluster::bare(small());
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"));
    let request = json!({ "ports": [{ "port": TFTP, "protocol": "UDP" }] });
    let spec = json!({ "podSelector": { "matchLabels": { "pod": "a" } }, "policyTypes": ["Egress", "Ingress"], "egress": [request] });
    bed.write_policies(&[policy("tftp", &spec)]);
    bed.enforce(&[]);
    bed.lab
        .node(0)
        .nft(
            "table inet helpers {\nct helper tftp { type \"tftp\" protocol udp; }\n\
             chain in { type filter hook prerouting priority -150; udp dport 69 ct helper set \"tftp\"; }\n}\n",
        )
        .unwrap();
    for (client, server) in a.addrs(4000).into_iter().zip(b.addrs(TFTP)) {
        let [asks, hears, transfers] = [
            bind(&a, client),
            bind(&b, server),
            bind(&b, SocketAddr::new(server.ip(), 5000)),
        ];
        asks.send_to(REQUEST, server).unwrap();
        hears.recv(&mut [0; 64]).expect("the request is allowed");
        transfers.send_to(b"data", client).unwrap();
        let heard = asks.recv(&mut [0; 64]);
        assert!(heard.is_err(), "no policy allows {server} to open this");
    }
}

fn bind(host: &Host, at: SocketAddr) -> UdpSocket {
    let socket = host.run(|| UdpSocket::bind(at)).unwrap().unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket
}
