//! A scenario as a file: cluster, policies, what happens to them, and who may then talk to whom.
//!
//! The format is described in `policy/tests/cases/README.md`. Knows nothing of the `policy` crate, so
//! that the same files can be replayed on real connections.
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::grid::Grid;
use super::world::{Change, ContainerPort, Key, Labels, World, pod};

/// A scenario may use as many pods as the lab has places.
const MOST_PODS: usize = 9;

/// One file.
#[derive(Debug)]
pub struct Case {
    /// Where it was read.
    pub file: PathBuf,
    /// What it shows.
    pub title: String,
    /// Why the grids are what they are.
    pub reason: String,
    /// The cluster before the first step, without a policy.
    pub start: World,
    /// Hosts outside the cluster, each with one address.
    pub externals: BTreeMap<String, IpAddr>,
    /// What happens, in order.
    pub steps: Vec<Step>,
}

/// What happens, and what must hold afterwards.
#[derive(Debug)]
pub struct Step {
    /// In words.
    pub does: String,
    /// NetworkPolicy objects to create or update.
    pub manifests: Vec<Value>,
    /// All that the step does, in order; the manifests included.
    pub changes: Vec<Change>,
    /// What must hold after it.
    pub probes: Vec<Probe>,
}

/// A whole truth table for one port.
#[derive(Debug)]
pub struct Probe {
    /// The destination port.
    pub port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// `None`: the table holds for every family that both ends have.
    pub family: Option<Family>,
    /// Which connections must succeed.
    pub expected: Grid,
}

/// Of an IP address.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub enum Family {
    /// `10.244.1.10` and its like.
    IPv4,
    /// `fd00::1` and its like.
    IPv6,
}

impl Case {
    /// Reads the `text` of `file`.
    ///
    /// # Panics
    /// When the text cannot be understood, naming the file.
    pub fn parse(file: &Path, text: &str) -> Self {
        // Namespace `y` is a name and no boolean, as it is to kubectl.
        let options = serde_saphyr::options! { strict_booleans: true };
        let written = serde_saphyr::from_str_with_options(text, options);
        let case = written
            .map_err(|error| error.to_string())
            .and_then(|it: Written| it.case(file));
        case.unwrap_or_else(|problem| panic!("{}: {problem}", file.display()))
    }

    /// The addresses of a pod or an external host.
    pub fn addresses(&self, party: &str) -> &[IpAddr] {
        match self.externals.get(party) {
            Some(address) => std::slice::from_ref(address),
            None => &self.start.pods[&key(party).expect("grids name pods of the case")].addresses,
        }
    }
}

impl Family {
    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() {
            Self::IPv4
        } else {
            Self::IPv6
        }
    }
}

fn key(text: &str) -> Result<Key, String> {
    let (namespace, name) = text
        .split_once('/')
        .ok_or_else(|| format!("`{text}` is not namespace/name"))?;
    Ok((namespace.into(), name.into()))
}

