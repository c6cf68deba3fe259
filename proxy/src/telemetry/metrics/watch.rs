//! The metrics of the watches of the Kubernetes API, read when somebody asks.
use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use controller::kube::{ApiError, WatchStatus};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;

use super::Metrics;

impl Metrics {
    /// As [`Self::new`], with the metrics of the watches of the Kubernetes API if that is the source.
    pub(crate) fn watching(status: Option<Arc<WatchStatus>>) -> Self {
        let mut metrics = Self::new();
        if let Some(status) = status {
            let collector = Box::new(WatchMetrics(status));
            metrics.registry.register_collector(collector);
        }
        metrics
    }
}

/// Collects the status of the watches.
#[derive(Debug)]
struct WatchMetrics(Arc<WatchStatus>);

impl Collector for WatchMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let kinds = self.0.kinds();
        let mut family = encoder.encode_descriptor(
            "watch_connected",
            "1 if the watch of this resource is open",
            None,
            MetricType::Gauge,
        )?;
        for kind in &kinds {
            family
                .encode_family(&[("resource", kind.resource)])?
                .encode_gauge(&i64::from(kind.connected))?;
        }
        let mut family = encoder.encode_descriptor(
            "watch_last_transition_timestamp",
            "Unix time at which watch_connected last changed",
            Some(&Unit::Seconds),
            MetricType::Gauge,
        )?;
        for kind in &kinds {
            family
                .encode_family(&[("resource", kind.resource)])?
                .encode_gauge(&seconds(kind.since))?;
        }
        let mut family = encoder.encode_descriptor(
            "watch_lists",
            "Completed full lists",
            None,
            MetricType::Counter,
        )?;
        for kind in &kinds {
            count(
                family.encode_family(&[("resource", kind.resource)])?,
                kind.lists,
            )?;
        }
        let mut family = encoder.encode_descriptor(
            "watch_errors",
            "Requests to the API server that failed, and watches that broke",
            None,
            MetricType::Counter,
        )?;
        for kind in &kinds {
            for reason in ApiError::CAUSES {
                let errors = kind.errors.get(reason).copied().unwrap_or_default();
                let labels = [("resource", kind.resource), ("reason", reason)];
                count(family.encode_family(&labels)?, errors)?;
            }
        }
        let restored = encoder.encode_descriptor(
            "state_from_snapshot",
            "1 if the current state is from disk and the API server has not confirmed it yet",
            None,
            MetricType::Gauge,
        )?;
        let value = prometheus_client::metrics::gauge::ConstGauge::new(i64::from(
            self.0.restored().is_some(),
        ));
        value.encode(restored)
    }
}

fn count(mut encoder: MetricEncoder<'_>, value: u64) -> Result<(), fmt::Error> {
    encoder.encode_counter::<NoLabelSet, _, u64>(&value, None)
}

fn seconds(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
