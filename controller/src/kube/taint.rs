//! Removes the start-up taint from this node's Node object.
//!
//! kubelet registers a new node with the taint, so that no pod starts there before the daemon
//! enforces. Knows nothing of when that is.
use std::time::Duration;

use kube::api::{GetParams, Patch, PatchParams};
use kube::core::Request;
use serde_json::{Value, json};
use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::backoff::Backoff;
use super::connect::Connector;
use super::error::{ApiError, RequestInfo};

/// Between tries: the API server may be unreachable.
const WAITS: (Duration, Duration) = (Duration::from_millis(800), Duration::from_secs(30));

/// Removes every taint with `key` from the Node `node`; retries until that succeeds.
///
/// Must be called on a runtime of tokio. A Node that has no such taint is left alone.
pub async fn lift_taint(node: &str, key: &str) {
    let mut backoff = Backoff::new(WAITS);
    let mut last = None;
    loop {
        match try_to_lift(&Connector::default(), node, key).await {
            Ok(true) => return info!(node, key, "removed the start-up taint"),
            Ok(false) => return debug!(node, key, "there is no start-up taint"),
            Err(error) => {
                let cause = Some(error.cause());
                if last != cause {
                    warn!(node, key, "cannot remove the start-up taint: {error}");
                }
                last = cause;
            }
        }
        sleep(backoff.next()).await;
    }
}

/// Whether there was such a taint.
async fn try_to_lift(connector: &Connector, node: &str, key: &str) -> Result<bool, ApiError> {
    let client = connector.client().await?;
    let nodes = Request::new("/api/v1/nodes");
    let get = nodes.get(node, &GetParams::default());
    let get = get.map_err(|error| ApiError::config(&error))?;
    let found: Value = client
        .request(get)
        .await
        .map_err(|error| ApiError::from_client(&error, request_info("get")))?;
    let Some(patch) = patch_without(&found, key) else {
        return Ok(false);
    };
    let patch = nodes.patch(node, &PatchParams::default(), &Patch::Merge(patch));
    let patch = patch.map_err(|error| ApiError::config(&error))?;
    client
        .request_text(patch)
        .await
        .map_err(|error| ApiError::from_client(&error, request_info("patch")))?;
    Ok(true)
}

fn request_info(verb: &'static str) -> RequestInfo {
    RequestInfo {
        verb,
        group: "",
        resource: "nodes",
    }
}

/// A merge patch (RFC 7386) that leaves the other taints; `None` if there is nothing to take off.
///
/// Taints are one value for the API server: it must refuse the patch (409) if somebody else has
/// changed the Node meanwhile.
fn patch_without(node: &Value, key: &str) -> Option<Value> {
    let taints = node["spec"]["taints"].as_array()?;
    let kept: Vec<_> = taints.iter().filter(|taint| taint["key"] != key).collect();
    (kept.len() < taints.len()).then(|| {
        json!({
            "metadata": { "resourceVersion": node["metadata"]["resourceVersion"] },
            "spec": { "taints": kept },
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taint_patch_removes_own_key_and_requires_resourceversion() {
        let taint = |key: &str, effect: &str| json!({ "key": key, "effect": effect });
        let ours = "portreeve.io/agent-not-ready";
        let node = |taints: Value| {
            json!({
                "metadata": { "name": "n1", "resourceVersion": "7" },
                "spec": { "podCIDR": "10.0.1.0/24", "taints": taints },
            })
        };
        let other = taint("node.kubernetes.io/unschedulable", "NoSchedule");
        let tainted = node(json!([
            taint(ours, "NoSchedule"),
            other,
            taint(ours, "NoExecute")
        ]));
        let expected = json!({
            "metadata": { "resourceVersion": "7" },
            "spec": { "taints": [other] },
        });
        assert_eq!(patch_without(&tainted, ours), Some(expected));
        assert_eq!(patch_without(&node(json!([other])), ours), None);
        assert_eq!(patch_without(&node(Value::Null), ours), None);
    }
}
