//! Tracks the interface of each pod's address, and detects pods that are gone before the API reports it.
//!
//! An address can be given to another pod as soon as its holder's link is gone; the API reports both changes some time
//! later. Until the API names another pod, the address is vacant, and neither pod has rights there. A route that
//! disappears while its link stays means nothing, since network plugins replace routes.
//!
//! Pure, except for [`Vacancies`], which hands the result to the table.
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use controller::{LocalPod, Table, UncertainAddresses};
use parking_lot::{Mutex, MutexGuard};
use policy::Identity;
use tokio::sync::Notify;

/// How long the API has to name another pod for an address at another link. If it still names the same pod then, that
/// pod has a new link (kubelet reports within 10 seconds).
const CONFIRMED: Duration = Duration::from_secs(15);

/// The index of no link.
const NO_LINK: u32 = 0;

/// The link of each address of this node's pods in the API.
#[derive(Debug, Default)]
pub(crate) struct Occupancy {
    occupants: BTreeMap<IpAddr, Occupant>,
    /// The links that the previous daemon knew, until the first look.
    before: BTreeMap<IpAddr, u32>,
}

#[derive(Debug)]
struct Occupant {
    pod: Arc<Identity>,
    /// The link's index, if there has been one.
    link: Option<u32>,
    /// Since when the address has been at another link.
    moved: Option<Instant>,
    /// The first other link that the address was at: the next pod's, even if that has left it before the API names it.
    next: Option<u32>,
}

/// The state of links and API at a look.
pub(crate) struct Seen<'a> {
    /// The index of the link that leads to each address.
    pub(crate) at: BTreeMap<IpAddr, u32>,
    /// Whether there is a link with this index; indices are never reused.
    pub(crate) exists: &'a dyn Fn(u32) -> bool,
    /// Whether the API's state is up to date.
    pub(crate) heard: bool,
    /// Whether a pod is terminating or gone by the API.
    pub(crate) ending: &'a dyn Fn(&LocalPod) -> bool,
}

/// The result of a look.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Look {
    /// The pods that have left their addresses.
    pub(crate) vacant: BTreeMap<IpAddr, Arc<Identity>>,
    /// When to look again even if nothing changes.
    pub(crate) again: Option<Instant>,
}

impl Occupancy {
    /// Starts with the links that the previous daemon knew.
    pub(crate) fn resumed(before: BTreeMap<IpAddr, u32>) -> Self {
        Self {
            before,
            ..Self::default()
        }
    }

    /// Whether the pods differ from those of the last look, so that links must be read again.
    pub(crate) fn are_other(&self, pods: &[LocalPod]) -> bool {
        let same = |pod: &LocalPod| {
            let occupant = self.occupants.get(&pod.address);
            occupant.is_some_and(|occupant| occupant.pod.is_same_pod(&pod.identity))
        };
        pods.len() != self.occupants.len() || !pods.iter().all(same)
    }

    /// Compares the pods that the API names with the links of their addresses, which must be read after the pods.
    pub(crate) fn look(&mut self, pods: &[LocalPod], links: &Seen<'_>, now: Instant) -> Look {
        let mut look = Look::default();
        let mut occupants = std::mem::take(&mut self.occupants);
        let before = std::mem::take(&mut self.before);
        // An old state may name a pod whose end the previous daemon has seen.
        let unknown = (!before.is_empty() && !links.heard).then_some(NO_LINK);
        for pod in pods {
            let last = occupants.remove(&pod.address);
            let mut occupant = match last {
                Some(occupant) if occupant.pod.is_same_pod(&pod.identity) => occupant,
                last => Occupant {
                    pod: Arc::clone(&pod.identity),
                    link: last
                        .and_then(|last| last.next)
                        .or_else(|| before.get(&pod.address).copied())
                        .or(unknown),
                    moved: None,
                    next: None,
                },
            };
            let link = links.at.get(&pod.address).copied();
            let link = link.or_else(|| occupant.link.filter(|link| (links.exists)(*link)));
            if occupant.link.is_none() || link.is_none() && occupant.link == unknown {
                occupant.link = link;
            }
            occupant.next = occupant.next.or(link).filter(|_| occupant.link != link);
            if occupant.link == link {
                occupant.moved = None;
            } else if link.is_none() || !links.heard || (links.ending)(pod) {
                occupant.moved = link.map(|_| now);
            } else if now >= *occupant.moved.get_or_insert(now) + CONFIRMED {
                (occupant.link, occupant.moved, occupant.next) = (link, None, None);
            }
            if occupant.link != link {
                look.vacant.insert(pod.address, Arc::clone(&occupant.pod));
                let due = occupant.moved.map(|moved| moved + CONFIRMED);
                look.again = look.again.into_iter().chain(due).min();
            }
            self.occupants.insert(pod.address, occupant);
        }
        look
    }
}

