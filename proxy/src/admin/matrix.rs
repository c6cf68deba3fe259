//! `/matrix`: who may talk to whom, of all pods or of some namespaces, by the table in force.
use super::Answer;
use super::query::Query;
use crate::cli::ask::{Plan, Port, Scope, Survey};
use crate::enforcer::Enforcer;

/// Pods in one answer: a quarter of a million pairs, some tens of milliseconds' work.
const MOST: usize = 512;

/// Takes the survey; to be evaluated where it delays nobody.
///
/// # Errors
/// What is wrong with the query.
pub(super) fn survey(
    enforcer: &Enforcer,
    query: &str,
) -> Result<impl FnOnce() -> Plan + Send + 'static, Answer> {
    let scope = scope(query).map_err(|error| Answer::refused(&error))?;
    let table = &enforcer.table;
    // Read before the cluster: a change in between makes the answer newer than it says, and the
    // next question brings it again.
    let generation = table.generation();
    let survey = table.with_cluster(|cluster| Survey::of(cluster, &scope));
    let own_node = table.settings().own_node;
    Ok(move || survey.plan(generation, own_node))
}

fn scope(query: &str) -> Result<Scope, String> {
    let query = Query::parse(query, &["namespaces", "port", "protocol"])?;
    let protocol = query.protocol()?;
    let names = query.get("namespaces").unwrap_or_default().split(',');
    Ok(Scope {
        namespaces: names
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect(),
        port: query.port()?.map(|port| Port { port, protocol }),
        most: MOST,
    })
}
