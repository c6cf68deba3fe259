//! The thread that makes spans of records and hands them to the collector.
//!
//! It sends in batches and waits for each answer; meanwhile records wait in the queue, and when that
//! is full they are lost and counted there.
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hyper::body::Bytes;
use tokio::runtime::Runtime;
use tracing::{info, warn};

use super::collector::{Collector, Rejected};
use super::fold::{Fold, Folded};
use super::settings::Settings;
use super::span::Spanner;
use super::{Counts, TelemetryError};
use crate::records::{Queue, Record};

/// How long to wait before a request that failed for now is repeated, at first; each time twice as long.
const PAUSE: Duration = Duration::from_millis(200);

/// The collector's end of the queue.
pub(super) struct Exporter {
    runtime: Runtime,
    collector: Collector,
    spanner: Spanner,
    counts: Arc<Counts>,
    delay: Duration,
    batch: usize,
    timeout: Duration,
    failing: bool,
}

/// Why a request was given up.
enum Failure {
    Refused(String),
    /// There was no answer to any of it.
    Silent,
}

impl Exporter {
    /// Nothing is sent yet and no collector is tried.
    ///
    /// # Errors
    /// If there can be no runtime.
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
        let collector = Collector::new(settings.transport, settings.endpoint, settings.headers);
        drop(guard);
        Ok(Self {
            runtime,
            collector,
            spanner: Spanner::new(node, settings.resource),
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
                self.send(batch);
            }
        }
    }

    fn send(&mut self, batch: &[Folded]) {
        let number = batch.len() as u64;
        let request = self.spanner.request(batch).into();
        let delivery = deliver(&mut self.collector, request, self.timeout);
        let count =
            |count: &std::sync::atomic::AtomicU64, by| count.fetch_add(by, Ordering::Relaxed);
        let failure = match self.runtime.block_on(delivery) {
            Ok(Rejected { spans, why }) => {
                let rejected = spans.min(number);
                count(&self.counts.sent, number - rejected);
                count(&self.counts.refused, rejected);
                (rejected > 0).then(|| format!("it rejects {rejected} of {number}: {why}"))
            }
            Err(Failure::Refused(why)) => {
                count(&self.counts.refused, number);
                Some(why)
            }
            Err(Failure::Silent) => {
                count(&self.counts.timed_out, number);
                Some(format!("no answer within {:?}", self.timeout))
            }
        };
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

/// Sends a request, again and again if it fails for now, until it is answered or `limit` is over.
async fn deliver(
    collector: &mut Collector,
    request: Bytes,
    limit: Duration,
) -> Result<Rejected, Failure> {
    let mut last = None;
    let attempts = async {
        let mut pause = PAUSE;
        loop {
            match collector.send(request.clone()).await {
                Ok(rejected) => return Ok(rejected),
                Err(refused) if refused.for_now => last = Some(refused.why),
                Err(refused) => return Err(Failure::Refused(refused.why)),
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
    };
    let answered = tokio::time::timeout(limit, attempts).await;
    answered.unwrap_or_else(|_| Err(last.map_or(Failure::Silent, Failure::Refused)))
}
