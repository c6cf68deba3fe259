//! The lab's tests of itself: what the other tests rely on.
//!
//! Has a main of its own (`harness = false`): the namespaces are entered before any thread runs.

#![expect(
    clippy::unwrap_used,
    reason = "without a harness clippy does not know it for a test"
)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::panic::{self, AssertUnwindSafe};
use std::process::{ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use lab::traffic::{Flags, UdpOutcome, Way, bulk, connect_all, craft, greeting};
use lab::{
    Between, Cluster, Dial, Gateway, Kind, Netns, Packet, PodSpec, Protocol, RpFilter, Serve,
    ServiceSpec,
};
use nix::errno::Errno;

/// For what must happen.
const LIMIT: Duration = Duration::from_secs(5);
/// For what must not happen: long enough for a SYN's first retransmit (1 s, RFC 6298).
const PATIENCE: Duration = Duration::from_millis(1_300);

fn main() -> ExitCode {
    // A test starts this program again, to kill it.
    if std::env::args().nth(1).as_deref() == Some("--hold-a-child") {
        return hold_a_child();
    }
    lab::runner::main(&lab::tests![
        client_distinguishes_dropped_refused_and_unreachable,
        pods_reach_pods_across_nodes_in_both_families,
        pods_connect_on_every_wiring_and_rp_filter,
        pods_of_different_nodes_talk_inside_a_tunnel,
        service_balances_over_pods_in_both_families,
        a_pod_reaches_itself_by_its_own_service,
        a_service_without_endpoints_refuses,
        pod_traffic_to_outside_has_node_address,
        outside_and_nodes_reach_pods_unmasqueraded,
        a_pod_with_host_network_is_its_node,
        udp_distinguishes_answered_refused_and_dropped,
        a_capture_sees_the_handshake_and_counts_retransmits,
        crafted_packets_arrive_unchanged,
        a_thousand_dials_at_once_need_no_retransmit,
        bulk_data_arrives_unchanged_and_half_close_works,
        client_sees_a_reset_as_reset,
        a_source_port_can_be_chosen,
        pods_come_and_go_while_the_cluster_runs,
        manifests_describe_the_cluster,
        wrong_cluster_is_rejected_with_a_remedy,
        cluster_starts_quickly_and_leaves_host_unchanged,
        namespaces_are_removed_after_drop_and_panic,
        every_namespace_has_its_own_run_directory,
        dropping_a_child_kills_and_reaps_it,
        children_die_with_a_killed_parent,
        a_missing_program_is_named,
    ])
}

fn two_pods() -> Cluster {
    Cluster::builder()
        .nodes(2)
        .pod(PodSpec::new("x", "a").node(0))
        .pod(PodSpec::new("x", "b").node(1))
        .build()
        .unwrap()
}

fn client_distinguishes_dropped_refused_and_unreachable() {
    let cluster = two_pods();
    let (a, b) = (cluster.pod("x/a"), cluster.pod("x/b"));
    b.serve(&[80]).unwrap();
    b.nft("table inet t { chain in { type filter hook input priority 0; tcp dport 81 drop; }; }")
        .unwrap();
    let [nowhere, nowhere6] = cluster.unreachable(80);
    let [silent, silent6] = cluster.blackhole(80);
    for (to, kind, errno, why) in [
        (b.addr_v4(80), Kind::Connected, None, "served"),
        (b.addr_v6(80), Kind::Connected, None, "served"),
        (
            b.addr_v4(81),
            Kind::TimedOut,
            Some(Errno::ETIMEDOUT),
            "dropped",
        ),
        (
            b.addr_v6(81),
            Kind::TimedOut,
            Some(Errno::ETIMEDOUT),
            "dropped",
        ),
        (
            b.addr_v4(82),
            Kind::Refused,
            Some(Errno::ECONNREFUSED),
            "nobody listens",
        ),
        (
            b.addr_v6(82),
            Kind::Refused,
            Some(Errno::ECONNREFUSED),
            "nobody listens",
        ),
        (
            nowhere,
            Kind::Unreachable,
            Some(Errno::EHOSTUNREACH),
            "ICMP host unreachable",
        ),
        (
            nowhere6,
            Kind::Unreachable,
            Some(Errno::ENETUNREACH),
            "ICMPv6 no route",
        ),
        (silent, Kind::TimedOut, Some(Errno::ETIMEDOUT), "swallowed"),
        (silent6, Kind::TimedOut, Some(Errno::ETIMEDOUT), "swallowed"),
        (
            "10.244.1.200:80".parse().unwrap(),
            Kind::TimedOut,
            Some(Errno::ETIMEDOUT),
            "no pod",
        ),
    ] {
        let limit = if kind == Kind::TimedOut {
            Duration::from_millis(300)
        } else {
            LIMIT
        };
        let outcome = a.connect(to, limit).unwrap();
        assert_eq!(
            (outcome.kind(), outcome.errno()),
            (kind, errno),
            "{to}: {why}: {outcome}"
        );
    }
}

fn pods_reach_pods_across_nodes_in_both_families() {
    let cluster = two_pods();
    let (a, b) = (cluster.pod("x/a"), cluster.pod("x/b"));
    b.serve(&[80, 81]).unwrap();
    for (port, from) in [(80, a.ipv4().into()), (81, a.ipv4().into())] {
        assert_eq!(seen(&a, b.addr_v4(port)), ("x/b".into(), from));
    }
    assert_eq!(seen(&a, b.addr_v6(80)), ("x/b".into(), a.ipv6().into()));
}

fn pods_connect_on_every_wiring_and_rp_filter() {
    let filters = [RpFilter::Off, RpFilter::Strict, RpFilter::Loose];
    for gateway in [
        Gateway::LinkLocal,
        Gateway::NodeAddress,
        Gateway::Bridge { hairpin: false },
        Gateway::Bridge { hairpin: true },
    ] {
        for rp_filter in filters {
            all_reach_all(gateway, Between::Routes, rp_filter);
        }
        all_reach_all(gateway, Between::Vxlan, RpFilter::Loose);
    }
}

/// By address and by Service, from each pod to each, itself included.
fn all_reach_all(gateway: Gateway, between: Between, rp_filter: RpFilter) {
    let pod = |name: &str, node: usize| PodSpec::new("x", name).node(node).label("pod", name);
    let service = |name: &str| {
        ServiceSpec::new("x", name)
            .selects("pod", name)
            .port(80, 80)
    };
    let cluster = Cluster::builder()
        .nodes(2)
        .gateway(gateway)
        .between(between)
        .rp_filter(rp_filter)
        .pods([pod("a", 0), pod("b", 1), pod("c", 0)])
        .services(["a", "b", "c"].map(service))
        .build()
        .unwrap();
    for pod in cluster.pods() {
        pod.serve(&[80]).unwrap();
    }
    // A bridge that looks into IP packets (br_netfilter) translates the address and sends the frame
    // on: back out of its own port only with hairpin mode.
    let stuck = gateway == Gateway::Bridge { hairpin: false };
    let mut dials = Vec::new();
    for (from, to) in cluster
        .pods()
        .flat_map(|from| cluster.pods().map(move |to| (from.clone(), to)))
    {
        let by_address = to.addrs(80).map(|to| Dial::new(&from, to));
        dials.extend(by_address);
        if from.name() != to.name() || !stuck {
            let by_service = cluster.service(to.name()).addrs(80);
            dials.extend(by_service.map(|to| Dial::new(&from, to)));
        }
    }
    for (dial, outcome) in dials.iter().zip(connect_all(&dials, LIMIT).unwrap()) {
        assert!(
            outcome.is_connected(),
            "{gateway:?} {between:?} {rp_filter:?} {dial:?}: {outcome}"
        );
    }
}

fn pods_of_different_nodes_talk_inside_a_tunnel() {
    let cluster = Cluster::builder()
        .nodes(2)
        .between(Between::Vxlan)
        .pod(PodSpec::new("x", "a").node(0))
        .pod(PodSpec::new("x", "b").node(1))
        .build()
        .unwrap();
    let (a, b) = (cluster.pod("x/a"), cluster.pod("x/b"));
    b.serve(&[80]).unwrap();
    for to in b.addrs(80) {
        let outside = cluster.node(0).capture().unwrap();
        assert!(a.connect(to, LIMIT).unwrap().is_connected());
        let inner = outside.count(|packet| packet.destination == to);
        let outer =
            outside.count(|packet| packet.protocol == 17 && packet.destination.port() == 8472);
        assert_eq!(inner, 0, "{to}: nothing travels bare");
        assert!(outer > 0, "{to}: in UDP");
    }
}

fn web() -> lab::Builder {
    let backend = |name, node| PodSpec::new("x", name).node(node).label("app", "web");
    Cluster::builder()
        .nodes(2)
        .pod(backend("b1", 0))
        .pod(backend("b2", 1))
        .pod(PodSpec::new("x", "client").node(0))
        .pod(PodSpec::new("y", "b3").node(0).label("app", "web"))
        .service(
            ServiceSpec::new("x", "web")
                .selects("app", "web")
                .port(80, 8080),
        )
        .service(
            ServiceSpec::new("x", "none")
                .selects("app", "nothing")
                .port(80, 8080),
        )
}

fn service_balances_over_pods_in_both_families() {
    let cluster = web().build().unwrap();
    cluster.pods().for_each(|pod| pod.serve(&[8080]).unwrap());
    let client = cluster.pod("x/client");
    for to in cluster.service("x/web").addrs(80) {
        let outcomes = client.connect_all(&[to; 200], LIMIT).unwrap();
        let mut served: BTreeMap<String, u32> = BTreeMap::new();
        for outcome in outcomes {
            let seen = greeting(&outcome.into_stream().unwrap(), LIMIT).unwrap();
            assert!(client.addresses().contains(&seen.client.ip()), "{seen:?}");
            *served.entry(seen.server).or_default() += 1;
        }
        // 200 tosses of a coin: fewer than 40 of one side happens once in 10^18 runs.
        assert_eq!(served.keys().collect::<Vec<_>>(), ["x/b1", "x/b2"]);
        assert!(
            served.values().all(|count| *count >= 40),
            "{to}: {served:?}"
        );
    }
    let node = seen(&cluster.node(1), cluster.service("x/web").addr_v4(80));
    assert!(
        node.0.starts_with("x/b"),
        "a node reaches Services too: {node:?}"
    );
}

fn a_pod_reaches_itself_by_its_own_service() {
    let cluster = Cluster::builder()
        .nodes(1)
        .pod(PodSpec::new("x", "a").label("app", "web"))
        .service(
            ServiceSpec::new("x", "web")
                .selects("app", "web")
                .port(80, 80),
        )
        .build()
        .unwrap();
    let a = cluster.pod("x/a");
    a.serve(&[80]).unwrap();
    for to in cluster.service("x/web").addrs(80) {
        assert_eq!(seen(&a, to).0, "x/a");
    }
}

fn a_service_without_endpoints_refuses() {
    let cluster = web().build().unwrap();
    for to in cluster.service("x/none").addrs(80) {
        let outcome = cluster.pod("x/client").connect(to, LIMIT).unwrap();
        assert_eq!(outcome.kind(), Kind::Refused, "{to}");
    }
}

fn pod_traffic_to_outside_has_node_address() {
    let cluster = two_pods();
    let (a, node, outside) = (cluster.pod("x/a"), cluster.node(0), cluster.outside());
    outside.serve(&[443]).unwrap();
    assert_eq!(
        seen(&a, outside.addr_v4(443)),
        ("outside".into(), node.ipv4().into())
    );
    assert_eq!(
        seen(&a, outside.addr_v6(443)),
        ("outside".into(), node.ipv6().into())
    );
}

fn outside_and_nodes_reach_pods_unmasqueraded() {
    let cluster = two_pods();
    let b = cluster.pod("x/b");
    b.serve(&[80]).unwrap();
    for from in [cluster.outside(), cluster.node(0), cluster.node(1)] {
        assert_eq!(
            seen(&from, b.addr_v4(80)).1,
            std::net::IpAddr::V4(from.ipv4())
        );
        assert_eq!(
            seen(&from, b.addr_v6(80)).1,
            std::net::IpAddr::V6(from.ipv6())
        );
    }
}

fn a_pod_with_host_network_is_its_node() {
    let cluster = Cluster::builder()
        .nodes(1)
        .pod(PodSpec::new("x", "a"))
        .pod(PodSpec::new("kube-system", "agent").host_network())
        .build()
        .unwrap();
    let agent = cluster.pod("kube-system/agent");
    agent.serve(&[9100]).unwrap();
    assert_eq!(agent.addresses(), cluster.node(0).addresses());
    for to in agent.addrs(9100) {
        assert_eq!(seen(&cluster.pod("x/a"), to).0, "kube-system/agent");
    }
}

fn udp_distinguishes_answered_refused_and_dropped() {
    let cluster = two_pods();
    let (a, b) = (cluster.pod("x/a"), cluster.pod("x/b"));
    b.serve_udp(&[53]).unwrap();
    for (at, closed) in b.addrs(53).into_iter().zip(b.addrs(54)) {
        match a.ask_udp(at, b"hello", LIMIT).unwrap() {
            UdpOutcome::Answered { text, .. } => assert_eq!(text, b"hello"),
            other => panic!("{at}: {other}"),
        }
        assert_eq!(
            a.ask_udp(closed, b"hello", LIMIT).unwrap(),
            UdpOutcome::Refused
        );
    }
    let silent = cluster.blackhole(53)[0];
    let outcome = a
        .ask_udp(silent, b"hello", Duration::from_millis(200))
        .unwrap();
    assert_eq!(outcome, UdpOutcome::TimedOut);
}

fn a_capture_sees_the_handshake_and_counts_retransmits() {
    let cluster = two_pods();
    let (a, b) = (cluster.pod("x/a"), cluster.pod("x/b"));
    b.serve(&[80]).unwrap();
    b.nft("table inet t { chain in { type filter hook input priority 0; tcp dport 81 drop; }; }")
        .unwrap();
    for (open, dropped, closed) in [
        (b.addr_v4(80), b.addr_v4(81), b.addr_v4(82)),
        (b.addr_v6(80), b.addr_v6(81), b.addr_v6(82)),
    ] {
        let capture = a.capture().unwrap();
        let on_node = cluster
            .node(1)
            .capture_on(&cluster.link_of("x/b").unwrap())
            .unwrap();
        assert_eq!(seen(&a, open).0, "x/b");
        assert_eq!((capture.syns_to(open), capture.syn_acks_from(open)), (1, 1));
        assert!(
            capture
                .packets()
                .iter()
                .any(|p| p.way == Way::Out && p.is_syn_to(open))
        );
        assert_eq!(
            on_node.syns_to(open),
            1,
            "the node sees it pass the pod's link"
        );

        assert_eq!(a.connect(dropped, PATIENCE).unwrap().kind(), Kind::TimedOut);
        assert_eq!(
            (capture.syns_to(dropped), capture.syn_acks_from(dropped)),
            (2, 0)
        );

        assert_eq!(a.connect(closed, LIMIT).unwrap().kind(), Kind::Refused);
        let resets = capture.count(|p| p.flags.is_reset() && p.source == closed);
        assert_eq!((capture.syns_to(closed), resets), (1, 1));
        capture
            .wait_for(LIMIT, "a FIN", 1, |p| p.flags.is_fin())
            .unwrap();
    }
    assert!(!Flags::default().is_syn());
}

fn crafted_packets_arrive_unchanged() {
    let cluster = two_pods();
    let (a, b) = (cluster.pod("x/a"), cluster.pod("x/b"));
    b.serve_udp(&[53]).unwrap();
    let injector = a.injector().unwrap();
    let capture = b.capture().unwrap();
    for (from, to) in [
        (a.addr_v4(1000), b.addr_v4(53)),
        (a.addr_v6(1000), b.addr_v6(53)),
    ] {
        let (source, target) = (from.ip(), to.ip());
        let whole = craft::udp(from, to, &[7; 1000]);
        let made = [
            (6, craft::tcp(from, to, craft::SYN | craft::FIN, 1, &[])),
            (132, craft::sctp(from, to, 0, craft::SCTP_INIT)),
            (253, craft::ip(source, target, 253, b"experiment")),
            (17, craft::udp(from, to, b"question")),
        ];
        for (number, (protocol, packet)) in (1..).zip(made) {
            injector.send(&craft::numbered(packet, number)).unwrap();
            let such = |it: &Packet| {
                it.way == Way::In
                    && (it.protocol, it.number, it.source.ip()) == (protocol, number, source)
            };
            capture.wait_for(LIMIT, "the packet", 1, such).unwrap();
        }
        for piece in craft::fragment(&whole, &[(0, 504), (504, 1008)]) {
            injector.send(&piece).unwrap();
        }
        // The checksums are right: a socket answers, once a datagram.
        let answer =
            |it: &Packet| it.way == Way::Out && it.protocol == 17 && it.destination.ip() == source;
        capture.wait_for(LIMIT, "the answers", 2, answer).unwrap();
    }
}

fn a_thousand_dials_at_once_need_no_retransmit() {
    let cluster = two_pods();
    let (a, b) = (cluster.pod("x/a"), cluster.pod("x/b"));
    raise_descriptor_limit();
    b.serve(&[80]).unwrap();
    let capture = a.capture().unwrap();
    let to = b.addr_v4(80);
    let outcomes = a.connect_all(&[to; 1_000], LIMIT).unwrap();
    assert!(outcomes.iter().all(lab::Outcome::is_connected));
    assert_eq!(capture.syns_to(to), 1_000);
}

fn bulk_data_arrives_unchanged_and_half_close_works() {
    const TOTAL: u64 = 20_000_000;
    let cluster = two_pods();
    let (a, b) = (cluster.pod("x/a"), cluster.pod("x/b"));
    b.serve(&[80]).unwrap();
    b.serve_as(&[81], Serve::Sink).unwrap();
    b.serve_as(&[82], Serve::Source(TOTAL)).unwrap();

    let mut sink = a
        .connect(b.addr_v4(81), LIMIT)
        .unwrap()
        .into_stream()
        .unwrap();
    bulk::send(&sink, TOTAL).unwrap();
    sink.shutdown(Shutdown::Write).unwrap();
    let mut told = String::new();
    sink.read_to_string(&mut told).unwrap();
    assert_eq!(
        told,
        format!("{TOTAL} ok\n"),
        "the answer comes after the client's end"
    );

    let source = a
        .connect(b.addr_v6(82), LIMIT)
        .unwrap()
        .into_stream()
        .unwrap();
    assert!(bulk::receive(source).unwrap().is_all_of(TOTAL));

    let echo = a
        .connect(b.addr_v4(80), LIMIT)
        .unwrap()
        .into_stream()
        .unwrap();
    greeting(&echo, LIMIT).unwrap();
    let seen = thread::scope(|scope| {
        scope.spawn(|| {
            bulk::send(&echo, TOTAL).unwrap();
            echo.shutdown(Shutdown::Write).unwrap();
        });
        bulk::receive(&echo).unwrap()
    });
    assert!(seen.is_all_of(TOTAL), "{seen}");
}

fn client_sees_a_reset_as_reset() {
    let cluster = two_pods();
    let (a, b) = (cluster.pod("x/a"), cluster.pod("x/b"));
    b.serve_as(&[80], Serve::Reset).unwrap();
    let outcome = a.connect(b.addr_v4(80), LIMIT).unwrap();
    // The reset can be there before the client looks at its finished handshake.
    let kind = match outcome.kind() {
        Kind::Connected => outcome
            .into_stream()
            .unwrap()
            .read(&mut [0])
            .unwrap_err()
            .raw_os_error(),
        _ => outcome.errno().map(|errno| errno as i32),
    };
    assert_eq!(kind, Some(Errno::ECONNRESET as i32));
}

fn a_source_port_can_be_chosen() {
    let cluster = two_pods();
    let (a, b) = (cluster.pod("x/a"), cluster.pod("x/b"));
    b.serve(&[80]).unwrap();
    let stream = a
        .connect_from(40_001, b.addr_v4(80), LIMIT)
        .unwrap()
        .into_stream()
        .unwrap();
    assert_eq!(greeting(&stream, LIMIT).unwrap().client, a.addr_v4(40_001));
}

fn pods_come_and_go_while_the_cluster_runs() {
    let mut cluster = web().build().unwrap();
    let to = cluster.service("x/none").addr_v4(80);
    let address = "10.244.1.77".parse().unwrap();
    let late = PodSpec::new("x", "late")
        .node("node-1")
        .ipv4(address)
        .label("app", "nothing");
    let client = cluster.pod("x/client");

    let added = cluster.add_pod(late).unwrap();
    added.serve(&[8080]).unwrap();
    assert_eq!(added.ipv4(), address);
    assert_eq!(seen(&client, added.addr_v4(8080)).0, "x/late");
    assert_eq!(seen(&client, to).0, "x/late", "its Service knows it");

    cluster.remove_pod("x/late").unwrap();
    assert_eq!(
        client.connect(to, LIMIT).unwrap().kind(),
        Kind::Refused,
        "no endpoint is left"
    );
    let gone = client
        .connect((address, 8080).into(), Duration::from_millis(200))
        .unwrap();
    assert_eq!(gone.kind(), Kind::TimedOut, "the address is nobody's");

    // The same address comes back with another pod.
    let heir = PodSpec::new("y", "heir").node("node-1").ipv4(address);
    cluster.add_pod(heir).unwrap().serve(&[8080]).unwrap();
    assert_eq!(seen(&client, (address, 8080).into()).0, "y/heir");
    let uids: Vec<_> = pods_of(&cluster)
        .map(|pod| pod["metadata"]["uid"].to_string())
        .collect();
    assert_eq!(
        uids.iter().collect::<std::collections::BTreeSet<_>>().len(),
        uids.len()
    );
}

fn pods_of(cluster: &Cluster) -> impl Iterator<Item = serde_json::Value> {
    let list = cluster.manifests();
    let items = list["items"].as_array().unwrap().clone();
    items.into_iter().filter(|item| item["kind"] == "Pod")
}

fn manifests_describe_the_cluster() {
    let mut cluster = Cluster::builder()
        .node("alpha")
        .namespace("x", [("team", "red")])
        .pod(
            PodSpec::new("x", "a")
                .port("http", 80)
                .port_of("dns", 53, Protocol::Udp),
        )
        .pod(PodSpec::new("y", "b").label("app", "web"))
        .build()
        .unwrap();
    cluster.relabel_pod("y/b", [("app", "db")]).unwrap();
    cluster.relabel_namespace("x", [("team", "blue")]);
    let list = cluster.manifests();
    let items = list["items"].as_array().unwrap();
    let kinds: Vec<_> = items
        .iter()
        .map(|item| item["kind"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["Namespace", "Namespace", "Node", "Pod", "Pod"]);
    assert_eq!(items[0]["metadata"]["labels"]["team"], "blue");
    assert_eq!(items[2]["spec"]["podCIDRs"][1], "fd00:10:244::/64");
    assert_eq!(items[3]["spec"]["nodeName"], "alpha");
    assert_eq!(
        items[3]["spec"]["containers"][0]["ports"][1]["protocol"],
        "UDP"
    );
    assert_eq!(
        items[3]["status"]["podIP"],
        cluster.pod("x/a").ipv4().to_string()
    );
    assert_eq!(items[4]["metadata"]["labels"]["app"], "db");
}

fn wrong_cluster_is_rejected_with_a_remedy() {
    let pod = || PodSpec::new("x", "a");
    let taken: std::net::Ipv4Addr = "10.244.0.9".parse().unwrap();
    let outside: std::net::Ipv4Addr = "10.0.0.9".parse().unwrap();
    for (builder, expected) in [
        (Cluster::builder(), "no node; ask the builder for"),
        (
            Cluster::builder().node("n").node("n"),
            "two nodes n; give one",
        ),
        (
            Cluster::builder().nodes(1).pod(pod()).pod(pod()),
            "two pods x/a; give one",
        ),
        (
            Cluster::builder().nodes(2).pod(pod().node("n")),
            "node n, which there is not; nodes are node-0, node-1",
        ),
        (
            Cluster::builder().nodes(1).pod(pod().node(1)),
            "node number 1, which there is not",
        ),
        (
            Cluster::builder().nodes(1).pod(pod().ipv4(outside)),
            "outside of the pod CIDR 10.244.0.0/16",
        ),
        (
            Cluster::builder()
                .nodes(1)
                .pod(pod().ipv4(taken))
                .pod(PodSpec::new("x", "b").ipv4(taken)),
            "which x/a has on the same node; choose another",
        ),
        (Cluster::builder().nodes(201), "at most 200"),
    ] {
        let error = builder.build().unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
}

fn cluster_starts_quickly_and_leaves_host_unchanged() {
    let before = interfaces();
    let names = ["x", "y", "z"]
        .into_iter()
        .flat_map(|ns| ["a", "b", "c"].map(|name| (ns, name)));
    let pods = names.enumerate().map(|(at, (ns, name))| {
        PodSpec::new(ns, name)
            .node(at % 2)
            .label("pod", name)
            .port("http", 80)
    });
    let services = ["x", "y", "z"].into_iter().flat_map(|ns| {
        ["a", "b", "c"].map(|n| ServiceSpec::new(ns, n).selects("pod", n).port(80, 80))
    });
    let started = Instant::now();
    let cluster = Cluster::builder()
        .nodes(2)
        .pods(pods)
        .services(services)
        .build()
        .unwrap();
    let took = started.elapsed();
    assert!(took < Duration::from_secs(3), "{took:?}");
    assert_eq!(cluster.pods().count(), 9);
    assert_eq!(interfaces(), before);
}

fn interfaces() -> String {
    fs::read_to_string("/proc/thread-self/net/dev").unwrap()
}

fn namespaces_are_removed_after_drop_and_panic() {
    let build = || {
        let cluster = two_pods();
        cluster.pod("x/a").serve(&[80]).unwrap();
        let capture = cluster.pod("x/a").capture().unwrap();
        let child = sleeper(cluster.pod("x/b").netns());
        let hosts = cluster.pods().chain(cluster.nodes());
        let held: Vec<_> = hosts.map(|host| host.netns().inode()).collect();
        assert!(
            held.iter().all(|inode| held_namespaces().contains(inode)),
            "the check sees them"
        );
        (held, (cluster, capture, child))
    };
    let expect_gone = |held: Vec<u64>, after: &str| {
        // A joined thread lets go of its namespace a moment after it was joined.
        let gone = || held.iter().all(|inode| !held_namespaces().contains(inode));
        lab::wait_until(LIMIT, format!("namespaces to go {after}"), gone).unwrap();
    };
    let (held, all) = build();
    drop(all);
    expect_gone(held, "after a drop");

    let mut held = Vec::new();
    let panicked = panic::catch_unwind(AssertUnwindSafe(|| {
        let (inodes, _all) = build();
        held = inodes;
        panic::resume_unwind(Box::new("on purpose"));
    }));
    assert!(panicked.is_err());
    expect_gone(held, "after a panic");
}

/// The network namespaces that any thread or descriptor of any process of this user holds.
fn held_namespaces() -> Vec<u64> {
    let list = |path: String| fs::read_dir(path).into_iter().flatten().flatten();
    let mut held = Vec::new();
    for process in list("/proc".into()) {
        let root = process.path().display().to_string();
        for thread in list(format!("{root}/task")) {
            held.extend(fs::metadata(thread.path().join("ns/net")).map(|ns| ns.ino()));
        }
        for handle in list(format!("{root}/fd")) {
            let Ok(target) = fs::read_link(handle.path()) else {
                continue;
            };
            let target = target.display().to_string();
            let inode = target
                .strip_prefix("net:[")
                .and_then(|rest| rest.strip_suffix(']'));
            held.extend(inode.and_then(|inode| inode.parse::<u64>().ok()));
        }
    }
    held
}

fn every_namespace_has_its_own_run_directory() {
    let (one, other) = (Netns::new().unwrap(), Netns::new().unwrap());
    let shell = |netns: &Netns, script: &str| {
        let mut command = netns.command("sh");
        command.args(["-c", script]);
        let output = command.output().unwrap();
        (
            output.status.success(),
            String::from_utf8(output.stdout).unwrap(),
        )
    };
    assert!(shell(&one, "touch /run/mark").0);
    assert!(
        shell(&one, "test -e /run/mark").0,
        "programs of one namespace share it"
    );
    assert!(
        !shell(&other, "test -e /run/mark").0,
        "another namespace has its own"
    );
    let (listed, interfaces) = shell(&one, "ls /sys/class/net");
    assert!(
        listed && ["lo\n", ""].contains(&interfaces.as_str()),
        "{interfaces}"
    );
}

fn sleeper(netns: &Netns) -> lab::Child {
    let mut command = netns.command("sleep");
    command.arg("1000");
    command.spawn().unwrap()
}

fn dropping_a_child_kills_and_reaps_it() {
    let netns = Netns::new().unwrap();
    let mut child = sleeper(&netns);
    let entry = format!("/proc/{}", child.id());
    assert_eq!(child.try_wait().unwrap(), None);
    drop(netns);
    assert_eq!(
        child.try_wait().unwrap(),
        None,
        "it holds its namespace itself"
    );
    drop(child);
    assert!(fs::metadata(entry).is_err(), "not even a zombie is left");

    let mut child = sleeper(&Netns::new().unwrap());
    child.terminate();
    assert!(!child.wait(LIMIT).unwrap().success());
}

/// Starts a child in a namespace, says its id and waits to be killed.
fn hold_a_child() -> ExitCode {
    lab::enter().unwrap();
    let child = sleeper(&Netns::new().unwrap());
    println!("{}", child.id());
    std::io::stdout().flush().unwrap();
    loop {
        thread::park();
    }
}

fn children_die_with_a_killed_parent() {
    let mut command = Netns::new()
        .unwrap()
        .command(std::env::current_exe().unwrap());
    command
        .arg("--hold-a-child")
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    let mut parent = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(parent.take_stdout().unwrap())
        .read_line(&mut line)
        .unwrap();
    let status = format!("/proc/{}/status", line.trim());
    let runs = || fs::read_to_string(&status).unwrap().contains("sleep");
    lab::wait_until(LIMIT, "the child to run", runs).unwrap();
    parent.kill();
    parent.wait(LIMIT).unwrap();
    lab::wait_until(LIMIT, "the child to die with its parent", || {
        // Its new parent may not have reaped it yet.
        fs::read_to_string(&status).map_or(true, |status| status.contains("State:\tZ"))
    })
    .unwrap();
}

fn a_missing_program_is_named() {
    let error = Netns::new()
        .unwrap()
        .command("no-such-program")
        .spawn()
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("no program no-such-program; install it"),
        "{error}"
    );
}

/// Who answered at `to`, and the client's address as the server saw it.
fn seen(from: &lab::Host, to: SocketAddr) -> (String, std::net::IpAddr) {
    let outcome = from.connect(to, LIMIT).unwrap();
    assert!(outcome.is_connected(), "{} to {to}: {outcome}", from.name());
    let mut stream = outcome.into_stream().unwrap();
    let greeting = greeting(&stream, LIMIT).unwrap();
    stream.write_all(b"ping").unwrap();
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"ping");
    (greeting.server, greeting.client.ip())
}

fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
}
