//! A pod and the node that it runs on, a node and the pods of others, pods on the host's network,
//! and a pod with itself.
use std::io::{Read, Write};
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket,
};
use std::time::{Duration, Instant};

use lab::traffic::{UdpOutcome, craft, introduce};
use lab::{Cluster, Gateway, Host, Kind, PodSpec, Protocol, ServiceSpec, wait_until};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::if_nametoindex;
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use testbed::runner::Test;

use crate::bridges::BRIDGE;
use testbed::{
    DEADLINE, SOON, TestCluster, ask, connected, counter, deny_egress, deny_ingress, echoes,
    greeted, metric, policy, small,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    pod_reaches_only_its_own_node_despite_policy,
    untracked_node_local_dns_cache_answers_pods,
    judged_own_node_needs_an_egress_rule,
    judged_own_node_streams_are_severed_by_policy,
    judged_node_cannot_keep_denied_stream_open,
    judged_link_local_senders_cannot_reach_the_node,
    node_reaches_only_its_own_isolated_pods,
    host_network_pods_are_judged_as_the_node,
    pod_reaches_itself_despite_policy,
];

/// Conntrack forgets a severed connection after two seconds; both ends retransmit lost data after three and six.
const PAST_FORGETTING: Duration = Duration::from_secs(8);
const ASK: Duration = Duration::from_millis(400);

/// A cluster whose nodes and pods answer TCP 80 and 81 and UDP 53.
fn bed(flags: &[&str], policies: &[Value]) -> TestCluster {
    let mut bed = TestCluster::bare(small().gateway(Gateway::NodeAddress));
    for node in bed.lab.nodes() {
        node.serve(&[80, 81]).unwrap();
        node.serve_udp(&[53]).unwrap();
    }
    for pod in bed.lab.pods() {
        pod.serve_udp(&[53]).unwrap();
    }
    bed.write_policies(policies);
    bed.enforce(flags);
    bed
}

#[track_caller]
fn reaches(from: &Host, to: SocketAddr) -> bool {
    match from.connect(to, SOON).unwrap().kind() {
        Kind::Connected => true,
        Kind::TimedOut => false,
        other => panic!("{} to {to}: {other}", from.name()),
    }
}

#[track_caller]
fn is_answered(from: &Host, to: SocketAddr) -> bool {
    match from.ask_udp(to, b"who?", ASK).unwrap() {
        UdpOutcome::Answered { .. } => true,
        UdpOutcome::TimedOut => false,
        other => panic!("{} to {to}: {other}", from.name()),
    }
}

/// The first addresses of a node's pod CIDRs; the IPv4 one is the node's in this cluster.
fn gateway() -> SocketAddr {
    "10.244.0.1:80".parse().unwrap()
}

fn pod_reaches_only_its_own_node_despite_policy() {
    let bed = bed(&[], &[deny_egress("a"), deny_ingress("a")]);
    let (a, own, other) = (bed.lab.pod("x/a"), bed.lab.node(0), bed.lab.node(1));
    // As NodePorts have it: one leads to the node itself, one to a pod.
    own.nft(&format!(
        "table ip ports {{\nchain in {{\ntype nat hook prerouting priority dstnat;\n\
         ip daddr {node} tcp dport 30080 dnat to {node}:80\n\
         ip daddr {node} tcp dport 30081 dnat to {pod}:80\n}}\n}}\n",
        node = own.ipv4(),
        pod = bed.lab.pod("x/b").ipv4()
    ))
    .unwrap();
    for to in own.addrs(80).into_iter().chain([gateway()]) {
        assert_eq!(greeted(&a, to).server, own.name());
    }
    for to in own.addrs(53) {
        assert!(is_answered(&a, to), "{to}");
    }
    assert_eq!(greeted(&a, own.addr_v4(30_080)).server, own.name());
    assert!(!reaches(&a, own.addr_v4(30_081)), "behind it is a pod");
    for to in other.addrs(80) {
        assert!(!reaches(&a, to), "{to} is another node's");
    }
    for to in other.addrs(53) {
        assert!(!is_answered(&a, to), "{to} is another node's");
    }
    assert_eq!(ask(&own, "/connections").unwrap().json(), json!([]));
}

