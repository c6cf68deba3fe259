//! The thread that makes spans of records and hands them to the collector.
//!
//! It sends in batches and waits for each answer; meanwhile records wait in the queue, and when that
//! is full they are lost and counted there.
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::error::OTelSdkError;
use opentelemetry_sdk::trace::{SpanData, SpanExporter as _};
use tokio::runtime::Runtime;
use tracing::{info, warn};

use super::fold::{Fold, Folded};
use super::settings::{Settings, Transport};
use super::span::Spanner;
use super::{Counts, TelemetryError};
use crate::records::{Queue, Record};

/// The collector's end of the queue.
pub(super) struct Exporter {
    runtime: Runtime,
    exporter: SpanExporter,
    spanner: Spanner,
    counts: Arc<Counts>,
    delay: Duration,
    batch: usize,
    timeout: Duration,
    failing: bool,
}

impl Exporter {
    /// Nothing is sent yet and no collector is tried.
    ///
    /// # Errors
    /// What the exporter does not take.
    pub(super) fn new(
        settings: Settings,
        node: Arc<str>,
        counts: Arc<Counts>,
    ) -> Result<Self, TelemetryError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(TelemetryError::Thread)?;
        let guard = runtime.enter();
        let exporter = match settings.transport {
            Transport::Grpc => SpanExporter::builder()
                .with_tonic()
                .with_endpoint(settings.endpoint)
                .with_timeout(settings.timeout)
                .build(),
            Transport::Http => SpanExporter::builder()
                .with_http()
                .with_protocol(opentelemetry_otlp::Protocol::HttpBinary)
                .with_endpoint(settings.endpoint)
                .with_timeout(settings.timeout)
                .build(),
        };
        drop(guard);
        let mut exporter = exporter.map_err(TelemetryError::Exporter)?;
        exporter.set_resource(&settings.resource);
        Ok(Self {
            runtime,
            exporter,
            spanner: Spanner::new(node),
            counts,
            delay: settings.delay,
            batch: settings.batch,
            timeout: settings.timeout,
            failing: false,
        })
    }

    /// Sends until the queue is closed and empty.
    pub(super) fn run(mut self, queue: &Queue<Arc<Record>>) {
        let mut fold = Fold::default();
        let mut records = Vec::new();
        let mut open = true;
        while open {
            open = queue.take(&mut records, self.delay, fold.next_due());
            let now = Instant::now();
            let mut told: Vec<Folded> = Vec::with_capacity(records.len());
            for record in records.drain(..) {
                told.extend(fold.add(record, now));
            }
            told.extend(if open { fold.due(now) } else { fold.rest() });
            for batch in told.chunks(self.batch) {
                let spans = batch.iter().map(|folded| self.spanner.span(folded));
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
            // The exporter has the same limit. Where both are seen to have passed at once, its word for that is an
            // error like any other.
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
        match failure {
            Some(why) if !self.failing => {
                warn!(
                    why,
                    "spans do not reach the collector; they are lost and counted until it takes them again"
                );
                self.failing = true;
            }
            None if self.failing => {
                info!("the collector takes spans again");
                self.failing = false;
            }
            _ => {}
        }
    }
}
