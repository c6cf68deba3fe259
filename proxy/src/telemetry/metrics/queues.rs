//! The kernel's statistics of our NFQUEUEs: `/proc/net/netfilter/nfnetlink_queue`.
use std::ops::Range;

/// The state of our queues together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Queues {
    /// Packets that wait for their verdict.
    pub(crate) held: u64,
    /// Packets dropped because the queue or the socket buffer was full.
    pub(crate) drops: u64,
}

impl Queues {
    /// Reads the statistics of the queues with these numbers; zeros if there are none.
    pub(crate) fn read(numbers: &Range<u16>) -> Self {
        std::fs::read_to_string("/proc/net/netfilter/nfnetlink_queue")
            .map(|table| Self::parse(&table, numbers))
            .unwrap_or_default()
    }

    /// Columns: number, port id, packets held, copy mode, copy range, dropped in the queue, dropped
    /// on the way, last id, 1.
    fn parse(table: &str, numbers: &Range<u16>) -> Self {
        let mut all = Self::default();
        for line in table.lines() {
            let columns: Vec<u64> = line
                .split_whitespace()
                .map_while(|column| column.parse().ok())
                .collect();
            if let [number, _, held, _, _, full, undelivered, ..] = columns[..]
                && u16::try_from(number).is_ok_and(|number| numbers.contains(&number))
            {
                all.held += held;
                all.drops += full + undelivered;
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_queues_are_summed() {
        let table = "    7  12345     9 2  256     1     1       50  1\n  \
                     100   4711     3 2  256     5     2      900  1\n  \
                     101   4711     1 2  256     0     1      900  1\nnonsense\n";
        let expected = Queues { held: 4, drops: 8 };
        assert_eq!(Queues::parse(table, &(100..102)), expected);
    }
}