/// The file as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    title: String,
    reason: String,
    pods: Option<Vec<WrittenPod>>,
    #[serde(default)]
    namespaces: BTreeMap<String, Labels>,
    #[serde(default)]
    externals: BTreeMap<String, IpAddr>,
    steps: Vec<WrittenStep>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenPod {
    pod: String,
    labels: Labels,
    ports: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct WrittenStep {
    does: String,
    #[serde(default)]
    delete: Vec<String>,
    #[serde(default)]
    label_namespaces: BTreeMap<String, Labels>,
    #[serde(default)]
    label_pods: BTreeMap<String, Labels>,
    #[serde(default)]
    apply: Vec<Value>,
    expect: Vec<WrittenProbe>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenProbe {
    probe: String,
    family: Option<Family>,
    grid: String,
}

impl Written {
    fn case(self, file: &Path) -> Result<Case, String> {
        let mut start = self.pods.map_or_else(|| Ok(World::nine_pods()), pods)?;
        start.namespaces.extend(self.namespaces);
        if start.pods.len() > MOST_PODS {
            return Err(format!(
                "{} pods are more than the {MOST_PODS} places of the lab",
                start.pods.len()
            ));
        }
        let parties: Vec<String> = start
            .pods
            .keys()
            .map(|(namespace, name)| format!("{namespace}/{name}"))
            .collect();
        let mut state = start.clone();
        let mut steps = Vec::new();
        for step in self.steps {
            let step = step.step(&mut state)?;
            for probe in &step.probes {
                probe
                    .check(&parties, &self.externals)
                    .map_err(|problem| format!("{}: {problem}", step.does))?;
            }
            steps.push(step);
        }
        if steps.is_empty() {
            return Err("a case has at least one step".into());
        }
        Ok(Case {
            file: file.into(),
            title: self.title,
            reason: self.reason,
            start,
            externals: self.externals,
            steps,
        })
    }
}

/// The pods of a file take the places of the cluster in the order in which they are written.
fn pods(written: Vec<WrittenPod>) -> Result<World, String> {
    let mut world = World::nodes_only();
    for (slot, written) in written.into_iter().enumerate() {
        let (namespace, name) = key(&written.pod)?;
        let mut pod = pod(slot, &namespace, &name, written.labels);
        if let Some(ports) = written.ports {
            pod.ports = ports
                .iter()
                .map(|text| container_port(text))
                .collect::<Result<_, _>>()?;
        }
        world.apply(&Change::Pod(pod));
    }
    Ok(world)
}

/// `80/TCP` or `name:80/TCP`.
fn container_port(text: &str) -> Result<ContainerPort, String> {
    let (name, rest) = match text.split_once(':') {
        Some((name, rest)) => (Some(name.to_owned()), rest),
        None => (None, text),
    };
    let (number, protocol) = port(rest)?;
    Ok(ContainerPort {
        name,
        number,
        protocol,
    })
}

fn port(text: &str) -> Result<(u16, String), String> {
    let parsed = text
        .split_once('/')
        .and_then(|(number, protocol)| Some((number.parse().ok()?, protocol)));
    match parsed {
        Some((number, protocol @ ("TCP" | "UDP" | "SCTP"))) => Ok((number, protocol.into())),
        _ => Err(format!("`{text}` is not a port and protocol as in 80/TCP")),
    }
}

impl WrittenStep {
    fn step(self, state: &mut World) -> Result<Step, String> {
        let mut changes = Vec::new();
        for policy in &self.delete {
            let key = key(policy)?;
            if !state.policies.contains_key(&key) {
                return Err(format!(
                    "{}: there is no policy {policy} to delete",
                    self.does
                ));
            }
            changes.push(Change::NoPolicy(key));
        }
        for (name, added) in self.label_namespaces {
            let mut labels = state.namespaces.get(&name).cloned().unwrap_or_default();
            labels.extend(added);
            changes.push(Change::Namespace(name, labels));
        }
        for (name, added) in self.label_pods {
            let pod = state.pods.get(&key(&name)?).cloned();
            let mut pod = pod.ok_or_else(|| format!("{}: there is no pod {name}", self.does))?;
            pod.labels.extend(added);
            changes.push(Change::Pod(pod));
        }
        changes.extend(self.apply.iter().cloned().map(Change::Policy));
        changes.iter().for_each(|change| state.apply(change));
        let probes = self
            .expect
            .into_iter()
            .map(WrittenProbe::probe)
            .collect::<Result<_, _>>();
        Ok(Step {
            probes: probes?,
            does: self.does,
            manifests: self.apply,
            changes,
        })
    }
}

impl WrittenProbe {
    fn probe(self) -> Result<Probe, String> {
        let (port, protocol) = port(&self.probe)?;
        let expected =
            Grid::parse(&self.grid).map_err(|problem| format!("{}: {problem}", self.probe))?;
        Ok(Probe {
            port,
            protocol,
            family: self.family,
            expected,
        })
    }
}

impl Probe {
    /// A grid must be whole, and say what every case has in common.
    fn check(&self, pods: &[String], externals: &BTreeMap<String, IpAddr>) -> Result<(), String> {
        let Grid { parties, cells } = &self.expected;
        if let Some(missing) = pods.iter().find(|pod| !parties.contains(pod)) {
            return Err(format!("the grid lacks pod {missing}"));
        }
        if let Some(stranger) = parties
            .iter()
            .find(|party| !pods.contains(party) && !externals.contains_key(*party))
        {
            return Err(format!(
                "the grid names {stranger}, which is neither a pod nor an external host"
            ));
        }
        for (row, from) in parties.iter().enumerate() {
            if pods.contains(from) && cells[row][row] != Some(true) {
                return Err(format!("{from} always reaches itself"));
            }
            for (column, to) in parties.iter().enumerate() {
                let outside = externals.contains_key(from) && externals.contains_key(to);
                if outside != cells[row][column].is_none() {
                    return Err(format!(
                        "{from} to {to}: `-` is for two external hosts, and for them only"
                    ));
                }
            }
        }
        Ok(())
    }
}
