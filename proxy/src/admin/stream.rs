//! `/observe`: decisions as they are made, a JSON line each.
//!
//! A client that reads too slowly loses decisions and gets `{"lost":N}` in their place; it delays nobody.
use std::convert::Infallible;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::channel::{Channel, Sender};
use hyper::body::Bytes;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};

use super::query::Filter;
use crate::telemetry::recent::Event;

/// Parts of the body that may wait for the reader's socket.
const WAITING: usize = 8;
/// Decisions in one part.
const TOGETHER: usize = 256;
/// After this time without a decision, an empty line is sent as keep-alive.
const SILENCE: Duration = Duration::from_secs(10);

/// The body of a response that ends when the client disconnects. Holds `_place` until then.
pub(super) fn body(
    decisions: Receiver<Arc<Event>>,
    filter: Filter,
    node: Arc<str>,
    place: OwnedSemaphorePermit,
) -> Channel<Bytes, Infallible> {
    let (sender, body) = Channel::new(WAITING);
    tokio::spawn(async move {
        let _place = place;
        pass_on(decisions, sender, &filter, &node).await;
    });
    body
}

/// Returns when the client disconnects or the daemon stops enforcing.
async fn pass_on(
    mut decisions: Receiver<Arc<Event>>,
    mut to: Sender<Bytes, Infallible>,
    filter: &Filter,
    node: &str,
) {
    // Shows the client that it is connected, before the first decision.
    let mut lines = "\n".to_owned();
    while to
        .send_data(std::mem::take(&mut lines).into())
        .await
        .is_ok()
    {
        match tokio::time::timeout(SILENCE, decisions.recv()).await {
            Err(_) => lines.push('\n'),
            Ok(Ok(event)) => put(&mut lines, &event, filter, node),
            Ok(Err(RecvError::Lagged(lost))) => lose(&mut lines, lost),
            Ok(Err(RecvError::Closed)) => return,
        }
        for _ in 1..TOGETHER {
            match decisions.try_recv() {
                Ok(event) => put(&mut lines, &event, filter, node),
                Err(TryRecvError::Lagged(lost)) => lose(&mut lines, lost),
                Err(_) => break,
            }
        }
    }
}

fn put(lines: &mut String, event: &Event, filter: &Filter, node: &str) {
    let decision = &event.decision;
    if filter.admits(
        event.kind,
        [decision.from.as_deref(), decision.to.as_deref()],
    ) {
        // A `String` takes all.
        let _ = writeln!(lines, "{}", event.json(node));
    }
}

fn lose(lines: &mut String, lost: u64) {
    let _ = writeln!(lines, "{{\"lost\":{lost}}}");
}
