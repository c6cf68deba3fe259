//! Bounds on what may be held and open, per source address and in all.
//!
//! Over a source's bound only that source is refused; its neighbours keep the rest.
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dashmap::DashMap;

/// How many connections there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// From one source address, held ones included.
    pub(crate) per_source: usize,
    /// In all.
    pub(crate) total: usize,
}

/// Which bound was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    Source,
    Node,
}

/// The counts behind the bounds.
pub(crate) struct Limits {
    bounds: Bounds,
    total: AtomicUsize,
    sources: DashMap<IpAddr, usize, ahash::RandomState>,
}

/// The right to one connection; dropped, it is given back.
pub(crate) struct Permit {
    limits: Arc<Limits>,
    source: IpAddr,
}

impl Limits {
    /// Counts from zero.
    pub(crate) fn new(bounds: Bounds) -> Arc<Self> {
        Arc::new(Self {
            bounds,
            total: AtomicUsize::new(0),
            sources: DashMap::default(),
        })
    }

    /// Counts one more connection of `source`.
    ///
    /// # Errors
    /// Which bound stands against it.
    pub(crate) fn permit(self: &Arc<Self>, source: IpAddr) -> Result<Permit, Full> {
        if self.total.fetch_add(1, Ordering::Relaxed) >= self.bounds.total {
            self.total.fetch_sub(1, Ordering::Relaxed);
            return Err(Full::Node);
        }
        let mut count = self.sources.entry(source).or_insert(0);
        if *count >= self.bounds.per_source {
            drop(count);
            self.total.fetch_sub(1, Ordering::Relaxed);
            return Err(Full::Source);
        }
        *count += 1;
        drop(count);
        Ok(Permit {
            limits: Arc::clone(self),
            source,
        })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.limits.total.fetch_sub(1, Ordering::Relaxed);
        self.limits.sources.remove_if_mut(&self.source, |_, count| {
            *count -= 1;
            *count == 0
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    #[test]
    fn a_source_over_its_bound_is_refused_and_its_neighbour_is_not() {
        let limits = Limits::new(Bounds {
            per_source: 2,
            total: 4,
        });
        let _held: Vec<_> = (0..2).map(|_| limits.permit(address(1)).ok()).collect();
        assert_eq!(limits.permit(address(1)).err(), Some(Full::Source));
        assert!(limits.permit(address(2)).is_ok());
    }

    #[test]
    fn the_bound_in_all_stands_whoever_asks() {
        let limits = Limits::new(Bounds {
            per_source: 2,
            total: 2,
        });
        let _held: Vec<_> = (1..=2).map(|n| limits.permit(address(n)).ok()).collect();
        assert_eq!(limits.permit(address(3)).err(), Some(Full::Node));
    }

    #[test]
    fn a_dropped_permit_is_given_back_and_leaves_no_trace() {
        let limits = Limits::new(Bounds {
            per_source: 1,
            total: 1,
        });
        drop(limits.permit(address(1)));
        assert!(limits.sources.is_empty());
        assert!(limits.permit(address(1)).is_ok());
    }
}
