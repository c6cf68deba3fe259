//! Pods on a Linux bridge: no packet passes from port to port unchecked, whatever happens to the bridge.
pub(crate) mod frames;

use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use lab::traffic::{UdpOutcome, craft};
use lab::{Cluster, Gateway, Host, Kind, PodSpec, wait_until};
use nix::ifaddrs::getifaddrs;
use socket2::{Domain, Protocol, Socket, Type};
use testbed::runner::Test;

use testbed::{
    DEADLINE, SOON, TestCluster, allow_ingress, ask, connected, counter, counter_of, deny_ingress,
    greeted, small,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    bridge_created_with_the_first_pod_is_found,
    pods_started_without_daemon_are_blocked_until_restart,
    bridge_without_daemon_drops_only_pod_addresses,
    bridge_nf_call_is_reported_and_opens_nothing,
    new_pod_address_is_owned_immediately,
    a_ports_free_addresses_share_one_packet_rate,
];

pub(crate) const BRIDGE: Gateway = Gateway::Bridge { hairpin: false };
/// Contained in every crafted frame.
const MAGIC: &[u8] = b"by hand";
/// Addresses that are no pod's, though two ends may use them.
const NEAR: [Ipv6Addr; 2] = [
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x98),
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x99),
];
const FOREIGN: [Ipv4Addr; 2] = [
    Ipv4Addr::new(192, 168, 77, 1),
    Ipv4Addr::new(192, 168, 77, 2),
];

fn bridge_created_with_the_first_pod_is_found() {
    let mut bed = TestCluster::of(Cluster::builder().nodes(1).gateway(BRIDGE).build().unwrap());
    bed.enforce(&[]);
    for name in ["a", "b"] {
        let pod = bed
            .lab
            .add_pod(PodSpec::new("x", name).node(0).label("pod", name))
            .unwrap();
        pod.serve(&[80]).unwrap();
    }
    bed.write_cluster();
    bed.apply(&[deny_ingress("b")]);
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"));
    for (to, back) in b.addrs(80).into_iter().zip(a.addrs(80)) {
        assert_eq!(a.connect(to, SOON).unwrap().kind(), Kind::TimedOut, "{to}");
        assert_eq!(greeted(&b, back).server, "x/a");
    }
}

fn pods_started_without_daemon_are_blocked_until_restart() {
    let mut bed = TestCluster::bare(small().gateway(BRIDGE));
    bed.enforce(&[]);
    bed.kill(0);
    let new = ["e", "f"].map(|name| {
        let pod = bed
            .lab
            .add_pod(PodSpec::new("x", name).node(0).label("pod", name))
            .unwrap();
        pod.serve(&[80]).unwrap();
        pod.serve_udp(&[53]).unwrap();
        pod
    });
    let [e, f] = &new;
    let known = bed.lab.pod("x/b");
    let heard = [f.capture().unwrap(), known.capture().unwrap()];
    for server in [f, &known] {
        for (tcp, udp) in server.addrs(80).into_iter().zip(server.addrs(53)) {
            assert_eq!(
                e.connect(tcp, SOON).unwrap().kind(),
                Kind::TimedOut,
                "{tcp}"
            );
            assert_eq!(
                e.ask_udp(udp, b"who?", SOON).unwrap(),
                UdpOutcome::TimedOut,
                "{udp}"
            );
        }
    }
    for capture in &heard {
        let passed = capture.count(|packet| {
            [6, 17].contains(&packet.protocol) && e.addresses().contains(&packet.source.ip())
        });
        assert_eq!(passed, 0);
    }
    // Pods that were non-isolated before go on.
    for to in known.addrs(80) {
        greeted(&bed.lab.pod("x/a"), to);
    }
    bed.write_cluster();
    bed.start(0, &[]);
    for to in f.addrs(80) {
        greeted(e, to);
    }
}

