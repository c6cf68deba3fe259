//! First packets that wait for their turn. The gate decides one packet of each user in turn, so that a flood delays the
//! packets of its own user only.
//!
//! The kernel's queue is first come, first served, so it is emptied into this one. That costs little compared with a
//! decision, which can start a connection to the server.
use std::collections::{HashMap, VecDeque};

use crate::limits::Source;

/// Packets of one user that may wait here, and never more than are still free: each keeps its place in the kernel's
/// queue until it is decided. A client that sends thousands of first packets at once loses none.
const OF_USER: usize = 4096;
/// Long packets among these; the kernel keeps whole packets.
const LONG_OF_USER: usize = 64;
/// Packets that may wait here in all.
const ROOM: usize = 8192;

/// Whose packets wait: those that a pod of this node sends, or those to a pod from elsewhere, which can have any number of
/// sources. Addresses that no pod has are one user together, since there is any number of them too.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum User {
    Asks(Source),
    Asked(Source),
    Nobody,
}

/// The waiting packets, by user.
pub(super) struct Backlog<T> {
    waiting: HashMap<User, VecDeque<T>, ahash::RandomState>,
    /// Users with waiting packets, in the order of their turns.
    turns: VecDeque<User>,
    len: usize,
}

impl<T> Backlog<T> {
    pub(super) fn new() -> Self {
        Self {
            waiting: HashMap::default(),
            turns: VecDeque::new(),
            len: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    /// Adds a packet behind all of the same user.
    ///
    /// # Errors
    /// The same packet, if the user already has as many waiting packets as it may have, or as are still free.
    pub(super) fn push(&mut self, user: User, value: T, is_long: bool) -> Result<(), T> {
        let free = ROOM - self.len;
        let most = if is_long { LONG_OF_USER } else { OF_USER }.min(free);
        if self.waiting.get(&user).map_or(0, VecDeque::len) >= most {
            return Err(value);
        }
        self.len += 1;
        let waiting = self.waiting.entry(user.clone()).or_default();
        if waiting.is_empty() {
            self.turns.push_back(user);
        }
        waiting.push_back(value);
        Ok(())
    }

    /// Takes out the next packet of the user whose turn it is.
    pub(super) fn pop(&mut self) -> Option<T> {
        let user = self.turns.pop_front()?;
        let waiting = self.waiting.get_mut(&user)?;
        let value = waiting.pop_front();
        self.len -= usize::from(value.is_some());
        if waiting.is_empty() {
            self.waiting.remove(&user);
        } else {
            self.turns.push_back(user);
        }
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(last: u8) -> User {
        User::Asks(Source::Outside([10, 0, 0, last].into()))
    }

    /// Adds short packets of a user until one is refused. Returns how many were accepted.
    fn fill(backlog: &mut Backlog<usize>, last: u8) -> usize {
        let pushed = (0..).map(|value| backlog.push(user(last), value, false));
        pushed.take_while(Result::is_ok).count()
    }

    #[test]
    fn users_take_turns_and_keep_their_order() {
        let mut backlog = Backlog::new();
        for (from, value) in [(1, 10), (1, 11), (1, 12), (2, 20), (3, 30), (2, 21)] {
            assert_eq!(backlog.push(user(from), value, false), Ok(()));
        }
        let order: Vec<_> = std::iter::from_fn(|| backlog.pop()).collect();
        assert_eq!(order, [10, 20, 30, 11, 21, 12]);
        assert!(backlog.is_empty() && backlog.waiting.is_empty() && backlog.len == 0);
    }

    #[test]
    fn a_full_users_backlog_leaves_others_room() {
        let mut backlog = Backlog::new();
        assert_eq!(fill(&mut backlog, 1), OF_USER);
        assert_eq!(backlog.push(user(2), 8, false), Ok(()));
        assert_eq!((backlog.pop(), backlog.pop()), (Some(0), Some(8)));
        assert_eq!(fill(&mut backlog, 1), 1, "one has gone");
    }

    #[test]
    fn many_users_leave_room_for_one_more() {
        let mut backlog = Backlog::new();
        let taken: usize = (1..=20).map(|last| fill(&mut backlog, last)).sum();
        assert!(taken <= ROOM);
        let mut backlog = Backlog::new();
        (1..=5).for_each(|last| assert!(fill(&mut backlog, last) > 0, "{last}"));
        assert_eq!(backlog.push(user(6), 7, false), Ok(()));
    }

    #[test]
    fn long_packets_of_a_user_have_less_room() {
        let mut backlog = Backlog::new();
        let pushed = (0..).map(|value| backlog.push(user(1), value, true));
        assert_eq!(pushed.take_while(Result::is_ok).count(), LONG_OF_USER);
        assert_eq!(backlog.push(user(1), 7, false), Ok(()));
        assert_eq!(backlog.push(user(2), 7, true), Ok(()));
    }
}
