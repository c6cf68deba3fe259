//! Services by the real kube-proxy: which source a policy sees, by every path to a pod.
//!
//! The server is on node 0. A cell is a client and a way; what an ipBlock sees of it is in
//! `docs/services.md`, cell by cell.
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use lab::kubernetes::{ControlPlane, ProxyMode};
use lab::runner::Test;
use lab::traffic::{self, Greeting, Server, UdpOutcome};
use lab::{Child, Cluster, Host, Kind, PodSpec, Protocol, wait_until};
use serde_json::{Value, json};

use crate::api::items;
use crate::control;
use testbed::cases::Family;
use testbed::dials::{By, Dial, Reached, dial_all};
use testbed::{Bed, DEADLINE, greeted, policy};

pub(crate) const TESTS: &[Test] = &lab::tests![
    iptables_services_are_judged_by_documented_source,
    nftables_services_are_judged_by_documented_source,
    session_affinity_holds_with_and_without_policy,
    service_without_endpoints_refuses_with_any_policy,
];

fn iptables_services_are_judged_by_documented_source() {
    every_cell(ProxyMode::Iptables);
}

fn nftables_services_are_judged_by_documented_source() {
    every_cell(ProxyMode::Nftables);
}

/// Addresses of the Services in front of the server: who in the fabric routes them to which node.
const ROUTED_TO_SERVERS_NODE: u8 = 1;
const ROUTED_TO_OTHER_NODE: u8 = 2;

/// `externalTrafficPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Traffic {
    Cluster,
    Local,
}

