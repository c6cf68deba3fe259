//! The place of a node's span in its trace: ids that two nodes derive from what both see on the
//! wire, without talking to each other.
//!
//! The node that a connection leaves knows the leg on which it leaves, and the next one sees the same
//! leg arrive. Both use its addresses, ports and protocol, and, since ports are reused, a
//! time window: by the timestamp of the leg's SYN, which is the same for both, or else by the
//! clocks of the nodes. docs/tracing.md has the limits.
use std::hash::Hasher;
use std::net::{IpAddr, SocketAddr};
use std::time::{SystemTime, UNIX_EPOCH};

use opentelemetry::trace::{SpanId, TraceId};
use policy::{Endpoint, Protocol};
use siphasher::sip128::{Hasher128, SipHasher13};

use crate::telemetry::decision::DataPath;
use crate::telemetry::record::{Fate, Record, Subject};
use kernel::names::REMOTE_PORTS;

/// A window of SYN timestamps has this many bits of milliseconds: 16 seconds.
const STAMP_BITS: u32 = 14;
/// A window of the nodes' clocks.
const CLOCK_SECONDS: u64 = 64;

/// The leg that two nodes see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wire {
    client: SocketAddr,
    server: SocketAddr,
    protocol: Protocol,
    window: Window,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Window {
    Stamp(u32),
    Clock(u64),
}

/// The ids of a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) trace: TraceId,
    /// `None`: a random id, since no other node derives it.
    pub(super) span: Option<SpanId>,
    /// The span of the node that the connection came from.
    pub(super) parent: Option<SpanId>,
}

impl Wire {
    /// The leg to another node if there is one, else the one on which the connection came.
    pub(super) fn of(subject: &Subject) -> Self {
        let mut client = subject.client;
        let mut stamp = None;
        if let Some(seen) = &subject.seen {
            stamp = seen.stamp;
            if let Some(onward) = seen.onward {
                client.set_port(onward.port);
                stamp = onward.stamp;
            }
        }
        Self {
            client,
            server: subject.server,
            protocol: subject.protocol,
            window: stamp.map_or_else(|| Window::clock(subject.opened), Window::stamp),
        }
    }

    /// The trace of every span about this leg.
    pub(super) fn trace_id(&self) -> TraceId {
        TraceId::from_bytes(self.hash(b"trace").to_be_bytes())
    }

    /// The span of the node that the connection leaves on this leg.
    fn first_span_id(&self) -> SpanId {
        let [bytes @ .., _, _, _, _, _, _, _, _] = self.hash(b"first").to_be_bytes();
        SpanId::from_bytes(bytes)
    }

    /// The same on every node and in every version of this program.
    fn hash(&self, about: &[u8; 5]) -> u128 {
        // Any keys will do; they only must not change.
        let mut hasher = SipHasher13::new_with_keys(0x706f_7274_7265_6576, 0x6520_7472_6163_6573);
        hasher.write(about);
        for end in [self.client, self.server] {
            match end.ip() {
                IpAddr::V4(v4) => hasher.write(&v4.octets()),
                IpAddr::V6(v6) => hasher.write(&v6.octets()),
            }
            hasher.write(&end.port().to_be_bytes());
        }
        hasher.write(&[ip_number(self.protocol)]);
        match self.window {
            Window::Stamp(window) => {
                hasher.write(b"s");
                hasher.write(&window.to_be_bytes());
            }
            Window::Clock(window) => {
                hasher.write(b"c");
                hasher.write(&window.to_be_bytes());
            }
        }
        hasher.finish128().as_u128()
    }
}

impl Window {
    fn stamp(stamp: u32) -> Self {
        Self::Stamp(stamp >> STAMP_BITS)
    }

    fn clock(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::Clock(since.as_secs() / CLOCK_SECONDS)
    }
}

impl Place {
    /// The ids of `node`'s span of this connection.
    ///
    /// A parent is named only where one is to be expected: the client's pod lives on another node
    /// and is isolated for egress, so that its node has decided the connection before, and the port
    /// is one of those that nodes use between each other.
    pub(super) fn of(record: &Record, node: &str) -> Self {
        let Record {
            subject,
            fate,
            decision,
            ..
        } = record;
        let wire = Wire::of(subject);
        let lives_here = |pod: &Endpoint| *pod.identity.node_name == *node;
        let (from, to) = (decision.from.as_deref(), decision.to.as_deref());
        let leaves = match subject.path {
            DataPath::Spliced => subject.seen.is_some_and(|seen| seen.onward.is_some()),
            DataPath::Kernel => {
                from.is_some_and(lives_here)
                    && !to.is_some_and(lives_here)
                    && !matches!(fate, Fate::Denied)
            }
        };
        let comes = !leaves
            && from.is_some_and(|pod| !lives_here(pod))
            && decision.verdict.egress.isolated
            && (subject.path == DataPath::Kernel || REMOTE_PORTS.contains(&subject.client.port()));
        Self {
            trace: wire.trace_id(),
            span: leaves.then(|| wire.first_span_id()),
            parent: comes.then(|| wire.first_span_id()),
        }
    }
}

/// Takes a share of traces, the same on every node: as OpenTelemetry's consistent probability
/// sampling does, by the last 56 bits of the trace id.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sampler {
    /// The minimum of the last 56 bits.
    threshold: u64,
}

impl Sampler {
    const RANGE: u64 = 1 << 56;

    /// Takes about `share` of all traces, which is from 0 to 1.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a share of 2^56 is a whole number of that range as exactly as a float can say it"
    )]
    pub(super) fn new(share: f64) -> Self {
        Self {
            threshold: ((1.0 - share) * Self::RANGE as f64) as u64,
        }
    }

    pub(super) fn takes_all(self) -> bool {
        self.threshold == 0
    }

    pub(super) fn takes(self, trace: TraceId) -> bool {
        let [_, _, _, _, _, _, _, _, low @ ..] = trace.to_bytes();
        u64::from_be_bytes(low) % Self::RANGE >= self.threshold
    }
}

/// The number of a protocol in an IP header.
fn ip_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
        Protocol::Other(number) => number,
    }
}

#[cfg(test)]
mod tests;