/// Whether this network namespace has a link with this index.
pub(crate) fn exists(index: u32) -> bool {
    let name = nix::net::if_::if_indextoname(index);
    // nix 0.31 returns success for a null pointer, which means that there is none.
    name.is_ok_and(|name| !name.is_empty())
}

/// A part of the daemon that looks at links.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Looker {
    Routes,
    Bridges,
}

/// Collects the results of all lookers, hands them to the table, and says which addresses change.
#[derive(Clone)]
pub(crate) struct Vacancies {
    table: Arc<Table>,
    found: Arc<Mutex<Found>>,
    changed: Arc<Notify>,
}

#[derive(Default)]
struct Found {
    vacant: BTreeMap<Looker, BTreeMap<IpAddr, Arc<Identity>>>,
    awaited: BTreeSet<IpAddr>,
    touched: BTreeSet<IpAddr>,
}

impl Vacancies {
    pub(crate) fn new(table: Arc<Table>) -> Self {
        Self {
            table,
            found: Arc::default(),
            changed: Arc::default(),
        }
    }

    /// Sets the pods that have left their addresses, as one looker found.
    pub(crate) fn left(&self, looker: Looker, vacant: BTreeMap<IpAddr, Arc<Identity>>) {
        let mut found = self.found();
        found.vacant.insert(looker, vacant);
        self.publish(found);
    }

    /// Sets the addresses that have a link while the API names no pod for them.
    pub(crate) fn awaited(&self, addresses: BTreeSet<IpAddr>) {
        let mut found = self.found();
        found.awaited = addresses;
        self.publish(found);
    }

    /// Waits until [`Self::take`] has something. Cancel safe.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The addresses whose verdicts have changed since the last call.
    pub(crate) fn take(&self) -> BTreeSet<IpAddr> {
        std::mem::take(&mut self.found().touched)
    }

    /// Under the lock, so that the table gets concurrent results in order.
    fn publish(&self, mut found: MutexGuard<'_, Found>) {
        // One looker may know an older pod of an address than the other.
        let mut vacant: BTreeMap<IpAddr, Vec<Arc<Identity>>> = BTreeMap::new();
        for (address, pod) in found.vacant.values().flatten() {
            vacant.entry(*address).or_default().push(Arc::clone(pod));
        }
        let uncertain = UncertainAddresses {
            vacant,
            awaited: found.awaited.clone(),
        };
        let touched = self.table.set_uncertain(uncertain);
        if !touched.is_empty() {
            found.touched.extend(touched);
            self.changed.notify_one();
        }
    }

    fn found(&self) -> MutexGuard<'_, Found> {
        self.found.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use controller::TableSettings;
    use policy::PodKey;

    fn at() -> IpAddr {
        IpAddr::from([10, 0, 0, 5])
    }

    fn pod(uid: &str) -> LocalPod {
        LocalPod {
            address: at(),
            ingress_isolated: false,
            egress_isolated: false,
            identity: Arc::new(Identity {
                key: PodKey {
                    namespace: "x".into(),
                    name: "a".into(),
                },
                uid: uid.into(),
                node_name: "n1".into(),
                node: None,
            }),
            vacant: false,
        }
    }

    /// Takes looks as `(second, uid, link, heard, ending)`, and returns for each whether the address is vacant.
    fn vacant(looks: &[(u64, &str, Option<u32>, bool, bool)]) -> Vec<bool> {
        let start = Instant::now();
        let mut occupancy = Occupancy::default();
        let look = |&(second, uid, link, heard, ending): &(u64, &str, Option<u32>, bool, bool)| {
            let seen = Seen {
                at: link.map(|link| (at(), link)).into_iter().collect(),
                exists: &|link| link > 100,
                heard,
                ending: &|_| ending,
            };
            let now = start + Duration::from_secs(second);
            !occupancy.look(&[pod(uid)], &seen, now).vacant.is_empty()
        };
        looks.iter().map(look).collect()
    }

