//! Values that are read at each scrape, not counted when they change.
use std::sync::atomic::Ordering;

use kernel::counters;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::{Queues, ReasonLabel, whole};
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

/// Sets the metrics to what was read.
pub(super) struct Scraped(Vec<Setter>);

/// Sets one metric.
type Setter = Box<dyn Fn(&Readings) + Send + Sync>;

/// Values by label; `None`: not known now, the last one stays.
type ByLabel<const N: usize> = [(&'static str, Option<u64>); N];

impl Scraped {
    /// In `registry`.
    pub(super) fn registered(registry: &mut Registry) -> Self {
        let mut all = Registration {
            registry,
            setters: Vec::new(),
        };
        all.traffic();
        all.cluster();
        all.losses();
        Self(all.setters)
    }

    /// Sets the metrics to `readings`.
    pub(super) fn set(&self, readings: &Readings) {
        for set in &self.0 {
            set(readings);
        }
    }
}

/// Registers metrics, each with how it is read.
struct Registration<'a> {
    registry: &'a mut Registry,
    setters: Vec<Setter>,
}

impl Registration<'_> {
    fn register_gauge(&mut self, name: &str, help: &str, read: fn(&Readings) -> u64) {
        let gauge = Gauge::<i64>::default();
        self.registry.register(name, help, gauge.clone());
        let set = move |readings: &Readings| {
            gauge.set(whole(read(readings)));
        };
        self.setters.push(Box::new(set));
    }

    fn register_counter(&mut self, name: &str, help: &str, read: fn(&Readings) -> u64) {
        let counter = Counter::<u64>::default();
        self.registry.register(name, help, counter.clone());
        let set =
            move |readings: &Readings| counter.inner().store(read(readings), Ordering::Relaxed);
        self.setters.push(Box::new(set));
    }

    /// A counter for each reason.
    fn register_counters<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        read: fn(&Readings) -> ByLabel<N>,
    ) {
        let family = Family::<ReasonLabel, Counter>::default();
        self.registry.register(name, help, family.clone());
        let set = move |readings: &Readings| {
            for (reason, count) in read(readings) {
                let counter = family.get_or_create(&ReasonLabel { reason });
                if let Some(count) = count {
                    counter.inner().store(count, Ordering::Relaxed);
                }
            }
        };
        self.setters.push(Box::new(set));
    }

    fn traffic(&mut self) {
        let stages = Family::<StageLabel, Gauge>::default();
        let help = "Proxied connections by stage";
        self.registry.register("connections", help, stages.clone());
        self.setters.push(Box::new(move |readings| {
            for (stage, count) in [
                ("held", readings.held),
                ("admitted", readings.admitted),
                ("live", readings.live),
            ] {
                let gauge = stages.get_or_create(&StageLabel { stage });
                gauge.set(whole(count as u64));
            }
        }));
        let help = "Flows that the kernel forwards";
        self.register_gauge("kernel_flows", help, |all| all.kernel_flows as u64);
        let help = "Packets that wait in the kernel's queues";
        self.register_gauge("queued_packets", help, |all| all.queues.held);
        let help = "Readers of the stream of decisions";
        self.register_gauge("observe_clients", help, |all| all.observers as u64);
        let help = "Whether this node enforces the newest state";
        self.register_gauge("ready", help, |all| all.ready.into());
    }

    /// The gauges of the cluster's state.
    fn cluster(&mut self) {
        let help = "Generation of the policy table in force";
        self.register_gauge("table_generation", help, |all| all.generation);
        let help = "Pod addresses in the policy table";
        self.register_gauge("endpoints", help, |all| all.addresses as u64);
        let help = "Policies in force";
        self.register_gauge("policies", help, |all| all.policies as u64);
        let help =
            "Policies beyond the budgets of their namespaces, or the first one too many for a pod";
        self.register_gauge("policies_refused", help, |all| all.refused as u64);
        let help = "Current diagnostics of the cluster's objects";
        self.register_gauge("config_problems", help, |all| all.problems as u64);
    }

    fn losses(&mut self) {
        let help = "Records lost to a slow or full disk";
        self.register_counter("records_dropped", help, |all| all.records_lost);
        let help = "Packets that the kernel dropped because a queue was full";
        self.register_counter("queue_drops", help, |all| all.queues.drops);
        let help = "Packets that the redirect's rules dropped before policy evaluation";
        self.register_counters("nft_dropped_packets", help, |all| {
            let mut packets = all.rules.into_iter().flatten();
            counters::NAMES.map(|name| (name, packets.next()))
        });
        let help = "Spans that the collector accepted";
        self.register_counter("spans_sent", help, |all| all.spans.sent);
        let help = "Spans that did not reach the collector";
        self.register_counters("spans_dropped", help, |all| {
            [
                ("queue_full", all.spans.queue_full),
                ("refused", all.spans.refused),
                ("timeout", all.spans.timed_out),
            ]
            .map(|(reason, count)| (reason, Some(count)))
        });
    }
}
