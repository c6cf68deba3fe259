//! Which entries make room, and that no operation loses or leaks one.
use std::collections::BTreeMap;

use super::*;

fn outside(n: u32) -> Source {
    Source::Outside(std::net::Ipv4Addr::from(n).into())
}

fn pod(name: &str) -> Source {
    Source::Pod(name.into())
}

fn anybody(source: Source) -> Asking {
    Asking {
        source,
        is_bound: false,
    }
}

fn local(name: &str) -> Asking {
    Asking {
        source: pod(name),
        is_bound: true,
    }
}

/// Enters at a time with no recent replacement.
fn enter<T>(
    pending: &Arc<Pending<T>>,
    asking: Asking,
    asked: Source,
    value: T,
) -> Result<(Place<T>, Option<T>), ShareUsedUp> {
    pending.state().renewed.1 = 0;
    pending.enter(asking, asked, value, Instant::now())
}

#[test]
fn forged_sources_count_against_the_attacked_server() {
    let pending = Pending::new(100 / 2, 100);
    let honest = enter(&pending, local("honest"), pod("other"), 1_000_000)
        .unwrap()
        .0;
    let mut places = Vec::new();
    for n in 0..1000 {
        let (place, gave_way) = enter(&pending, anybody(outside(n)), pod("attacked"), n).unwrap();
        places.push(place);
        // One place belongs to the honest source; then the oldest entry of the flood goes.
        assert_eq!(gave_way, n.checked_sub(99));
    }
    assert_eq!(pending.len(), 100);
    drop(honest);
    assert_eq!(pending.len(), 99);
    drop(places);
    let state = pending.state();
    assert_eq!((state.len, state.by_name.len(), state.biggest), (0, 0, 0));
}

#[test]
fn a_newcomer_displaces_the_biggest_user() {
    let pending = Pending::new(10 / 2, 10);
    let _flood: Vec<_> = (0..10)
        .map(|n| enter(&pending, anybody(outside(7)), outside(100 + n), n).unwrap())
        .collect();
    let mut places = Vec::new();
    for n in 0..4 {
        let asking = local(["a", "b", "c", "d"][n as usize]);
        let (place, gave_way) = enter(&pending, asking, pod("server"), 50 + n).unwrap();
        assert_eq!(gave_way, Some(n), "the oldest first");
        places.push(place);
    }
}

#[test]
fn local_pod_is_limited_to_its_share() {
    let pending = Pending::new(10 / 2, 10);
    let flood = |name: &str| -> Vec<_> {
        let enter = || enter(&pending, local(name), pod(&format!("{name}s server")), 0).ok();
        std::iter::from_fn(enter).collect()
    };
    let first = flood("a");
    assert_eq!(first.len(), 5);
    let second = flood("b");
    assert_eq!(second.len(), 5, "all is in use");
    let third = flood("c");
    assert!(
        third.iter().all(|(_, gave_way)| gave_way.is_some()),
        "the big ones give way"
    );
    assert!((2..=3).contains(&third.len()), "{}", third.len());
    assert!(flood("a").is_empty(), "no pushing to and fro");
}

#[test]
fn spoofable_sources_displace_instead_of_being_limited() {
    let pending = Pending::new(10 / 2, 10);
    let mut places = Vec::new();
    for n in 0..100 {
        places.push(enter(&pending, anybody(pod("elsewhere")), pod("server"), n).unwrap());
    }
    let gave_way: Vec<_> = places
        .iter()
        .filter_map(|(_, gave_way)| *gave_way)
        .collect();
    assert_eq!(gave_way, (0..90).collect::<Vec<_>>());
}

#[test]
fn a_displaced_place_is_freed_only_once() {
    let pending = Pending::new(1 / 2, 1);
    let (first, _) = enter(&pending, anybody(outside(1)), pod("s"), 1).unwrap();
    let (second, gave_way) = enter(&pending, anybody(outside(2)), pod("s"), 2).unwrap();
    assert_eq!(gave_way, Some(1));
    drop(first);
    assert_eq!(pending.len(), 1, "the index is the second's by now");
    drop(second);
    assert_eq!(pending.len(), 0);
}

#[test]
fn a_flood_renews_entries_at_a_limited_rate() {
    let (pending, now) = (Pending::new(50, 100), Instant::now());
    let flood = |n: u32, now| pending.enter(anybody(outside(n)), pod("attacked"), n, now);
    let mut places: Vec<_> = (0..100 + RENEWED).map(|n| flood(n, now).unwrap()).collect();
    assert_eq!(flood(1000, now).err(), Some(ShareUsedUp));
    for server in ["other", "attacked"] {
        let neighbour = pending.enter(local(server), pod(server), 0, now);
        assert!(neighbour.is_ok(), "to {server}");
    }
    places.push(flood(1001, now + WINDOW).unwrap());
}

/// Compares with a list that is searched from end to end each time.
#[test]
fn pending_table_agrees_with_a_linear_search() {
    const ROOM: usize = 12;
    let pending = Pending::new(ROOM / 2, ROOM);
    let mut places: BTreeMap<u64, Place<u64>> = BTreeMap::new();
    let mut plain: Vec<(u64, [u32; 2])> = Vec::new();
    let mut random = 1u64;
    for number in 0..20_000u64 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        if random.is_multiple_of(3) && !plain.is_empty() {
            let at = (random >> 8) as usize % plain.len();
            let (gone, _) = plain.remove(at);
            drop(places.remove(&gone));
            continue;
        }
        let [_, _, high, low, ..] = random.to_be_bytes();
        let ends = [u32::from(high % 5), 10 + u32::from(low % 5)];
        let (place, gave_way) = enter(
            &pending,
            anybody(outside(ends[0])),
            outside(ends[1]),
            number,
        )
        .unwrap();
        if let Some(gone) = gave_way {
            let of = |user: u32| {
                plain
                    .iter()
                    .filter(|(_, ends)| ends.contains(&user))
                    .count()
            };
            let most = (0..15).map(of).max().unwrap();
            let may_go = |(gone, ends): &(u64, [u32; 2])| {
                ends.iter().any(|user| {
                    let oldest = plain.iter().find(|(_, ends)| ends.contains(user));
                    of(*user) == most && oldest.is_some_and(|(oldest, _)| oldest == gone)
                })
            };
            let at = plain.iter().position(|(it, _)| *it == gone).unwrap();
            assert!(may_go(&plain[at]), "{gone} of {plain:?}");
            plain.remove(at);
            drop(places.remove(&gone));
        }
        plain.push((number, ends));
        places.insert(number, place);
        assert_eq!(pending.len(), plain.len());
        assert!(pending.len() <= ROOM);
    }
}
