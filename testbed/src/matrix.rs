//! A lab with a pod in every place of the cases' cluster: every pod to every pod, by address and
//! through a ClusterIP, in both families, on one node and across.
//!
//! A [`Source`] provides a case's state to the daemons.
mod objects;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use lab::traffic::{Server, introduce};
use lab::{Cluster, Host, Netns, PodSpec, Protocol, ServiceSpec};
use serde_json::Value;

use crate::TestCluster;
use crate::cases::world::{self, Change, World};
use crate::cases::{Case, Family, Probe};
use crate::dials::{By, Dial, dial_all};

pub use objects::{objects, policy_object};

/// Places for pods; the loader allows no more.
const SLOTS: usize = 9;

/// Provides the state of a case to the daemons. Each call returns once it is applied.
pub trait Source {
    /// Starts the daemon of a node.
    fn start(&self, bed: &mut TestCluster, node: usize) {
        bed.start(node, &[]);
    }

    /// Makes `world` the state that the first step of a case starts from, if steps are given as changes.
    fn begin(&mut self, _: &TestCluster, _: &[Value], _: &World) {}

    /// Makes `world` the state: the one before with `changes`.
    fn step(&mut self, bed: &TestCluster, nodes: &[Value], world: &World, changes: &[Change]);

    /// Called for every connection that must be denied, after the attempt.
    fn refused(&mut self, _: &World, _: Refused) {}
}

/// A connection that must be denied.
#[derive(Clone, Copy, Debug)]
pub struct Refused {
    /// Its address.
    pub client: IpAddr,
    /// Behind a Service, the pod that it leads to.
    pub server: SocketAddr,
}

fn protocol(probe: &Probe) -> Protocol {
    match probe.protocol.as_str() {
        "TCP" => Protocol::Tcp,
        "UDP" => Protocol::Udp,
        "SCTP" => Protocol::Sctp,
        other => panic!("{other} is no protocol of a case"),
    }
}

/// The cases of a directory.
pub fn cases(directory: &str, at_least: usize) -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../policy/tests/cases")
        .join(directory);
    let entries = fs::read_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| {
        file.extension()
            .is_some_and(|extension| extension == "yaml")
    });
    files.sort();
    assert!(
        files.len() >= at_least,
        "{directory}: {} cases",
        files.len()
    );
    let read = |file: &PathBuf| Case::parse(file, &fs::read_to_string(file).unwrap());
    files.iter().map(read).collect()
}

/// The lab, used by one case after the other.
pub struct MatrixCluster<S> {
    bed: TestCluster,
    source: S,
    nodes: Vec<Value>,
    /// Servers of UDP and SCTP, and of the fabric.
    _servers: Vec<Server>,
    _fabric: Vec<TcpListener>,
}

/// The ports that the probes of some cases ask for.
type Ports = BTreeMap<Protocol, Vec<u16>>;

/// Where the fabric's own address is an external host of a case.
const FABRIC: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(172, 18, 0, 1));

impl<S: Source> MatrixCluster<S> {
    /// Builds the lab for `cases`, with the daemons on an empty state.
    pub fn new(cases: &[Case], source: impl FnOnce(&mut TestCluster) -> S) -> Self {
        let ports = ports(cases);
        let mut bed = TestCluster::of(cluster(&ports));
        let externals: BTreeSet<IpAddr> = cases
            .iter()
            .flat_map(|case| case.externals.values().copied())
            .collect();
        for external in externals.iter().filter(|address| **address != FABRIC) {
            place_outside(&bed.lab, *external);
        }
        let servers = serve(&bed.lab, &externals, &ports);
        let listeners = if externals.contains(&FABRIC) {
            listen_in_fabric(&bed.lab, &ports[&Protocol::Tcp])
        } else {
            Vec::new()
        };
        let manifests = bed.lab.manifests();
        let nodes = manifests["items"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|it| it["kind"] == "Node");
        let nodes = nodes.cloned().collect();
        let source = source(&mut bed);
        let mut matrix = Self {
            bed,
            source,
            nodes,
            _servers: servers,
            _fabric: listeners,
        };
        for node in [1, 2] {
            matrix.bed.install(node, &[]);
        }
        matrix
            .source
            .step(&matrix.bed, &matrix.nodes, &World::default(), &[]);
        for node in [1, 2] {
            matrix.source.start(&mut matrix.bed, node);
        }
        matrix
    }

