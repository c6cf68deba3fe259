//! Packets that the redirect's rules dropped before policy evaluation.
use std::sync::atomic::Ordering;

use kernel::counters::{NAMES, Packets};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::ReasonLabel;

/// A counter for each nft counter, in the order of [`NAMES`].
#[derive(Default)]
pub(super) struct Rules([Counter; NAMES.len()]);

impl Rules {
    /// In `registry`.
    pub(super) fn registered(registry: &mut Registry) -> Self {
        let drops = Family::<ReasonLabel, Counter>::default();
        registry.register(
            "nft_dropped_packets",
            "Packets that the redirect's rules dropped before policy evaluation",
            drops.clone(),
        );
        Self(NAMES.map(|reason| drops.get_or_create_owned(&ReasonLabel { reason })))
    }

    /// Sets the kernel's counts; without them the metrics keep their values.
    pub(super) fn set(&self, packets: Option<&Packets>) {
        for (counter, packets) in self.0.iter().zip(packets.into_iter().flatten()) {
            counter.inner().store(*packets, Ordering::Relaxed);
        }
    }
}
