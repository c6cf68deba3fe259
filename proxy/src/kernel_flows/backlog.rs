//! Evaluates flows again in the background if they are many or not listed, so that one source's many flows do not delay
//! changes that concern others.
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::Notify;

/// The addresses whose flows wait to be evaluated again. Adding waits for the result, but only for a limited time.
#[derive(Default)]
pub(crate) struct Backlog {
    waiting: Mutex<Waiting>,
    done: Condvar,
    added: Notify,
}

#[derive(Default)]
struct Waiting {
    addresses: BTreeSet<IpAddr>,
    /// The number of additions, and how many of them are done.
    turn: u64,
    done: u64,
}

impl Backlog {
    /// Adds addresses, and waits until they are done, but not longer than `patience`.
    pub(crate) fn add(&self, addresses: &BTreeSet<IpAddr>, patience: Duration) {
        let mut waiting = self.waiting();
        waiting.addresses.extend(addresses);
        waiting.turn += 1;
        let turn = waiting.turn;
        self.added.notify_one();
        let is_open = |waiting: &mut Waiting| waiting.done < turn;
        self.done.wait_while_for(&mut waiting, is_open, patience);
    }

    /// Waits until there is something to do.
    pub(crate) async fn added(&self) {
        self.added.notified().await;
    }

    /// Calls `todo` with all waiting addresses; if it fails, they wait again.
    ///
    /// # Errors
    /// Those of `todo`.
    pub(crate) fn work<E>(
        &self,
        todo: impl FnOnce(&BTreeSet<IpAddr>) -> Result<(), E>,
    ) -> Result<(), E> {
        let (addresses, turn) = {
            let mut waiting = self.waiting();
            (std::mem::take(&mut waiting.addresses), waiting.turn)
        };
        let result = todo(&addresses);
        let mut waiting = self.waiting();
        match result {
            Ok(()) => {
                waiting.done = turn;
                self.done.notify_all();
            }
            Err(_) => waiting.addresses.extend(addresses),
        }
        result
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(last: u8) -> BTreeSet<IpAddr> {
        [IpAddr::from([10, 0, 0, last])].into()
    }

    #[test]
    fn failed_addresses_are_retried_with_later_ones() {
        let backlog = Backlog::default();
        backlog.add(&addresses(1), Duration::ZERO);
        assert_eq!(backlog.work(|_| Err(())), Err(()));
        backlog.add(&addresses(2), Duration::ZERO);
        let mut done = BTreeSet::new();
        let work = |all: &BTreeSet<IpAddr>| {
            done.clone_from(all);
            Ok::<_, ()>(())
        };
        backlog.work(work).unwrap();
        assert_eq!(done.len(), 2);
    }

    #[test]
    fn adding_waits_for_completion_up_to_a_limit() {
        let backlog = Backlog::default();
        std::thread::scope(|scope| {
            scope.spawn(|| backlog.add(&addresses(1), Duration::from_secs(600)));
            while backlog.waiting().addresses.is_empty() {
                std::thread::yield_now();
            }
            backlog.work(|_| Ok::<_, ()>(())).unwrap();
        });
        backlog.add(&addresses(1), Duration::from_millis(1));
    }
}
