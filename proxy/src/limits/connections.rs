//! How many connections there may be: of one source, and in all.
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dashmap::DashMap;

use super::{Full, Source};

/// The counts behind the bound of connections.
pub(crate) struct Connections {
    /// Of one source.
    per_source: usize,
    /// In all.
    total: usize,
    used: AtomicUsize,
    sources: Counts,
    servers: Counts,
}

type Counts = DashMap<Source, usize, ahash::RandomState>;

/// The right to one connection; dropped, it is given back.
pub(crate) struct Permit {
    connections: Arc<Connections>,
    source: Source,
    server: Source,
}

impl Connections {
    /// Counts from zero.
    pub(crate) fn new(per_source: usize, total: usize) -> Arc<Self> {
        Arc::new(Self {
            per_source,
            total,
            used: AtomicUsize::new(0),
            sources: DashMap::default(),
            servers: DashMap::default(),
        })
    }

    /// Counts one more connection of `source` to `server`. Each may have no more than are still free: one alone half
    /// of all, two a third each; so there is always some left for those who have none yet. A server counts too, since
    /// who attacks one may have any number of sources.
    ///
    /// # Errors
    /// Which bound stands against it.
    pub(crate) fn permit(self: &Arc<Self>, source: Source, server: Source) -> Result<Permit, Full> {
        let used = self.used.fetch_add(1, Ordering::Relaxed);
        let free = self.total.saturating_sub(used);
        let full = if free == 0 {
            Full::Node
        } else if !count(&self.sources, &source, self.per_source.min(free)) {
            Full::Source
        } else if !count(&self.servers, &server, free) {
            discount(&self.sources, &source);
            Full::Server
        } else {
            return Ok(Permit {
                connections: Arc::clone(self),
                source,
                server,
            });
        };
        self.used.fetch_sub(1, Ordering::Relaxed);
        Err(full)
    }
}

/// Counts one more of `whose`, unless there are `most`.
fn count(counts: &Counts, whose: &Source, most: usize) -> bool {
    let mut count = counts.entry(whose.clone()).or_insert(0);
    let room = *count < most;
    *count += usize::from(room);
    room
}

fn discount(counts: &Counts, whose: &Source) {
    counts.remove_if_mut(whose, |_, count| {
        *count -= 1;
        *count == 0
    });
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Connections {
            used,
            sources,
            servers,
            ..
        } = &*self.connections;
        used.fetch_sub(1, Ordering::Relaxed);
        discount(sources, &self.source);
        discount(servers, &self.server);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(last: u8) -> Source {
        Source::Outside([10, 0, 0, last].into())
    }

    fn server(last: u8) -> Source {
        Source::Outside([10, 0, 1, last].into())
    }

    /// Permits for as many connections of a source as it gets.
    fn all_of(connections: &Arc<Connections>, last: u8) -> Vec<Permit> {
        std::iter::from_fn(|| connections.permit(source(last), server(last)).ok()).collect()
    }

    #[test]
    fn a_source_over_its_bound_is_refused_and_its_neighbour_is_not() {
        let connections = Connections::new(2, 8);
        let _held = all_of(&connections, 1);
        assert_eq!(
            connections.permit(source(1), server(1)).err(),
            Some(Full::Source)
        );
        assert!(connections.permit(source(2), server(2)).is_ok());
    }

    #[test]
    fn greedy_sources_leave_as_much_as_each_has() {
        for greedy in 1..10 {
            let connections = Connections::new(usize::MAX, 1000);
            // In turns, as they would come: the first would have half otherwise.
            let mut held = Vec::new();
            while (1..=greedy)
                .map(|last| {
                    connections
                        .permit(source(last), server(last))
                        .map(|it| held.push(it))
                })
                .filter(Result::is_ok)
                .count()
                > 0
            {}
            let each = 1000 / (usize::from(greedy) + 1);
            let free = 1000 - held.len();
            assert!(
                free.abs_diff(each) <= usize::from(greedy),
                "{free} of {each}"
            );
            assert!(connections.permit(source(99), server(99)).is_ok());
        }
    }

    #[test]
    fn one_server_has_half_however_many_sources_come_to_it() {
        let connections = Connections::new(usize::MAX, 100);
        let held: Vec<_> = (0..200)
            .filter_map(|last| connections.permit(source(last), server(1)).ok())
            .collect();
        assert_eq!(held.len(), 50);
        let more = connections.permit(source(201), server(1));
        assert_eq!(more.err(), Some(Full::Server));
        assert!(connections.permit(source(1), server(2)).is_ok());
        drop(held);
        assert!(connections.servers.is_empty() && connections.sources.is_empty());
    }

    #[test]
    fn the_bound_in_all_stands_whoever_asks() {
        let connections = Connections::new(usize::MAX, 2);
        let _held: Vec<_> = (1..=2)
            .map(|n| connections.permit(source(n), server(n)).ok())
            .collect();
        assert_eq!(
            connections.permit(source(3), server(3)).err(),
            Some(Full::Node)
        );
    }

    #[test]
    fn a_dropped_permit_is_given_back_and_leaves_no_trace() {
        let connections = Connections::new(1, 1);
        drop(connections.permit(source(1), server(1)));
        assert!(connections.sources.is_empty());
        assert!(connections.permit(source(1), server(1)).is_ok());
    }

    #[test]
    fn a_refused_source_leaves_no_trace() {
        let connections = Connections::new(usize::MAX, 1);
        let _held = connections.permit(source(1), server(1));
        assert!(connections.permit(source(2), server(2)).is_err());
        assert_eq!(connections.sources.len(), 1);
    }
}
