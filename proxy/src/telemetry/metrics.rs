//! Every metric of the daemon, declared once. Counting never waits for a scrape to be written, and
//! looks up no label: every series has its counter from the start.
mod decisions;
mod queues;
mod scraped;
mod text;
mod watch;

use std::time::Duration;

use controller::Decision;
use iptables_init::watch::Part;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::limits::Full;
use crate::telemetry::decision::{DataPath, VerdictKind};
use crate::telemetry::moved::Moved;

use decisions::Decisions;
pub(crate) use queues::Queues;
pub(crate) use scraped::Readings;
use scraped::Scraped;

/// Why a packet or connection was dropped, other than by policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DropReason {
    /// Its source has as many connections as one source may have, or as are still free.
    SourceLimit,
    /// Its server has as many connections as are still free.
    ServerLimit,
    /// The pods of a namespace have three times as many connections as are still free.
    NamespaceLimit,
    /// The node has as many connections as it can hold.
    NodeLimit,
    /// Its source, a pod of this node, has its share of half-open connections, or the biggest user replaces its own too
    /// often.
    HalfOpenLimit,
    /// An allowed half-open connection was ended to make room for another.
    HalfOpenGaveWay,
    /// One end is unknown, and its source has used up its share of waiting packets, or it made room for another packet.
    WaitingLimit,
    /// It would have to wait and is too long for that.
    TooLong,
    /// Too many first packets of the same user wait.
    Crowded,
    /// One end is in the cluster and did not become known within `--hold`.
    UnknownPod,
    /// No source port was left towards that server.
    NoPort,
    /// A TCP segment that is neither a SYN nor part of a connection, a packet too short for a verdict, or a link-local
    /// source.
    Invalid,
    /// No IP packet that we can read.
    Malformed,
    /// An error of this host; see the log.
    Internal,
}

impl From<Full> for DropReason {
    fn from(full: Full) -> Self {
        match full {
            Full::Source => Self::SourceLimit,
            Full::Server => Self::ServerLimit,
            Full::Namespace => Self::NamespaceLimit,
            Full::Node => Self::NodeLimit,
        }
    }
}

impl DropReason {
    /// Every one of them, in the order in which they are declared.
    const ALL: [Self; 14] = [
        Self::SourceLimit,
        Self::ServerLimit,
        Self::NamespaceLimit,
        Self::NodeLimit,
        Self::HalfOpenLimit,
        Self::HalfOpenGaveWay,
        Self::WaitingLimit,
        Self::TooLong,
        Self::Crowded,
        Self::UnknownPod,
        Self::NoPort,
        Self::Invalid,
        Self::Malformed,
        Self::Internal,
    ];

