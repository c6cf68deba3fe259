//! Packets that have come to the gate and wait for their turn: one of each user in turn, so that one user's flood
//! delays its own packets and not those of others.
//!
//! The kernel's queue is first come, first served. So it is emptied into this one, which costs little for each packet
//! beside what deciding it can cost: a connection to its server.
use std::collections::{HashMap, VecDeque};

use crate::limits::Source;

/// Packets of one user that may wait here; more are dropped, so that the kernel's queue is not filled by one.
pub(super) const OF_USER: usize = 256;

/// Who waits: a pod of this node by what it sends; else the one who is asked, since whoever sends to it may do so
/// in any number of names.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum User {
    Asks(Source),
    Asked(Source),
}

/// What waits, by user.
pub(super) struct Backlog<T> {
    waiting: HashMap<User, VecDeque<T>, ahash::RandomState>,
    /// Users of whom something waits, in the order of their turns.
    turns: VecDeque<User>,
}

impl<T> Backlog<T> {
    pub(super) fn new() -> Self {
        Self {
            waiting: HashMap::default(),
            turns: VecDeque::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    /// Adds something behind all of the same user.
    ///
    /// # Errors
    /// The same thing, if as much of the user as may waits already.
    pub(super) fn push(&mut self, user: User, value: T) -> Result<(), T> {
        let waiting = self.waiting.entry(user.clone()).or_default();
        if waiting.len() >= OF_USER {
            return Err(value);
        }
        if waiting.is_empty() {
            self.turns.push_back(user);
        }
        waiting.push_back(value);
        Ok(())
    }

    /// Takes out what is next, of the user whose turn it is.
    pub(super) fn pop(&mut self) -> Option<T> {
        let user = self.turns.pop_front()?;
        let waiting = self.waiting.get_mut(&user)?;
        let value = waiting.pop_front();
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

    #[test]
    fn users_take_turns_and_each_has_its_own_order() {
        let mut backlog = Backlog::new();
        for (from, value) in [(1, 10), (1, 11), (1, 12), (2, 20), (3, 30), (2, 21)] {
            assert_eq!(backlog.push(user(from), value), Ok(()));
        }
        let order: Vec<_> = std::iter::from_fn(|| backlog.pop()).collect();
        assert_eq!(order, [10, 20, 30, 11, 21, 12]);
        assert!(backlog.is_empty() && backlog.waiting.is_empty());
    }

    #[test]
    fn one_user_has_so_much_room_and_others_have_theirs() {
        let mut backlog = Backlog::new();
        for value in 0..OF_USER {
            assert_eq!(backlog.push(user(1), value), Ok(()));
        }
        assert_eq!(backlog.push(user(1), 7), Err(7));
        assert_eq!(backlog.push(user(2), 8), Ok(()));
        assert_eq!((backlog.pop(), backlog.pop()), (Some(0), Some(8)));
        assert_eq!(backlog.push(user(1), 9), Ok(()), "one has gone");
    }
}
