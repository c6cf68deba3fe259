//! Keeps kernel flows in sync with the policy table, and their list in sync with conntrack.
//!
//! A flow that a change denies is marked as severed in conntrack: from then on each of its packets is evaluated, for
//! as long as either side sends. A TCP entry is deleted a little later: until then the reset of a
//! node that proxies the connection passes, and without an entry only a SYN starts a new one.
//! The list says which flows these are; conntrack is dumped only to find their entries, at the
//! start, and from time to time for missed events.
mod follow;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use controller::{Severance, Unknown};
use kernel::conntrack::{self, Endings, Entry, FlowId};
use policy::Protocol;
use tokio::task::JoinSet;
use tracing::warn;

use crate::enforcer::Enforcer;
use crate::kernel_flows::{ON_ITS_WAY, unlisted};
use crate::telemetry::occasional::warn_occasionally;

use follow::follow;

/// When a severed connection is deleted: by then the other node has learnt of the change and reset it.
const DELETE_AFTER: Duration = Duration::from_secs(2);
/// The pause before conntrack is searched again for a flow that was just allowed.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// The pause after an error of conntrack.
const RETRY: Duration = Duration::from_secs(1);
/// How long a change waits until unlisted flows are evaluated again. It takes longer only for a source with many flows.
const PATIENCE: Duration = Duration::from_millis(100);
/// If a change denies more listed flows than this, they are ended in the background.
const MANY: usize = 256;
/// Flows that are ended together.
const AT_ONCE: usize = 1024;

/// Flows to sever, and why; those without a decision are not recorded.
type ToSever = Vec<(Entry, Option<Severance>)>;

/// Starts the background tasks.
pub(crate) fn spawn(tasks: &mut JoinSet<()>, enforcer: &Arc<Enforcer>, endings: Endings) {
    tasks.spawn(follow(Arc::clone(enforcer), endings));
    tasks.spawn(delete_severed(Arc::clone(enforcer)));
    tasks.spawn(evaluate_backlog(Arc::clone(enforcer)));
}

/// Evaluates the listed flows of these addresses again and severs those that are denied, or one of whose
/// pods is no longer the one behind its address. Blocks if there are any.
///
/// To be called after the table has changed.
///
/// # Errors
/// What ctnetlink answers; to be called again then.
pub(crate) fn evaluate_again(enforcer: &Enforcer, touched: &BTreeSet<IpAddr>) -> io::Result<()> {
    let denied = denied_of(enforcer, touched);
    let many = denied.len() > MANY;
    if !many {
        sever_listed(enforcer, touched, denied)?;
    }
    if many || enforcer.kernel_flows.is_incomplete() {
        enforcer.kernel_flows.backlog.add(touched, PATIENCE);
    }
    Ok(())
}

/// Does the same for all flows of these addresses, listed or not, however long it takes.
fn evaluate_all_again(enforcer: &Enforcer, touched: &BTreeSet<IpAddr>) -> io::Result<()> {
    let began = Instant::now();
    sever_listed(enforcer, touched, denied_of(enforcer, touched))?;
    let accepted = enforcer.marks.accepted();
    let evaluate = || {
        let unlisted = |flow: &FlowId| enforcer.kernel_flows.get(flow).is_none();
        evaluate_unlisted(enforcer, accepted, accepted, touched, unlisted)
    };
    evaluate()?;
    // A flow that was allowed just before the change may get its conntrack entry only now.
    if enforcer.kernel_flows.has_unlisted_on_its_way(began) {
        thread::sleep(ON_ITS_WAY.saturating_sub(began.elapsed()));
        evaluate()?;
    }
    Ok(())
}

/// The listed flows of these addresses that are denied now, and why.
fn denied_of(enforcer: &Enforcer, touched: &BTreeSet<IpAddr>) -> HashMap<FlowId, Severance> {
    let mut denied: HashMap<FlowId, Severance> = HashMap::new();
    for flow in enforcer.kernel_flows.of(touched) {
        let now = enforcer.decide(&flow.id);
        let (client, server) = (flow.id.client.ip(), flow.id.server.ip());
        if let Some(severance) = flow.decision().overturned(client, server, &now) {
            denied.insert(flow.id, severance);
        } else if let Ok(now) = now {
            // So the flow does not keep the old policies in memory.
            flow.decide(now);
        }
    }
    denied
}

