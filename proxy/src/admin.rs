//! The operators' side: health, metrics and explanations over HTTP, on the control thread: never on
//! a worker's.
mod answers;

pub(crate) use answers::percent_decoded;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tracing::{debug, warn};

use crate::enforcer::Enforcer;
use crate::readiness::Readiness;

/// Requests served at a time; more wait.
const CONNECTIONS: usize = 64;
/// How long a client may take to send its request.
const HEADER_WITHIN: Duration = Duration::from_secs(5);

/// What a path answers with.
struct Answer {
    status: StatusCode,
    kind: &'static str,
    body: String,
}

/// Opens the admin port.
///
/// # Errors
/// If the address is in use or not this host's.
pub(crate) async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address}: is it in use? (--admin chooses another)")
    })
}

/// Serves until told to stop.
pub(crate) async fn serve(
    listener: TcpListener,
    enforcer: Arc<Enforcer>,
    readiness: Readiness,
    mut stop: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "the admin port cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (enforcer, readiness) = (Arc::clone(&enforcer), readiness.clone());
        tokio::spawn(async move {
            let _place = place;
            let service = service_fn(move |request| {
                let answer = route(&request, &enforcer, &readiness);
                async move { Ok::<_, Infallible>(response(answer)) }
            });
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_WITHIN)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                debug!(%error, "an admin client went away");
            }
        });
    }
}

fn route(request: &Request<Incoming>, enforcer: &Enforcer, readiness: &Readiness) -> Answer {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return Answer::text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
    }
    match request.uri().path() {
        "/livez" => Answer::text(StatusCode::OK, "ok\n"),
        "/readyz" => answers::readyz(enforcer, readiness),
        "/metrics" => answers::metrics(enforcer, readiness),
        "/connections" => answers::connections(enforcer),
        "/policies" => answers::policies(enforcer),
        "/explain" => answers::explain(enforcer, request.uri().query().unwrap_or_default()),
        _ => Answer::text(
            StatusCode::NOT_FOUND,
            "there are: /livez /readyz /metrics /connections /policies /explain?from=..&to=..&port=..&protocol=..\n",
        ),
    }
}

impl Answer {
    fn text(status: StatusCode, body: impl Into<String>) -> Self {
        Self {
            status,
            kind: "text/plain; charset=utf-8",
            body: body.into(),
        }
    }

    fn json(status: StatusCode, body: &serde_json::Value) -> Self {
        Self {
            status,
            kind: "application/json",
            body: format!("{body}\n"),
        }
    }
}

fn response(answer: Answer) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(answer.body)));
    *response.status_mut() = answer.status;
    response.headers_mut().insert(
        CONTENT_TYPE,
        hyper::header::HeaderValue::from_static(answer.kind),
    );
    if answer.status == StatusCode::METHOD_NOT_ALLOWED {
        response
            .headers_mut()
            .insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
    }
    response
}
