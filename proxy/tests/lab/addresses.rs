//! Address owners: pods outside of their node's pod CIDRs, and addresses that move to another pod before the API
//! says so.
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};

use lab::traffic::connect_all;
use lab::{Cluster, Dial, Gateway, Kind, PodSpec, wait_until};
use serde_json::{Value, json};
use testbed::runner::Test;

use crate::bridges::BRIDGE;
use crate::sever::reset_after;
use testbed::{DEADLINE, SOON, TestCluster, ask, connected, echoes, greeted, policy, small};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    policies_hold_for_pods_outside_node_cidrs,
    an_unknown_pod_outside_of_cidrs_is_held,
    policies_hold_without_node_pod_cidrs,
    a_pod_behind_no_link_is_reported,
    new_pods_at_a_link_inherit_no_rights,
    new_pods_at_a_port_inherit_no_rights,
    restarted_daemon_gives_new_pods_no_old_rights,
    a_pod_whose_route_returns_keeps_its_rights,
    address_of_a_removed_link_has_no_owner,
];

/// Addresses with this host number that lie in no pod CIDR.
fn outside(host: u8) -> [IpAddr; 2] {
    let v6 = Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, host.into());
    [Ipv4Addr::new(192, 168, 77, host).into(), v6.into()]
}

fn deny_all() -> Value {
    let spec = json!({ "podSelector": {}, "policyTypes": ["Ingress", "Egress"] });
    policy("deny-all", &spec)
}

fn deny_all_of(pod: &str) -> Value {
    let selector = json!({ "matchLabels": { "pod": pod } });
    let spec = json!({ "podSelector": selector, "policyTypes": ["Ingress", "Egress"] });
    policy("deny-all", &spec)
}

fn allow_egress(pod: &str) -> Value {
    let selector = json!({ "matchLabels": { "pod": pod } });
    let spec = json!({ "podSelector": selector, "policyTypes": ["Egress"], "egress": [{}] });
    policy("allow-egress", &spec)
}

/// Gives a pod more addresses, with a route to each on its node and from everywhere.
fn place(bed: &TestCluster, pod: &str, addresses: [IpAddr; 2]) {
    let (host, node) = (bed.lab.pod(pod), bed.lab.node_of(pod));
    let link = bed.lab.link_of(pod).unwrap();
    for (at, via) in addresses.into_iter().zip(node.addresses()) {
        let nodad = if at.is_ipv6() { " nodad" } else { "" };
        host.ip(&format!("addr add {at} dev eth0{nodad}\n"))
            .unwrap();
        node.ip(&format!("route add {at} dev {link}\n")).unwrap();
        let mut route = bed.lab.fabric().command("ip");
        route.args(["route", "add", &at.to_string(), "via", &via.to_string()]);
        assert!(route.output().unwrap().status.success(), "{at}");
    }
}

/// The cluster's state with these addresses for these pods instead of their own.
fn moved(bed: &TestCluster, pods: &[(&str, [IpAddr; 2])]) -> Value {
    let mut state = bed.lab.manifests();
    for object in state["items"].as_array_mut().unwrap() {
        let Some((_, [v4, v6])) = pods
            .iter()
            .find(|(name, _)| object["metadata"]["name"] == *name)
        else {
            continue;
        };
        object["status"]["podIP"] = json!(v4);
        object["status"]["podIPs"] = json!([{ "ip": v4 }, { "ip": v6 }]);
    }
    state
}

/// Connections between two pods by these addresses.
fn dials(bed: &TestCluster, pairs: &[(&str, [IpAddr; 2], [IpAddr; 2])]) -> Vec<Dial> {
    let dial = |&(from, source, to): &(&str, [IpAddr; 2], [IpAddr; 2])| {
        let host = bed.lab.pod(from);
        let dial = |(source, to)| Dial::new(&host, SocketAddr::new(to, 80)).source(source);
        source.into_iter().zip(to).map(dial).collect::<Vec<_>>()
    };
    pairs.iter().flat_map(dial).collect()
}

#[track_caller]
fn all(dials: &[Dial], kind: Kind) {
    for (dial, outcome) in dials.iter().zip(connect_all(dials, SOON).unwrap()) {
        assert_eq!(outcome.kind(), kind, "{dial:?}");
    }
}