fn bridge_without_daemon_drops_only_pod_addresses() {
    let mut bed = TestCluster::bare(small().gateway(BRIDGE));
    bed.enforce(&[]);
    bed.kill(0);
    let [e, f] = ["e", "f"].map(|name| {
        let pod = PodSpec::new("x", name).node(0).label("pod", name);
        bed.lab.add_pod(pod).unwrap()
    });
    let (node, tap, port) = (bed.lab.node(0), Tap::new(&f), link_address(&f));
    let dropped = || counter_of(&node, "bridge", "bridge_drop");
    let send = |pairs: &[(IpAddr, IpAddr)]| {
        let link = e.injector().unwrap().towards(port);
        for &(from, to) in pairs {
            let packet = craft::udp((from, 9).into(), (to, 9).into(), MAGIC);
            link.send(&packet).unwrap();
        }
    };
    let foreign = [
        NEAR.map(IpAddr::from).into(),
        FOREIGN.map(IpAddr::from).into(),
    ];
    let pods = [
        (e.ipv4().into(), f.ipv4().into()),
        (e.ipv4().into(), FOREIGN[1].into()),
        (FOREIGN[0].into(), f.ipv4().into()),
        (e.ipv6().into(), f.ipv6().into()),
        (e.ipv6().into(), NEAR[1].into()),
        (NEAR[0].into(), f.ipv6().into()),
    ];
    // They find each other, and no more.
    let refused = e.connect(f.addrs(80)[0], SOON).unwrap();
    assert_eq!(refused.kind(), Kind::TimedOut);
    let before = dropped();
    send(&pods);
    send(&foreign);
    wait_until(DEADLINE, "all frames to be looked at", || {
        dropped() == before + 6 && tap.heard() == 2
    })
    .unwrap();

    bed.write_cluster();
    bed.start(0, &[]);
    wait_until(DEADLINE, "the new ports to be known", || {
        listed(&node, "ports").matches('"').count() == 2 * 5
    })
    .unwrap();
    let lies = || counter(&node, "spoofed");
    let (before, heard) = (lies(), tap.heard());
    // Now they come up to the node, whose rules find the last of them a lie.
    send(&foreign);
    wait_until(DEADLINE, "all frames to be looked at", || {
        lies() == before + 1
    })
    .unwrap();
    assert_eq!(tap.heard(), heard);
}

fn bridge_nf_call_is_reported_and_opens_nothing() {
    let mut bed = TestCluster::bare(small().gateway(BRIDGE));
    for pod in bed.lab.pods() {
        pod.serve_udp(&[53]).unwrap();
    }
    bed.write_policies(&[allow_ingress("b"), deny_ingress("d")]);
    bed.enforce(&[]);
    let (a, b, d) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.pod("x/d"));
    let node = bed.lab.node(0);
    for family in ["iptables", "ip6tables"] {
        let sysctl = format!("bridge/bridge-nf-call-{family}");
        node.netns().set_sysctls(&[(&sysctl, "1")]).unwrap();
        let since = Instant::now();
        let readyz = || ask(&node, "/readyz").unwrap();
        wait_until(DEADLINE, "the node not to be ready", || {
            readyz().status == 503
        })
        .unwrap();
        assert!(
            since.elapsed() < Duration::from_secs(5),
            "{:?}",
            since.elapsed()
        );
        let answer = readyz().body;
        assert!(
            answer.contains(&format!("net.bridge.bridge-nf-call-{family} was set to 1")),
            "{answer}"
        );
        assert!(
            answer.contains("sysctl -w") && answer.contains("cni0"),
            "{answer}"
        );

        let heard = d.capture().unwrap();
        for (tcp, udp) in d.addrs(80).into_iter().zip(d.addrs(53)) {
            assert_eq!(
                a.connect(tcp, SOON).unwrap().kind(),
                Kind::TimedOut,
                "{tcp}"
            );
            assert_eq!(
                a.ask_udp(udp, b"who?", SOON).unwrap(),
                UdpOutcome::TimedOut,
                "{udp}"
            );
        }
        let passed = heard.count(|packet| {
            [6, 17].contains(&packet.protocol) && a.addresses().contains(&packet.source.ip())
        });
        assert_eq!(passed, 0, "{family}");

        node.netns().set_sysctls(&[(&sysctl, "0")]).unwrap();
        wait_until(DEADLINE, "the node to be ready", || readyz().status == 200).unwrap();
        for to in b.addrs(80) {
            drop(connected(&a, to));
        }
    }
}

/// The MAC address of a pod in the node's neighbour table.
fn neighbour(node: &Host, pod: &Host) -> [u8; 6] {
    let mut ip = node.command("ip");
    ip.args(["-j", "neigh", "show", &pod.ipv4().to_string()]);
    let found: serde_json::Value = serde_json::from_slice(&ip.output().unwrap().stdout).unwrap();
    let text = found[0]["lladdr"].as_str().unwrap();
    let bytes = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap());
    bytes.collect::<Vec<_>>().try_into().unwrap()
}

