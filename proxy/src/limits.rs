//! The share that each source may have of common resources, and what happens beyond it.
//!
//! A user is a [`Source`]: a pod, whatever its addresses, or an address or prefix outside. No user can take all of a
//! resource, and a user that has none of it yet gets some:
//!
//! | resource | one source | in all | beyond |
//! |---|---|---|---|
//! | connections | as many as are still free: one alone half of all, two a third each; twice that for one server, from clients that are not pods, and three times for one namespace | what descriptors and memory allow | a new one is dropped; live ones are never ended |
//! | half-open ones among them | a pod of this node two thirds | [`Bounds::half_open`] | the oldest of the biggest user, by source or by server, ends; beyond its share a pod's new ones are dropped |
//! | packets that wait for an unknown address | a pod of this node [`WAITING_OF_SOURCE`] | [`Bounds::waiting`] | the same |
//! | length of a packet that waits | [`LONGEST_WAITING`] | | it is dropped |
//! | pipes of bulk streams | | [`Bounds::pipes`] | the stream is copied, not spliced |
//!
//! The kernel's queue (`kernel/src/nfqueue.rs`) has room for all packets that may wait at once.
mod connections;
mod memory;
mod pending;
mod source;

pub(crate) use connections::{ConnectionLimits, Permit};
pub(crate) use pending::{Asking, Pending, Place, ShareUsedUp};
pub(crate) use source::{Party, Source};

/// Packets that may wait for an unknown address, however many connections there may be.
const WAITING: usize = 4096;
/// Packets of one pod of this node among these.
pub(crate) const WAITING_OF_SOURCE: usize = 256;
/// Bytes of a packet that may wait, headers included: more than an Ethernet frame has. The kernel keeps the whole
/// packet.
pub(crate) const LONGEST_WAITING: usize = 2048;
/// ConnectionLimits that may be half-open, however many descriptors there are. With the packets that wait for unknown
/// addresses they fit into one core's queue, and into the backlog of one listener (`net.core.somaxconn`, 4096), whose
/// overflow would affect all connections.
const HALF_OPEN: usize = 3072;
/// Descriptors for everything but connections: queues, listeners, admin, files.
const DESCRIPTORS_KEPT: usize = 1024;
/// Bytes of a connection besides those that its receivers leave unread: 5.2 kB in the daemon and 7.5 kB in the kernel
/// while it is idle (deploy/README.md), and two empty pipes.
const CONNECTION: usize = 20 << 10;
/// The least memory for everything but connections, in bytes: the cluster's state, the programs.
const MEMORY_KEPT: usize = 64 << 20;

/// The bounds of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// ConnectionLimits of one source, even if more are free.
    pub(crate) per_source: usize,
    /// ConnectionLimits in all, half-open ones included.
    pub(crate) total: usize,
    /// ConnectionLimits whose client has not completed its handshake.
    pub(crate) half_open: usize,
    /// Packets that wait for an unknown address. A SYN among them counts as a connection.
    pub(crate) waiting: usize,
    /// Pipes of bulk streams.
    pub(crate) pipes: usize,
}

/// Which bound was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    Source,
    Server,
    Namespace,
    Node,
}

impl Bounds {
    /// What `descriptors` allow: two for a connection, and an eighth of all for pipes, two each. Half-open may be
    /// half of all connections, with one descriptor each, and three quarters of the `backlog` of a listener. What waits
    /// for unknown addresses can have any source: an eighth, so that with half-open ones to the same server it is less
    /// than that may have.
    ///
    /// Under a limit of `memory`, connections have what is left of it without `unread` bytes and an eighth for the rest.
    pub(crate) fn of(
        descriptors: usize,
        backlog: usize,
        [memory, unread]: [usize; 2],
        most: Option<usize>,
        most_of_source: Option<usize>,
    ) -> Self {
        let pipes = descriptors / 8 / 2;
        let left = descriptors.saturating_sub(DESCRIPTORS_KEPT + 2 * pipes);
        let kept = unread.saturating_add((memory / 8).max(MEMORY_KEPT));
        let free = memory.saturating_sub(kept);
        let total = (left / 2).min(free / CONNECTION).max(64);
        let total = most.map_or(total, |most| most.min(total));
        Self {
            per_source: most_of_source.unwrap_or(total).min(total),
            total,
            half_open: (total / 2).min(backlog / 4 * 3).clamp(16, HALF_OPEN),
            waiting: (total / 8).clamp(8, WAITING),
            pipes,
        }
    }

    /// The memory limit of this process in bytes, or as much as there can be.
    pub(crate) fn memory() -> usize {
        memory::limit().unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No limit of memory.
    const FREE: [usize; 2] = [usize::MAX, 256 << 20];

    #[test]
    fn connections_and_unread_bytes_fit_into_the_memory() {
        const MIB: usize = 1 << 20;
        for (memory, unread, total) in [
            (512, 256, 9830),
            (1024, 256, 32_768),
            (512, 64, 19_660),
            // Too little for its flags.
            (256, 256, 64),
        ] {
            let bounds = Bounds::of(1_048_576, 4096, [memory * MIB, unread * MIB], None, None);
            assert_eq!(bounds.total, total, "{memory} MiB");
            let used = unread * MIB + bounds.total * CONNECTION + MEMORY_KEPT;
            assert!(used <= memory * MIB || total == 64, "{memory} MiB");
        }
    }

    #[test]
    fn the_bounds_fit_into_the_descriptors() {
        for descriptors in [4096, 20_000, 65_536, 1_048_576] {
            let bounds = Bounds::of(descriptors, 4096, FREE, None, None);
            let used = 2 * bounds.total + 2 * bounds.pipes + DESCRIPTORS_KEPT;
            assert!(used <= descriptors, "{bounds:?}");
            assert!(bounds.half_open <= bounds.total / 2, "{bounds:?}");
            assert!(bounds.total >= descriptors / 4, "{bounds:?}");
        }
    }

    #[test]
    fn half_open_connections_fit_into_a_listeners_backlog() {
        let bounds = Bounds::of(1_048_576, 4096, FREE, None, None);
        assert_eq!(bounds.half_open, HALF_OPEN);
        assert_eq!(Bounds::of(1_048_576, 128, FREE, None, None).half_open, 96);
    }

    #[test]
    fn flags_lower_the_bounds_and_never_raise_them() {
        let of = |most, most_of_source| Bounds::of(20_000, 4096, FREE, most, most_of_source);
        let default = of(None, None);
        assert_eq!(of(Some(usize::MAX), Some(usize::MAX)), default);
        let lower = of(Some(100), Some(7));
        assert_eq!(
            (
                lower.total,
                lower.per_source,
                lower.half_open,
                lower.waiting
            ),
            (100, 7, 50, 12)
        );
    }
}
