//! Reports faults to the authors of policies: one Kubernetes Event on the object.
//!
//! The Event's name is made of the policy's uid and version and of the fault's kind, so every node
//! computes the same one, and the API server rejects all but the first. Knows nothing of how faults
//! are found.
use std::collections::{BTreeMap, BTreeSet};

use kube::Client;
use kube::api::PostParams;
use kube::core::Request;
use policy::PolicyKey;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tracing::{debug, warn};

use super::connect::{Connector, fingerprint};
use super::error::{ApiError, RequestInfo};
use super::state::Written;
use crate::objects::Kind;
use crate::{Problem, Severity};

/// How many Events may wait for the API server; more are sent at the next change.
const WAITING: usize = 256;
/// What the API allows for a note (`events.k8s.io/v1` Event, `note`).
const NOTE_BYTES: usize = 1024;

/// Hands Events to a task that sends them one by one.
#[derive(Debug)]
pub(super) struct EventReporter {
    events: mpsc::Sender<Value>,
    /// Names of those that were handed over, by the policy that they are about.
    sent: BTreeMap<PolicyKey, BTreeSet<String>>,
    node: String,
}

impl EventReporter {
    /// A reporter for `node`, and the task's work.
    pub(super) fn new(
        node: &str,
        connector: Connector,
    ) -> (Self, impl Future<Output = ()> + use<>) {
        let (events, waiting) = mpsc::channel(WAITING);
        let reporter = Self {
            events,
            sent: BTreeMap::new(),
            node: node.to_owned(),
        };
        (reporter, send(waiting, connector))
    }

    /// Reports the problems of policies that the API server has; `written` finds them.
    pub(super) fn report<'a>(
        &mut self,
        problems: &[Problem],
        written: impl Fn(&PolicyKey) -> Option<&'a Written>,
    ) {
        self.sent.retain(|key, _| written(key).is_some());
        for problem in problems {
            let key = problem.object.as_deref().and_then(policy_key);
            let Some((key, written)) = key.and_then(|key| Some((key.clone(), written(&key)?)))
            else {
                continue;
            };
            let name = name(&key, written, problem);
            let sent = self.sent.entry(key.clone()).or_default();
            if sent.contains(&name) {
                continue;
            }
            let event = event(&name, &key, written, problem, &self.node);
            if self.events.try_send(event).is_ok() {
                sent.insert(name);
            }
        }
    }
}

/// The key in `NetworkPolicy x/deny`.
fn policy_key(object: &str) -> Option<PolicyKey> {
    let (kind, key) = object.split_once(' ')?;
    let (namespace, name) = key.split_once('/')?;
    (kind == Kind::NetworkPolicy.name()).then(|| PolicyKey {
        namespace: namespace.into(),
        name: name.into(),
    })
}

fn reason(problem: &Problem) -> &'static str {
    match problem.severity {
        Severity::Error => "NotEnforcedAsWritten",
        Severity::Warning => "NotInFullEffect",
    }
}

/// Of the Event: the same on every node, and another for another version of the policy.
fn name(key: &PolicyKey, written: &Written, problem: &Problem) -> String {
    let (uid, version) = (&written.uid, &written.resource_version);
    let (reason, field) = (
        reason(problem),
        problem.field.as_deref().unwrap_or_default(),
    );
    let digest = fingerprint(format!("{uid} {version} {reason} {field}").as_bytes());
    let stem = &key.name[..key.name.floor_char_boundary(200)];
    format!("{}.{}", stem.trim_end_matches(['.', '-']), &digest[..16])
}

fn event(name: &str, key: &PolicyKey, written: &Written, problem: &Problem, node: &str) -> Value {
    let place = problem
        .field
        .as_deref()
        .map_or_else(String::new, |field| format!("{field}: "));
    let mut note = format!("{place}{}; {}", problem.problem, problem.remedy);
    note.truncate(note.floor_char_boundary(NOTE_BYTES));
    let now = humantime::format_rfc3339_micros(std::time::SystemTime::now()).to_string();
    json!({
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {
            "name": name,
            "namespace": &*key.namespace,
        },
        "eventTime": now,
        "type": "Warning",
        "reason": reason(problem),
        "action": "Enforce",
        "note": note,
        "reportingController": "portreeve",
        "reportingInstance": format!("portreeve-{node}"),
        "regarding": {
            "apiVersion": Kind::NetworkPolicy.api_version(),
            "kind": Kind::NetworkPolicy.name(),
            "namespace": &*key.namespace,
            "name": &*key.name,
            "uid": written.uid,
            "resourceVersion": written.resource_version,
        },
    })
}

