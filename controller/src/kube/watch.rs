//! Follows the objects of one kind: a full list, then its changes.
//!
//! The list is streamed where the server can (`sendInitialEvents`, KEP-3157); where that fails, it is read in pages.
//! Both are reads of the newest state, so that a relist never goes back in time. A watch that ends or breaks is resumed
//! where it was, unless the server was unreachable for longer: a list has an end mark, a resumed watch has none.
//! Knows nothing of what the objects mean.
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, TryStreamExt};
use kube::Client;
use kube::api::WatchParams;
use kube::core::WatchEvent;
use serde_json::Value;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, timeout};

use super::backoff::Backoff;
use super::connect::Connector;
use super::error::{ApiError, RequestInfo};
use super::list::{Pages, requests, within};
use super::status::WatchStatus;
use crate::objects::{Kind, Trimmed};

/// A watch that ends sooner without an event counts as a failure, so that it is not retried at once.
const TOO_SHORT: Duration = Duration::from_secs(1);

/// The events of a watch, in their order.
#[derive(Debug)]
pub(super) enum Update {
    /// The watch has lost the server.
    Lost,
    /// The watch continues from where it was lost.
    Resumed,
    /// A full list begins.
    ListBegins,
    /// An object of the list.
    Listed(Value),
    /// The list is complete: what was not in it does not exist.
    ListEnds,
    /// An object is new or has changed.
    Changed(Value),
    /// An object was deleted; this is what it was.
    Deleted(Value),
}

/// The timeouts of a watch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timeouts {
    /// Before the first retry, before the last.
    pub(super) retry: (Duration, Duration),
    /// For how long a lost watch may be resumed instead of listing everything again.
    pub(super) resume: Duration,
    /// For the head of a response, a page, or the next object of a streamed list.
    pub(super) answer: Duration,
    /// How long one watch lasts; the server ends it then.
    pub(super) watch: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            retry: (Duration::from_millis(800), Duration::from_secs(30)),
            resume: Duration::from_secs(10),
            answer: Duration::from_secs(20),
            watch: Duration::from_secs(280),
        }
    }
}

/// Why a round ended.
enum Ended {
    Failed(ApiError),
    /// The receiver of the updates is gone.
    ReceiverGone,
}

impl From<ApiError> for Ended {
    fn from(error: ApiError) -> Self {
        Self::Failed(error)
    }
}

/// The watch of one kind.
pub(super) struct Watch {
    pub(super) kind: Kind,
    pub(super) connector: Connector,
    pub(super) updates: mpsc::Sender<(Kind, Update)>,
    pub(super) status: Arc<WatchStatus>,
    /// Wakes the watches that wait for their next try when one of them has reached the server.
    pub(super) recovered: Arc<Notify>,
    pub(super) timeouts: Timeouts,
}

/// How the next list is read.
#[derive(Clone, Copy, Default)]
enum ListMode {
    #[default]
    Stream,
    /// In pages, since the last stream failed; the one after it is streamed again.
    PagesOnce,
    /// In pages: the server cannot stream.
    Pages,
}

/// The position of a watch.
#[derive(Default)]
struct Position {
    /// The resource version to go on from; `None`: a list is needed.
    version: Option<String>,
    /// The server has accepted it for a watch. Listing again does not help if it is rejected at once.
    accepted: bool,
    list_mode: ListMode,
    /// A streamed list is being read.
    streaming: bool,
    /// Since when the server has not answered.
    lost_since: Option<Instant>,
    client: Option<Client>,
}

