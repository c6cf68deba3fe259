//! Keeps the list of kernel flows in sync with conntrack: by the events of flows that end, and by comparing both from
//! time to time, since events can be lost.
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use controller::{Severance, Unknown};
use kernel::conntrack::{self, Ended, Endings, Entry, Heard};
use policy::Protocol;
use tracing::{debug, warn};

use super::{ToSever, sever, sever_if_many};
use crate::enforcer::Enforcer;
use crate::kernel_flows::ON_ITS_WAY;
use crate::limits::Source;
use crate::telemetry::occasional::warn_occasionally;

/// How often the list is compared with conntrack.
const COMPARE_EVERY: Duration = Duration::from_secs(15);
/// The pause before the next comparison if endings were lost, as happens all the time while a source begins many flows.
const COMPARE_AGAIN: Duration = Duration::from_secs(5);

/// Follows the ends of kernel flows until the stream of conntrack events breaks.
pub(super) async fn follow(enforcer: Arc<Enforcer>, mut endings: Endings) {
    let mut compare = tokio::time::interval(COMPARE_EVERY);
    let mut compared: Option<Instant> = None;
    loop {
        let due = tokio::select! {
            heard = endings.next(|entry, how| ended(&enforcer, &entry, how)) => match heard {
                Ok(Heard::All) => false,
                Ok(Heard::SomeLost) => {
                    debug!("conntrack events were lost; reading the table again");
                    compared.is_none_or(|it| it.elapsed() > COMPARE_AGAIN)
                }
                Err(error) => {
                    warn!(%error, "lost the stream of conntrack events; records of kernel flows are delayed");
                    break;
                }
            },
            _ = compare.tick() => enforcer.kernel_flows.len() > 0 || enforcer.kernel_flows.is_incomplete(),
        };
        if due {
            compare_in_background(&enforcer).await;
            compared = Some(Instant::now());
        }
    }
    loop {
        compare.tick().await;
        compare_in_background(&enforcer).await;
    }
}

/// Syncs the list with conntrack: adds flows that are not listed, such as those that an
/// earlier daemon allowed, and records those that are gone. Blocks: it dumps all of conntrack.
///
/// # Errors
/// What ctnetlink answers.
fn compare(enforcer: &Enforcer) -> io::Result<()> {
    let round = enforcer.kernel_flows.begin_round(Instant::now());
    let accepted = enforcer.marks.accepted();
    let mut to_sever = ToSever::new();
    let mut reset = Vec::new();
    conntrack::each_marked(accepted, accepted, |entry| {
        let listed = enforcer.kernel_flows.get(&entry.flow);
        if entry.over {
            // It does not count as seen: if it is listed, the event of its end was lost.
            listed.inspect(|flow| flow.note(&entry));
            if entry.reset {
                reset.push(entry);
            }
            return Ok(());
        }
        if let Some(flow) = listed {
            flow.seen_in(&round, &entry);
            return Ok(());
        }
        let client = entry.flow.client.ip();
        let source = Source::behind(enforcer.table.endpoint(client).as_deref(), client);
        if !enforcer.kernel_flows.has_room(&source) {
            // Changes search conntrack for it.
            enforcer.kernel_flows.pass_over();
            return Ok(());
        }
        let opened = entry.began.unwrap_or_else(SystemTime::now);
        match enforcer.enter_kernel_flow(entry.flow, opened) {
            Err(Unknown(_)) => to_sever.push((entry, None)),
            Ok((decision, None)) => to_sever.push((entry, Some(Severance::denied(decision)))),
            Ok((_, Some(_))) => {
                if let Some(flow) = enforcer.kernel_flows.get(&entry.flow) {
                    flow.seen_in(&round, &entry);
                }
            }
        }
        sever_if_many(enforcer, &mut to_sever)
    })?;
    sever(enforcer, &to_sever)?;
    conntrack::delete(&reset.iter().collect::<Vec<_>>())?;
    for flow in enforcer.kernel_flows.end_round(round) {
        if let Some(flow) = enforcer.kernel_flows.remove(&flow.id) {
            enforcer.kernel_flow_ended(&flow);
        }
    }
    enforcer.kernel_flows.shrink();
    Ok(())
}

async fn compare_in_background(enforcer: &Arc<Enforcer>) {
    let enforcer = Arc::clone(enforcer);
    let compared = tokio::task::spawn_blocking(move || compare(&enforcer)).await;
    if let Ok(Err(error)) = compared {
        warn_occasionally!(%error, "cannot read conntrack; retrying");
    }
}

/// Records a flow that has ended. The entry of a reset connection is deleted: later SYNs between its ends need a verdict
/// of their own.
fn ended(enforcer: &Enforcer, entry: &Entry, how: Ended) {
    if how == Ended::Closed
        && entry.reset
        && let Err(error) = conntrack::delete(&[entry])
    {
        // The next comparison deletes it; until then changes find it in the list.
        warn_occasionally!(%error, "cannot delete a reset connection from conntrack");
        return;
    }
    if how == Ended::Deleted && is_of_earlier(enforcer, entry) {
        return;
    }
    if let Some(flow) = enforcer.kernel_flows.ended(entry) {
        enforcer.kernel_flow_ended(&flow);
    }
}

/// Whether the deleted entry of a TCP connection was an earlier one's between the ends of a listed one: a closed one has
/// left the list long before its entry is deleted, and a new one with the same ports can be in it.
fn is_of_earlier(enforcer: &Enforcer, deleted: &Entry) -> bool {
    if deleted.flow.protocol != Protocol::Tcp {
        return false;
    }
    let Some(listed) = enforcer.kernel_flows.get(&deleted.flow) else {
        return true;
    };
    // One that was refused never had a reply, so it had not left the list.
    !deleted.unanswered && listed.entered.elapsed() < ON_ITS_WAY
        // If conntrack cannot be asked, the next comparison finds out.
        || conntrack::has_entry_between(deleted).unwrap_or(true)
}