/// As NodeLocal DNSCache has it: a link-local address of the node, whose packets conntrack passes over.
fn untracked_node_local_dns_cache_answers_pods() {
    let bed = bed(&[], &[deny_egress("a"), deny_ingress("a")]);
    let (a, own) = (bed.lab.pod("x/a"), bed.lab.node(0));
    let cache = SocketAddr::from(([169, 254, 20, 10], 53));
    own.ip("addr add 169.254.20.10/32 dev lo").unwrap();
    own.nft(
        "table ip cache {\n\
         chain in {\ntype filter hook prerouting priority raw;\nip daddr 169.254.20.10 notrack\n}\n\
         chain out {\ntype filter hook output priority raw;\nip saddr 169.254.20.10 notrack\n}\n}\n",
    )
    .unwrap();
    own.serve(&[53]).unwrap();
    let _udp = introduce(own.netns(), own.name(), Protocol::Udp, &[cache.ip()], &[53]).unwrap();
    for _ in 0..20 {
        assert!(is_answered(&a, cache));
        echoes(&connected(&a, cache), "the same by TCP");
    }
    assert_eq!(counter(&own, "out_of_state"), 0);
}

/// Lets one pod go to TCP 80 and UDP 53 of these addresses.
fn to_blocks(pod: &str, blocks: &[IpAddr]) -> Value {
    let whole = |ip: &IpAddr| format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 });
    let to: Vec<_> = blocks
        .iter()
        .map(|ip| json!({ "ipBlock": { "cidr": whole(ip) } }))
        .collect();
    let ports = json!([{ "port": 80 }, { "port": 53, "protocol": "UDP" }]);
    let spec = json!({ "podSelector": { "matchLabels": { "pod": pod } }, "policyTypes": ["Egress"], "egress": [{ "to": to, "ports": ports }] });
    policy(&format!("to-blocks-{pod}"), &spec)
}

