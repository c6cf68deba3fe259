//! The shapes of Kubernetes objects, reduced to the fields that policy looks at.
//!
//! One JSON value in, one object of the `policy` crate out, or every problem by its field path.
//! Knows nothing of files, documents or lists. What the API allows to be `null` may be `null`.
mod foreign;
mod json;
mod network_policy;
mod pod;
mod trimmed;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use policy::{Labels, PodKey, PolicyKey};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Object, ObjectKey, Problem};

pub(crate) use foreign::{FOREIGN, REMEDY as FOREIGN_REMEDY, is_foreign};
pub(crate) use json::to_json;
pub(crate) use network_policy::closed_policy;
pub(crate) use trimmed::Trimmed;

/// The kinds that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Namespace,
    Pod,
    Node,
    NetworkPolicy,
}

impl Kind {
    pub(crate) const ALL: [Self; 4] = [Self::Namespace, Self::Pod, Self::Node, Self::NetworkPolicy];

    /// The kind of the object with this key.
    pub(crate) fn of(key: &ObjectKey) -> Self {
        match key {
            ObjectKey::Node(_) => Self::Node,
            ObjectKey::Namespace(_) => Self::Namespace,
            ObjectKey::NetworkPolicy(_) => Self::NetworkPolicy,
            ObjectKey::Pod(_) => Self::Pod,
        }
    }

    /// `kind` as the API writes it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Pod => "Pod",
            Self::Node => "Node",
            Self::NetworkPolicy => "NetworkPolicy",
        }
    }

    /// The only `apiVersion` that is understood.
    pub(crate) fn api_version(self) -> &'static str {
        match self {
            Self::NetworkPolicy => "networking.k8s.io/v1",
            Self::Namespace | Self::Pod | Self::Node => "v1",
        }
    }

    /// The API group; empty for the core.
    pub(crate) fn group(self) -> &'static str {
        self.api_version()
            .split_once('/')
            .map_or("", |(group, _)| group)
    }

    /// What the API calls its objects in paths and permissions.
    pub(crate) fn resource(self) -> &'static str {
        match self {
            Self::Namespace => "namespaces",
            Self::Pod => "pods",
            Self::Node => "nodes",
            Self::NetworkPolicy => "networkpolicies",
        }
    }

    fn namespaced(self) -> bool {
        matches!(self, Self::Pod | Self::NetworkPolicy)
    }
}

/// What is wrong with one field of an object.
fn problem_at(
    field: impl Into<String>,
    problem: impl Into<String>,
    remedy: impl Into<String>,
) -> Box<Problem> {
    Box::new(Problem::error(problem, remedy).at(field))
}

/// Which object `value` is, even if the rest of it is wrong.
///
/// A missing namespace is `default`, as with `kubectl apply`.
pub(crate) fn key_of(kind: Kind, value: &Value) -> Result<ObjectKey, Box<Problem>> {
    let metadata = &value["metadata"];
    let name = match &metadata["name"] {
        Value::String(name) => checked_name("metadata.name", name)?,
        Value::Null => {
            let problem = if metadata["generateName"].is_string() {
                "only generateName is given: the object has no name yet"
            } else {
                "missing"
            };
            return Err(problem_at(
                "metadata.name",
                problem,
                "give the object a name",
            ));
        }
        other => return Err(not_a_string("metadata.name", other)),
    };
    let namespace = match &metadata["namespace"] {
        Value::Null => Arc::from("default"),
        Value::String(namespace) if namespace.is_empty() => Arc::from("default"),
        Value::String(namespace) if kind.namespaced() => {
            checked_name("metadata.namespace", namespace)?
        }
        Value::String(_) => Arc::from(""),
        other => return Err(not_a_string("metadata.namespace", other)),
    };
    Ok(match kind {
        Kind::Namespace => ObjectKey::Namespace(name),
        Kind::Node => ObjectKey::Node(name),
        Kind::Pod => ObjectKey::Pod(PodKey { namespace, name }),
        Kind::NetworkPolicy => ObjectKey::NetworkPolicy(PolicyKey { namespace, name }),
    })
}

/// Reads `value` as the object that `key` names.
///
/// # Errors
/// Every problem that was found.
pub(crate) fn read(key: &ObjectKey, value: Value) -> Result<Object, Vec<Problem>> {
    match key {
        ObjectKey::Namespace(name) => namespace(name, value).map_err(|problem| vec![*problem]),
        ObjectKey::Node(name) => node(name, value),
        ObjectKey::Pod(key) => pod::read(key, value),
        ObjectKey::NetworkPolicy(key) => network_policy::read(key, value),
    }
}

/// A name is printed and looked up as `namespace/name`, so it must hold nothing that breaks that.
fn checked_name(field: &str, name: &str) -> Result<Arc<str>, Box<Problem>> {
    let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | ':' | '_');
    if name.is_empty() || name.len() > 253 || !name.chars().all(valid) {
        return Err(problem_at(
            field,
            format!("{name:?} is not a Kubernetes name"),
            "use up to 253 lower case letters, digits, '-' and '.'",
        ));
    }
    Ok(name.into())
}

const QUOTE: &str = "put the value in quotes";
/// A namespace `y` is the classic case; kubectl refuses it too.
const QUOTE_BOOLEAN: &str =
    "put the value in quotes: YAML reads y, n, yes, no, on and off as true and false";