impl Watch {
    /// Follows until the receiver is gone.
    pub(super) async fn run(self) {
        let mut backoff = Backoff::new(self.timeouts.retry);
        let mut position = Position::default();
        loop {
            let began = Instant::now();
            let error = match self.round(&mut position).await {
                Ok(()) => continue,
                Err(Ended::ReceiverGone) => return,
                Err(Ended::Failed(error)) => error,
            };
            let expired =
                matches!(error, ApiError::Expired(_)) && position.version.take().is_some();
            if expired && position.accepted {
                self.status.expired(self.kind, &error);
                continue;
            }
            if std::mem::take(&mut position.streaming) && error.pages_may_succeed() {
                position.list_mode = if error.cannot_stream() {
                    ListMode::Pages
                } else {
                    ListMode::PagesOnce
                };
                self.status.fell_back(self.kind, &error);
                continue;
            }
            if began.elapsed() > self.timeouts.resume {
                backoff.reset();
            }
            position.client = None;
            position.lost_since.get_or_insert_with(Instant::now);
            self.status.failed(self.kind, error);
            if self.send(Update::Lost).await.is_err() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.next()) => {}
                () = self.recovered.notified() => {}
            }
        }
    }

    /// One list, or one watch.
    async fn round(&self, position: &mut Position) -> Result<(), Ended> {
        let client = match &position.client {
            Some(client) => client.clone(),
            None => position
                .client
                .insert(self.connector.client().await?)
                .clone(),
        };
        if position
            .lost_since
            .is_some_and(|since| since.elapsed() > self.timeouts.resume)
        {
            position.version = None;
        }
        if position.version.is_some() {
            return self.watch(&client, position).await;
        }
        match position.list_mode {
            ListMode::Stream => {
                position.streaming = true;
                self.list_as_stream(&client, position).await
            }
            ListMode::PagesOnce => {
                position.list_mode = ListMode::Stream;
                self.list_in_pages(&client, position).await
            }
            ListMode::Pages => self.list_in_pages(&client, position).await,
        }
    }

    /// Records that the server answers.
    async fn answered(&self, position: &mut Position) -> Result<(), Ended> {
        if self.status.connected(self.kind) {
            self.recovered.notify_waiters();
        }
        if position.lost_since.take().is_some() && position.version.is_some() {
            self.send(Update::Resumed).await?;
        }
        Ok(())
    }

    /// Follows changes from the position on, until the server ends the watch.
    async fn watch(&self, client: &Client, position: &mut Position) -> Result<(), Ended> {
        let version = position.version.clone().unwrap_or_default();
        let began = Instant::now();
        let mut events = self.open(client, &self.params(), &version).await?;
        self.answered(position).await?;
        position.accepted = true;
        let silence = self.timeouts.watch + self.timeouts.answer;
        while let Some(event) = self.next(&mut events, silence).await? {
            self.change(event, position).await?;
        }
        if began.elapsed() < TOO_SHORT && position.version.as_ref() == Some(&version) {
            return Err(ApiError::Unreachable("a watch ended immediately".to_owned()).into());
        }
        Ok(())
    }

    async fn change(
        &self,
        event: WatchEvent<Trimmed>,
        position: &mut Position,
    ) -> Result<(), Ended> {
        let (version, update) = match event {
            WatchEvent::Added(Trimmed(object)) | WatchEvent::Modified(Trimmed(object)) => {
                (version_of(&object), Update::Changed(object))
            }
            WatchEvent::Deleted(Trimmed(object)) => (version_of(&object), Update::Deleted(object)),
            WatchEvent::Bookmark(bookmark) => {
                position.version = Some(bookmark.metadata.resource_version);
                return Ok(());
            }
            WatchEvent::Error(status) => return Err(self.refusal(&status).into()),
        };
        self.send(update).await?;
        position.version = version;
        Ok(())
    }

    /// A list and the changes after it, in one stream.
    async fn list_as_stream(&self, client: &Client, position: &mut Position) -> Result<(), Ended> {
        let params = self.params().initial_events();
        let mut events = self.open(client, &params, "").await?;
        self.answered(position).await?;
        self.send(Update::ListBegins).await?;
        while let Some(event) = self.next(&mut events, self.timeouts.answer).await? {
            match event {
                WatchEvent::Bookmark(bookmark)
                    if bookmark
                        .metadata
                        .annotations
                        .contains_key("k8s.io/initial-events-end") =>
                {
                    self.list_ends(position, bookmark.metadata.resource_version)
                        .await?;
                    let silence = self.timeouts.watch + self.timeouts.answer;
                    while let Some(event) = self.next(&mut events, silence).await? {
                        self.change(event, position).await?;
                    }
                    return Ok(());
                }
                WatchEvent::Added(Trimmed(object)) | WatchEvent::Modified(Trimmed(object)) => {
                    self.send(Update::Listed(object)).await?;
                }
                WatchEvent::Deleted(_) | WatchEvent::Bookmark(_) => {}
                WatchEvent::Error(status) => return Err(self.refusal(&status).into()),
            }
        }
        Err(ApiError::Unreachable("the connection ended within a list".to_owned()).into())
    }

    async fn list_in_pages(&self, client: &Client, position: &mut Position) -> Result<(), Ended> {
        let mut pages = Pages::new(client, self.kind, self.timeouts.answer);
        let mut version = None;
        while let Some(page) = pages.next().await? {
            if version.is_none() {
                self.answered(position).await?;
                self.send(Update::ListBegins).await?;
            }
            for object in page.objects {
                self.send(Update::Listed(object)).await?;
            }
            version = Some(page.version);
        }
        self.list_ends(position, version.unwrap_or_default()).await
    }

    async fn list_ends(&self, position: &mut Position, version: String) -> Result<(), Ended> {
        if version.is_empty() {
            let problem = "a list has no resourceVersion".to_owned();
            return Err(ApiError::Malformed(problem).into());
        }
        (position.version, position.accepted) = (Some(version), false);
        position.streaming = false;
        self.status.listed(self.kind);
        self.send(Update::ListEnds).await
    }

    async fn open(
        &self,
        client: &Client,
        params: &WatchParams,
        version: &str,
    ) -> Result<
        impl Stream<Item = Result<WatchEvent<Trimmed>, kube::Error>> + Unpin + use<>,
        ApiError,
    > {
        let request = requests(self.kind).watch(params, version);
        let request = request.map_err(|error| ApiError::config(&error))?;
        let opened = within(self.timeouts.answer, client.request_events(request)).await?;
        let events = opened.map_err(|error| self.failure(&error))?;
        Ok(Box::pin(events))
    }

    /// The next event; `None` when the server has ended the stream.
    async fn next(
        &self,
        events: &mut (impl Stream<Item = Result<WatchEvent<Trimmed>, kube::Error>> + Unpin),
        silence: Duration,
    ) -> Result<Option<WatchEvent<Trimmed>>, ApiError> {
        let next = timeout(silence, events.try_next()).await;
        let next = next.map_err(|_| ApiError::Silent(silence.as_secs()))?;
        next.map_err(|error| self.failure(&error))
    }

    fn params(&self) -> WatchParams {
        let seconds = self.timeouts.watch.as_secs().clamp(1, 290);
        WatchParams::default().timeout(u32::try_from(seconds).unwrap_or(290))
    }

    fn failure(&self, error: &kube::Error) -> ApiError {
        ApiError::from_client(error, RequestInfo::of("watch", self.kind))
    }

    fn refusal(&self, status: &kube::core::Status) -> ApiError {
        ApiError::from_status(status, RequestInfo::of("watch", self.kind))
    }

    async fn send(&self, update: Update) -> Result<(), Ended> {
        let sent = self.updates.send((self.kind, update)).await;
        sent.map_err(|_| Ended::ReceiverGone)
    }
}

fn version_of(object: &Value) -> Option<String> {
    object["metadata"]["resourceVersion"]
        .as_str()
        .map(str::to_owned)
}
