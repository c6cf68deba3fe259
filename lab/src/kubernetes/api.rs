//! Requests to the API server through `kubectl proxy`, which speaks TLS and shows the credentials:
//! plain HTTP on a Unix socket, which is in no network namespace.
//!
//! Knows no kinds of objects.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use super::error::KubernetesError;

/// The API server's own limit for a request is a minute.
pub(super) const ANSWERED: Duration = Duration::from_secs(70);

#[derive(Debug)]
pub(super) struct Api {
    socket: PathBuf,
}

impl Api {
    pub(super) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Any request; `PATCH` is a merge patch.
    pub(super) fn request(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, KubernetesError> {
        let kind = if method == "PATCH" {
            "application/merge-patch+json"
        } else {
            "application/json"
        };
        self.send(method, path, kind, body)
    }

    /// Creates or updates an object: server-side apply as the lab, which takes over all that the
    /// object says and gives up what it said before.
    pub(super) fn apply(&self, path: &str, object: &Value) -> Result<Value, KubernetesError> {
        let path = format!("{path}?fieldManager=lab&force=true");
        self.send("PATCH", &path, "application/apply-patch+yaml", Some(object))
    }

    fn send(
        &self,
        method: &str,
        path: &str,
        kind: &str,
        body: Option<&Value>,
    ) -> Result<Value, KubernetesError> {
        let body = body.map(Value::to_string).unwrap_or_default();
        // HTTP/1.0: the answer ends with the connection, and is not cut into chunks.
        let text = format!(
            "{method} {path} HTTP/1.0\r\nHost: localhost\r\nAccept: application/json\r\n\
             Content-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let request = || format!("{method} {path}");
        let (status, body) = self.exchange(&text).map_err(|source| {
            let request = request();
            KubernetesError::NoAnswer { request, source }
        })?;
        // `/readyz` and the like answer in plain text.
        let answer: Value = serde_json::from_str(&body).unwrap_or_default();
        if (200..300).contains(&status) {
            return Ok(answer);
        }
        Err(KubernetesError::Refused {
            request: request(),
            status,
            message: answer["message"]
                .as_str()
                .unwrap_or_else(|| body.trim())
                .into(),
        })
    }

    fn exchange(&self, request: &str) -> io::Result<(u16, String)> {
        let stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(ANSWERED))?;
        exchange(stream, request)
    }
}

/// Sends an HTTP/1.0 request; returns the answer's status and body.
pub(super) fn exchange(mut stream: impl Read + Write, request: &str) -> io::Result<(u16, String)> {
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    parse(&answer).ok_or_else(|| io::Error::other(format!("no HTTP: {answer:?}")))
}

/// Status and body of an HTTP/1.0 answer.
fn parse(answer: &str) -> Option<(u16, String)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some((status, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn response_has_a_status_and_a_body() {
        let answer = "HTTP/1.0 404 Not Found\r\nContent-Type: application/json\r\n\r\n{}";
        assert_eq!(parse(answer), Some((404, "{}".into())));
        for bad in ["", "HTTP/1.0 200 OK", "HTTP/1.0 x\r\n\r\n"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}
