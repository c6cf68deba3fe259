//! A bounded list of pending entries, each from one source to another, in the order of their arrival. At the bound the
//! oldest entry of the biggest user makes room.
//!
//! A user is a source in one of two roles, asking or asked, since an attack can be one pod that asks many, or many
//! forged sources that ask one pod. Every operation takes constant time: users with the same number of entries are on
//! one list, the entries of a user on another. Knows no connection.
mod slab;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Source;
use parking_lot::{Mutex, MutexGuard};
use slab::Slab;

/// Stands for no index.
const NONE: u32 = u32::MAX;

/// Entries of the biggest user that may be replaced by its own newer ones within [`WINDOW`]. Each replacement costs a
/// connection: without this bound, a flood would use up the time of the core that all share.
const RENEWED: u32 = 200;
const WINDOW: Duration = Duration::from_millis(100);

/// Entries, each with a value by which it can be ended.
pub(crate) struct Pending<T> {
    /// Entries of one bound source.
    per_source: usize,
    /// In all.
    room: usize,
    state: Mutex<State<T>>,
}

/// A place in the list; given back when dropped.
pub(crate) struct Place<T> {
    pending: Arc<Pending<T>>,
    entry: u32,
    number: u64,
}

/// The share of the asking source is used up, or the biggest user replaces its own entries too often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ShareUsedUp;

/// The source of an entry.
#[derive(Clone, Debug)]
pub(crate) struct Asking {
    pub(crate) source: Source,
    /// Whether it is refused beyond its share. It is if it is a pod of this node, since nobody else can send from its
    /// address. Other addresses can be forged, and refusing them would shut out their owners: their oldest entries make
    /// room instead.
    pub(crate) is_bound: bool,
}

struct State<T> {
    /// The number of entries so far.
    number: u64,
    len: usize,
    by_name: HashMap<(Role, Source), u32, ahash::RandomState>,
    users: Slab<User>,
    entries: Slab<Entry<T>>,
    /// Lists of users by their number of entries, which is the index.
    by_count: Vec<List>,
    /// The highest number of entries of a user.
    biggest: usize,
    /// How many entries of the biggest user were replaced by its own, and since when that is counted.
    renewed: (Instant, u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Role {
    Asks,
    Asked,
}

struct User {
    name: (Role, Source),
    count: usize,
    entries: List,
    link: Link,
}

struct Entry<T> {
    number: u64,
    value: T,
    /// By role.
    users: [u32; 2],
    links: [Link; 2],
}

#[derive(Clone, Copy)]
struct List {
    first: u32,
    last: u32,
}

#[derive(Clone, Copy)]
struct Link {
    before: u32,
    after: u32,
}

const EMPTY: List = List {
    first: NONE,
    last: NONE,
};
const UNLINKED: Link = Link {
    before: NONE,
    after: NONE,
};

impl<T> Pending<T> {
    /// An empty list with room for this many entries of one bound source, and in all.
    pub(crate) fn new(per_source: usize, room: usize) -> Arc<Self> {
        Arc::new(Self {
            per_source,
            room: room.max(1),
            state: Mutex::new(State::new()),
        })
    }

    /// Enters `value`. Returns its place, and the value that had to make room for it and has lost its place.
    ///
    /// # Errors
    /// If `asking` has used up its share, or if the list is full and the new entry belongs to the biggest user, which
    /// has already replaced 2,000 entries a second.
    pub(crate) fn enter(
        self: &Arc<Self>,
        asking: Asking,
        asked: Source,
        value: T,
        now: Instant,
    ) -> Result<(Place<T>, Option<T>), ShareUsedUp> {
        let mut state = self.state();
        let full = state.len >= self.room;
        if asking.is_bound && state.share_is_used_up(&asking.source, self.per_source, full) {
            return Err(ShareUsedUp);
        }
        let gave_way = match full {
            true => Some(state.make_room(&asking, &asked, now)?),
            false => None,
        };
        let (entry, number) = state.insert(asking.source, asked, value);
        drop(state);
        let place = Place {
            pending: Arc::clone(self),
            entry,
            number,
        };
        Ok((place, gave_way))
    }

    /// The number of entries.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.state().len
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock()
    }
}

impl<T> Drop for Place<T> {
    fn drop(&mut self) {
        let mut state = self.pending.state();
        let mine = state.entries.get(self.entry);
        // It may have made room, and another entry may have its index by now.
        if mine.is_some_and(|entry| entry.number == self.number) {
            let value = state.remove(self.entry);
            drop(state);
            drop(value);
        }
    }
}

impl<T> State<T> {
    fn new() -> Self {
        Self {
            number: 0,
            len: 0,
            by_name: HashMap::default(),
            users: Slab::new(),
            entries: Slab::new(),
            by_count: vec![EMPTY],
            biggest: 0,
            renewed: (Instant::now(), 0),
        }
    }

