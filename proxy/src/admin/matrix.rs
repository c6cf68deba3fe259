//! `/matrix`: the verdicts between all pods, or those of some namespaces, under the current policy table.
use super::Answer;
use super::query::Query;
use crate::cli::ask::{Plan, Port, Scope, Survey};
use crate::enforcer::Enforcer;

/// Maximum number of pods in a response: a quarter of a million pairs, which take some tens of milliseconds.
const MOST: usize = 512;

/// Takes the survey; evaluate it on another thread.
///
/// # Errors
/// What is wrong with the query.
pub(super) fn survey(
    enforcer: &Enforcer,
    query: &str,
) -> Result<impl FnOnce() -> Plan + Send + 'static, Answer> {
    let scope = scope(query).map_err(|error| Answer::refused(&error))?;
    let table = &enforcer.table;
    // Read before the cluster: after a change in between the response is newer than its tag, and the
    // next request gets it again.
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