impl Traffic {
    fn name(self) -> &'static str {
        match self {
            Self::Cluster => "cluster",
            Self::Local => "local",
        }
    }

    /// The last part of the ClusterIPs.
    fn cluster_ip(self) -> u8 {
        20 + self as u8
    }

    fn node_port(self) -> u16 {
        match self {
            Self::Cluster => 30080,
            Self::Local => 30081,
        }
    }

    /// An address outside of the cluster, routed to one of the nodes.
    fn address(self, kind: External, routed_to: u8) -> [IpAddr; 2] {
        let net = 2 * kind as u8 + self as u8;
        [
            Ipv4Addr::new(198, 18, net, routed_to).into(),
            Ipv6Addr::new(0x2001, 0xdb8, 0x18, net.into(), 0, 0, 0, routed_to.into()).into(),
        ]
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum External {
    ExternalIp,
    LoadBalancer,
}

const EXTERNALS: [External; 2] = [External::ExternalIp, External::LoadBalancer];

const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

/// How a client reaches the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    ClusterIp,
    NodePort {
        of_servers_node: bool,
    },
    /// For clients outside it matters which node the address is routed to.
    External {
        kind: External,
        to_servers_node: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Client {
    /// The server itself.
    Itself,
    PodOnServersNode,
    PodOnOtherNode,
    ServersNode,
    OtherNode,
    Outside,
}

const CLIENTS: [Client; 6] = [
    Client::Itself,
    Client::PodOnServersNode,
    Client::PodOnOtherNode,
    Client::ServersNode,
    Client::OtherNode,
    Client::Outside,
];

/// The effect of policy on a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// An ipBlock matches this one's address.
    As(Client),
    /// Allowed whatever policies say: the server itself, or its node.
    Exempt,
    /// kube-proxy lets no client through.
    NoWay,
}

impl Seen {
    /// While policy allows only `source`.
    fn is_allowed(self, source: Client) -> bool {
        self == Self::Exempt || self == Self::As(source)
    }
}

/// The table of `docs/services.md`. `judged`: the client is a pod under egress policy.
fn seen(client: Client, way: Way, traffic: Traffic, judged: bool) -> Seen {
    use Client::{Itself, OtherNode, Outside, PodOnOtherNode, PodOnServersNode, ServersNode};
    let local = traffic == Traffic::Local;
    match (client, way) {
        // By the other node's address even what is on the server's node comes in from there.
        (
            Itself | PodOnServersNode | ServersNode | Outside,
            Way::NodePort {
                of_servers_node: false,
            },
        ) => {
            if local {
                Seen::NoWay
            } else {
                Seen::As(OtherNode)
            }
        }
        (
            Outside,
            Way::External {
                to_servers_node: false,
                ..
            },
        ) => {
            if local {
                Seen::NoWay
            } else {
                Seen::As(OtherNode)
            }
        }
        (Itself | ServersNode, _) => Seen::Exempt,
        (Outside, _) => Seen::As(Outside),
        (PodOnServersNode, _) => Seen::As(PodOnServersNode),
        (OtherNode, _) => Seen::As(OtherNode),
        (PodOnOtherNode, Way::ClusterIp) => Seen::As(PodOnOtherNode),
        // To another node's address a pod goes behind its own node's.
        (
            PodOnOtherNode,
            Way::NodePort {
                of_servers_node: true,
            },
        ) => Seen::As(OtherNode),
        // kube-proxy hides what comes in from outside, and a pod that asks so; not what the daemon has judged.
        (PodOnOtherNode, _) if local || judged => Seen::As(PodOnOtherNode),
        (PodOnOtherNode, _) => Seen::As(OtherNode),
    }
}

/// The cluster, its Services and who may be a client.
struct Stage {
    bed: Bed,
    _udp: Vec<Server>,
    _control: Arc<ControlPlane>,
    _proxies: Vec<Child>,
}

struct Cell {
    what: String,
    protocol: Protocol,
    client: Client,
    seen: Seen,
    to: SocketAddr,
}

fn every_cell(mode: ProxyMode) {
    let stage = Stage::new(mode);
    let mut wrong = Vec::new();
    for judged in [false, true] {
        for source in CLIENTS.into_iter().filter(|it| *it != Client::Itself) {
            wrong.extend(stage.wrong_cells(source, judged));
        }
    }
    assert!(
        wrong.is_empty(),
        "{mode:?}:\n{}\n{}",
        wrong.join("\n"),
        stage.bed.logs()
    );
}

impl Stage {
    fn new(mode: ProxyMode) -> Self {
        let lab = Cluster::builder()
            .nodes(2)
            .pod(PodSpec::new("x", "server").node(0).label("app", "server"))
            .pod(PodSpec::new("x", "near").node(0).label("app", "client"))
            .pod(PodSpec::new("x", "far").node(1).label("app", "client"))
            .build()
            .unwrap();
        route_externals(&lab);
        let control = control::joined(&lab);
        let services = [Traffic::Cluster, Traffic::Local].map(|it| service(it, "server"));
        let proxies = start_kube_proxies(&control, &lab, mode, &services);
        let udp = vec![serve(&lab, "x/server")];
        let mut bed = Bed::of(lab);
        bed.write_policies(&[]);
        bed.enforce(&[]);
        Self {
            bed,
            _udp: udp,
            _control: control,
            _proxies: proxies,
        }
    }

    /// Allows one source to the server, and reports the cells with another outcome.
    fn wrong_cells(&self, source: Client, judged: bool) -> Vec<String> {
        let mut policies = vec![only_from(&self.host(source))];
        if judged {
            let spec = json!({ "podSelector": {}, "policyTypes": ["Egress"], "egress": [{}] });
            policies.push(policy("all-may-go-out", &spec));
        }
        self.bed.apply(&policies);
        let cells = self.cells(judged);
        let dials: Vec<_> = cells.iter().map(|cell| self.dial(cell, source)).collect();
        let outcomes = cells.iter().zip(dial_all(&dials));
        outcomes
            .filter_map(|(cell, reached)| {
                let problem = self.problem(cell, source, reached)?;
                let Cell { what, protocol, client, to, .. } = cell;
                Some(format!("{client:?} by {what} ({protocol} {to}), judged: {judged}, only {source:?} allowed: {problem}"))
            })
            .collect()
    }

    fn dial(&self, cell: &Cell, source: Client) -> Dial {
        // The client's own choice.
        let any: IpAddr = if cell.to.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        Dial {
            protocol: cell.protocol,
            row: 0,
            column: 0,
            family: Family::of(any),
            by: By::Service,
            expected: cell.seen.is_allowed(source),
            netns: self.host(cell.client).netns().clone(),
            source: any,
            to: cell.to,
            server_address: cell.to,
            server: None,
        }
    }

    /// What is wrong with an outcome while only `source` is allowed.
    fn problem(&self, cell: &Cell, source: Client, reached: Option<Reached>) -> Option<String> {
        if reached.is_some() != cell.seen.is_allowed(source) {
            let answered = if reached.is_some() { "" } else { "not " };
            return Some(format!("{answered}answered, but it is {:?}", cell.seen));
        }
        let client = reached?.greeting().unwrap().client.ip();
        let as_judged = self.host(source).addresses().contains(&client);
        (cell.seen != Seen::Exempt && !as_judged).then(|| format!("the server saw {client}"))
    }

    fn cells(&self, judged: bool) -> Vec<Cell> {
        let mut cells = Vec::new();
        for client in CLIENTS {
            for traffic in [Traffic::Cluster, Traffic::Local] {
                for way in ways(client) {
                    for to in self.addresses(way, traffic) {
                        for protocol in PROTOCOLS {
                            cells.push(Cell {
                                what: format!("{way:?} with externalTrafficPolicy {traffic:?}"),
                                protocol,
                                client,
                                seen: seen(client, way, traffic, judged),
                                to,
                            });
                        }
                    }
                }
            }
        }
        cells
    }

    fn addresses(&self, way: Way, traffic: Traffic) -> [SocketAddr; 2] {
        let lab = &self.bed.lab;
        match way {
            Way::ClusterIp => cluster_ips(traffic.cluster_ip()).map(|ip| (ip, 80).into()),
            Way::NodePort { of_servers_node } => lab
                .node(usize::from(!of_servers_node))
                .addrs(traffic.node_port()),
            Way::External {
                kind,
                to_servers_node,
            } => {
                let routed_to = if to_servers_node {
                    ROUTED_TO_SERVERS_NODE
                } else {
                    ROUTED_TO_OTHER_NODE
                };
                traffic.address(kind, routed_to).map(|ip| (ip, 80).into())
            }
        }
    }

    fn host(&self, client: Client) -> Host {
        let lab = &self.bed.lab;
        match client {
            Client::Itself => lab.pod("x/server"),
            Client::PodOnServersNode => lab.pod("x/near"),
            Client::PodOnOtherNode => lab.pod("x/far"),
            Client::ServersNode => lab.node(0),
            Client::OtherNode => lab.node(1),
            Client::Outside => lab.outside(),
        }
    }
}

/// The ways that a client has.
fn ways(client: Client) -> Vec<Way> {
    let mut ways = Vec::new();
    // A ClusterIP leads nowhere from outside.
    if client != Client::Outside {
        ways.push(Way::ClusterIp);
    }
    for of_servers_node in [true, false] {
        ways.push(Way::NodePort { of_servers_node });
    }
    for kind in EXTERNALS {
        for to_servers_node in [true, false] {
            ways.push(Way::External {
                kind,
                to_servers_node,
            });
        }
    }
    ways
}

/// The chosen ClusterIPs: IPv4, IPv6.
fn cluster_ips(host: u8) -> [IpAddr; 2] {
    [
        Ipv4Addr::new(10, 96, 0, host).into(),
        Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, host.into()).into(),
    ]
}