    /// If the list is full, a source that has half as many entries as the biggest user gets no more: refusing is
    /// cheaper than letting big users displace each other.
    fn share_is_used_up(&self, source: &Source, most: usize, full: bool) -> bool {
        let user = self.by_name.get(&(Role::Asks, source.clone()));
        let count = user
            .and_then(|user| self.users.get(*user))
            .map_or(0, |user| user.count);
        count > 0 && (count >= most || full && count >= self.biggest / 2)
    }

    /// Takes out the oldest entry of the biggest user. A pod of this node that asks a server under attack is no part of
    /// that: it has few entries, or would have been refused.
    fn make_room(&mut self, asks: &Asking, asked: &Source, now: Instant) -> Result<T, ShareUsedUp> {
        let user = &self.users[self.by_count[self.biggest].first];
        let oldest = user.entries.first;
        let is_own = match &user.name {
            (Role::Asks, source) => *source == asks.source,
            (Role::Asked, source) => source == asked && !asks.is_bound,
        };
        if is_own {
            let (since, renewed) = &mut self.renewed;
            if now.saturating_duration_since(*since) >= WINDOW {
                (*since, *renewed) = (now, 0);
            }
            if *renewed >= RENEWED {
                return Err(ShareUsedUp);
            }
            *renewed += 1;
        }
        Ok(self.remove(oldest))
    }

    fn insert(&mut self, asks: Source, asked: Source, value: T) -> (u32, u64) {
        self.number += 1;
        self.len += 1;
        let users = [
            self.user((Role::Asks, asks)),
            self.user((Role::Asked, asked)),
        ];
        let number = self.number;
        let entry = self.entries.insert(Entry {
            number,
            value,
            users,
            links: [UNLINKED; 2],
        });
        for (role, user) in users.into_iter().enumerate() {
            let mut list = self.users[user].entries;
            list.append(entry, &mut ByRole(&mut self.entries, role));
            self.users[user].entries = list;
            self.recount(user, self.users[user].count + 1);
        }
        (entry, number)
    }

    fn remove(&mut self, at: u32) -> T {
        self.len -= 1;
        for role in 0..2 {
            let user = self.entries[at].users[role];
            let mut list = self.users[user].entries;
            list.unlink(at, &mut ByRole(&mut self.entries, role));
            self.users[user].entries = list;
            self.recount(user, self.users[user].count - 1);
            if self.users[user].count == 0 {
                let gone = self.users.remove(user);
                self.by_name.remove(&gone.name);
            }
        }
        self.entries.remove(at).value
    }

    /// The index of a user, which is created if it has no entry yet.
    fn user(&mut self, name: (Role, Source)) -> u32 {
        let users = &mut self.users;
        *self.by_name.entry(name).or_insert_with_key(|name| {
            users.insert(User {
                name: name.clone(),
                count: 0,
                entries: EMPTY,
                link: UNLINKED,
            })
        })
    }

    /// Moves a user to the list of users with `count` entries; with 0 it is on none.
    fn recount(&mut self, user: u32, count: usize) {
        let before = std::mem::replace(&mut self.users[user].count, count);
        if before > 0 {
            self.by_count[before].unlink(user, &mut self.users);
        }
        if count > 0 {
            if self.by_count.len() <= count {
                self.by_count.resize(count + 1, EMPTY);
            }
            self.by_count[count].append(user, &mut self.users);
        }
        self.biggest = self.biggest.max(count);
        // Counts change by one: if the only biggest user has left its list, it now has one entry less.
        if self.biggest == before && self.by_count[before].first == NONE {
            self.biggest = count;
        }
    }
}

/// Gives access to the links of a list's values.
trait Linked {
    fn link(&mut self, at: u32) -> &mut Link;
}

impl Linked for Slab<User> {
    fn link(&mut self, at: u32) -> &mut Link {
        &mut self[at].link
    }
}

/// Entries on the list of their user in this role.
struct ByRole<'a, T>(&'a mut Slab<Entry<T>>, usize);

impl<T> Linked for ByRole<'_, T> {
    fn link(&mut self, at: u32) -> &mut Link {
        &mut self.0[at].links[self.1]
    }
}

impl List {
    /// Adds `at` as the last one.
    fn append(&mut self, at: u32, linked: &mut impl Linked) {
        *linked.link(at) = Link {
            before: self.last,
            after: NONE,
        };
        match self.last {
            NONE => self.first = at,
            last => linked.link(last).after = at,
        }
        self.last = at;
    }

    /// Takes out `at`, which is on this list.
    fn unlink(&mut self, at: u32, linked: &mut impl Linked) {
        let Link { before, after } = std::mem::replace(linked.link(at), UNLINKED);
        match before {
            NONE => self.first = after,
            before => linked.link(before).after = after,
        }
        match after {
            NONE => self.last = before,
            after => linked.link(after).before = before,
        }
    }
}

#[cfg(test)]
mod tests;
