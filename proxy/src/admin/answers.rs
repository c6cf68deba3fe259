//! What each path of the admin port says.
use std::sync::atomic::Ordering;

use hyper::StatusCode;
use serde_json::json;

use super::Answer;
use crate::enforcer::Enforcer;
use crate::flows::{Flow, StageName};
use crate::metrics::Readings;
use crate::readiness::Readiness;
use crate::records::{record, timestamp};

/// Ready or why not, and every fault of the cluster's objects that stands.
pub(super) fn readyz(enforcer: &Enforcer, readiness: &Readiness) -> Answer {
    let (status, mut body) = match readiness.check() {
        Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
        Err(reason) => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("not ready: {reason}\n"),
        ),
    };
    for problem in enforcer.table.problems().iter() {
        body.push_str(&format!("{problem}\n"));
    }
    Answer::text(status, body)
}

pub(super) fn metrics(enforcer: &Enforcer, readiness: &Readiness) -> Answer {
    let readings = Readings {
        connections: enforcer.flows.len(),
        generation: enforcer.table.generation(),
        problems: enforcer.table.problems().len(),
        records_lost: enforcer.recorder.lost(),
        queue_drops: kernel_queue_drops(),
        ready: readiness.check().is_ok(),
    };
    match enforcer.metrics.render(&readings) {
        Ok(body) => Answer {
            status: StatusCode::OK,
            kind: "application/openmetrics-text; version=1.0.0; charset=utf-8",
            body,
        },
        Err(error) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

/// Every connection that stands, oldest first.
pub(super) fn connections(enforcer: &Enforcer) -> Answer {
    let mut flows = enforcer.flows.all();
    flows.sort_unstable_by_key(|flow| flow.id);
    let listed: Vec<_> = flows
        .iter()
        .map(|flow| connection(&enforcer.node, flow))
        .collect();
    Answer::json(StatusCode::OK, &listed.into())
}

/// Every policy in force with the pods that it selects.
pub(super) fn policies(enforcer: &Enforcer) -> Answer {
    match serde_json::to_value(enforcer.table.policies()) {
        Ok(listed) => Answer::json(StatusCode::OK, &listed),
        Err(error) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

/// The keys of a record as far as they are known, and the stage.
fn connection(node: &str, flow: &Flow) -> serde_json::Value {
    let stage = flow.stage_name();
    let mut shown = match flow.decision() {
        Some(decision) => record("allow", node, flow, &decision, decision.verdict.reason()),
        None => json!({
            "source.address": flow.key.client.ip(), "source.port": flow.key.client.port(),
            "destination.address": flow.key.server.ip(), "destination.port": flow.key.server.port(),
            "bytes.sent": flow.moved.sent.load(Ordering::Relaxed), "start_time": timestamp(flow.opened),
        }),
    };
    if let Some(fields) = shown.as_object_mut() {
        fields.remove("end_time");
        fields.insert("stage".to_owned(), json!(stage));
        if stage == StageName::Held {
            fields.remove("verdict");
        }
    }
    shown
}

/// Packets that the kernel dropped at our queues for want of room, from
/// /proc/net/netfilter/nfnetlink_queue (columns 6 and 7); 0 where that cannot be read.
fn kernel_queue_drops() -> u64 {
    let Ok(table) = std::fs::read_to_string("/proc/net/netfilter/nfnetlink_queue") else {
        return 0;
    };
    let dropped = |line: &str| -> u64 {
        line.split_whitespace()
            .skip(5)
            .take(2)
            .filter_map(|count| count.parse::<u64>().ok())
            .sum()
    };
    table.lines().map(dropped).sum()
}

pub(super) fn explain(_enforcer: &Enforcer, _query: &str) -> Answer {
    Answer::text(StatusCode::NOT_IMPLEMENTED, "")
}