/// A Service in front of the pods with the label `app`, by every way there is.
fn service(traffic: Traffic, app: &str) -> Value {
    let addresses = |kind| -> Vec<IpAddr> {
        let nodes = [ROUTED_TO_SERVERS_NODE, ROUTED_TO_OTHER_NODE];
        nodes
            .into_iter()
            .flat_map(|node| traffic.address(kind, node))
            .collect()
    };
    let ingress: Vec<_> = addresses(External::LoadBalancer)
        .iter()
        .map(|ip| json!({ "ip": ip }))
        .collect();
    let ips = cluster_ips(traffic.cluster_ip());
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "namespace": "x", "name": traffic.name() },
        "spec": {
            "type": "LoadBalancer",
            "externalTrafficPolicy": format!("{traffic:?}"),
            "clusterIP": ips[0],
            "clusterIPs": ips,
            "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "RequireDualStack",
            "externalIPs": addresses(External::ExternalIp),
            "selector": { "app": app },
            "ports": PROTOCOLS.map(|protocol| json!({
                "name": protocol.to_string().to_lowercase(), "protocol": protocol.to_string(),
                "port": 80, "targetPort": 8080, "nodePort": traffic.node_port(),
            })),
        },
        "status": { "loadBalancer": { "ingress": ingress } },
    })
}

