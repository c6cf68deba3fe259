//! The admin port: health, metrics, explanations and a web page over HTTP, on the control
//! thread, never on a worker's.
//!
//! Everything is read-only. Users choose the names of pods, so they are untrusted and sent as
//! JSON or plain text only.
mod answers;
mod matrix;
mod page;
mod query;
mod stream;

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context;
use http_body_util::channel::Channel;
use http_body_util::{Either, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, ETAG, HOST, HeaderName, HeaderValue, IF_NONE_MATCH};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tracing::debug;

use crate::enforcer::Enforcer;
use crate::node::readiness::Readiness;
use crate::telemetry::occasional::warn_occasionally;

use page::Page;
use query::Query;

/// Requests served at a time; more wait.
const CONNECTIONS: usize = 64;
/// How many of them may be streams, which have no end.
const STREAMS: usize = 16;
/// How long a client may take to send its request.
const HEADER_WITHIN: Duration = Duration::from_secs(5);
/// Security headers of every response: no content sniffing, no frames, no use by
/// other sites.
const GUARDS: [(&str, &str); 4] = [
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    ("cross-origin-resource-policy", "same-origin"),
    ("referrer-policy", "no-referrer"),
];

/// The body of a response: complete, or a stream.
type Body = Either<Full<Bytes>, Channel<Bytes, Infallible>>;

/// The response of a path.
struct Answer {
    status: StatusCode,
    kind: &'static str,
    body: Body,
    /// The entity tag; a client that has it already gets status 304 instead.
    tag: Option<String>,
}

