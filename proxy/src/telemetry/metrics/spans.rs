//! Spans sent to the collector, and lost on the way.
use std::sync::atomic::Ordering;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::ReasonLabel;
use crate::telemetry::spans::SpanCounts;

/// The metrics about spans; all at zero if none are sent.
#[derive(Default)]
pub(super) struct Spans {
    sent: Counter,
    lost: Family<ReasonLabel, Counter>,
}

impl Spans {
    /// In `registry`.
    pub(super) fn registered(registry: &mut Registry) -> Self {
        let all = Self::default();
        registry.register(
            "spans_sent",
            "Spans that the collector accepted",
            all.sent.clone(),
        );
        registry.register(
            "spans_dropped",
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
        for (reason, count) in lost {
            let counter = self.lost.get_or_create(&ReasonLabel { reason });
            counter.inner().store(count, Ordering::Relaxed);
        }
    }
}