/// The fabric sends the Services' addresses outside of the cluster to the nodes.
fn route_externals(lab: &Cluster) {
    for traffic in [Traffic::Cluster, Traffic::Local] {
        for kind in EXTERNALS {
            for (routed_to, node) in [(ROUTED_TO_SERVERS_NODE, 0), (ROUTED_TO_OTHER_NODE, 1)] {
                let vias = lab.node(node).addresses();
                for (address, via) in traffic.address(kind, routed_to).into_iter().zip(vias) {
                    let mut ip = lab.fabric().command("ip");
                    ip.args([
                        "route",
                        "add",
                        &address.to_string(),
                        "via",
                        &via.to_string(),
                    ]);
                    let said = ip.output().unwrap();
                    assert!(said.status.success(), "{said:?}");
                }
            }
        }
    }
}

/// Publishes the cluster with `services` and starts kube-proxy on every node; waits for its rules.
fn start_kube_proxies(
    control: &ControlPlane,
    lab: &Cluster,
    mode: ProxyMode,
    services: &[Value],
) -> Vec<Child> {
    let mut objects = items(&lab.manifests());
    objects.extend_from_slice(services);
    control.publish(&objects).unwrap();
    let proxies: Vec<_> = lab
        .nodes()
        .map(|node| control.kube_proxy(&node, mode).unwrap())
        .collect();
    for node in lab.nodes() {
        // Its first rules are those of all Services that there were when it began.
        for ip in services
            .iter()
            .flat_map(|it| it["spec"]["clusterIPs"].as_array().unwrap())
        {
            let ip = ip.as_str().unwrap();
            wait_until(
                DEADLINE,
                format!("kube-proxy's rules for {ip} on {}", node.name()),
                || rules(&node, mode).contains(ip),
            )
            .unwrap();
        }
    }
    proxies
}

fn rules(node: &Host, mode: ProxyMode) -> String {
    let dump = |program: &str, args: &[&str]| {
        let mut command = node.command(program);
        command.args(args);
        String::from_utf8_lossy(&command.output().unwrap().stdout).into_owned()
    };
    match mode {
        ProxyMode::Iptables => dump("iptables-save", &[]) + &dump("ip6tables-save", &[]),
        ProxyMode::Nftables => {
            dump("nft", &["list", "table", "ip", "kube-proxy"])
                + &dump("nft", &["list", "table", "ip6", "kube-proxy"])
        }
    }
}

/// Allows nothing but `source`'s addresses to the server.
fn only_from(source: &Host) -> Value {
    let blocks = source.addresses().map(|ip| {
        let length = if ip.is_ipv4() { 32 } else { 128 };
        json!({ "ipBlock": { "cidr": format!("{ip}/{length}") } })
    });
    policy(
        "only-one-source",
        &json!({
            "podSelector": { "matchLabels": { "app": "server" } },
            "policyTypes": ["Ingress"],
            "ingress": [{ "from": blocks }],
        }),
    )
}

fn session_affinity_holds_with_and_without_policy() {
    for mode in [ProxyMode::Iptables, ProxyMode::Nftables] {
        let small = Small::new(
            mode,
            &[("sticky", STICKY, "ClientIP"), ("spread", SPREAD, "None")],
        );
        for client in small.clients() {
            for family in [0, 1] {
                let servers = |service: u8, protocol| -> BTreeSet<String> {
                    let to = (cluster_ips(service)[family], 80).into();
                    let once = |_| match protocol {
                        Protocol::Udp => asked(&client, to).server,
                        _ => greeted(&client, to).server,
                    };
                    (0..24).map(once).collect()
                };
                for protocol in PROTOCOLS {
                    let what = format!("{mode:?}, {}, {protocol}", client.name());
                    let (stuck, met) = (servers(STICKY, protocol), servers(SPREAD, protocol));
                    assert_eq!(stuck.len(), 1, "{what}: {stuck:?}");
                    // By chance of 2^-23 all are one.
                    assert_eq!(met.len(), 2, "{what}: {met:?}");
                }
            }
        }
    }
}