    /// The bed and the source, once all has been played.
    pub fn into_parts(self) -> (TestCluster, S) {
        (self.bed, self.source)
    }

    /// Plays the cases; fails with every grid of any that differs from what was asked for.
    pub fn play_all(&mut self, cases: &[Case]) {
        let failures: Vec<String> = cases.iter().flat_map(|case| self.play(case)).collect();
        assert!(
            failures.is_empty(),
            "{}\n{}",
            failures.join("\n"),
            self.bed.logs()
        );
    }

    fn play(&mut self, case: &Case) -> Vec<String> {
        let mut world = case.start.clone();
        let mut failures = Vec::new();
        self.source.begin(&self.bed, &self.nodes, &world);
        for step in &case.steps {
            step.changes.iter().for_each(|change| world.apply(change));
            self.source
                .step(&self.bed, &self.nodes, &world, &step.changes);
            for probe in &step.probes {
                for failure in self.observe(case, probe, &world) {
                    failures.push(format!(
                        "{}\n  {}\n  because: {}\n  after: {}\n  {failure}",
                        case.file.display(),
                        case.title,
                        case.reason,
                        step.does
                    ));
                }
            }
        }
        failures
    }

    /// Fills the grid of `probe` by every way there is, all dials at once.
    fn observe(&mut self, case: &Case, probe: &Probe, world: &World) -> Vec<String> {
        let mut dials = Vec::new();
        let families = [Family::IPv4, Family::IPv6];
        for family in families
            .into_iter()
            .filter(|it| probe.family.is_none_or(|only| only == *it))
        {
            for by in [By::Address, By::Service] {
                self.dials_of(case, probe, family, by, &mut dials);
            }
        }
        let seen = dial_all(&dials);
        for dial in dials.iter().filter(|dial| !dial.expected) {
            let refused = Refused {
                client: dial.source,
                server: dial.server_address,
            };
            self.source.refused(world, refused);
        }
        let mut problems = Vec::new();
        for family in families {
            for by in [By::Address, By::Service] {
                let mut grid = probe.expected.clone();
                let ours = dials
                    .iter()
                    .zip(&seen)
                    .filter(|(dial, _)| dial.family == family && dial.by == by);
                for (dial, reached) in ours {
                    grid.cells[dial.row][dial.column] = Some(reached.is_some());
                    problems.extend(
                        reached
                            .as_ref()
                            .and_then(|reached| dial.misled(reached, &probe.expected)),
                    );
                }
                if grid != probe.expected {
                    problems.push(format!(
                        "{}/{} over {family:?} by {by:?}, observed (differences in brackets):\n{}",
                        probe.port,
                        probe.protocol,
                        grid.draw(&probe.expected)
                    ));
                }
            }
        }
        problems
    }

    fn dials_of(&self, case: &Case, probe: &Probe, family: Family, by: By, dials: &mut Vec<Dial>) {
        let parties = &probe.expected.parties;
        let ends: Vec<_> = parties
            .iter()
            .map(|party| self.end(case, party, family))
            .collect();
        for (row, from) in ends.iter().enumerate() {
            for (column, to) in ends.iter().enumerate() {
                let (Some(from), Some(to), Some(expected)) =
                    (from, to, probe.expected.cells[row][column])
                else {
                    continue;
                };
                let address = match (by, &to.pod) {
                    (By::Address, _) => to.address,
                    // Only pods are behind Services, and only pods and nodes reach them.
                    (By::Service, Some(pod)) if from.pod.is_some() => self.cluster_ip(pod, family),
                    (By::Service, _) => continue,
                };
                dials.push(Dial {
                    protocol: protocol(probe),
                    row,
                    column,
                    family,
                    by,
                    expected,
                    netns: from.netns.clone(),
                    source: from.address,
                    to: (address, probe.port).into(),
                    server_address: (to.address, probe.port).into(),
                    server: to.pod.as_ref().map(|pod| pod.name().to_owned()),
                });
            }
        }
    }

