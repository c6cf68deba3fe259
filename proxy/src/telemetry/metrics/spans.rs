//! Spans sent to the collector, and lost on the way.
use std::sync::atomic::Ordering;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::CauseLabel;
use crate::telemetry::spans::SpanCounts;

/// The metrics about spans; all at zero if none are sent.
#[derive(Default)]
pub(super) struct Spans {
    sent: Counter,
    lost: Family<CauseLabel, Counter>,
}

impl Spans {
    /// In `registry`.
    pub(super) fn registered(registry: &mut Registry) -> Self {
        let all = Self::default();
        registry.register(
            "spans_sent",
            "Spans that the collector took",
            all.sent.clone(),
        );
        registry.register(
            "spans_lost",
            "Spans that did not reach the collector",
            all.lost.clone(),
        );
        all
    }

    /// As counted since the start.
    pub(super) fn set(&self, counts: &SpanCounts) {
        self.sent.inner().store(counts.sent, Ordering::Relaxed);
        let lost = [
            ("queue_full", counts.queue_full),
            ("refused", counts.refused),
            ("timeout", counts.timed_out),
        ];
        for (cause, count) in lost {
            let counter = self.lost.get_or_create(&CauseLabel { cause });
            counter.inner().store(count, Ordering::Relaxed);
        }
    }
}
