//! Owns the cluster's state: applies batches and publishes what they changed.
//!
//! Synchronous and without clock or I/O. A batch is applied as a whole: no reader of the
//! table sees a part of it.
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use policy::{Claim, Cluster, Excess, PodKey, PolicyKey, Resource, Touched};

use crate::table::Table;
use crate::{Batch, Event, Object, ObjectKey, Problem};

/// Applies batches to a cluster and publishes them in a [`Table`].
///
/// A table has one index. It also finds what no single object shows: addresses that two
/// pods claim, and policies that select hostNetwork pods.
#[derive(Debug)]
pub struct Index {
    table: Arc<Table>,
    /// What the table's problems were made of: those of the source, and [`Cluster::findings_version`].
    stated: Option<(Arc<Vec<Problem>>, u64)>,
}

impl Index {
    /// An index over an empty cluster. Nothing is published before the first batch.
    #[must_use]
    pub fn new(table: Arc<Table>) -> Self {
        Self {
            table,
            stated: None,
        }
    }

    /// Applies all of `batch`, then publishes it as one generation, and returns the addresses
    /// whose endpoint changed.
    ///
    /// A batch that changes nothing for policy publishes no generation, except the first; its
    /// problems are published all the same.
    pub fn apply(&mut self, batch: Batch) -> BTreeSet<IpAddr> {
        let mut cluster = self.table.cluster();
        let (mut nodes, mut others) = (false, false);
        for event in &batch.events {
            match event {
                Event::Upsert(Object::Node(_)) | Event::Delete(ObjectKey::Node(_)) => nodes = true,
                Event::Upsert(Object::NetworkPolicy(_))
                | Event::Delete(ObjectKey::NetworkPolicy(_)) => others = true,
                Event::Upsert(_) | Event::Delete(_) => {}
            }
        }
        let touched = apply_to(&mut cluster, batch.events);
        let stated = Some((batch.problems, cluster.findings_version()));
        if self.stated != stated {
            let of_source = stated
                .iter()
                .flat_map(|(problems, _)| problems.iter().cloned());
            let problems = of_source.chain(findings(&cluster)).collect();
            self.table.set_problems(problems);
            self.stated = stated;
        }
        if nodes || others || !touched.is_empty() || self.table.generation() == 0 {
            self.table.publish(&cluster, &touched, nodes);
        }
        touched.addresses
    }
}

/// How many refused policies of one namespace are named one by one.
const REFUSALS: usize = 20;

/// Makes changes to a cluster; those of policies come last, together.
pub(crate) fn apply_to(cluster: &mut Cluster, events: Vec<Event>) -> Touched {
    let (mut touched, mut policies) = (Touched::default(), BTreeMap::new());
    for event in events {
        touched.merge(match event {
            Event::Upsert(Object::Namespace(namespace)) => cluster.upsert_namespace(namespace),
            Event::Upsert(Object::Pod(pod)) => cluster.upsert_pod(pod),
            Event::Upsert(Object::Node(node)) => cluster.upsert_node(node),
            Event::Upsert(Object::NetworkPolicy(policy)) => {
                policies.insert(policy.key().clone(), Some(policy));
                continue;
            }
            Event::Delete(ObjectKey::Namespace(name)) => cluster.remove_namespace(&name),
            Event::Delete(ObjectKey::Pod(key)) => cluster.remove_pod(&key),
            Event::Delete(ObjectKey::Node(name)) => cluster.remove_node(&name),
            Event::Delete(ObjectKey::NetworkPolicy(key)) => {
                policies.insert(key, None);
                continue;
            }
        });
    }
    touched.merge(cluster.change_policies(policies));
    touched
}

/// The problems of a cluster as a whole.
pub(crate) fn findings(cluster: &Cluster) -> Vec<Problem> {
    let claims = cluster.claims().map(|claim| claimed(&claim));
    // The API does not define policy for hostNetwork pods; here, as nearly everywhere, it has no effect.
    let out_of_reach = cluster.out_of_reach();
    let out_of_reach = out_of_reach.filter_map(|(policy, pods)| not_isolated(policy, pods));
    let oversized = oversized(cluster);
    claims
        .chain(out_of_reach)
        .chain(oversized)
        .chain(refusals(cluster))
        .collect()
}

/// The policies that are not in force as written: of each namespace the first [`REFUSALS`] that are
/// refused, and that are too many for a pod, then how many more there are.
fn refusals(cluster: &Cluster) -> Vec<Problem> {
    let mut problems = Vec::new();
    let all = cluster
        .refused()
        .map(|(key, excess)| (key, refused(key, excess)));
    first_of_namespaces(all, "are refused", &mut problems);
    let bound = cluster.budget().bound(Resource::OfAPod);
    let all = cluster.surplus();
    let all = all.filter_map(|(key, pods)| Some((key, too_many(key, pods, bound)?)));
    first_of_namespaces(all, "are too many for some pods", &mut problems);
    problems
}