    /// Where a party of a case is in the lab, if it has an address of the family.
    fn end(&self, case: &Case, party: &str, family: Family) -> Option<End> {
        let address = *case
            .addresses(party)
            .iter()
            .find(|it| Family::of(**it) == family)?;
        let pod = self
            .bed
            .lab
            .pods()
            .find(|pod| pod.addresses().contains(&address));
        let netns = match &pod {
            Some(pod) => pod.netns().clone(),
            None if address == FABRIC => self.bed.lab.fabric().clone(),
            None => self.bed.lab.outside().netns().clone(),
        };
        Some(End {
            address,
            netns,
            pod,
        })
    }

    fn cluster_ip(&self, pod: &Host, family: Family) -> IpAddr {
        let service = self.bed.lab.service(pod.name());
        match family {
            Family::IPv4 => service.addr_v4(0).ip(),
            Family::IPv6 => service.addr_v6(0).ip(),
        }
    }
}

struct End {
    address: IpAddr,
    netns: Netns,
    pod: Option<Host>,
}

fn ports(cases: &[Case]) -> Ports {
    let steps = cases.iter().flat_map(|case| &case.steps);
    let mut ports = Ports::new();
    for probe in steps.flat_map(|step| &step.probes) {
        let of_protocol = ports.entry(protocol(probe)).or_default();
        if !of_protocol.contains(&probe.port) {
            of_protocol.push(probe.port);
        }
    }
    ports
}

/// A pod in every place, each behind a Service.
fn cluster(ports: &Ports) -> Cluster {
    // The cases count their nodes from 1.
    let mut builder = Cluster::builder().nodes(3);
    for slot in 0..SLOTS {
        let [IpAddr::V4(v4), IpAddr::V6(v6)] = world::addresses(slot) else {
            panic!("a place has an address of each family");
        };
        let name = format!("slot-{slot}");
        let pod = PodSpec::new("lab", &name)
            .label("slot", &name)
            .node(1 + slot % 2);
        let mut service = ServiceSpec::new("lab", &name).selects("slot", &name);
        for (protocol, ports) in ports {
            for port in ports {
                service = service.port_of(*port, *port, *protocol);
            }
        }
        builder = builder.pod(pod.ipv4(v4).ipv6(v6)).service(service);
    }
    builder.build().unwrap()
}

/// Has every pod and everybody outside answer at all ports.
fn serve(lab: &Cluster, externals: &BTreeSet<IpAddr>, ports: &Ports) -> Vec<Server> {
    let outside = lab.outside();
    let hosts = lab.pods().chain([outside.clone()]);
    hosts.for_each(|host| host.serve(&ports[&Protocol::Tcp]).unwrap());
    let (in_fabric, placed): (Vec<_>, Vec<_>) = externals.iter().partition(|it| **it == FABRIC);
    let of_pods = lab.pods().map(|pod| {
        (
            pod.netns().clone(),
            pod.name().to_owned(),
            pod.addresses().to_vec(),
        )
    });
    let places = of_pods.chain([
        (outside.netns().clone(), "outside".into(), placed),
        (lab.fabric().clone(), "fabric".into(), in_fabric),
    ]);
    let mut servers = Vec::new();
    for (netns, name, addresses) in places {
        for protocol in [Protocol::Udp, Protocol::Sctp] {
            if let Some(ports) = ports.get(&protocol) {
                servers.push(introduce(&netns, &name, protocol, &addresses, ports).unwrap());
            }
        }
    }
    servers
}

/// Gives the outside host one more address, and the fabric a way to it.
fn place_outside(lab: &Cluster, address: IpAddr) {
    let outside = lab.outside();
    let (length, via) = match address {
        IpAddr::V4(_) => (32, IpAddr::from(outside.ipv4())),
        IpAddr::V6(_) => (128, IpAddr::from(outside.ipv6())),
    };
    outside
        .ip(&format!("addr add {address}/{length} dev lo\n"))
        .unwrap();
    let mut route = lab.fabric().command("ip");
    route.args([
        "route",
        "add",
        &format!("{address}/{length}"),
        "via",
        &via.to_string(),
    ]);
    let said = route.output().unwrap();
    assert!(said.status.success(), "{said:?}");
}

/// Listeners that nobody accepts from: the kernel finishes the handshakes.
fn listen_in_fabric(lab: &Cluster, ports: &[u16]) -> Vec<TcpListener> {
    let listen = || {
        ports
            .iter()
            .map(|port| TcpListener::bind((FABRIC, *port)).unwrap())
            .collect()
    };
    lab.fabric().run(listen).unwrap()
}