/// One after the other: with a poll every two seconds, they would take 16 s.
fn new_pod_address_is_owned_immediately() {
    let mut bed = TestCluster::bare(small().gateway(BRIDGE));
    bed.enforce(&[]);
    let (node, pod) = (bed.lab.node(0), bed.lab.pod("x/a"));
    let since = Instant::now();
    for last in 100..108 {
        takes(&pod, &node, Ipv4Addr::new(10, 244, 0, last));
    }
    let took = since.elapsed();
    assert!(took < Duration::from_secs(4), "{took:?}");
}

/// Gives a pod another address, and waits until no other pod on its bridge can use it.
pub(crate) fn takes(pod: &Host, node: &Host, address: Ipv4Addr) {
    pod.ip(&format!("addr add {address}/32 dev eth0\n"))
        .unwrap();
    wait_until(DEADLINE, "a pod's new address to be known", || {
        listed(node, "ip_ports4").contains(&format!("{address} . "))
    })
    .unwrap();
}

/// Frames in which `liar` spoofs the victim or the gateway, each with its sender.
fn lies(liar: &Host, victim: &Host, gateway: &str) -> Vec<(&'static str, [u8; 6], u16, Vec<u8>)> {
    const ARP: u16 = 0x0806;
    let (own, theirs) = (link_address(liar), link_address(victim));
    let gateway: Ipv4Addr = gateway.parse().unwrap();
    let arp = |operation, taken, target| {
        [
            craft::arp(operation, (taken, own), (target, [0; 6])),
            MAGIC.to_vec(),
        ]
        .concat()
    };
    let everyone: IpAddr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).into();
    // Target, its link's address, and an option that nobody knows, 16 bytes with its header.
    let discovery = |from: IpAddr, kind: u8, flags: u8, target: Ipv6Addr, option: u8| {
        let mut rest = vec![flags, 0, 0, 0];
        rest.extend(target.octets());
        rest.extend([option, 1]);
        rest.extend(own);
        rest.extend([253, 2]);
        rest.extend(MAGIC);
        rest.extend([0; 7]);
        craft::with_hop_limit(craft::icmp(from, everyone, kind, 0, &rest), 255)
    };
    let (v4, v6) = (victim.ipv4(), victim.ipv6());
    let datagram = |from: IpAddr, to: IpAddr| craft::udp((from, 9).into(), (to, 9).into(), MAGIC);
    let packet = |from: [IpAddr; 2], to: [IpAddr; 2], at: usize| datagram(from[at], to[at]);
    let (liars, victims) = (liar.addresses(), victim.addresses());
    vec![
        ("a gratuitous ARP reply", own, ARP, arp(2, v4, v4)),
        ("an ARP reply", own, ARP, arp(2, v4, liar.ipv4())),
        ("an ARP request", own, ARP, arp(1, v4, gateway)),
        (
            "an ARP reply for the gateway",
            own,
            ARP,
            arp(2, gateway, liar.ipv4()),
        ),
        (
            "a neighbour advertisement",
            own,
            0x86dd,
            discovery(liars[1], 136, 0x20, v6, 2),
        ),
        (
            "a neighbour solicitation",
            own,
            0x86dd,
            discovery(victims[1], 135, 0, liar.ipv6(), 1),
        ),
        ("an IPv4 packet", own, 0x0800, packet(victims, liars, 0)),
        ("an IPv6 packet", own, 0x86dd, packet(victims, liars, 1)),
        ("a frame", theirs, 0x88b5, MAGIC.to_vec()),
        (
            "a frame with an honest packet",
            theirs,
            0x0800,
            packet(liars, victims, 0),
        ),
    ]
}

/// The elements of a set of the table for bridges, as nft writes them.
fn listed(node: &Host, set: &str) -> String {
    let mut nft = node.command("nft");
    nft.args(["list", "set", "bridge", "portreeve", set]);
    String::from_utf8_lossy(&nft.output().unwrap().stdout).into_owned()
}

/// Where a pod's default route leads, IPv4.
fn gateway(pod: &Host) -> String {
    let mut ip = pod.command("ip");
    ip.args(["-j", "-4", "route", "show", "default"]);
    let routes: serde_json::Value = serde_json::from_slice(&ip.output().unwrap().stdout).unwrap();
    routes[0]["gateway"].as_str().unwrap().to_owned()
}