/// Ends listed flows that have an end among `touched`. Conntrack may have several entries of one flow, such as one by a
/// Service and one without. It names a flow otherwise than the gate if headers precede TCP: those of its entries that
/// are not listed are evaluated too.
fn sever_listed(
    enforcer: &Enforcer,
    touched: &BTreeSet<IpAddr>,
    mut denied: HashMap<FlowId, Severance>,
) -> io::Result<()> {
    let accepted = enforcer.marks.accepted();
    while !denied.is_empty() {
        let ends = denied
            .keys()
            .flat_map(|id| [id.client.ip(), id.server.ip()]);
        let ends = ends.filter(|end| touched.contains(end)).collect();
        let mut to_sever = ToSever::new();
        let mut found = HashSet::new();
        conntrack::each_with_end(&ends, accepted, accepted, |entry| {
            if let Some(severance) = denied.get(&entry.flow) {
                found.insert(entry.flow);
                to_sever.push((entry, Some(severance.clone())));
            } else if enforcer.kernel_flows.get(&entry.flow).is_none() {
                add_if_denied(enforcer, touched, entry, &mut to_sever);
            }
            sever_if_many(enforcer, &mut to_sever)
        })?;
        sever(enforcer, &to_sever)?;
        // A flow that has ended will not appear; one that was just allowed will.
        denied.retain(|id, _| {
            let listed = enforcer
                .kernel_flows
                .get(id)
                .filter(|_| !found.contains(id));
            listed.is_some_and(|flow| flow.entered.elapsed() < ON_ITS_WAY)
        });
        if !denied.is_empty() {
            thread::sleep(LOOK_AGAIN);
        }
    }
    Ok(())
}

/// Evaluates the unmarked flows of addresses that have just become isolated, and
/// ends those that are denied. Blocks.
///
/// Call this after the nft sets are in sync: later packets are queued anyway.
///
/// # Errors
/// What ctnetlink answers; to be called again then.
pub(crate) fn evaluate_unmarked(
    enforcer: &Enforcer,
    isolated: &BTreeSet<IpAddr>,
) -> io::Result<()> {
    if isolated.is_empty() {
        return Ok(());
    }
    let marks = enforcer.marks;
    evaluate_unlisted(enforcer, 0, marks.mask(), isolated, |_| true)
}

/// Deletes severed connections, also those of an earlier daemon, from conntrack once their resets have passed.
async fn delete_severed(enforcer: Arc<Enforcer>) {
    let severed = enforcer.marks.severed();
    let left = tokio::task::spawn_blocking(move || conntrack::marked(severed, severed)).await;
    match left {
        Ok(Ok(mut left)) => {
            left.retain(|entry| entry.flow.protocol == Protocol::Tcp);
            enforcer.kernel_flows.await_delete(left);
        }
        // They stay blocked until their conntrack entries time out.
        Ok(Err(error)) => warn!(%error, "cannot list the flows that the previous daemon severed"),
        Err(_) => {}
    }
    let mut every = tokio::time::interval(DELETE_AFTER / 4);
    loop {
        every.tick().await;
        let due = enforcer.kernel_flows.due_for_delete(DELETE_AFTER);
        if due.is_empty() {
            continue;
        }
        let delete = move || conntrack::delete(&due.iter().collect::<Vec<_>>());
        if let Ok(Err(error)) = tokio::task::spawn_blocking(delete).await {
            // It stays blocked until its conntrack entry times out.
            warn_occasionally!(%error, "cannot delete severed connections from conntrack");
        }
    }
}

/// Evaluates the flows of these addresses in conntrack whose mark under `mask` is `mark`, but for those
/// that are not `concerned`, and severs those that are denied.
fn evaluate_unlisted(
    enforcer: &Enforcer,
    mark: u32,
    mask: u32,
    addresses: &BTreeSet<IpAddr>,
    concerned: impl Fn(&FlowId) -> bool,
) -> io::Result<()> {
    let mut to_sever = ToSever::new();
    conntrack::each_with_end(addresses, mark, mask, |entry| {
        if !concerned(&entry.flow) {
            return Ok(());
        }
        add_if_denied(enforcer, addresses, entry, &mut to_sever);
        sever_if_many(enforcer, &mut to_sever)
    })?;
    sever(enforcer, &to_sever)
}

