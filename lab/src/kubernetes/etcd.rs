//! Requests to etcd itself, over its JSON gateway.
//!
//! Knows nothing of Kubernetes.

use std::net::TcpStream;

use serde_json::{Value, json};

use super::api::{ANSWERED, exchange};
use super::error::KubernetesError;

/// Its client address, in the control plane's namespace.
pub(super) const CLIENTS: &str = "127.0.0.1:2379";

/// Forgets every state before `revision`. Must be called in the control plane's namespace.
pub(super) fn compact(revision: &Value) -> Result<(), KubernetesError> {
    let path = "/v3/kv/compaction";
    let body = json!({ "revision": revision, "physical": true }).to_string();
    let request = format!(
        "POST {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer = TcpStream::connect(CLIENTS).and_then(|stream| {
        stream.set_read_timeout(Some(ANSWERED))?;
        exchange(stream, &request)
    });
    let request = || format!("etcd's POST {path}");
    match answer {
        Ok((200, _)) => Ok(()),
        Ok((status, message)) => Err(KubernetesError::Refused {
            request: request(),
            status,
            message,
        }),
        Err(source) => Err(KubernetesError::NoAnswer {
            request: request(),
            source,
        }),
    }
}
