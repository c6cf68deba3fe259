//! Reads the state of the cluster once, without a watch.
use std::time::Duration;

use tokio::time::Instant;

use super::connect::Connector;
use super::error::ApiError;
use super::list::Pages;
use super::state::State;
use super::watch::{Timeouts, Update};
use crate::Loaded;
use crate::objects::Kind;

/// Lists all objects of every kind once.
///
/// An invalid object is a problem of the result, not an error: its replacement
/// is used, as when a daemon starts.
///
/// # Errors
/// If there is no usable client configuration, or the API server does not answer every list.
pub async fn load() -> Result<Loaded, ApiError> {
    load_by(&Connector::Found, Timeouts::default().answer).await
}

pub(super) async fn load_by(connector: &Connector, timeout: Duration) -> Result<Loaded, ApiError> {
    let client = connector.client().await?;
    let (mut state, now) = (State::new(""), Instant::now());
    for kind in Kind::ALL {
        state.take(kind, Update::ListBegins, now);
        let mut pages = Pages::new(&client, kind, timeout);
        while let Some(page) = pages.next().await? {
            for object in page.objects {
                state.take(kind, Update::Listed(object), now);
            }
        }
        state.take(kind, Update::ListEnds, now);
    }
    Ok(Loaded::of(state.changes(now).unwrap_or_default()))
}
