//! The collector's side of the wire: OTLP requests over gRPC or HTTP, one at a time, and what it answers.
//!
//! <https://opentelemetry.io/docs/specs/otlp/>. Must not know what a request says.
use bytes::{Buf, BufMut};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::http::uri::PathAndQuery;
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic::{Code, Extensions, Status};

use super::settings::Transport;
use super::wire::{Value, fields};

const EXPORT: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
/// Bytes of an answer that are read.
const ANSWER: usize = 64 << 10;

/// A way to it that connects when it is needed, and again when it broke.
pub(super) struct Collector {
    way: Way,
    /// What it wants to see with each request.
    headers: HeaderMap,
}

enum Way {
    Grpc(Grpc<Channel>),
    Http {
        client: Client<HttpConnector, Full<Bytes>>,
        url: Uri,
    },
}

/// What it did not take of a request that it answered.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Rejected {
    pub(super) spans: u64,
    pub(super) why: String,
}

/// Why a request failed.
#[derive(Debug)]
pub(super) struct Refused {
    /// The same request may be taken later.
    pub(super) for_now: bool,
    pub(super) why: String,
}

impl Collector {
    /// Nothing is connected yet. To be called, as all of it, inside a runtime.
    pub(super) fn new(transport: Transport, url: Uri, mut headers: HeaderMap) -> Self {
        let way = match transport {
            Transport::Grpc => Way::Grpc(Grpc::new(Channel::builder(url).connect_lazy())),
            Transport::Http => {
                let kind = HeaderValue::from_static("application/x-protobuf");
                headers.insert(CONTENT_TYPE, kind);
                let client = Client::builder(TokioExecutor::new()).build_http();
                Way::Http { client, url }
            }
        };
        Self { way, headers }
    }

    /// Sends an `ExportTraceServiceRequest` and waits for the answer, without end.
    pub(super) async fn send(&mut self, request: Bytes) -> Result<Rejected, Refused> {
        let headers = self.headers.clone();
        match &mut self.way {
            Way::Grpc(grpc) => {
                grpc.ready().await.map_err(|error| Refused {
                    for_now: true,
                    why: chain(&error),
                })?;
                let metadata = MetadataMap::from_headers(headers);
                let request = tonic::Request::from_parts(metadata, Extensions::new(), request);
                let path = PathAndQuery::from_static(EXPORT);
                let answer = grpc.unary(request, path, Raw).await?;
                Ok(rejected(&answer.into_inner()))
            }
            Way::Http { client, url } => {
                let mut posted = Request::new(Full::new(request));
                *posted.method_mut() = Method::POST;
                *posted.uri_mut() = url.clone();
                *posted.headers_mut() = headers;
                let broken = |why| Refused { for_now: true, why };
                let answer = client.request(posted).await;
                let answer = answer.map_err(|error| broken(chain(&error)))?;
                let status = answer.status();
                let body = Limited::new(answer.into_body(), ANSWER).collect().await;
                let body = body.map_err(|error| broken(chain(&*error)))?.to_bytes();
                if status.is_success() {
                    return Ok(rejected(&body));
                }
                Err(Refused {
                    for_now: matches!(
                        status,
                        StatusCode::TOO_MANY_REQUESTS
                            | StatusCode::BAD_GATEWAY
                            | StatusCode::SERVICE_UNAVAILABLE
                            | StatusCode::GATEWAY_TIMEOUT
                    ),
                    why: format!("it answers {status}"),
                })
            }
        }
    }
}

impl From<Status> for Refused {
    /// What the collector says itself is left out: it may repeat a token that it was sent.
    fn from(status: Status) -> Self {
        let code = status.code();
        let why = std::error::Error::source(&status).map(chain);
        Self {
            for_now: matches!(
                code,
                Code::Cancelled
                    | Code::DeadlineExceeded
                    | Code::Aborted
                    | Code::OutOfRange
                    | Code::Unavailable
                    | Code::DataLoss
            ),
            why: why.unwrap_or_else(|| format!("it answers {code:?}")),
        }
    }
}

/// An `ExportTraceServiceResponse`: how many spans it rejected, and why.
fn rejected(answer: &[u8]) -> Rejected {
    let mut rejected = Rejected::default();
    let partial = fields(answer).find_map(|field| match field {
        (1, Value::Bytes(partial)) => Some(partial),
        _ => None,
    });
    for field in fields(partial.unwrap_or_default()) {
        match field {
            (1, Value::Number(spans)) => rejected.spans = spans,
            (2, Value::Bytes(why)) => rejected.why = String::from_utf8_lossy(why).into_owned(),
            _ => {}
        }
    }
    rejected
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

/// Messages that are bytes already.
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put(message);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, message: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(message.copy_to_bytes(message.remaining())))
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::Message;
    use super::*;

    #[test]
    fn spans_that_a_collector_did_not_take_are_known_with_its_reason() {
        assert_eq!(rejected(&[]), Rejected::default());
        let mut answer = Vec::new();
        Message::onto(&mut answer).message(1, |partial| {
            partial.varint(1, 3);
            partial.bytes(2, b"too large");
        });
        let expected = Rejected {
            spans: 3,
            why: "too large".to_owned(),
        };
        assert_eq!(rejected(&answer), expected);
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        for (code, again) in [(Code::Unavailable, true), (Code::Unauthenticated, false)] {
            assert_eq!(Refused::from(Status::new(code, "")).for_now, again);
        }
    }
}
