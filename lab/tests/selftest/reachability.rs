//! Reachability: pods, Services, nodes and the outside, on every wiring.
use std::collections::BTreeMap;
use std::time::Duration;

use lab::traffic::{connect_all, greeting};
use lab::{Between, Cluster, Dial, Gateway, Kind, PodSpec, RpFilter, ServiceSpec};
use nix::errno::Errno;
use testbed::runner::Test;

use super::{LIMIT, seen, two_pods, web};

pub(crate) const TESTS: &[Test] = &testbed::tests![
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
];

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