    /// The value of the label `reason`.
    fn label(self) -> &'static str {
        match self {
            Self::SourceLimit => "source_limit",
            Self::ServerLimit => "server_limit",
            Self::NamespaceLimit => "namespace_limit",
            Self::NodeLimit => "node_limit",
            Self::HalfOpenLimit => "half_open_limit",
            Self::HalfOpenGaveWay => "half_open_gave_way",
            Self::WaitingLimit => "waiting_limit",
            Self::TooLong => "too_long",
            Self::Crowded => "crowded",
            Self::UnknownPod => "unknown_pod",
            Self::NoPort => "no_port",
            Self::Invalid => "invalid",
            Self::Malformed => "malformed",
            Self::Internal => "internal",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BytesLabels {
    direction: &'static str,
    path: &'static str,
}

/// The metrics and their registry.
pub(crate) struct Metrics {
    registry: Registry,
    decisions: Decisions,
    /// In the order of [`DropReason::ALL`].
    dropped: Vec<Counter>,
    /// By path, then sent and received.
    bytes: [[Counter; 2]; 2],
    verdict: Histogram,
    connect: Histogram,
    change: Histogram,
    enforced: Gauge,
    taken_over: Counter,
    /// In the order of [`Part::ALL`].
    redirect: [Counter; Part::ALL.len()],
    unread: Gauge,
    gave_way: Counter,
    scraped: Scraped,
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
        let (decisions, dropped, bytes) = counted(&mut registry);
        let [verdict, connect, change] = timed(&mut registry);
        let enforced = Gauge::default();
        registry.register(
            "enforced_generation",
            "Newest generation of the policy table that the nft sets are in sync with",
            enforced.clone(),
        );
        let taken_over = Counter::default();
        registry.register(
            "handover_connections",
            "Proxied connections taken over from the previous daemon",
            taken_over.clone(),
        );
        let redirect = Family::<ReasonLabel, Counter>::default();
        registry.register(
            "redirect_faults",
            "Faults of the redirect: a part was missing or changed",
            redirect.clone(),
        );
        let (unread, gave_way) = (Gauge::default(), Counter::default());
        registry.register_with_unit(
            "unread",
            "Memory of streams whose senders send much or whose receivers do not keep up",
            Unit::Bytes,
            unread.clone(),
        );
        registry.register(
            "unread_resets",
            "Streams reset because their source had more unread bytes than its share",
            gave_way.clone(),
        );
        Self {
            redirect: Part::ALL.map(|part| {
                redirect.get_or_create_owned(&ReasonLabel {
                    reason: part.label(),
                })
            }),
            decisions,
            dropped,
            bytes,
            verdict,
            connect,
            change,
            enforced,
            taken_over,
            unread,
            gave_way,
            scraped: Scraped::registered(&mut registry),
            registry,
        }
    }

    /// Counts a connection that policy has decided, and how long that took from its first packet.
    pub(crate) fn decided(&self, decision: &Decision, path: DataPath, waited: Duration) {
        let kind = if decision.verdict.allowed() {
            VerdictKind::Allow
        } else {
            VerdictKind::Deny
        };
        self.decisions.count(kind, decision, path);
        self.verdict.observe(waited.as_secs_f64());
    }

    /// Counts a severed connection.
    pub(crate) fn severed(&self, severance: &Decision, path: DataPath) {
        self.decisions.count(VerdictKind::Sever, severance, path);
    }

    /// Counts a packet that was dropped for another reason than policy.
    pub(crate) fn dropped(&self, reason: DropReason) {
        if let Some(counter) = self.dropped.get(reason as usize) {
            counter.inc();
        }
    }

    /// Counts a part of the redirect that was missing or changed.
    pub(crate) fn redirect_fault(&self, part: Part) {
        if let Some(counter) = self.redirect.get(part as usize) {
            counter.inc();
        }
    }

    /// Counts a connection taken over from another daemon.
    pub(crate) fn taken_over(&self) {
        self.taken_over.inc();
    }

    /// Sets the memory of busy streams, and counts those that were reset for it.
    pub(crate) fn unread(&self, bytes: usize, gave_way: usize) {
        self.unread.set(whole(bytes as u64));
        self.gave_way.inc_by(gave_way as u64);
    }

    /// Notes how long a first packet waited for the server.
    pub(crate) fn connected(&self, waited: Duration) {
        self.connect.observe(waited.as_secs_f64());
    }

    /// Sets the generation that the nft sets are in sync with.
    pub(crate) fn enforced(&self, generation: u64) {
        self.enforced.set(whole(generation));
    }

    /// Records how long a change took from its arrival until it was applied to table, flows and kernel.
    pub(crate) fn took_effect(&self, after: Duration) {
        self.change.observe(after.as_secs_f64());
    }

    /// Counts what a relayed connection has moved since this was last asked about it.
    pub(crate) fn moved(&self, moved: &Moved) {
        for (counter, bytes) in self.bytes[DataPath::Spliced as usize]
            .iter()
            .zip(moved.take_new())
        {
            counter.inc_by(bytes);
        }
    }

    /// Counts the bytes of a kernel flow.
    pub(crate) fn kernel_flow_bytes(&self, sent: u64, received: u64) {
        let [sent_by, received_by] = &self.bytes[DataPath::Kernel as usize];
        sent_by.inc_by(sent);
        received_by.inc_by(received);
    }

    /// Everything in the Prometheus text format, version 0.0.4.
    ///
    /// # Errors
    /// Never: writing to a `String` does not fail.
    pub(crate) fn render(&self, readings: &Readings) -> Result<String, std::fmt::Error> {
        self.scraped.set(readings);
        let mut out = String::new();
        prometheus_client::encoding::text::encode(&mut out, &self.registry)?;
        Ok(text::prometheus(&out))
    }
}

fn whole(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn counted(registry: &mut Registry) -> (Decisions, Vec<Counter>, [[Counter; 2]; 2]) {
    let (decisions, family) = Decisions::new();
    registry.register(
        "policy_verdicts",
        "First packets that policy allowed or denied, and connections that it severed",
        family,
    );
    let dropped = Family::<ReasonLabel, Counter>::default();
    registry.register(
        "dropped_packets",
        "Packets dropped for another reason than policy",
        dropped.clone(),
    );
    let by_reason = DropReason::ALL.map(|reason| {
        dropped.get_or_create_owned(&ReasonLabel {
            reason: reason.label(),
        })
    });
    let bytes = Family::<BytesLabels, Counter>::default();
    registry.register(
        "bytes",
        "Bytes moved, from the client's side",
        bytes.clone(),
    );
    let by_path = [DataPath::Spliced, DataPath::Kernel].map(|path| {
        ["sent", "received"].map(|direction| {
            bytes.get_or_create_owned(&BytesLabels {
                direction,
                path: path.name(),
            })
        })
    });
    (decisions, by_reason.into(), by_path)
}

/// Verdict, connect, change.
fn timed(registry: &mut Registry) -> [Histogram; 3] {
    let verdict = Histogram::new([
        2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 1e-2, 0.1, 1.0, 5.0,
    ]);
    let connect = Histogram::new([
        1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 5e-2, 0.25, 1.0, 5.0,
    ]);
    let change = Histogram::new([1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 1.0, 5.0]);
    registry.register_with_unit(
        "verdict_duration",
        "From a connection's first packet to its verdict",
        Unit::Seconds,
        verdict.clone(),
    );
    registry.register_with_unit(
        "upstream_connect_duration",
        "From a connection's first packet to the server's answer",
        Unit::Seconds,
        connect.clone(),
    );
    registry.register_with_unit(
        "policy_sync_duration",
        "From the arrival of a change of the cluster until it is applied",
        Unit::Seconds,
        change.clone(),
    );
    [verdict, connect, change]
}

#[cfg(test)]
mod tests;
