//! How many connections there may be: of one source, and in all.
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dashmap::DashMap;

use super::{Full, Party, Source};

/// The counts behind the bound of connections.
pub(crate) struct ConnectionLimits {
    /// Of one source.
    per_source: usize,
    /// In all.
    total: usize,
    used: AtomicUsize,
    sources: Counts<Source>,
    servers: Counts<Source>,
    namespaces: Counts<Arc<str>>,
}

type Counts<K> = DashMap<K, usize, ahash::RandomState>;

/// ConnectionLimits of a namespace for each one that is still free: three quarters of all if it is alone on the node.
const OF_NAMESPACE: usize = 3;
/// The same of one server: more than a source, so that no single source takes all of it.
const OF_SERVER: usize = 2;

/// A permit for one connection, released when dropped.
pub(crate) struct Permit {
    connections: Arc<ConnectionLimits>,
    source: Source,
    /// None for a connection of a pod.
    server: Option<Source>,
    namespace: Option<Arc<str>>,
}

impl ConnectionLimits {
    /// Counts from zero.
    pub(crate) fn new(per_source: usize, total: usize) -> Arc<Self> {
        Arc::new(Self {
            per_source,
            total,
            used: AtomicUsize::new(0),
            sources: DashMap::default(),
            servers: DashMap::default(),
            namespaces: DashMap::default(),
        })
    }

    /// Counts one more connection. A source may have no more than are still free: one alone half of all, two a third
    /// each; so there is always some left for those who have none yet. A namespace, which may have any number of pods,
    /// may have three times as many.
    ///
    /// A pod's connection counts in its own namespace only: it must not use up what the server has, or the namespace
    /// that this is in. Clients that are not pods can use any number of addresses, so a server may have from those
    /// twice as many as are still free, and they count in its namespace.
    ///
    /// # Errors
    /// The bound that is met.
    pub(crate) fn permit(self: &Arc<Self>, client: Party, server: Party) -> Result<Permit, Full> {
        let used = self.used.load(Ordering::Relaxed);
        let free = self.total.saturating_sub(used);
        if free == 0 {
            return Err(Full::Node);
        }
        // It is counted first, so that dropping a refused permit gives it back like any other.
        let permit = self.take_over(client, server);
        if count(&self.sources, &permit.source) > self.per_source.min(free) {
            return Err(Full::Source);
        }
        let has_more = |counts: &Counts<_>, server| count(counts, server) > OF_SERVER * free;
        if permit.server.iter().any(|it| has_more(&self.servers, it)) {
            return Err(Full::Server);
        }
        let namespace = permit.namespace.as_ref();
        if namespace.is_some_and(|it| count(&self.namespaces, it) > OF_NAMESPACE * free) {
            return Err(Full::Namespace);
        }
        Ok(permit)
    }

    /// Counts a connection that is live already, regardless of the bounds.
    pub(crate) fn take_over(self: &Arc<Self>, client: Party, server: Party) -> Permit {
        self.used.fetch_add(1, Ordering::Relaxed);
        let (server, namespace) = match client.namespace {
            Some(own) => (None, Some(own)),
            None => (Some(server.source), server.namespace),
        };
        add(&self.sources, &client.source);
        server.iter().for_each(|it| add(&self.servers, it));
        namespace.iter().for_each(|it| add(&self.namespaces, it));
        Permit {
            connections: Arc::clone(self),
            source: client.source,
            server,
            namespace,
        }
    }
}

fn add<K: Clone + Eq + Hash>(counts: &Counts<K>, whose: &K) {
    *counts.entry(whose.clone()).or_insert(0) += 1;
}

fn count<K: Eq + Hash>(counts: &Counts<K>, whose: &K) -> usize {
    counts.get(whose).map_or(0, |count| *count)
}

fn take<K: Eq + Hash>(counts: &Counts<K>, whose: &K) {
    counts.remove_if_mut(whose, |_, count| {
        *count -= 1;
        *count == 0
    });
}

