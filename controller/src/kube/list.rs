//! Lists the objects of one kind in pages, each of which is read whole.
//!
//! The first page is a read of the newest state; the others belong to the same resource version
//! (Kubernetes API concepts, "Retrieving large results sets in chunks").
use std::time::Duration;

use kube::Client;
use kube::api::ListParams;
use kube::core::Request;
use serde::Deserialize;
use serde_json::Value;
use tokio::time::timeout;

use super::error::{ApiError, RequestInfo};
use crate::objects::{Kind, Trimmed};

/// Objects of a page.
const PAGE: u32 = 500;
/// Policies in a page: each can have the 1.5 MiB that the API server accepts.
const PAGE_OF_POLICIES: u32 = 20;

/// The pages of a list.
pub(super) struct Pages<'a> {
    client: &'a Client,
    kind: Kind,
    /// How long the server has for a page.
    timeout: Duration,
    /// Of the next page; `None` after the last one.
    params: Option<ListParams>,
}

/// One page of a list.
pub(super) struct Page {
    pub(super) objects: Vec<Value>,
    /// The resource version of the list; empty if the server gives none.
    pub(super) version: String,
}

impl<'a> Pages<'a> {
    pub(super) fn new(client: &'a Client, kind: Kind, timeout: Duration) -> Self {
        let page = match kind {
            Kind::NetworkPolicy => PAGE_OF_POLICIES,
            Kind::Namespace | Kind::Pod | Kind::Node => PAGE,
        };
        Self {
            client,
            kind,
            timeout,
            params: Some(ListParams::default().limit(page)),
        }
    }

    /// The next page, or `None` after the last one.
    pub(super) async fn next(&mut self) -> Result<Option<Page>, ApiError> {
        let Some(params) = self.params.take() else {
            return Ok(None);
        };
        let request = requests(self.kind).list(&params);
        let request = request.map_err(|error| ApiError::config(&error))?;
        let text = within(self.timeout, self.client.request_text(request)).await?;
        let info = RequestInfo::of("list", self.kind);
        let text = text.map_err(|error| ApiError::from_client(&error, info))?;
        let list: List =
            serde_json::from_str(&text).map_err(|error| ApiError::Malformed(error.to_string()))?;
        let token = list.metadata.r#continue.filter(|token| !token.is_empty());
        self.params = token.map(|token| params.continue_token(&token));
        let items = list.items.unwrap_or_default().into_iter();
        Ok(Some(Page {
            objects: items.map(|Trimmed(object)| object).collect(),
            version: list.metadata.resource_version.unwrap_or_default(),
        }))
    }
}

/// Requests for all objects of a kind, whatever their namespace.
pub(super) fn requests(kind: Kind) -> Request {
    let group = match kind.group() {
        "" => "api",
        _ => "apis",
    };
    let (version, resource) = (kind.api_version(), kind.resource());
    Request::new(format!("/{group}/{version}/{resource}"))
}

/// # Errors
/// If there is no answer within this time.
pub(super) async fn within<T>(
    limit: Duration,
    answer: impl Future<Output = T>,
) -> Result<T, ApiError> {
    let answer = timeout(limit, answer).await;
    answer.map_err(|_| ApiError::Silent(limit.as_secs()))
}

/// A page as the API server sends it (`ListMeta`).
#[derive(Deserialize)]
struct List {
    metadata: ListMeta,
    items: Option<Vec<Trimmed>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMeta {
    resource_version: Option<String>,
    r#continue: Option<String>,
}