/// Evaluates a flow that is not listed, and adds it to those to sever if it is denied.
fn add_if_denied(
    enforcer: &Enforcer,
    addresses: &BTreeSet<IpAddr>,
    entry: Entry,
    to_sever: &mut ToSever,
) {
    match enforcer.decide(&entry.flow) {
        // The earlier owner of the address is unknown: no pod inherits the flow.
        Err(Unknown(unknown)) if addresses.contains(&unknown) => to_sever.push((entry, None)),
        Ok(decision) if !decision.verdict.allowed() => {
            // A flow without a reply may never have been allowed: it is not recorded as severed.
            let severance = (!entry.unanswered).then(|| Severance::denied(Arc::new(decision)));
            to_sever.push((entry, severance));
        }
        Ok(_) | Err(Unknown(_)) => {}
    }
}

/// Ends the flows if there are [`AT_ONCE`] or more, so that no more than that wait in memory.
fn sever_if_many(enforcer: &Enforcer, to_sever: &mut ToSever) -> io::Result<()> {
    if to_sever.len() >= AT_ONCE {
        sever(enforcer, to_sever)?;
        to_sever.clear();
    }
    Ok(())
}

/// Severs flows in conntrack and records them, except those that had already ended.
fn sever(enforcer: &Enforcer, to_sever: &ToSever) -> io::Result<()> {
    if to_sever.is_empty() {
        return Ok(());
    }
    for (entry, severance) in to_sever {
        // Before the deletion, since its event may arrive before the reply to the request.
        if let (Some(flow), Some(severance), false) = (
            enforcer.kernel_flows.get(&entry.flow),
            severance,
            entry.over,
        ) {
            flow.sever(severance.clone());
        }
    }
    let listed: Vec<_> = to_sever
        .iter()
        .map(|(entry, _)| enforcer.kernel_flows.get(&entry.flow))
        .collect();
    let unlisted_and_denied: Vec<_> = to_sever
        .iter()
        .zip(&listed)
        .filter(|((_, severance), listed)| severance.is_some() && listed.is_none())
        .map(|((entry, _), _)| entry)
        .collect();
    // A change that found it listed has marked it since it was read, then has taken it out of the list and recorded it.
    let mut unmarked = conntrack::keep_their_marks(&unlisted_and_denied)?.into_iter();
    let entries = to_sever.iter().map(|(entry, _)| entry);
    // An unanswered client retransmits its SYN, which is evaluated again.
    let is_tcp = |entry: &Entry| entry.flow.protocol == Protocol::Tcp;
    let (others, live): (Vec<_>, Vec<_>) =
        entries.partition(|entry| entry.over || entry.unanswered && is_tcp(entry));
    conntrack::delete(&others)?;
    let marks = enforcer.marks;
    // Before they are marked: if only some can be marked, all are deleted nevertheless.
    let connections = live.iter().filter(|entry| is_tcp(entry));
    enforcer
        .kernel_flows
        .await_delete(connections.copied().cloned());
    conntrack::set_mark(&live, marks.severed(), marks.mask())?;
    for ((entry, severance), listed) in to_sever.iter().zip(listed) {
        match (listed, severance) {
            // Only the caller that removes it from the list records it.
            (Some(_), _) => {
                if let Some(flow) = enforcer.kernel_flows.remove(&entry.flow) {
                    flow.note(entry);
                    enforcer.kernel_flow_ended(&flow);
                }
            }
            (None, Some(severance)) => {
                if unmarked.next() == Some(true) && !entry.over {
                    enforcer.severed(unlisted(entry), severance.clone());
                }
            }
            (None, None) => {}
        }
    }
    Ok(())
}

/// After changes, evaluates again the flows that are not listed. One pod can have so many of them that it takes seconds.
async fn evaluate_backlog(enforcer: Arc<Enforcer>) {
    loop {
        enforcer.kernel_flows.backlog.added().await;
        loop {
            let of_task = Arc::clone(&enforcer);
            let evaluate = move || {
                let evaluate = |all: &BTreeSet<IpAddr>| evaluate_all_again(&of_task, all);
                of_task.kernel_flows.backlog.work(evaluate)
            };
            match tokio::task::spawn_blocking(evaluate).await {
                Ok(Err(error)) => {
                    warn!(%error, "cannot evaluate unlisted kernel flows again; retrying");
                    tokio::time::sleep(RETRY).await;
                }
                _ => break,
            }
        }
    }
}