impl Permit {
    /// The number of connections that its source has now.
    pub(crate) fn connections_of_source(&self) -> usize {
        count(&self.connections.sources, &self.source)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let ConnectionLimits {
            used,
            sources,
            servers,
            namespaces,
            ..
        } = &*self.connections;
        used.fetch_sub(1, Ordering::Relaxed);
        take(sources, &self.source);
        self.server.iter().for_each(|it| take(servers, it));
        self.namespace.iter().for_each(|it| take(namespaces, it));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outside(third: u8, last: u8) -> Party {
        Party {
            source: Source::Outside([10, 0, third, last].into()),
            namespace: None,
        }
    }

    fn source(last: u8) -> Party {
        outside(0, last)
    }

    fn server(last: u8) -> Party {
        outside(1, last)
    }

    fn pod(namespace: &str, name: u16) -> Party {
        Party {
            source: Source::Pod(format!("{namespace}/{name}").into()),
            namespace: Some(namespace.into()),
        }
    }

    /// As many permits as a source gets.
    fn all_of(connections: &Arc<ConnectionLimits>, last: u8) -> Vec<Permit> {
        std::iter::from_fn(|| connections.permit(source(last), server(last)).ok()).collect()
    }

    #[test]
    fn only_source_over_its_bound_is_limited() {
        let connections = ConnectionLimits::new(2, 8);
        let _held = all_of(&connections, 1);
        assert_eq!(
            connections.permit(source(1), server(1)).err(),
            Some(Full::Source)
        );
        assert!(connections.permit(source(2), server(2)).is_ok());
    }

    #[test]
    fn greedy_sources_leave_an_equal_share() {
        for greedy in 1..10 {
            let connections = ConnectionLimits::new(usize::MAX, 1000);
            // In turns, as connections arrive; otherwise the first source would get half.
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
    fn one_server_gets_two_thirds_at_most() {
        let connections = ConnectionLimits::new(usize::MAX, 100);
        let held: Vec<_> = (0..200)
            .filter_map(|last| connections.permit(source(last), server(1)).ok())
            .collect();
        assert_eq!(held.len(), 67);
        let more = connections.permit(source(201), server(1));
        assert_eq!(more.err(), Some(Full::Server));
        assert!(connections.permit(source(1), server(2)).is_ok());
        drop(held);
        assert!(connections.servers.is_empty() && connections.sources.is_empty());
    }

    #[test]
    fn one_source_leaves_its_server_to_others() {
        let bank = || pod("bank", 1);
        for (greedy, what) in [(pod("evil", 1), "a pod"), (source(1), "one from outside")] {
            let connections = ConnectionLimits::new(usize::MAX, 100);
            let permit = |client: &Party| connections.permit(client.clone(), bank());
            let held: Vec<_> = (0..200).filter_map(|_| permit(&greedy).ok()).collect();
            assert_eq!(held.len(), 50, "{what}");
            assert_eq!(permit(&greedy).err(), Some(Full::Source), "{what}");
            for other in [source(2), pod("third", 1), pod("bank", 2)] {
                assert!(permit(&other).is_ok(), "{what}, {other:?}");
            }
        }
    }

    #[test]
    fn namespaces_do_not_use_each_others_share() {
        let connections = ConnectionLimits::new(usize::MAX, 1000);
        let held: Vec<_> = (0..1000)
            .filter_map(|n| connections.permit(pod("evil", n), pod("bank", n % 3)).ok())
            .collect();
        assert_eq!(held.len(), 750);
        let more = connections.permit(pod("evil", 9999), pod("bank", 0));
        assert_eq!(more.err(), Some(Full::Namespace));
        for client in [pod("bank", 7), pod("third", 1), source(1)] {
            let theirs = connections.permit(client.clone(), pod("bank", 0));
            assert!(theirs.is_ok(), "{client:?}");
        }
    }

    #[test]
    fn one_namespace_always_leaves_a_quarter() {
        type Ends = fn(u16) -> (Party, Party);
        let others = |n: u16| outside(2, n.to_le_bytes()[0]);
        let ways: [(Ends, &str); 3] = [
            (
                |n| (pod("greedy", n), server(n.to_le_bytes()[0])),
                "clients",
            ),
            (
                |n| (source(n.to_le_bytes()[0]), pod("greedy", n)),
                "servers",
            ),
            (|n| (pod("greedy", n), pod("greedy", n + 5000)), "both"),
        ];
        for (ends, what) in ways {
            let connections = ConnectionLimits::new(usize::MAX, 1000);
            let permit = |n| {
                let (client, server) = ends(n);
                connections.permit(client, server).ok()
            };
            let held: Vec<_> = (0..1000).filter_map(permit).collect();
            assert_eq!(held.len(), 750, "{what}");
            let more = connections.permit(pod("greedy", 9999), others(1));
            assert_eq!(more.err(), Some(Full::Namespace), "{what}");
            assert!(
                connections.permit(pod("third", 1), others(1)).is_ok(),
                "{what}"
            );
            drop(held);
            assert!(connections.namespaces.is_empty(), "{what}");
        }
    }

    #[test]
    fn handed_over_connections_may_exceed_the_bounds() {
        let connections = ConnectionLimits::new(1, 2);
        let held: Vec<_> = (0..5)
            .map(|_| connections.take_over(source(1), server(1)))
            .collect();
        assert_eq!(
            connections.permit(source(2), server(2)).err(),
            Some(Full::Node)
        );
        drop(held);
        assert!(connections.permit(source(1), server(1)).is_ok());
    }

    #[test]
    fn total_bound_applies_to_every_source() {
        let connections = ConnectionLimits::new(usize::MAX, 2);
        let _held: Vec<_> = (1..=2)
            .map(|n| connections.permit(source(n), server(n)).ok())
            .collect();
        assert_eq!(
            connections.permit(source(3), server(3)).err(),
            Some(Full::Node)
        );
    }

    #[test]
    fn released_permit_leaves_no_trace() {
        let connections = ConnectionLimits::new(1, 1);
        drop(connections.permit(source(1), server(1)));
        assert!(connections.sources.is_empty());
        assert!(connections.permit(source(1), server(1)).is_ok());
    }

    #[test]
    fn limited_source_leaves_no_trace() {
        let connections = ConnectionLimits::new(usize::MAX, 1);
        let _held = connections.permit(source(1), server(1));
        assert!(connections.permit(source(2), server(2)).is_err());
        assert_eq!(connections.sources.len(), 1);
    }
}
