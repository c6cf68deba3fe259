//! Spans: one a connection, sent by OTLP to a collector such as Jaeger.
//!
//! Workers decide only whether a connection is sampled; spans are made and sent by a
//! thread of their own. A slow, dead or mute collector costs spans, which are counted by cause, and
//! never delays a packet. docs/tracing.md tells what a span holds and how two nodes share a trace.
mod aggregate;
mod export;
mod settings;
mod span;
mod span_ids;
mod tls;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::telemetry::record::{Fate, Queue, Sink, Subject};

use export::Exporter;
pub(crate) use settings::{SettingsError, TelemetryArgs};
use span_ids::{Sampler, Wire};
pub(crate) use tls::TlsError;

/// Spans on their way to a collector.
pub(crate) struct Spans {
    sink: Sink,
    sampler: Sampler,
    counts: Arc<Counts>,
}

/// Counters of the spans that left the queue.
#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    refused: AtomicU64,
    timed_out: AtomicU64,
}

/// Why spans cannot be sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TelemetryError {
    /// A flag or an environment variable is wrong.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The exporter does not take its settings, some of which it reads from the environment itself.
    #[error(
        "spans cannot be exported; correct --otlp-endpoint or the OTEL_EXPORTER_OTLP_* variable that is named"
    )]
    Exporter(#[source] opentelemetry_otlp::ExporterBuildError),
    /// The collector is at `https://`, and certificates are missing or wrong.
    #[error("spans cannot be sent over TLS")]
    Tls(#[from] TlsError),
    /// The collector's URL is invalid.
    #[error("the collector's URL {url:?} cannot be read; correct --otlp-endpoint")]
    Url {
        /// What it is.
        url: String,
        /// What is wrong with it.
        #[source]
        source: tonic::transport::Error,
    },
    /// Its thread or runtime cannot be created.
    #[error("the thread that sends spans cannot be started; see the process limits")]
    Thread(#[source] std::io::Error),
}

/// How many spans were sent, and how many were lost to which cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SpanCounts {
    /// Accepted by the collector.
    pub(crate) sent: u64,
    /// The queue was full: the collector does not keep up.
    pub(crate) queue_full: u64,
    /// The collector rejected them or could not be reached.
    pub(crate) refused: u64,
    /// The collector did not answer in time.
    pub(crate) timed_out: u64,
}

impl Spans {
    /// Starts to send the spans of `node` as flags and environment specify; `None` if they name no
    /// collector.
    ///
    /// # Errors
    /// What is wrong with flags or environment; the collector is not contacted yet.
    pub(crate) fn start(
        args: &TelemetryArgs,
        node: Arc<str>,
    ) -> Result<Option<Self>, TelemetryError> {
        let variable = |name: &str| std::env::var(name).ok();
        let Some(settings) = settings::Settings::read(args, &node, variable)? else {
            return Ok(None);
        };
        let counts = Arc::new(Counts::default());
        let sampler = Sampler::new(settings.allowed);
        let queue = Queue::new(settings.room, settings.batch);
        let exporter = Exporter::new(settings, node, Arc::clone(&counts))?;
        let sink = Sink::start("spans", queue, move |queue| exporter.run(queue))
            .map_err(TelemetryError::Thread)?;
        Ok(Some(Self {
            sink,
            sampler,
            counts,
        }))
    }

    /// Whether a connection becomes a span: a denied one always, an allowed one by ratio. All
    /// nodes of a trace decide the same.
    pub(crate) fn wants(&self, subject: &Subject, fate: &Fate) -> bool {
        !matches!(fate, Fate::Allowed(_))
            || self.sampler.takes_all()
            || self.sampler.takes(Wire::of(subject).trace_id())
    }

    /// The thread that makes and sends them.
    pub(crate) fn sink(&self) -> &Sink {
        &self.sink
    }

    /// The counts of spans so far.
    pub(crate) fn counts(&self) -> SpanCounts {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        SpanCounts {
            sent: read(&self.counts.sent),
            queue_full: self.sink.lost(),
            refused: read(&self.counts.refused),
            timed_out: read(&self.counts.timed_out),
        }
    }
}