/// By the other pod's and by the node's own address on the bridge.
fn a_ports_free_addresses_share_one_packet_rate() {
    let mut bed = TestCluster::bare(small().gateway(BRIDGE));
    bed.write_policies(&[allow_ingress("b")]);
    bed.enforce(&[]);
    let (a, b, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.node(0));
    let nft = |line: String| {
        let mut command = node.command("sh");
        command.args(["-c", &format!("nft {line}")]);
        let said = command.output().unwrap();
        assert!(said.status.success(), "{line}: {said:?}");
        String::from_utf8(said.stdout).unwrap()
    };
    for to in b.addrs(80) {
        greeted(&a, to);
    }
    for to in [link_address(&b), link_of(&node, "cni0")] {
        let link = a.injector().unwrap().towards(to);
        let send = |number: u128| {
            let free = Ipv6Addr::from_bits(a.ipv6().to_bits() ^ ((number + 1) << 16));
            let packet = craft::tcp((free, 9).into(), b.addr_v6(80), craft::SYN, 1, &[]);
            link.send(&packet).unwrap();
        };
        // From now on the port that the first comes from may send nothing.
        nft("flush set inet portreeve link_rate".into());
        send(0);
        let listed = || nft("list set inet portreeve link_rate".into());
        let counted = || listed().contains("elements");
        wait_until(DEADLINE, "the port to be counted", counted).unwrap();
        let listing = listed();
        let (_, elements) = listing.split_once("elements = { ").unwrap();
        let (port, _) = elements.split_once(" limit").unwrap();
        nft(format!(
            "delete element inet portreeve link_rate '{{ {port} }}'"
        ));
        let spent = format!("{port} limit rate over 1/day burst 1 packets");
        nft(format!(
            "add element inet portreeve link_rate '{{ {spent} }}'"
        ));
        let before = counter(&node, "rate_limited");
        (1..=20).for_each(send);
        let dropped = || counter(&node, "rate_limited") >= before + 19;
        wait_until(DEADLINE, "the port's packets to be dropped", dropped).unwrap();
        // Another port's still pass.
        greeted(&bed.lab.pod("x/d"), b.addr_v6(80));
    }
}

/// EtherTypes and what follows them.
fn frames(from: &Host, to: &Host) -> Vec<(u16, Vec<u8>)> {
    let pairs = [
        (from.ipv4().into(), to.ipv4().into()),
        (from.ipv6().into(), to.ipv6().into()),
        (from.ipv6().into(), NEAR[1].into()),
        NEAR.map(IpAddr::from).into(),
        FOREIGN.map(IpAddr::from).into(),
    ];
    let mut frames = vec![
        (0x88b5, MAGIC.to_vec()),
        (0x0801, MAGIC.to_vec()),
        (0x8863, MAGIC.to_vec()),
    ];
    for (from, to) in pairs {
        let kind = if from.is_ipv4() { 0x0800 } else { 0x86dd };
        for protocol in 0..=255 {
            // What finds neighbours must pass, and says so in its first byte.
            let payload = [&[0; 20][..], MAGIC].concat();
            frames.push((kind, craft::ip(from, to, protocol, &payload)));
        }
        let (from, to): (SocketAddr, SocketAddr) = ((from, 9).into(), (to, 80).into());
        frames.push((kind, craft::tcp(from, to, 0x02, 1, MAGIC)));
        frames.push((kind, craft::udp(from, to, MAGIC)));
    }
    frames
}

/// Counts the crafted frames that a host receives, of any kind.
struct Tap {
    socket: Socket,
    heard: std::cell::Cell<usize>,
}

impl Tap {
    fn new(host: &Host) -> Self {
        // ETH_P_ALL, in network byte order.
        let every = Protocol::from(i32::from(3_u16.to_be()));
        let open = || Socket::new(Domain::PACKET, Type::RAW.nonblocking(), Some(every));
        let socket = host.run(open).unwrap().unwrap();
        socket.set_recv_buffer_size(8 << 20).unwrap();
        Self {
            socket,
            heard: 0.into(),
        }
    }

    fn heard(&self) -> usize {
        let mut frame = [0; 2048];
        loop {
            match (&self.socket).read(&mut frame) {
                Ok(length) => {
                    let ours = frame[..length]
                        .windows(MAGIC.len())
                        .any(|window| window == MAGIC);
                    self.heard.set(self.heard.get() + usize::from(ours));
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    return self.heard.get();
                }
            }
        }
    }
}

/// The address of a pod's link (IEEE 802).
fn link_address(pod: &Host) -> [u8; 6] {
    link_of(pod, "eth0")
}

/// The address of a link (IEEE 802).
fn link_of(host: &Host, name: &str) -> [u8; 6] {
    let found = host.run(|| {
        let mut links = getifaddrs()
            .unwrap()
            .filter(|link| link.interface_name == name);
        links.find_map(|link| link.address?.as_link_addr()?.addr())
    });
    found.unwrap().unwrap()
}
