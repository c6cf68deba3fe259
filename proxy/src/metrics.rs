//! Every metric of the daemon, declared once. Counting never waits for a scrape to be written.
use std::sync::atomic::Ordering;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::decision::{Decision, Way};
use crate::relay::Moved;

/// Why a packet or connection was refused, when it was not policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// Its source has as many connections as one source may have.
    SourceLimit,
    /// The node has as many connections as it can hold.
    NodeLimit,
    /// One end is in the cluster and did not become known within `--hold`.
    UnknownPod,
    /// No source port was left towards that server.
    NoPort,
    /// TCP that begins nothing and belongs to nothing, or a packet cut too short.
    Odd,
    /// No IP packet that we can read.
    Unreadable,
    /// This host failed us; the log says how.
    Internal,
}

impl Cause {
    /// The value of the label `cause`.
    fn label(self) -> &'static str {
        match self {
            Self::SourceLimit => "source_limit",
            Self::NodeLimit => "node_limit",
            Self::UnknownPod => "unknown_pod",
            Self::NoPort => "no_port",
            Self::Odd => "odd",
            Self::Unreadable => "unreadable",
            Self::Internal => "internal",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabels {
    verdict: &'static str,
    direction: &'static str,
    path: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CauseLabel {
    cause: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabel {
    direction: &'static str,
}

/// What is known only when somebody asks.
pub(crate) struct Readings {
    pub(crate) connections: usize,
    pub(crate) generation: u64,
    pub(crate) problems: usize,
    pub(crate) records_lost: u64,
    pub(crate) queue_drops: u64,
    pub(crate) ready: bool,
}

/// The metrics and their registry.
pub(crate) struct Metrics {
    registry: Registry,
    decisions: Family<DecisionLabels, Counter>,
    refusals: Family<CauseLabel, Counter>,
    bytes: Family<DirectionLabel, Counter>,
    connect: Histogram,
    connections: Gauge,
    generation: Gauge,
    enforced: Gauge,
    problems: Gauge,
    records_lost: Gauge,
    queue_drops: Gauge,
    ready: Gauge,
}

impl Metrics {
    /// All at zero.
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("portreeve");
        let build = [("version", env!("CARGO_PKG_VERSION"))];
        registry.register(
            "build",
            "What this daemon was built from",
            Info::new(build.to_vec()),
        );
        let metrics = Self {
            decisions: Family::default(),
            refusals: Family::default(),
            bytes: Family::default(),
            connect: Histogram::new([
                0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.05, 0.25, 1.0, 5.0,
            ]),
            connections: Gauge::default(),
            generation: Gauge::default(),
            enforced: Gauge::default(),
            problems: Gauge::default(),
            records_lost: Gauge::default(),
            queue_drops: Gauge::default(),
            ready: Gauge::default(),
            registry: Registry::default(),
        };
        metrics.registered(registry)
    }

    fn registered(mut self, mut registry: Registry) -> Self {
        registry.register(
            "decisions",
            "Connections judged by policy",
            self.decisions.clone(),
        );
        registry.register(
            "refusals",
            "Packets refused for another reason than policy",
            self.refusals.clone(),
        );
        registry.register(
            "relayed_bytes",
            "Payload of connections that have ended",
            self.bytes.clone(),
        );
        registry.register_with_unit(
            "connect",
            "From the first packet to the server's answer",
            Unit::Seconds,
            self.connect.clone(),
        );
        registry.register(
            "connections",
            "Connections held, admitted or live",
            self.connections.clone(),
        );
        registry.register(
            "table_generation",
            "Generation of the policy table in force",
            self.generation.clone(),
        );
        registry.register(
            "enforced_generation",
            "Generation of the policy table that the kernel's sets are in step with",
            self.enforced.clone(),
        );
        registry.register(
            "problems",
            "Faults of the cluster's objects that stand now",
            self.problems.clone(),
        );
        registry.register(
            "records_lost",
            "Records lost to a slow disk",
            self.records_lost.clone(),
        );
        registry.register(
            "queue_drops",
            "Packets that the kernel dropped because a queue was full",
            self.queue_drops.clone(),
        );
        registry.register(
            "ready",
            "1 if this node enforces the newest state",
            self.ready.clone(),
        );
        self.registry = registry;
        self
    }

    /// Counts a connection that policy has judged.
    pub(crate) fn decided(&self, decision: &Decision, way: Way) {
        let verdict = if decision.verdict.allowed() {
            "allow"
        } else {
            "deny"
        };
        self.count(verdict, decision, way);
    }

    /// Counts a connection that was allowed once and is cut.
    pub(crate) fn severed(&self, severance: &Decision, way: Way) {
        self.count("sever", severance, way);
    }

    fn count(&self, verdict: &'static str, decision: &Decision, way: Way) {
        let (direction, path) = (decision.direction(), way.name());
        self.decisions
            .get_or_create(&DecisionLabels {
                verdict,
                direction,
                path,
            })
            .inc();
    }

    /// Counts a packet refused for another reason.
    pub(crate) fn refused(&self, cause: Cause) {
        self.refusals
            .get_or_create(&CauseLabel {
                cause: cause.label(),
            })
            .inc();
    }

    /// Notes how long a first packet waited for the server.
    pub(crate) fn connected(&self, waited: Duration) {
        self.connect.observe(waited.as_secs_f64());
    }

    /// Notes which generation the kernel's sets are in step with.
    pub(crate) fn enforced(&self, generation: u64) {
        self.enforced
            .set(i64::try_from(generation).unwrap_or(i64::MAX));
    }

    /// Counts what a connection that is over has moved.
    pub(crate) fn moved(&self, moved: &Moved) {
        let bytes = |direction| self.bytes.get_or_create(&DirectionLabel { direction });
        bytes("sent").inc_by(moved.sent.load(Ordering::Relaxed));
        bytes("received").inc_by(moved.received.load(Ordering::Relaxed));
    }

    /// Everything in the OpenMetrics text format.
    ///
    /// # Errors
    /// Never in practice: a `String` takes all.
    pub(crate) fn render(&self, readings: &Readings) -> Result<String, std::fmt::Error> {
        let gauge = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        self.connections.set(gauge(readings.connections as u64));
        self.generation.set(gauge(readings.generation));
        self.problems.set(gauge(readings.problems as u64));
        self.records_lost.set(gauge(readings.records_lost));
        self.queue_drops.set(gauge(readings.queue_drops));
        self.ready.set(readings.ready.into());
        let mut out = String::new();
        text::encode(&mut out, &self.registry)?;
        Ok(out)
    }
}
