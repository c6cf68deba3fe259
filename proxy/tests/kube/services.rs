//! Services by the real kube-proxy: which source a policy sees, by every path to a pod.
//!
//! The server is on node 0. A cell is a client and a way; what an ipBlock sees of it is in
//! `docs/services.md`, cell by cell.
pub(crate) mod small;

mod setup;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use lab::kubernetes::{ControlPlane, ProxyMode};
use lab::traffic::{self, Server};
use lab::{Child, Cluster, Host, PodSpec, Protocol};
use serde_json::json;
use testbed::runner::Test;

use crate::control;
use testbed::cases::Family;
use testbed::dials::{By, Dial, Reached, dial_all};
use testbed::{TestCluster, policy};

use setup::{cluster_ips, only_from, route_externals, service, start_kube_proxies};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    iptables_services_are_judged_by_documented_source,
    nftables_services_are_judged_by_documented_source,
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
    bed: TestCluster,
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
        let mut bed = TestCluster::of(lab);
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

/// Has a pod answer by TCP, and by UDP as long as the answer lives.
fn serve(lab: &Cluster, pod: &str) -> Server {
    let pod = lab.pod(pod);
    pod.serve(&[8080]).unwrap();
    let (netns, addresses) = (pod.netns(), pod.addresses());
    traffic::introduce(netns, pod.name(), Protocol::Udp, &addresses, &[8080]).unwrap()
}