fn policies_hold_for_pods_outside_node_cidrs() {
    let mut bed = TestCluster::bare(small());
    let (a, b) = (outside(5), outside(6));
    place(&bed, "x/a", a);
    bed.write("cluster.json", &moved(&bed, &[("a", a)]));
    bed.enforce(&[]);
    let (inside, other) = (
        bed.lab.pod("x/b").addresses(),
        bed.lab.pod("x/c").addresses(),
    );
    let of_a = [
        ("x/a", a, other),
        ("x/a", a, inside),
        ("x/c", other, a),
        ("x/b", inside, a),
    ];
    let of_a = dials(&bed, &of_a);
    all(&of_a, Kind::Connected);
    let live = connected(&bed.lab.pod("x/c"), SocketAddr::new(a[0], 80));
    bed.apply(&[deny_all_of("a")]);
    all(&of_a, Kind::TimedOut);
    assert!(is_silent(&live), "what ran before is cut");

    // One that comes, one that goes: the first stays as it is.
    place(&bed, "x/b", b);
    bed.write("cluster.json", &moved(&bed, &[("a", a), ("b", b)]));
    bed.apply(&[deny_all()]);
    all(
        &dials(&bed, &[("x/b", b, other), ("x/c", other, b)]),
        Kind::TimedOut,
    );
    all(&of_a, Kind::TimedOut);
    bed.write("cluster.json", &moved(&bed, &[("a", a)]));
    bed.apply(&[deny_all_of("a")]);
    all(&of_a, Kind::TimedOut);
    bed.apply(&[]);
    all(&of_a, Kind::Connected);
}

/// Whether an echo connection returns nothing.
fn is_silent(mut stream: &TcpStream) -> bool {
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(b"still there?").unwrap();
    stream.read(&mut [0; 64]).is_err()
}

fn an_unknown_pod_outside_of_cidrs_is_held() {
    let mut bed = TestCluster::bare(small());
    let (a, new) = (outside(5), outside(7));
    place(&bed, "x/a", a);
    bed.write("cluster.json", &moved(&bed, &[("a", a)]));
    bed.write_policies(&[deny_all_of("d")]);
    bed.enforce(&["--hold", "300ms"]);
    place(&bed, "x/d", new);
    let other = bed.lab.pod("x/c").addresses();
    let pods = bed.lab.node(0);
    wait_until(DEADLINE, "the new addresses to be held", || {
        new.iter().all(|at| in_set(&pods, "pods", *at))
    })
    .unwrap();
    let of_new = dials(&bed, &[("x/d", new, other), ("x/c", other, new)]);
    all(&of_new, Kind::TimedOut);
    bed.write("cluster.json", &moved(&bed, &[("a", a), ("d", new)]));
    bed.apply(&[]);
    all(&of_new, Kind::Connected);
}

/// Whether the kernel's set of both families holds an address; `name` is without the family.
fn in_set(node: &lab::Host, name: &str, address: IpAddr) -> bool {
    let family = if address.is_ipv4() { "4" } else { "6" };
    let mut nft = node.command("nft");
    let element = format!("{{ {address} }}");
    nft.args([
        "get",
        "element",
        "inet",
        "portreeve",
        &format!("{name}{family}"),
        &element,
    ]);
    nft.output().unwrap().status.success()
}

fn policies_hold_without_node_pod_cidrs() {
    let mut bed = TestCluster::bare(small());
    let mut state = bed.lab.manifests();
    for object in state["items"].as_array_mut().unwrap() {
        if object["kind"] == "Node" {
            object["spec"] = json!({});
        }
    }
    bed.write("cluster.json", &state);
    bed.write_policies(&[deny_all_of("a")]);
    bed.enforce(&[]);
    let [a, b, c] = ["x/a", "x/b", "x/c"].map(|pod| bed.lab.pod(pod).addresses());
    all(
        &dials(&bed, &[("x/a", a, c), ("x/c", c, a), ("x/b", b, a)]),
        Kind::TimedOut,
    );
    all(
        &dials(&bed, &[("x/b", b, c), ("x/c", c, b)]),
        Kind::Connected,
    );
}

fn a_pod_behind_no_link_is_reported() {
    let mut bed = TestCluster::bare(small());
    let node = bed.lab.node(0);
    bed.write(
        "cluster.json",
        &moved(&bed, &[("a", outside(5)), ("b", node.addresses())]),
    );
    bed.write_policies(&[deny_all_of("a")]);
    bed.install(0, &[]);
    bed.start(0, &[]);
    let reason = |words: &[&str]| {
        let answer = ask(&node, "/readyz").unwrap();
        answer.status == 503 && words.iter().all(|word| answer.body.contains(word))
    };
    let limit = DEADLINE * 2;
    wait_until(limit, "a", || {
        reason(&["x/a", "192.168.77.5", "status.podIPs"])
    })
    .unwrap();
    bed.write_policies(&[deny_all_of("b")]);
    wait_until(limit, "b", || reason(&["x/b", "own address"])).unwrap();
    // The node's own traffic goes on.
    node.serve(&[7000]).unwrap();
    for to in node.addrs(7000) {
        greeted(&bed.lab.pod("x/c"), to);
    }
}

fn new_pods_at_a_link_inherit_no_rights() {
    succession(Gateway::LinkLocal, Last::Running);
}

fn new_pods_at_a_port_inherit_no_rights() {
    succession(BRIDGE, Last::Terminating);
}

fn restarted_daemon_gives_new_pods_no_old_rights() {
    for gateway in [Gateway::LinkLocal, BRIDGE] {
        succession(gateway, Last::Unseen);
    }
}

