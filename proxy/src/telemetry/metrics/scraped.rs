//! Values that are read at each scrape, not counted when they change.
use std::sync::atomic::Ordering;

use kernel::counters;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::rules::Rules;
use super::spans::Spans;
use super::{Queues, whole};
use crate::telemetry::spans::SpanCounts;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageLabel {
    stage: &'static str,
}

/// Values that are read at each scrape.
#[derive(Debug, Default)]
pub(crate) struct Readings {
    pub(crate) held: usize,
    pub(crate) admitted: usize,
    pub(crate) live: usize,
    pub(crate) kernel_flows: usize,
    pub(crate) generation: u64,
    pub(crate) addresses: usize,
    pub(crate) policies: usize,
    pub(crate) refused: usize,
    pub(crate) problems: usize,
    pub(crate) records_lost: u64,
    pub(crate) spans: SpanCounts,
    pub(crate) queues: Queues,
    /// Packets that the rules dropped; `None` if the kernel cannot be read.
    pub(crate) rules: Option<counters::Packets>,
    pub(crate) observers: usize,
    pub(crate) ready: bool,
}

/// What is set from [`Readings`].
#[derive(Default)]
pub(super) struct Scraped {
    connections: Family<StageLabel, Gauge>,
    kernel_flows: Gauge,
    held: Gauge,
    generation: Gauge,
    addresses: Gauge,
    policies: Gauge,
    refused: Gauge,
    problems: Gauge,
    records_lost: Counter,
    queue_drops: Counter,
    rules: Rules,
    observers: Gauge,
    ready: Gauge,
    spans: Spans,
}

impl Scraped {
    /// In `registry`.
    pub(super) fn registered(registry: &mut Registry) -> Self {
        let all = Self {
            spans: Spans::registered(registry),
            rules: Rules::registered(registry),
            ..Self::default()
        };
        registry.register(
            "connections",
            "Proxied connections by stage",
            all.connections.clone(),
        );
        registry.register(
            "kernel_flows",
            "Flows that the kernel forwards",
            all.kernel_flows.clone(),
        );
        registry.register(
            "queued_packets",
            "Packets that wait in the kernel's queues",
            all.held.clone(),
        );
        all.register_state(registry);
        registry.register(
            "records_dropped",
            "Records lost to a slow or full disk",
            all.records_lost.clone(),
        );
        registry.register(
            "queue_drops",
            "Packets that the kernel dropped because a queue was full",
            all.queue_drops.clone(),
        );
        registry.register(
            "observe_clients",
            "Readers of the stream of decisions",
            all.observers.clone(),
        );
        registry.register(
            "ready",
            "Whether this node enforces the newest state",
            all.ready.clone(),
        );
        all
    }

    /// The gauges of the cluster's state.
    fn register_state(&self, registry: &mut Registry) {
        registry.register(
            "table_generation",
            "Generation of the policy table in force",
            self.generation.clone(),
        );
        registry.register(
            "endpoints",
            "Pod addresses in the policy table",
            self.addresses.clone(),
        );
        registry.register("policies", "Policies in force", self.policies.clone());
        registry.register(
            "policies_refused",
            "Policies beyond the budgets of their namespaces, or the first one too many for a pod",
            self.refused.clone(),
        );
        registry.register(
            "config_problems",
            "Current diagnostics of the cluster's objects",
            self.problems.clone(),
        );
    }

    /// Sets the metrics to `readings`.
    pub(super) fn set(&self, readings: &Readings) {
        let stages = [
            ("held", readings.held),
            ("admitted", readings.admitted),
            ("live", readings.live),
        ];
        for (stage, count) in stages {
            let gauge = self.connections.get_or_create(&StageLabel { stage });
            gauge.set(whole(count as u64));
        }
        self.kernel_flows.set(whole(readings.kernel_flows as u64));
        self.held.set(whole(readings.queues.held));
        self.generation.set(whole(readings.generation));
        self.addresses.set(whole(readings.addresses as u64));
        self.policies.set(whole(readings.policies as u64));
        self.refused.set(whole(readings.refused as u64));
        self.problems.set(whole(readings.problems as u64));
        let counters = [
            (&self.records_lost, readings.records_lost),
            (&self.queue_drops, readings.queues.drops),
        ];
        for (counter, count) in counters {
            counter.inner().store(count, Ordering::Relaxed);
        }
        self.rules.set(readings.rules.as_ref());
        self.observers.set(whole(readings.observers as u64));
        self.ready.set(readings.ready.into());
        self.spans.set(&readings.spans);
    }
}