fn judged_own_node_needs_an_egress_rule() {
    let bed = bed(&["--own-node", "judge"], &[deny_egress("a")]);
    let (a, d, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/d"), bed.lab.node(0));
    let ways: Vec<_> = node.addrs(80).into_iter().chain([gateway()]).collect();
    for &to in &ways {
        assert!(!reaches(&a, to), "{to}: no rule");
        assert_eq!(greeted(&d, to).server, node.name(), "d is under no policy");
    }
    for to in node.addrs(53) {
        assert!(!is_answered(&a, to), "{to}: no rule");
    }
    let blocks: Vec<_> = ways.iter().map(SocketAddr::ip).collect();
    bed.apply(&[to_blocks("a", &blocks)]);
    for &to in &ways {
        assert_eq!(greeted(&a, to).server, node.name());
        assert!(
            !reaches(&a, (to.ip(), 81).into()),
            "another port than the rule's"
        );
    }
    for to in node.addrs(53) {
        assert!(is_answered(&a, to), "{to}");
    }
    // The node's own probes go on, and neither way is ever relayed.
    for to in a.addrs(80) {
        assert_eq!(greeted(&node, to).server, "x/a");
    }
    let allowed =
        r#"portreeve_policy_verdicts_total{verdict="allow",direction="egress",path="kernel"}"#;
    assert!(metric(&node, allowed) > 0);
    assert_eq!(
        metric(&node, r#"portreeve_policy_verdicts_total{path="spliced"}"#),
        0
    );
}

fn judged_own_node_streams_are_severed_by_policy() {
    let bed = bed(&["--own-node", "judge"], &[]);
    let (a, node) = (bed.lab.pod("x/a"), bed.lab.node(0));
    let ways: Vec<_> = node.addrs(80).into_iter().chain([gateway()]).collect();
    let blocks: Vec<_> = ways.iter().map(SocketAddr::ip).collect();
    let from_before = connected(&a, ways[0]);
    bed.apply(&[to_blocks("a", &blocks)]);
    echoes(&from_before, "still allowed");
    let live: Vec<_> = ways.iter().map(|to| connected(&a, *to)).collect();
    bed.apply(&[deny_egress("a")]);
    for mut stream in live.into_iter().chain([from_before]) {
        stream.set_read_timeout(Some(SOON)).unwrap();
        // What has been acknowledged is no proof: an answer would be.
        let _ = stream.write_all(b"anyone?");
        let heard = stream.read(&mut [0; 16]);
        assert!(heard.is_err(), "{:?}: {heard:?}", stream.peer_addr());
    }
    assert!(counter(&node, "out_of_state") > 0, "without a beginning");
}

/// Once conntrack has forgotten the stream, the node's retransmits would create a new entry, as a node may.
fn judged_node_cannot_keep_denied_stream_open() {
    let bed = bed(&["--own-node", "judge"], &[]);
    let (a, node) = (bed.lab.pod("x/a"), bed.lab.node(0));
    let servers = node.addrs(82).map(|at| {
        let listener = node.run(|| TcpListener::bind(at)).unwrap().unwrap();
        let client = a.run(|| TcpStream::connect(at)).unwrap().unwrap();
        (client, listener.accept().unwrap().0)
    });
    bed.apply(&[deny_egress("a")]);
    for (client, server) in &servers {
        // Either end may have been reset by what the other sent.
        let _ = (&mut &*server).write_all(b"and on");
        let _ = (&mut &*client).write_all(b"anyone?");
    }
    let until = Instant::now() + PAST_FORGETTING;
    for (_, server) in &servers {
        let left = until.saturating_duration_since(Instant::now()).max(SOON);
        server.set_read_timeout(Some(left)).unwrap();
        let heard = (&mut &*server).read(&mut [0; 16]);
        assert!(heard.is_err(), "{:?}: {heard:?}", server.local_addr());
    }
    assert!(counter(&node, "out_of_state") > 0, "without a beginning");
}

/// By TCP and UDP between link-local addresses, and between one of them and a global one; and broadcasts from 0.0.0.0.
fn judged_link_local_senders_cannot_reach_the_node() {
    for gateway in [BRIDGE, Gateway::NodeAddress, Gateway::LinkLocal] {
        let mut bed = TestCluster::bare(small().gateway(gateway));
        bed.write_policies(&[deny_egress("a"), deny_ingress("a")]);
        bed.enforce(&[]);
        let (a, node) = (bed.lab.pod("x/a"), bed.lab.node(0));
        let link = match gateway {
            BRIDGE => "cni0".to_owned(),
            _ => bed.lab.link_of("x/a").unwrap(),
        };
        // Each knows its neighbour from here on.
        greeted(&node, a.addr_v4(80));
        let everywhere = (Ipv6Addr::UNSPECIFIED, 85).into();
        let _server = node.listen(everywhere).unwrap();
        let datagrams = node.run(|| UdpSocket::bind(everywhere)).unwrap().unwrap();
        datagrams.set_read_timeout(Some(DEADLINE)).unwrap();
        let heard = || {
            let mut text = [0; 8];
            let length = datagrams.recv(&mut text).unwrap();
            text[..length].to_vec()
        };
        let (near, far) = (link_local(&a, "eth0"), link_local(&node, &link));
        let ways = [
            (near, far),
            (near, node.ipv6()),
            (a.ipv6(), far),
            (near, ALL_NODES),
        ];
        for (from, to) in &ways[..3] {
            assert!(
                dials(&a, *from, *to),
                "allowed: {from} to {to}, {gateway:?}"
            );
        }
        for (from, to) in ways {
            tells(&a, from, to, b"allowed");
            assert_eq!(heard(), b"allowed", "{from} to {to}, {gateway:?}");
        }
        bed.kill(0);
        bed.start(0, &["--own-node", "judge"]);
        for (from, to) in &ways[..3] {
            assert!(!dials(&a, *from, *to), "{from} to {to}, {gateway:?}");
        }
        for (from, to) in ways {
            tells(&a, from, to, b"judged");
        }
        let everybody = a.injector().unwrap().towards([0xff; 6]);
        let ends = (
            (Ipv4Addr::UNSPECIFIED, 85).into(),
            (Ipv4Addr::BROADCAST, 85).into(),
        );
        let broadcast = craft::udp(ends.0, ends.1, b"judged");
        everybody.send(&broadcast).unwrap();
        let dropped = || counter(&node, "link_local");
        // Of each family; the broadcast, too.
        wait_until(DEADLINE, "all to be looked at", || dropped() >= 5).unwrap();
        tells(&node, Ipv6Addr::LOCALHOST, Ipv6Addr::LOCALHOST, b"itself");
        assert_eq!(heard(), b"itself", "{gateway:?}");
        // The node asks its pods by any address, and neighbour discovery goes on.
        let _pod = a.listen((Ipv6Addr::UNSPECIFIED, 85).into()).unwrap();
        a.ip("neigh flush all\n").unwrap();
        node.ip("neigh flush all\n").unwrap();
        assert!(dials_by(&node, &link, far, near), "{gateway:?}");
        assert_eq!(greeted(&node, a.addr_v6(80)).server, "x/a");
    }
}

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// A link's own IPv6 address.
fn link_local(host: &Host, link: &str) -> Ipv6Addr {
    let found = host.run(|| {
        let addresses = getifaddrs().unwrap().filter(|it| it.interface_name == link);
        let v6 = addresses.filter_map(|it| Some(it.address?.as_sockaddr_in6()?.ip()));
        v6.into_iter().find(Ipv6Addr::is_unicast_link_local)
    });
    found.unwrap().unwrap()
}

fn dials(from: &Host, source: Ipv6Addr, to: Ipv6Addr) -> bool {
    dials_by(from, "eth0", source, to)
}

/// Whether a TCP connection from one address to port 85 of the other succeeds, both on a link.
fn dials_by(from: &Host, link: &str, source: Ipv6Addr, to: Ipv6Addr) -> bool {
    from.run(|| {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
        let index = if_nametoindex(link).unwrap();
        socket
            .bind(&SocketAddrV6::new(source, 0, 0, index).into())
            .unwrap();
        let to = SocketAddrV6::new(to, 85, 0, index);
        socket.connect_timeout(&to.into(), ASK).is_ok()
    })
    .unwrap()
}

/// Sends a datagram from one address to port 85 of the other.
fn tells(from: &Host, source: Ipv6Addr, to: Ipv6Addr, text: &[u8]) {
    from.run(|| {
        let link = if to.is_loopback() { "lo" } else { "eth0" };
        let index = if_nametoindex(link).unwrap();
        let socket = UdpSocket::bind(SocketAddrV6::new(source, 0, 0, index)).unwrap();
        socket
            .send_to(text, SocketAddrV6::new(to, 85, 0, index))
            .unwrap();
    })
    .unwrap();
}

fn node_reaches_only_its_own_isolated_pods() {
    let bed = bed(&[], &[deny_ingress("b"), deny_egress("b")]);
    let (own, other, b) = (bed.lab.node(0), bed.lab.node(1), bed.lab.pod("x/b"));
    for to in b.addrs(80) {
        let probe = connected(&own, to);
        echoes(&probe, "GET /healthz HTTP/1.1\r\nHost: probe\r\n\r\n");
        assert!(!reaches(&other, to), "{to} from another node");
    }
    for to in b.addrs(53) {
        assert!(is_answered(&own, to), "{to}");
        assert!(!is_answered(&other, to), "{to} from another node");
    }
}

fn host_network_pods_are_judged_as_the_node() {
    let on_host = PodSpec::new("x", "h")
        .node(1)
        .label("pod", "h")
        .host_network();
    let mut bed = TestCluster::of(small().pod(on_host).build().unwrap());
    let (a, b, h) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.pod("x/h"));
    for pod in [&b, &h] {
        pod.serve(&[80]).unwrap();
    }
    let from = |peer: Value| {
        let spec = json!({ "podSelector": { "matchLabels": { "pod": "b" } }, "policyTypes": ["Ingress"], "ingress": [{ "from": [peer] }] });
        policy("to-b", &spec)
    };
    bed.write_policies(&[
        deny_ingress("h"),
        from(json!({ "podSelector": { "matchLabels": { "pod": "h" } } })),
    ]);
    bed.enforce(&[]);
    for to in h.addrs(80) {
        assert!(reaches(&a, to), "no policy selects what is a node's: {to}");
    }
    let said = ask(&bed.lab.node(0), "/readyz").unwrap();
    assert!(
        said.body.contains("selects x/h") && said.body.contains("hostNetwork"),
        "{said:?}"
    );
    for to in b.addrs(80) {
        assert!(!reaches(&h, to), "its labels do not count: {to}");
    }
    let block = |ip: IpAddr, length| json!({ "ipBlock": { "cidr": format!("{ip}/{length}") } });
    for (to, block) in b
        .addrs(80)
        .into_iter()
        .zip([block(h.ipv4().into(), 32), block(h.ipv6().into(), 128)])
    {
        bed.apply(&[from(block)]);
        assert!(reaches(&h, to), "its node's address does: {to}");
    }
}

fn pod_reaches_itself_despite_policy() {
    let service = ServiceSpec::new("x", "self")
        .selects("pod", "a")
        .port(80, 80)
        .port_of(53, 53, Protocol::Udp);
    let a = PodSpec::new("x", "a").label("pod", "a");
    let b = PodSpec::new("x", "b").label("pod", "b");
    let mut bed = TestCluster::bare(Cluster::builder().nodes(1).pods([a, b]).service(service));
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"));
    a.serve_udp(&[53]).unwrap();
    bed.write_policies(&[deny_ingress("a"), deny_egress("a")]);
    bed.enforce(&[]);
    let service = bed.lab.service("x/self");
    for to in a.addrs(80).into_iter().chain(service.addrs(80)) {
        echoes(&connected(&a, to), "to myself");
        assert!(!reaches(&b, to), "{to} from another pod");
    }
    for to in a.addrs(53) {
        assert!(is_answered(&a, to), "{to}");
    }
    // Behind the Service the node answers in its own name first: masqueraded there and back.
    for to in service.addrs(53) {
        assert!(is_answered(&a, to), "{to}");
        assert!(!is_answered(&b, to), "{to} from another pod");
    }
    wait_until(DEADLINE, "what b tried to be counted", || {
        metric(
            &bed.lab.node(0),
            r#"portreeve_policy_verdicts_total{verdict="deny",direction="ingress"}"#,
        ) > 0
    })
    .unwrap();
}