async fn send(mut events: mpsc::Receiver<Value>, connector: Connector) {
    let mut client = None;
    // A missing permission is logged once, not for each Event.
    let mut last = None;
    while let Some(event) = events.recv().await {
        let sent = send_one(&mut client, &connector, &event).await;
        let cause = sent.as_ref().err().map(ApiError::cause);
        match sent {
            Ok(()) => debug!(%event, "Event sent"),
            Err(error) => {
                client = None;
                if last != cause {
                    warn!(
                        "cannot send an Event, so the policy's fault is only in the log: {error}"
                    );
                }
            }
        }
        last = cause;
    }
}

async fn send_one(
    client: &mut Option<Client>,
    connector: &Connector,
    event: &Value,
) -> Result<(), ApiError> {
    let client = match client {
        Some(client) => client,
        None => client.insert(connector.client().await?),
    };
    let namespace = event["metadata"]["namespace"].as_str().unwrap_or_default();
    let request = Request::new(format!(
        "/apis/events.k8s.io/v1/namespaces/{namespace}/events"
    ));
    let request = request.create(&PostParams::default(), event.to_string().into_bytes());
    let request = request.map_err(|error| ApiError::config(&error))?;
    match client.request_text(request).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        Err(error) => Err(ApiError::from_client(
            &error,
            RequestInfo {
                verb: "create",
                group: "events.k8s.io",
                resource: "events",
            },
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> PolicyKey {
        policy_key("NetworkPolicy x/deny").expect("a key")
    }

    fn written(version: &str) -> Written {
        let mut written = Written::default();
        written.uid = "u".to_owned();
        written.resource_version = version.to_owned();
        written
    }

    #[test]
    fn event_name_depends_on_policy_version_and_fault() {
        let problem = Problem::warning("selects a, and 3 more", "...").at("spec.podSelector");
        let name = |version: &str, problem: &Problem| name(&key(), &written(version), problem);
        let first = name("1", &problem);
        let reworded = Problem {
            problem: "selects b".to_owned(),
            ..problem.clone()
        };
        assert_eq!(
            first,
            name("1", &reworded),
            "the words may change with the pods"
        );
        assert_ne!(first, name("2", &problem));
        let error = Problem {
            severity: Severity::Error,
            ..problem
        };
        assert_ne!(first, name("1", &error));
    }

    #[test]
    fn fault_is_sent_once_per_policy_version() {
        let (mut reporter, _task) = EventReporter::new("n1", Connector::default());
        let faults = [
            Problem::error("bad", "correct it")
                .of("NetworkPolicy x/deny")
                .at("spec"),
            Problem::warning("two claim it", "...").of("Pod x/a"),
            Problem::error("unknown", "...").of("NetworkPolicy x/other"),
        ];
        let (old, new) = (written("1"), written("2"));
        let known = |written| move |asked: &PolicyKey| (*asked == key()).then_some(written);
        let before = reporter.events.capacity();
        reporter.report(&faults, known(&old));
        reporter.report(&faults, known(&old));
        assert_eq!(reporter.events.capacity(), before - 1);
        reporter.report(&faults, known(&new));
        assert_eq!(reporter.events.capacity(), before - 2);
    }

    #[test]
    fn event_note_fits_the_api_limit() {
        let problem = Problem::error("ö".repeat(2000), "correct it");
        let event = event("name", &key(), &written("1"), &problem, "n1");
        let note = event["note"].as_str().expect("a note");
        assert!(note.len() <= NOTE_BYTES && note.len() > NOTE_BYTES - 4);
    }
}
