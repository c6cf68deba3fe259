//! What each path of the admin port says.
use std::sync::atomic::Ordering;

use hyper::StatusCode;
use serde_json::json;

use super::Answer;
use crate::ask::{self, Question};
use crate::enforcer::Enforcer;
use crate::flows::{Flow, StageName};
use crate::metrics::{Queues, Readings};
use crate::readiness::Readiness;
use crate::records::{shown, timestamp};

/// Ready or why not, and every fault of the cluster's objects that stands.
pub(super) fn readyz(enforcer: &Enforcer, readiness: &Readiness) -> Answer {
    let (status, mut body) = match readiness.check() {
        Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
        Err(reason) => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("not ready: {reason}\n"),
        ),
    };
    for note in readiness.notes() {
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
        problems: enforcer.table.problems().len(),
        records_lost: enforcer.recorder.lost(),
        spans: enforcer.recorder.spans(),
        queues: Queues::read(&enforcer.queues),
        ready: readiness.check().is_ok(),
        ..Readings::default()
    };
    for flow in enforcer.flows.all() {
        enforcer.metrics.moved(&flow.moved);
        match flow.stage_name() {
            StageName::Held => readings.held += 1,
            StageName::Admitted => readings.admitted += 1,
            StageName::Live => readings.live += 1,
            StageName::Over => {}
        }
    }
    match enforcer.metrics.render(&readings) {
        Ok(body) => Answer {
            status: StatusCode::OK,
            kind: "text/plain; version=0.0.4; charset=utf-8",
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

/// May X talk to Y, as `check` answers it, by the table in force.
pub(super) fn explain(enforcer: &Enforcer, query: &str) -> Answer {
    let table = &enforcer.table;
    let answer = question(query).and_then(|question| {
        table.with_cluster(|cluster| ask::explain(cluster, question, table.settings().own_node))
    });
    match answer {
        Ok(json) => Answer {
            status: StatusCode::OK,
            kind: "application/json",
            body: json + "\n",
        },
        Err(error) => Answer::json(StatusCode::BAD_REQUEST, &json!({ "error": error })),
    }
}

/// Reads `from=..&to=..&port=..&protocol=..`, percent-encoded where need be (RFC 3986).
fn question(query: &str) -> Result<Question, String> {
    let usage = "ask /explain?from=NAMESPACE/POD&to=ADDRESS&port=80&protocol=TCP";
    let (mut from, mut to, mut port, mut protocol) = (None, None, None, None);
    for (key, value) in query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .filter_map(|pair| pair.split_once('='))
    {
        let value = percent_decoded(value);
        match key {
            "from" => from = Some(value),
            "to" => to = Some(value),
            "port" => port = Some(value),
            "protocol" => protocol = Some(value),
            _ => return Err(format!("unknown parameter {key:?}; {usage}")),
        }
    }
    let missing = |name| format!("{name} is missing; {usage}");
    let port = port.ok_or_else(|| missing("port"))?;
    Ok(Question {
        from: from.ok_or_else(|| missing("from"))?,
        to: to.ok_or_else(|| missing("to"))?,
        port: port
            .parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| format!("{port:?} is no port; use a number from 1 to 65535"))?,
        protocol: ask::protocol(protocol.as_deref().unwrap_or("TCP"))
            .map_err(|error| error.to_string())?,
    })
}

/// Undoes `%XX` (RFC 3986); what is not UTF-8 then is replaced.
pub(crate) fn percent_decoded(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.as_bytes().iter();
    while let Some(&byte) = bytes.next() {
        let rest = bytes.as_slice();
        let code = (byte == b'%').then(|| rest.first_chunk::<2>()).flatten();
        let code = code.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        if let Some(code) = code {
            out.push(code);
            bytes.nth(1);
        } else {
            out.push(byte);
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The keys of a record as far as they are known, and the stage.
fn connection(node: &str, flow: &Flow) -> serde_json::Value {
    let stage = flow.stage_name();
    let mut shown = match flow.decision() {
        Some(decision) => {
            let reason = decision.verdict.reason();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_read_from_a_query_string_or_refused_with_what_is_missing() {
        let read =
            question("from=x/a&to=10.0.0.1&port=80").map(|q| (q.from, q.to, q.port, q.protocol));
        assert_eq!(
            read,
            Ok(("x/a".into(), "10.0.0.1".into(), 80, policy::Protocol::Tcp))
        );
        let encoded =
            question("from=x%2Fa&to=fd00%3a%3A1&port=80&protocol=udp").map(|q| (q.from, q.to));
        assert_eq!(encoded, Ok(("x/a".into(), "fd00::1".into())));
        for (query, named) in [
            ("to=x/a&port=80", "from is missing"),
            ("from=x/a&port=80", "to is missing"),
            ("from=x/a&to=x/b", "port is missing"),
            ("from=x/a&to=x/b&port=0", "\"0\" is no port"),
            ("from=x/a&to=x/b&port=http", "\"http\" is no port"),
            ("from=x/a&to=x/b&port=80&protocol=QUIC", "QUIC"),
            ("form=x/a", "unknown parameter \"form\""),
        ] {
            let refused = question(query).map(|_| ()).expect_err(query);
            assert!(refused.contains(named), "{query}: {refused}");
        }
    }

    #[test]
    fn percent_codes_that_are_none_stay_as_they_are() {
        for (text, expected) in [
            ("a%20b", "a b"),
            ("100%", "100%"),
            ("%zz", "%zz"),
            ("%2", "%2"),
            ("%ff", "\u{fffd}"),
        ] {
            assert_eq!(percent_decoded(text), expected);
        }
    }
}