/// The admin server.
pub(crate) struct Admin {
    enforcer: Arc<Enforcer>,
    readiness: Readiness,
    /// The pod that it answers for, once another pod's daemon can take over; until then it answers for all pods.
    pod: Arc<OnceLock<String>>,
    page: Page,
    streams: Arc<Semaphore>,
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

/// Serves until stopped.
pub(crate) async fn serve(listener: TcpListener, admin: Admin, mut stop: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let admin = Arc::new(admin);
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
                warn_occasionally!(%error, "the admin port cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let admin = Arc::clone(&admin);
        tokio::spawn(async move {
            let _place = place;
            let service = service_fn(move |request| {
                let admin = Arc::clone(&admin);
                async move { Ok::<_, Infallible>(admin.respond(&request).await) }
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

impl Admin {
    /// Answers for this daemon; for its pod only, once `pod` is set.
    pub(crate) fn new(
        enforcer: Arc<Enforcer>,
        readiness: Readiness,
        pod: Arc<OnceLock<String>>,
    ) -> Self {
        Self {
            enforcer,
            readiness,
            pod,
            page: Page::new(),
            streams: Arc::new(Semaphore::new(STREAMS)),
        }
    }

    async fn respond(&self, request: &Request<Incoming>) -> Response<Body> {
        let answer = if request.method() != Method::GET && request.method() != Method::HEAD {
            Answer::text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n")
        } else if request.headers().get_all(HOST).iter().count() > 1 {
            // RFC 9112, section 3.2.
            Answer::text(StatusCode::BAD_REQUEST, "more than one Host\n")
        } else if !names_an_address(asked_as(request)) {
            Answer::text(
                StatusCode::MISDIRECTED_REQUEST,
                "use an IP address or localhost as the host name, as a protection against DNS rebinding\n",
            )
        } else {
            self.answer(request).await
        };
        let known = request.headers().get(IF_NONE_MATCH);
        answer.response(known.and_then(|value| value.to_str().ok()), &self.page)
    }

    async fn answer(&self, request: &Request<Incoming>) -> Answer {
        let (enforcer, readiness) = (&*self.enforcer, &self.readiness);
        let query = request.uri().query().unwrap_or_default();
        match request.uri().path() {
            "/" => self.page.answer(),
            "/livez" => Answer::text(StatusCode::OK, "ok\n"),
            "/readyz" => answers::readyz(enforcer, readiness, self.pod.get(), query),
            "/metrics" => answers::metrics(enforcer, readiness),
            "/connections" => answers::connections(enforcer, query),
            "/policies" => {
                // A large answer: neither connections nor policy changes wait for it.
                let enforcer = Arc::clone(&self.enforcer);
                let answer = tokio::task::spawn_blocking(move || answers::policies(&enforcer));
                answer.await.unwrap_or_else(|error| Answer::failed(&error))
            }
            "/explain" => answers::explain(enforcer, query),
            "/matrix" => self.matrix(query).await,
            "/observed" => answers::observed(enforcer),
            "/observe" => self.observe(query),
            _ => Answer::text(
                StatusCode::NOT_FOUND,
                "there are: / /livez /readyz /metrics /connections /policies /matrix /observed /observe \
                 /explain?from=..&to=..&port=..&protocol=..\n",
            ),
        }
    }

    /// Computed on a separate thread, so that neither connections nor policy changes wait for it.
    async fn matrix(&self, query: &str) -> Answer {
        let plan = match matrix::survey(&self.enforcer, query) {
            Ok(plan) => plan,
            Err(refused) => return refused,
        };
        let json = tokio::task::spawn_blocking(move || {
            let plan = plan();
            (plan.generation, serde_json::to_vec(&plan))
        });
        match json.await {
            Ok((generation, Ok(json))) => Answer {
                status: StatusCode::OK,
                kind: "application/json",
                body: Either::Left(json.into()),
                tag: Some(self.page.tag(generation)),
            },
            Ok((_, Err(error))) => Answer::failed(&error),
            Err(error) => Answer::failed(&error),
        }
    }

    fn observe(&self, query: &str) -> Answer {
        let filter =
            Query::parse(query, &["pod", "namespace", "verdict"]).and_then(|query| query.filter());
        let filter = match filter {
            Ok(filter) => filter,
            Err(error) => return Answer::refused(&error),
        };
        let Ok(place) = Arc::clone(&self.streams).try_acquire_owned() else {
            return Answer::text(
                StatusCode::SERVICE_UNAVAILABLE,
                format!("there are {STREAMS} observers already; stop one of them\n"),
            );
        };
        let enforcer = &self.enforcer;
        let decisions = enforcer.recorder.observed().stream();
        let body = stream::body(decisions, filter, Arc::clone(&enforcer.node), place);
        Answer {
            status: StatusCode::OK,
            kind: "application/jsonl",
            body: Either::Right(body),
            tag: None,
        }
    }
}

/// The host that the client names. An absolute URI takes precedence over Host (RFC 9112, section 3.2.2).
fn asked_as<T>(request: &Request<T>) -> Option<&[u8]> {
    let authority = request.uri().authority();
    let host = || Some(request.headers().get(HOST)?.as_bytes());
    authority.map(|it| it.as_str().as_bytes()).or_else(host)
}

/// Whether the host is an IP address, `localhost` or missing (HTTP/1.0). A browser on
/// a page whose domain suddenly points at this node (DNS rebinding) sends the name of that domain.
fn names_an_address(host: Option<&[u8]>) -> bool {
    let Some(host) = host else { return true };
    let Ok(host) = std::str::from_utf8(host) else {
        return false;
    };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|it| it.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok()
}

impl Answer {
    fn text(status: StatusCode, body: impl Into<String>) -> Self {
        Self {
            status,
            kind: "text/plain; charset=utf-8",
            body: Either::Left(body.into().into()),
            tag: None,
        }
    }

    fn json(status: StatusCode, body: &serde_json::Value) -> Self {
        Self {
            status,
            kind: "application/json",
            body: Either::Left(format!("{body}\n").into()),
            tag: None,
        }
    }

    /// The response to an invalid query.
    fn refused(error: &str) -> Self {
        Self::json(
            StatusCode::BAD_REQUEST,
            &serde_json::json!({ "error": error }),
        )
    }

    fn failed(error: &impl std::fmt::Display) -> Self {
        Self::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"))
    }

    fn response(self, known: Option<&str>, page: &Page) -> Response<Body> {
        let unchanged = self.tag.is_some() && self.tag.as_deref() == known;
        let (status, body) = if unchanged {
            (StatusCode::NOT_MODIFIED, Either::Left(Full::default()))
        } else {
            (self.status, self.body)
        };
        let mut response = Response::new(body);
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(self.kind));
        for (name, value) in GUARDS {
            headers.insert(
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            );
        }
        page.guard(headers);
        if let Some(tag) = self.tag.and_then(|tag| tag.try_into().ok()) {
            headers.insert(ETAG, tag);
        }
        if status == StatusCode::METHOD_NOT_ALLOWED {
            headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_and_localhost_are_valid_hosts() {
        for (host, ours) in [
            ("127.0.0.1:15020", true),
            ("127.0.0.1", true),
            ("[::1]:15020", true),
            ("[fd00::1]", true),
            ("localhost:8080", true),
            ("LOCALHOST", true),
            ("10.1.2.3:15020", true),
            ("attacker.example:15020", false),
            ("127.0.0.1.attacker.example", false),
            ("localhost.attacker.example:80", false),
            ("", false),
        ] {
            assert_eq!(names_an_address(Some(host.as_bytes())), ours, "{host}");
        }
        assert!(names_an_address(None), "HTTP/1.0");
    }
}
