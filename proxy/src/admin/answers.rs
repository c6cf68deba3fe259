//! The responses of the admin port's paths.
use std::net::IpAddr;
use std::sync::atomic::Ordering;

use hyper::StatusCode;
use kernel::counters;
use serde_json::json;
use tracing::debug;

use super::Answer;
use super::query::Query;
use crate::cli::ask;
use crate::enforcer::Enforcer;
use crate::kernel_flows::KernelFlow;
use crate::node::readiness::Readiness;
use crate::tcp::connections::{Connection, Ends, StageName};
use crate::telemetry::decision::VerdictKind;
use crate::telemetry::metrics::{Queues, Readings};
use crate::telemetry::record::{shown, timestamp};

/// Ready or why not, and all current diagnostics of the cluster's objects. If another pod's daemon is asked for, this
/// one is not ready, if it knows its pod.
pub(super) fn readyz(
    enforcer: &Enforcer,
    readiness: &Readiness,
    own: Option<&String>,
    query: &str,
) -> Answer {
    let asked = match Query::parse(query, &["pod"]) {
        Ok(asked) => asked,
        Err(error) => return Answer::refused(&error),
    };
    let check = match (own, asked.get("pod")) {
        (Some(own), Some(asked)) if own != asked => Err(format!(
            "this node's daemon is that of pod {own}, and not that of pod {asked}"
        )),
        _ => readiness.check(),
    };
    let (status, mut body) = match check {
        Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
        Err(reason) => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("not ready: {reason}\n"),
        ),
    };
    let of_node = iptables_init::without_timestamps().map(|it| it.to_string());
    let notes = readiness.notes().into_iter().chain(of_node);
    for note in notes.chain(enforcer.recorder.note()) {
        body.push_str(&format!("{note}\n"));
    }
    for problem in enforcer.table.problems().iter() {
        body.push_str(&format!("{problem}\n"));
    }
    Answer::text(status, body)
}

pub(super) fn metrics(enforcer: &Enforcer, readiness: &Readiness) -> Answer {
    let (addresses, policies) = enforcer.table.size();
    let mut readings = Readings {
        generation: enforcer.table.generation(),
        addresses,
        policies,
        refused: enforcer.table.refused(),
        problems: enforcer.table.problems().len(),
        records_lost: enforcer.recorder.lost(),
        spans: enforcer.recorder.spans(),
        queues: Queues::read(&enforcer.queues),
        rules: rules(),
        observers: enforcer.recorder.observed().readers(),
        ready: readiness.check().is_ok(),
        kernel_flows: enforcer.kernel_flows.len(),
        ..Readings::default()
    };
    for flow in enforcer.connections.all() {
        enforcer.metrics.moved(&flow.moved);
        match flow.stage_name() {
            StageName::Held => readings.held += 1,
            StageName::Admitted => readings.admitted += 1,
            StageName::Live => readings.live += 1,
            StageName::Closed => {}
        }
    }
    match enforcer.metrics.render(&readings) {
        Ok(body) => Answer {
            kind: "text/plain; version=0.0.4; charset=utf-8",
            ..Answer::text(StatusCode::OK, body)
        },
        Err(error) => Answer::failed(&error),
    }
}

fn rules() -> Option<counters::Packets> {
    counters::read()
        .inspect_err(|error| debug!(%error, "cannot read the counters of the nft rules"))
        .ok()
}

/// Every current proxied connection that matches the query, oldest first; then every kernel
/// flow.
pub(super) fn connections(enforcer: &Enforcer, query: &str) -> Answer {
    let filter = Query::parse(query, &["pod", "namespace"]).and_then(|query| query.filter());
    let filter = match filter {
        Ok(filter) => filter,
        Err(error) => return Answer::refused(&error),
    };
    let asked_for = |ends: [IpAddr; 2]| {
        let ends = ends.map(|end| enforcer.table.endpoint(end));
        filter.admits(VerdictKind::Allow, [ends[0].as_deref(), ends[1].as_deref()])
    };
    let mut flows = enforcer.connections.all();
    flows.retain(|flow| asked_for(flow.ends()));
    flows.sort_unstable_by_key(|flow| flow.id);
    let relayed = flows.iter().map(|flow| connection(&enforcer.node, flow));
    let mut flows = enforcer.kernel_flows.all();
    flows.retain(|flow| asked_for(flow.ends()));
    flows.sort_unstable_by_key(|flow| flow.id());
    let kernel_flows = flows.iter().map(|flow| kernel_flow(&enforcer.node, flow));
    let listed: Vec<_> = relayed.chain(kernel_flows).collect();
    Answer::json(StatusCode::OK, &listed.into())
}

/// All current policies with the pods that they select.
pub(super) fn policies(enforcer: &Enforcer) -> Answer {
    match serde_json::to_value(enforcer.table.policies()) {
        Ok(listed) => Answer::json(StatusCode::OK, &listed),
        Err(error) => Answer::failed(&error),
    }
}

/// Whether X may connect to Y under the current policy table, as `check` answers.
pub(super) fn explain(enforcer: &Enforcer, query: &str) -> Answer {
    let asked = Query::parse(query, &["from", "to", "port", "protocol", "output"])
        .and_then(|query| Ok((query.question()?, query.is_text()?)));
    let (question, text) = match asked {
        Ok(asked) => asked,
        Err(error) => return Answer::refused(&error),
    };
    let table = &enforcer.table;
    let own_node = table.settings().own_node;
    let answer = table.with_cluster(|cluster| {
        if text {
            ask::tell(cluster, question, own_node)
        } else {
            ask::explain(cluster, question, own_node).map(|json| json + "\n")
        }
    });
    match answer {
        Ok(body) if text => Answer::text(StatusCode::OK, body),
        Ok(body) => Answer {
            kind: "application/json",
            ..Answer::text(StatusCode::OK, body)
        },
        Err(error) => Answer::refused(&error),
    }
}

/// The decisions per pair of pods, and the last denials.
pub(super) fn observed(enforcer: &Enforcer) -> Answer {
    let observed = enforcer.recorder.observed();
    let observed = enforcer
        .table
        .with_cluster(|cluster| observed.json(&enforcer.node, |pod| cluster.pod(pod).is_some()));
    Answer::json(StatusCode::OK, &observed)
}

/// The keys of a record as far as they are known, and the stage.
fn connection(node: &str, flow: &Connection) -> serde_json::Value {
    let stage = flow.stage_name();
    let mut shown = match flow.decision() {
        Some(decision) => {
            let reason = decision.reason();
            shown(&flow.subject(), &decision, reason, node).into()
        }
        None => json!({
            "source.address": flow.key.client.ip(), "source.port": flow.key.client.port(),
            "destination.address": flow.key.server.ip(), "destination.port": flow.key.server.port(),
            "bytes.sent": flow.moved.sent.load(Ordering::Relaxed), "start_time": timestamp(flow.opened),
        }),
    };
    if let Some(fields) = shown.as_object_mut() {
        fields.insert("stage".to_owned(), json!(stage));
        if stage != StageName::Held {
            fields.insert("verdict".to_owned(), json!("allow"));
        }
    }
    shown
}

/// The same of a kernel flow; its byte counts are those of the last dump of conntrack.
fn kernel_flow(node: &str, flow: &KernelFlow) -> serde_json::Value {
    let decision = flow.decision();
    let reason = decision.reason();
    let mut fields = shown(&flow.subject(), &decision, reason, node);
    fields.insert("stage".to_owned(), json!(StageName::Live));
    fields.insert("verdict".to_owned(), json!("allow"));
    fields.into()
}
