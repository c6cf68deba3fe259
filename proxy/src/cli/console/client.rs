//! A request to the admin port, and its response as a stream.
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::net::TcpStream;

/// How long the daemon may take to begin its answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Everything but what RFC 3986, section 2.3, calls unreserved.
const RESERVED: AsciiSet = NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error(
        "no daemon answers at {admin}: {source}; is `portreeve run` up on this node? (--admin names its admin port; from elsewhere: kubectl exec ds/portreeve -- portreeve ...)"
    )]
    NoDaemon {
        admin: SocketAddr,
        source: io::Error,
    },
    #[error("{admin} does not answer in time; is it a Portreeve daemon, and is its node alive?")]
    Silent { admin: SocketAddr },
    #[error("{admin} does not answer with HTTP: {source}; is it a Portreeve daemon's admin port?")]
    NoHttp {
        admin: SocketAddr,
        source: hyper::Error,
    },
    #[error("{admin} is not the admin port of a Portreeve daemon; give it by --admin")]
    Foreign { admin: SocketAddr },
    /// The daemon has understood the question and says what is wrong with it.
    #[error("{0}")]
    Refused(String),
    #[error("lost the connection to the daemon at {admin}: {source}")]
    Gone {
        admin: SocketAddr,
        source: hyper::Error,
    },
}

/// An answer whose body is still to be read.
#[derive(Debug)]
pub(super) struct Answer {
    admin: SocketAddr,
    body: Incoming,
}

/// Asks for `path` with these parameters; those without a value are left out.
///
/// # Errors
/// If no daemon answers, or it answers with an error.
pub(super) async fn ask(
    admin: SocketAddr,
    path: &str,
    parameters: &[(&str, Option<&str>)],
) -> Result<Answer, ClientError> {
    let silent = |_| ClientError::Silent { admin };
    let answer = tokio::time::timeout(ANSWER_WITHIN, begin(admin, path, parameters));
    answer.await.map_err(silent)?
}

async fn begin(
    admin: SocketAddr,
    path: &str,
    parameters: &[(&str, Option<&str>)],
) -> Result<Answer, ClientError> {
    let no_daemon = |source| ClientError::NoDaemon { admin, source };
    let no_http = |source| ClientError::NoHttp { admin, source };
    let stream = TcpStream::connect(admin).await.map_err(no_daemon)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(no_http)?;
    // The sender returns its errors too.
    tokio::spawn(connection);
    let request = Request::get(target(path, parameters))
        .header(HOST, admin.to_string())
        .body(Empty::<Bytes>::new());
    let request = request.map_err(|error| ClientError::Refused(error.to_string()))?;
    let response = sender.send_request(request).await.map_err(no_http)?;
    let status = response.status();
    let answer = Answer {
        admin,
        body: response.into_body(),
    };
    if status == StatusCode::OK {
        return Ok(answer);
    }
    let text = answer.text().await?;
    let error = serde_json::from_str::<serde_json::Value>(&text)
        .ok()
        .and_then(|json| Some(json.get("error")?.as_str()?.to_owned()));
    Err(ClientError::Refused(error.unwrap_or_else(|| {
        format!("{admin} answers {status}: {}", text.trim())
    })))
}

impl Answer {
    /// The next part of the body; `None` at its end.
    ///
    /// # Errors
    /// If the connection to the daemon is lost.
    pub(super) async fn part(&mut self) -> Result<Option<Bytes>, ClientError> {
        let admin = self.admin;
        while let Some(frame) = self.body.frame().await {
            let frame = frame.map_err(|source| ClientError::Gone { admin, source })?;
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }

    /// The whole body as text.
    ///
    /// # Errors
    /// As [`Self::part`].
    pub(super) async fn text(mut self) -> Result<String, ClientError> {
        let mut bytes = Vec::new();
        while let Some(part) = self.part().await? {
            bytes.extend_from_slice(&part);
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// Path and query, the values percent-encoded.
fn target(path: &str, parameters: &[(&str, Option<&str>)]) -> String {
    let mut target = path.to_owned();
    let mut before = '?';
    for (name, value) in parameters {
        let Some(value) = value else { continue };
        target.push(before);
        before = '&';
        target.push_str(name);
        target.push('=');
        target.extend(utf8_percent_encode(value, &RESERVED));
    }
    target
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_values_are_encoded_and_absent_ones_omitted() {
        let parameters = [
            ("from", Some("x/a b")),
            ("pod", None),
            ("to", Some("fd00::1")),
        ];
        assert_eq!(
            target("/explain", &parameters),
            "/explain?from=x%2Fa%20b&to=fd00%3A%3A1"
        );
        assert_eq!(target("/connections", &[("pod", None)]), "/connections");
    }
}
