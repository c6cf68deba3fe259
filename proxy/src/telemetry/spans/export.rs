//! The thread that makes spans of records and hands them to the collector.
//!
//! It sends in batches and waits for each answer; meanwhile records wait in the queue, and when that
//! is full they are lost and counted there.
use std::error::Error;
use std::iter;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use opentelemetry_http::hyper::HyperClient;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig, WithTonicConfig};
use opentelemetry_sdk::error::OTelSdkError;
use opentelemetry_sdk::trace::{SpanData, SpanExporter as _};
use parking_lot::Mutex;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tracing::{info, warn};

use super::aggregate::{Aggregated, Aggregator};
use super::settings::{Settings, Transport};
use super::span::Spanner;
use super::tls::{self, Connector};
use super::{Counts, TelemetryError};
use crate::telemetry::record::{Queue, Record};

/// Makes spans from the queue and sends them.
pub(super) struct Exporter {
    runtime: Runtime,
    exporter: SpanExporter,
    spanner: Spanner,
    counts: Arc<Counts>,
    delay: Duration,
    batch: usize,
    timeout: Duration,
    failure: Failure,
    failing: bool,
}

/// Why the last request failed, where the exporter does not report it.
type Failure = Arc<Mutex<Option<String>>>;

/// Hyper's client, whose errors the exporter would report only as "network error".
#[derive(Debug)]
struct Client {
    inner: HyperClient<Connector>,
    failure: Failure,
}

impl Exporter {
    /// Sends nothing yet, and does not contact the collector.
    ///
    /// # Errors
    /// What the exporter rejects.
    pub(super) fn new(
        settings: Settings,
        node: Arc<str>,
        counts: Arc<Counts>,
    ) -> Result<Self, TelemetryError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(TelemetryError::Thread)?;
        let failure = Failure::default();
        let guard = runtime.enter();
        let exporter = exporter(&settings, &failure);
        drop(guard);
        let mut exporter = match exporter {
            Ok(exporter) => exporter,
            Err(error) => {
                // The caller is in a runtime too, where blocking on this one is not allowed.
                runtime.shutdown_background();
                return Err(error);
            }
        };
        exporter.set_resource(&settings.resource);
        Ok(Self {
            runtime,
            exporter,
            spanner: Spanner::new(node),
            counts,
            delay: settings.delay,
            batch: settings.batch,
            timeout: settings.timeout,
            failure,
            failing: false,
        })
    }

    /// Sends until the queue is closed and empty.
    pub(super) fn run(mut self, queue: &Queue<Arc<Record>>) {
        let mut aggregator = Aggregator::default();
        let mut records = Vec::new();
        let mut open = true;
        while open {
            open = queue.take(&mut records, self.delay, aggregator.next_due());
            let now = Instant::now();
            let mut due: Vec<Aggregated> = Vec::with_capacity(records.len());
            for record in records.drain(..) {
                due.extend(aggregator.add(record, now));
            }
            due.extend(if open {
                aggregator.due(now)
            } else {
                aggregator.rest()
            });
            for batch in due.chunks(self.batch) {
                let spans = batch.iter().map(|aggregated| self.spanner.span(aggregated));
                let spans = spans.collect();
                self.send(spans);
            }
        }
    }

    fn send(&mut self, spans: Vec<SpanData>) {
        let number = spans.len() as u64;
        let export = self.exporter.export(spans);
        let began = Instant::now();
        let limited = async { tokio::time::timeout(self.timeout, export).await };
        let (count, failure) = match self.runtime.block_on(limited) {
            Ok(Ok(())) => (&self.counts.sent, None),
            // The exporter has the same timeout. If both expire at once, it returns an
            // ordinary error.
            Ok(Err(error))
                if matches!(error, OTelSdkError::Timeout(_)) || began.elapsed() >= self.timeout =>
            {
                (&self.counts.timed_out, Some(error.to_string()))
            }
            Ok(Err(error)) => (&self.counts.refused, Some(error.to_string())),
            Err(_) => (
                &self.counts.timed_out,
                Some(format!("no answer within {:?}", self.timeout)),
            ),
        };
        count.fetch_add(number, Ordering::Relaxed);
        let cause = self.failure.lock().take();
        let failure = failure.map(|why| match cause {
            Some(cause) => format!("{why}: {cause}"),
            None => why,
        });
        match failure {
            Some(why) if !self.failing => {
                warn!(
                    why,
                    "spans do not reach the collector; they are lost and counted until it accepts them again"
                );
                self.failing = true;
            }
            None if self.failing => {
                info!("the collector accepts spans again");
                self.failing = false;
            }
            _ => {}
        }
    }
}

impl HttpClient for Client {
    fn send_bytes<'a, 'b>(
        &'a self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'b>>
    where
        'a: 'b,
    {
        let sent = self.inner.send_bytes(request);
        Box::pin(async move {
            sent.await.inspect_err(|error| {
                *self.failure.lock() = Some(chain(&**error));
            })
        })
    }
}

/// The text of an error and of all its sources.
fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = iter::successors(Some(error), |error| (*error).source());
    let said: Vec<_> = causes.map(ToString::to_string).collect();
    said.join(": ")
}

fn exporter(settings: &Settings, failure: &Failure) -> Result<SpanExporter, TelemetryError> {
    let Settings {
        endpoint,
        transport,
        timeout,
        ..
    } = settings;
    let connector = tls::connector(endpoint, &settings.files, *transport)?;
    let exporter = match transport {
        Transport::Grpc => SpanExporter::builder()
            .with_tonic()
            .with_channel(channel(endpoint, *timeout, connector)?)
            .with_timeout(*timeout)
            .build(),
        Transport::Http => SpanExporter::builder()
            .with_http()
            .with_http_client(Client {
                inner: HyperClient::new(connector, *timeout, None),
                failure: Arc::clone(failure),
            })
            .with_protocol(opentelemetry_otlp::Protocol::HttpBinary)
            .with_endpoint(endpoint)
            .with_timeout(*timeout)
            .build(),
    };
    exporter.map_err(TelemetryError::Exporter)
}

/// Connects when there is something to send, and again after a failure.
fn channel(url: &str, timeout: Duration, connector: Connector) -> Result<Channel, TelemetryError> {
    let endpoint = Endpoint::from_shared(url.to_owned());
    let endpoint = endpoint.map_err(|source| TelemetryError::Url {
        url: url.to_owned(),
        source,
    })?;
    Ok(endpoint
        .timeout(timeout)
        .connect_with_connector_lazy(connector))
}
