//! Keeps what the kernel carries true to the table: flows that a change denies lose their conntrack
//! entry, so that their next packet is judged again.
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use controller::Judgement;
use policy::Protocol;

use crate::conntrack::{self, Entry};
use crate::decision::{Decision, Severance, Way};
use crate::enforcer::Enforcer;
use crate::records::Subject;

/// Judges every flow of these addresses that is not relayed again, and ends those that are denied.
/// Returns how many that were. Blocks: it reads conntrack's whole table.
///
/// Flows that no policy concerned until now are looked at too, as they carry no mark.
///
/// # Errors
/// What ctnetlink answers; some flows may then go on until their next first packet.
pub(crate) fn judge_again(enforcer: &Enforcer, touched: &BTreeSet<IpAddr>) -> io::Result<usize> {
    if touched.is_empty() {
        return Ok(0);
    }
    let relayed = enforcer.marks.client() | enforcer.marks.upstream();
    let concerned = |entry: &Entry| {
        touched.contains(&entry.client.ip()) || touched.contains(&entry.server.ip())
    };
    let mut denied = conntrack::marked(0, relayed)?;
    denied.retain(|entry| concerned(entry) && is_denied(enforcer, entry));
    conntrack::delete(&denied)
}

/// Judges one flow; a denied one is counted and recorded, unless it had ended by itself.
fn is_denied(enforcer: &Enforcer, entry: &Entry) -> bool {
    let Entry {
        client,
        server,
        protocol,
        ..
    } = *entry;
    let port = (!matches!(protocol, Protocol::Other(_))).then_some(server.port());
    let judgement = enforcer
        .table
        .judge(client.ip(), server.ip(), port, protocol);
    let Judgement::Settled { verdict, from, to } = judgement else {
        return false;
    };
    let denied = !verdict.allowed();
    if denied && !entry.over {
        let subject = Subject {
            client,
            server,
            protocol,
            way: Way::Kernel,
            sent: 0,
            received: 0,
            opened: SystemTime::now(),
            attempt: 0,
            seen: None,
        };
        let decision = Arc::new(Decision { verdict, from, to });
        enforcer.severed(subject, Severance::denied(decision));
    }
    denied
}