/// What the API says of the previous pod at an address.
#[derive(PartialEq)]
enum Last {
    Running,
    Terminating,
    /// The API reports it running, but it left while no daemon ran.
    Unseen,
}

/// The pod at an address is replaced on the node by one that deny-all selects, without a change in the API.
fn succession(gateway: Gateway, last: Last) {
    let pod = |name: &str, node: usize| PodSpec::new("x", name).node(node).label("pod", name);
    let pods = [pod("old", 0), pod("b", 0), pod("c", 1)];
    let mut bed = TestCluster::bare(Cluster::builder().nodes(2).gateway(gateway).pods(pods));
    bed.write_policies(&[deny_all_of("new")]);
    bed.enforce(&["--hold", "300ms"]);
    let [at, b, c] = ["x/old", "x/b", "x/c"].map(|pod| bed.lab.pod(pod).addresses());
    let node = bed.lab.node(0);
    all(
        &dials(&bed, &[("x/old", at, c), ("x/c", c, at)]),
        Kind::Connected,
    );
    match last {
        Last::Running => {}
        Last::Terminating => {
            bed.write("cluster.json", &terminating_pod(&bed, "old"));
            bed.apply(&[deny_all_of("new")]);
        }
        Last::Unseen => bed.kill(0),
    }
    bed.lab.remove_pod("x/old").unwrap();
    let ([IpAddr::V4(v4), IpAddr::V6(v6)], new) = (at, pod("new", 0)) else {
        panic!("an address of each family");
    };
    bed.lab
        .add_pod(new.ipv4(v4).ipv6(v6))
        .unwrap()
        .serve(&[80])
        .unwrap();
    if last == Last::Unseen {
        bed.start(0, &["--hold", "300ms"]);
    }
    wait_until(DEADLINE, "the address to be nobody's", || {
        !at.iter()
            .any(|at| in_set(&node, "egress_non_isolated", *at))
    })
    .unwrap();
    for _ in 0..2 {
        let of_new = [
            ("x/new", at, c),
            ("x/new", at, b),
            ("x/c", c, at),
            ("x/b", b, at),
        ];
        all(&dials(&bed, &of_new), Kind::TimedOut);
    }
    bed.write_cluster();
    bed.apply(&[]);
    all(
        &dials(&bed, &[("x/new", at, c), ("x/c", c, at)]),
        Kind::Connected,
    );
}

fn terminating_pod(bed: &TestCluster, name: &str) -> Value {
    let mut state = bed.lab.manifests();
    let items = state["items"].as_array_mut().unwrap();
    let pod = items
        .iter_mut()
        .find(|it| it["metadata"]["name"] == name)
        .unwrap();
    pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    state
}

fn a_pod_whose_route_returns_keeps_its_rights() {
    let bed = TestCluster::enforced(&[], &[allow_egress("a")]);
    let (a, c, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/c"), bed.lab.node(0));
    let link = bed.lab.link_of("x/a").unwrap();
    let live = connected(&a, c.addr_v4(80));
    let link_sources = || {
        let mut nft = node.command("nft");
        nft.args(["list", "set", "inet", "portreeve", "link_sources4"]);
        let listing = String::from_utf8(nft.output().unwrap().stdout).unwrap();
        listing.contains(&format!(". {}", a.ipv4()))
    };
    for (change, there) in [("del", false), ("add", true)] {
        let route = format!("route {change} {} dev {link}\n", a.ipv4());
        node.ip(&route).unwrap();
        wait_until(DEADLINE, route, || link_sources() == there).unwrap();
        assert!(
            in_set(&node, "ingress_non_isolated", a.ipv4().into()),
            "{change}"
        );
    }
    echoes(&live, "still there");
}

fn address_of_a_removed_link_has_no_owner() {
    for gateway in [Gateway::LinkLocal, BRIDGE] {
        let pod = |name: &str| PodSpec::new("x", name).label("pod", name);
        let pods = [pod("a"), pod("b"), pod("last")];
        let mut bed = TestCluster::bare(Cluster::builder().nodes(1).gateway(gateway).pods(pods));
        bed.write_policies(&[allow_egress("a")]);
        bed.enforce(&[]);
        let (a, b, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.node(0));
        let last = bed.lab.pod("x/last").addresses();
        let live = connected(&a, SocketAddr::new(last[0], 80));
        let link = bed.lab.link_of("x/last").unwrap();
        node.ip(&format!("link del {link}\n")).unwrap();
        assert_eq!(reset_after(&live), Some(ErrorKind::ConnectionReset));
        wait_until(DEADLINE, "the addresses to be nobody's", || {
            !last
                .iter()
                .any(|at| in_set(&node, "ingress_non_isolated", *at))
        })
        .unwrap();
        for at in b.addresses() {
            assert!(
                in_set(&node, "ingress_non_isolated", at),
                "{at} is still b's"
            );
        }
    }
}
