//! Finds the kinds of policies of other systems that the cluster has, and logs once for each that it is not enforced.
//!
//! Discovery names the kinds, and every client may read it (`system:discovery`). Then one object of each kind is
//! listed; where listing is forbidden, there may be objects.
use std::collections::BTreeSet;
use std::time::Duration;

use kube::Client;
use kube::api::ListParams;
use kube::core::Request;
use serde::Deserialize;
use serde_json::Value;
use tracing::{debug, warn};

use super::connect::Connector;
use super::error::{ApiError, RequestInfo};
use crate::objects::{FOREIGN, FOREIGN_REMEDY, is_foreign};

/// How often to look: other software can be installed at any time.
const EVERY: Duration = Duration::from_secs(600);
/// When to look again if the API server did not answer.
const RETRY: Duration = Duration::from_secs(60);

/// Repeats the check without end.
pub(super) async fn watch(connector: Connector) {
    let mut said = BTreeSet::new();
    loop {
        let found = match connector.client().await {
            Ok(client) => look(&client).await,
            Err(error) => Err(error),
        };
        let pause = match found {
            Ok(found) => {
                for kind in found.difference(&said) {
                    warn!("{kind} is not enforced; {FOREIGN_REMEDY}");
                }
                said.extend(found);
                EVERY
            }
            Err(error) => {
                debug!("cannot find out which policies of other systems there are: {error}");
                RETRY
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// Each kind of which there are objects, or may be.
pub(super) async fn look(client: &Client) -> Result<BTreeSet<String>, ApiError> {
    let request = RequestInfo {
        verb: "get",
        group: "",
        resource: "apis",
    };
    let failed = |error: kube::Error| ApiError::from_client(&error, request);
    let groups = client.list_api_groups().await.map_err(failed)?;
    let mut found = BTreeSet::new();
    for group in groups.groups {
        let known = FOREIGN.iter().any(|it| it.group == group.name);
        let Some(version) = group.preferred_version.filter(|_| known) else {
            continue;
        };
        let version = version.group_version;
        let resources = client.list_api_group_resources(&version).await;
        for resource in resources.map_err(failed)?.resources {
            let is_part = resource.name.contains('/');
            if is_part || !is_foreign(&group.name, &resource.kind) {
                continue;
            }
            let kind = format!("{version} {}", resource.kind);
            match are_there(client, &version, &resource.name).await {
                Some(true) => drop(found.insert(kind)),
                Some(false) => {}
                None => drop(found.insert(format!(
                    "{kind}, if there are objects of it (list them: kubectl get {}.{} -A),",
                    resource.name, group.name
                ))),
            }
        }
    }
    Ok(found)
}

/// Whether there are objects; `None` if that is not known.
async fn are_there(client: &Client, version: &str, resource: &str) -> Option<bool> {
    #[derive(Deserialize)]
    struct Page {
        items: Vec<Value>,
    }
    let request = Request::new(format!("/apis/{version}/{resource}"));
    let request = request.list(&ListParams::default().limit(1)).ok()?;
    let text = client.request_text(request).await.ok()?;
    let page: Page = serde_json::from_str(&text).ok()?;
    Some(!page.items.is_empty())
}