fn first_of_namespaces<'a>(
    all: impl Iterator<Item = (&'a PolicyKey, Problem)>,
    fate: &str,
    problems: &mut Vec<Problem>,
) {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (key, problem) in all {
        let count = counts.entry(&key.namespace).or_default();
        *count += 1;
        if *count <= REFUSALS {
            problems.push(problem);
        }
    }
    for (namespace, count) in counts {
        if let Some(more @ 1..) = count.checked_sub(REFUSALS) {
            problems.push(
                Problem::error(
                    format!("{more} more policies of the namespace {fate}"),
                    "correct the policies that are named; `portreeve_policies_refused` counts all",
                )
                .of(format_args!("Namespace {namespace}")),
            );
        }
    }
}

fn too_many(policy: &PolicyKey, pods: &BTreeSet<PodKey>, bound: u64) -> Option<Problem> {
    let first = pods.first()?;
    let pods = match pods.len() - 1 {
        0 => first.to_string(),
        more => format!("{first} and {more} more"),
    };
    Some(
        Problem::error(
            format!(
                "{bound} policies whose names come before select {pods} too, and no more count for a pod: it isolates \
                 the pod in both directions and allows nothing there, for the policies that follow too"
            ),
            "select fewer pods, or merge policies; it comes into force there as soon as there is room",
        )
        .of(format_args!("NetworkPolicy {policy}"))
        .at(Resource::OfAPod.field()),
    )
}

fn refused(policy: &PolicyKey, excess: &Excess) -> Problem {
    let Excess {
        resource,
        own,
        count,
        bound,
    } = *excess;
    let what = resource.name();
    let (problem, remedy) = if resource == Resource::Policies {
        (
            format!(
                "it is number {count} of the namespace's policies in the order of their names, and a \
                 namespace may have {bound}: all pods of the namespace are isolated in both directions"
            ),
            "delete policies, or merge their rules",
        )
    } else {
        let with_others = if own == count {
            String::new()
        } else {
            format!(", {count} with the namespace's policies whose names come before")
        };
        (
            format!(
                "it has {own} {what}{with_others}, and a namespace may have {bound}: \
                 it isolates the pods that it selects and allows nothing"
            ),
            "make it smaller, or delete another policy of the namespace; it comes into force as soon \
             as there is room",
        )
    };
    Problem::error(problem, remedy)
        .of(format_args!("NetworkPolicy {policy}"))
        .at(resource.field())
}

fn claimed(claim: &Claim) -> Problem {
    const NAMED: usize = 5;
    let Claim { address, pods, .. } = claim;
    let nodes = claim.nodes.iter().map(|node| format!("node {node}"));
    let pods = pods.iter().map(|pod| format!("pod {pod}"));
    let all: Vec<String> = pods.chain(nodes).collect();
    let mut names = all[..all.len().min(NAMED)].join(", ");
    if all.len() > NAMED {
        names += &format!(" and {} more", all.len() - NAMED);
    }
    let taken = match &claim.holder {
        Some(holder) => format!("{holder} is treated as its holder"),
        None => {
            "it is not known which of them has it, so a rule that allows only one of them does not count".into()
        }
    };
    Problem::warning(
        format!("{address} is claimed by {names}: {taken}; the policies that isolate any of them deny"),
        "find out which pod has it (`kubectl get pods -A -o wide`), delete the other or correct its status.podIPs, \
         and find out who writes pods/status",
    )
    .of(format_args!(
        "Pod {}",
        claim.pods.first().map_or_else(String::new, ToString::to_string)
    ))
    .at("status.podIPs")
}

/// One problem for each namespace, however many pods.
fn oversized(cluster: &Cluster) -> Vec<Problem> {
    let mut namespaces: BTreeMap<&str, (&PodKey, usize)> = BTreeMap::new();
    for pod in cluster.oversized() {
        let (_, count) = namespaces.entry(&pod.namespace).or_insert((pod, 0));
        *count += 1;
    }
    let problem = |(first, count): &(&PodKey, usize)| {
        let others = match count - 1 {
            0 => String::new(),
            more => format!(", and so do {more} more pods of the namespace"),
        };
        let problem = format!(
            "has more than {} labels or {} ports{others}: isolated in both directions, and nothing is allowed",
            policy::Pod::LABELS,
            policy::Pod::PORTS
        );
        Problem::error(problem, "remove labels or ports").of(format_args!("Pod {first}"))
    };
    namespaces.values().map(problem).collect()
}

fn not_isolated(policy: &PolicyKey, pods: &BTreeSet<PodKey>) -> Option<Problem> {
    let first = pods.first()?;
    let problem = match pods.len() - 1 {
        0 => format!("selects {first}, which runs on its node's network (hostNetwork)"),
        more => format!("selects {first} and {more} more on their nodes' network (hostNetwork)"),
    };
    Some(
        Problem::warning(
            format!("{problem}: no policy isolates what has no address of its own"),
            "take the pods off the host network, or do not count on this policy for them",
        )
        .of(format_args!("NetworkPolicy {policy}"))
        .at("spec.podSelector"),
    )
}

#[cfg(test)]
mod tests;