    #[test]
    fn a_pod_without_a_link_leaves_its_address() {
        for (looks, expected, why) in [
            (
                &[(0, "1", Some(7), true, false), (1, "1", None, true, false)][..],
                &[false, true][..],
                "its link is gone",
            ),
            (
                &[
                    (0, "1", Some(7), true, false),
                    (1, "1", None, true, false),
                    (2, "1", Some(7), true, false),
                ],
                &[false, true, false],
                "its link is there again",
            ),
            (
                &[
                    (0, "1", Some(101), true, false),
                    (1, "1", None, true, false),
                    (2, "1", Some(101), true, false),
                    (3, "1", None, true, false),
                    (4, "1", Some(102), true, false),
                ],
                &[false, false, false, false, true],
                "its route is made again and its link stays, until another is there",
            ),
            (
                &[
                    (0, "1", Some(7), true, false),
                    (1, "1", Some(9), true, false),
                    (2, "2", Some(9), true, false),
                ],
                &[false, true, false],
                "another link, then another pod",
            ),
            (
                &[
                    (0, "1", Some(7), true, false),
                    (1, "1", Some(9), true, false),
                    (2, "1", Some(11), true, false),
                    (3, "2", Some(11), true, false),
                    (4, "3", Some(11), true, false),
                ],
                &[false, true, true, true, false],
                "two other links, then the pod of the first, which has left, then that of the second",
            ),
            (
                &[
                    (0, "1", Some(7), true, false),
                    (1, "1", Some(9), true, false),
                    (15, "1", Some(9), true, false),
                    (16, "1", Some(9), true, false),
                    (17, "1", Some(7), true, false),
                ],
                &[false, true, true, false, true],
                "the API goes on to name the pod, which has a new link",
            ),
            (
                &[
                    (0, "1", Some(7), true, false),
                    (1, "1", Some(9), false, false),
                    (90, "1", Some(9), false, false),
                    (91, "1", Some(9), true, false),
                    (106, "1", Some(9), true, false),
                ],
                &[false, true, true, true, false],
                "the API is away meanwhile",
            ),
            (
                &[
                    (0, "1", Some(7), true, true),
                    (1, "1", Some(9), true, true),
                    (90, "1", Some(9), true, true),
                ],
                &[false, true, true],
                "a pod that ends gets no other link",
            ),
            (
                &[
                    (0, "1", None, true, false),
                    (9, "1", Some(7), true, false),
                    (10, "1", None, true, false),
                ],
                &[false, false, true],
                "what never had a link is not without one",
            ),
        ] {
            assert_eq!(vacant(looks), expected, "{why}");
        }
    }

    #[test]
    fn a_new_daemon_resumes_from_pinned_links() {
        for (before, heard, link, expected, why) in [
            (&[(at(), 7)][..], true, Some(7), false, "the same link"),
            (
                &[(at(), 7)],
                false,
                Some(7),
                false,
                "the same, and the API is away",
            ),
            (&[(at(), 7)], true, Some(9), true, "another link"),
            (&[(at(), 7)], true, None, true, "no link"),
            (&[], false, Some(9), false, "no daemon before"),
            (
                &[(IpAddr::from([10, 0, 0, 6]), 7)],
                true,
                Some(9),
                false,
                "a pod that came since",
            ),
            (
                &[(IpAddr::from([10, 0, 0, 6]), 7)],
                false,
                Some(9),
                true,
                "or one that left, and the API is away",
            ),
            (
                &[(IpAddr::from([10, 0, 0, 6]), 7)],
                false,
                None,
                false,
                "what never had a link",
            ),
        ] {
            let mut occupancy = Occupancy::resumed(before.iter().copied().collect());
            let seen = Seen {
                at: link.map(|link| (at(), link)).into_iter().collect(),
                exists: &|_| false,
                heard,
                ending: &|_| false,
            };
            let look = occupancy.look(&[pod("1")], &seen, Instant::now());
            assert_eq!(!look.vacant.is_empty(), expected, "{why}");
        }
    }

    #[test]
    fn no_lookers_vacancy_hides_anothers() {
        let table = Table::new(TableSettings::default());
        let pod = |uid: &str| pod(uid).identity;
        let vacancies = Vacancies::new(Arc::clone(&table));
        vacancies.left(Looker::Routes, [(at(), pod("new"))].into());
        vacancies.left(Looker::Bridges, [(at(), pod("old"))].into());
        assert_eq!(table.uncertain().vacant[&at()], [pod("new"), pod("old")]);
    }

    #[test]
    fn a_missing_link_does_not_exist() {
        assert!(exists(1), "the loopback link");
        assert!(!exists(NO_LINK) && !exists(0x7fff_fff0));
    }

    #[test]
    fn a_look_is_due_at_the_confirmation_time() {
        let now = Instant::now();
        let mut occupancy = Occupancy::default();
        let mut look = |link| {
            let seen = Seen {
                at: [(at(), link)].into(),
                exists: &|_| false,
                heard: true,
                ending: &|_| false,
            };
            occupancy.look(&[pod("1")], &seen, now).again
        };
        assert_eq!(look(7), None);
        assert_eq!(look(9), Some(now + CONFIRMED));
    }
}