fn not_a_string(field: &str, value: &Value) -> Box<Problem> {
    let remedy = if value.is_boolean() {
        QUOTE_BOOLEAN
    } else {
        QUOTE
    };
    problem_at(field, format!("{value} is not a string"), remedy)
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    uid: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    creation_timestamp: Option<String>,
    deletion_timestamp: Option<String>,
}

impl Metadata {
    fn labels(self) -> Labels {
        let labels = self.labels.unwrap_or_default();
        labels
            .into_iter()
            .map(|(key, value)| (key.into(), value.into()))
            .collect()
    }
}

#[derive(Deserialize)]
struct NamespaceLite {
    #[serde(default)]
    metadata: Metadata,
}

fn namespace(name: &str, value: Value) -> Result<Object, Box<Problem>> {
    let raw: NamespaceLite = typed("namespace", "", value)?;
    Ok(Object::Namespace(policy::Namespace::new(
        name,
        raw.metadata.labels(),
    )))
}

#[derive(Deserialize)]
struct NodeLite {
    spec: Option<NodeSpec>,
    status: Option<NodeStatus>,
}

#[derive(Deserialize, Default)]
struct NodeSpec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
}

#[derive(Deserialize, Default)]
struct NodeStatus {
    addresses: Option<Vec<NodeAddress>>,
}

#[derive(Deserialize)]
struct NodeAddress {
    #[serde(rename = "type")]
    kind: String,
    address: String,
}

fn node(name: &Arc<str>, value: Value) -> Result<Object, Vec<Problem>> {
    let raw: NodeLite = typed("node", "", value).map_err(|problem| vec![*problem])?;
    let (spec, status) = (raw.spec.unwrap_or_default(), raw.status.unwrap_or_default());
    let mut problems = Vec::new();
    let mut addresses: Vec<IpAddr> = Vec::new();
    for (index, entry) in status.addresses.unwrap_or_default().iter().enumerate() {
        // Hostname, InternalDNS and ExternalDNS may hold an address too, but need not.
        if matches!(entry.kind.as_str(), "InternalIP" | "ExternalIP") {
            let field = format!("status.addresses[{index}].address");
            push_address(&mut addresses, &mut problems, field, &entry.address);
        }
    }
    let listed = spec.pod_cidrs.filter(|cidrs| !cidrs.is_empty());
    let fields: Vec<(String, String)> = match (listed, spec.pod_cidr) {
        (Some(cidrs), _) => (0..)
            .zip(cidrs)
            .map(|(i, cidr): (usize, _)| (format!("spec.podCIDRs[{i}]"), cidr))
            .collect(),
        (None, Some(cidr)) if !cidr.is_empty() => vec![("spec.podCIDR".to_owned(), cidr)],
        (None, _) => Vec::new(),
    };
    let mut pod_cidrs = Vec::new();
    for (field, cidr) in fields {
        match cidr.parse::<IpNet>() {
            Ok(cidr) => pod_cidrs.push(cidr.trunc()),
            Err(_) => {
                let problem = format!("{cidr:?} is not a CIDR");
                let remedy = "write an address and a prefix length, as 10.244.1.0/24";
                problems.push(Problem::error(problem, remedy).at(field));
            }
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    Ok(Object::Node(policy::Node {
        name: Arc::clone(name),
        addresses,
        pod_cidrs,
    }))
}

fn push_address(into: &mut Vec<IpAddr>, problems: &mut Vec<Problem>, field: String, text: &str) {
    match text.parse::<IpAddr>() {
        Ok(address) => {
            let address = address.to_canonical();
            if !into.contains(&address) {
                into.push(address);
            }
        }
        Err(_) => {
            let problem = format!("{text:?} is not an IP address");
            let remedy = "write an IPv4 or IPv6 address without a prefix length";
            problems.push(Problem::error(problem, remedy).at(field));
        }
    }
}

/// Deserializes; an error names the field below `prefix` and the remedy.
fn typed<T: DeserializeOwned>(
    resource: &str,
    prefix: &str,
    value: Value,
) -> Result<T, Box<Problem>> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let field = match (prefix, path.as_str()) {
            (_, ".") => prefix.to_owned(),
            ("", path) => path.to_owned(),
            (prefix, path) => format!("{prefix}.{path}"),
        };
        let problem = error.into_inner().to_string();
        let remedy = remedy(resource, &field, &problem);
        problem_at(field, problem, remedy)
    })
}

fn remedy(resource: &str, field: &str, problem: &str) -> String {
    if problem.contains("expected a string") {
        let boolean = problem.contains("boolean");
        return if boolean { QUOTE_BOOLEAN } else { QUOTE }.to_owned();
    }
    let path: String = field.split('.').fold(resource.to_owned(), |path, part| {
        format!("{path}.{}", part.split('[').next().unwrap_or(part))
    });
    let path = path.trim_end_matches('.');
    let see = format!("see `kubectl explain {path}`");
    if problem.starts_with("unknown field") {
        format!("correct or remove it, an unknown field could change what is allowed; {see}")
    } else if problem.starts_with("missing field") {
        format!("add it; {see}")
    } else {
        see
    }
}

#[cfg(test)]
mod tests;