fn service_without_endpoints_refuses_with_any_policy() {
    for mode in [ProxyMode::Iptables, ProxyMode::Nftables] {
        let small = Small::new(mode, &[("empty", EMPTY, "None")]);
        for client in small.clients() {
            for ip in cluster_ips(EMPTY) {
                let what = format!("{mode:?}, {} to {ip}", client.name());
                let outcome = client.connect((ip, 80).into(), DEADLINE).unwrap();
                assert_eq!(outcome.kind(), Kind::Refused, "{what}: {outcome}");
                let asked = client.ask_udp((ip, 80).into(), b"who?", DEADLINE).unwrap();
                assert_eq!(asked, UdpOutcome::Refused, "{what}");
            }
        }
    }
}

/// Has a pod answer by TCP, and by UDP as long as the answer lives.
fn serve(lab: &Cluster, pod: &str) -> Server {
    let pod = lab.pod(pod);
    pod.serve(&[8080]).unwrap();
    let (netns, addresses) = (pod.netns(), pod.addresses());
    traffic::introduce(netns, pod.name(), Protocol::Udp, &addresses, &[8080]).unwrap()
}

/// Who answers a datagram.
#[track_caller]
fn asked(from: &Host, to: SocketAddr) -> Greeting {
    match from.ask_udp(to, b"who?", DEADLINE).unwrap() {
        UdpOutcome::Answered { text, .. } => Greeting::parse(&text).unwrap(),
        other => panic!("{to}: {other}"),
    }
}

/// The last parts of ClusterIPs.
const STICKY: u8 = 30;
const SPREAD: u8 = 31;
const EMPTY: u8 = 32;

/// Two servers on two nodes, and two clients of which one is under egress policy.
struct Small {
    bed: Bed,
    _udp: Vec<Server>,
    _control: Arc<ControlPlane>,
    _proxies: Vec<Child>,
}

impl Small {
    /// With Services of these names, ClusterIPs and `sessionAffinity`; the servers are behind all but
    /// [`EMPTY`].
    fn new(mode: ProxyMode, services: &[(&str, u8, &str)]) -> Self {
        let server = |name, node| PodSpec::new("x", name).node(node).label("app", "server");
        let lab = Cluster::builder()
            .nodes(2)
            .pods([server("one", 0), server("two", 1)])
            .pod(PodSpec::new("x", "policed").node(0).label("policed", "yes"))
            .pod(PodSpec::new("x", "free").node(0))
            .build()
            .unwrap();
        let control = control::joined(&lab);
        let services: Vec<_> = services
            .iter()
            .map(|(name, ip, affinity)| cluster_ip_service(name, *ip, affinity))
            .collect();
        let proxies = start_kube_proxies(&control, &lab, mode, &services);
        let udp = ["x/one", "x/two"].map(|name| serve(&lab, name)).into();
        let mut bed = Bed::of(lab);
        let spec = json!({
            "podSelector": { "matchLabels": { "policed": "yes" } },
            "policyTypes": ["Egress"], "egress": [{}],
        });
        bed.write_policies(&[policy("may-go-out", &spec)]);
        bed.enforce(&[]);
        Self {
            bed,
            _udp: udp,
            _control: control,
            _proxies: proxies,
        }
    }

    fn clients(&self) -> [Host; 2] {
        ["x/policed", "x/free"].map(|name| self.bed.lab.pod(name))
    }
}

fn cluster_ip_service(name: &str, ip: u8, affinity: &str) -> Value {
    let ips = cluster_ips(ip);
    let app = if ip == EMPTY { "nobody" } else { "server" };
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "namespace": "x", "name": name },
        "spec": {
            "clusterIP": ips[0], "clusterIPs": ips,
            "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
            "sessionAffinity": affinity, "selector": { "app": app },
            "ports": PROTOCOLS.map(|protocol| json!({
                "name": protocol.to_string().to_lowercase(), "protocol": protocol.to_string(),
                "port": 80, "targetPort": 8080,
            })),
        },
    })
}
