//! Two daemons' ends of a handover, in one process.
use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, SystemTime};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::super::{Connection, Pod, Seat, Told};
use super::*;
use crate::trail::{Onward, Seen};

/// Both ends of a line that is broken off by `within`.
fn lines(within: Duration) -> (Line, Line) {
    let (kind, flags) = (SockType::SeqPacket, SockFlag::empty());
    let (one, other) = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
    let line = |socket| Line::to(socket, Uid::effective(), Instant::now() + within).unwrap();
    (line(one), line(other))
}

fn terms() -> Terms {
    Terms {
        format: FORMAT,
        namespace: 7,
        settings: "--proxy-port 15001".to_owned(),
        pod: None,
    }
}

fn told(port: u16) -> Told {
    Told {
        client: SocketAddr::from(([10, 0, 0, 1], port)),
        server: "[fd00::1]:80".parse().unwrap(),
        sequence: u32::MAX,
        opened: SystemTime::now(),
        age: Duration::from_nanos(1_500_000_001),
        moved: [u64::MAX, 0],
        pods: [
            Some(Pod {
                namespace: "x".to_owned(),
                name: "a".to_owned(),
                uid: "\"quoted\"".to_owned(),
            }),
            None,
        ],
        seen: Some(Seen {
            stamp: Some(9),
            onward: Some(Onward {
                port: 16_000,
                stamp: None,
            }),
            moments: [None, Some(Duration::from_micros(3)), None, None, None],
        }),
    }
}

/// A connection, and what it looks like from outside: the client's end and the server's.
fn connection(port: u16, in_flight: [Vec<u8>; 2]) -> (Connection, [TcpStream; 2]) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let pair = || {
        let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (dialled, listener.accept().unwrap().0)
    };
    let ((client, ours), (to_server, server)) = (pair(), pair());
    let connection = Connection {
        told: told(port),
        server: to_server.into(),
        client: Some(ours.into()),
        in_flight,
    };
    (connection, [client, server])
}

fn seat() -> Seat {
    let listener = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
    Seat {
        queue: listener(),
        listener: listener(),
    }
}

/// How a stream ends.
fn end_of(mut stream: &TcpStream) -> ErrorKind {
    stream.read(&mut [0]).unwrap_err().kind()
}

#[test]
fn what_is_given_is_what_is_taken() {
    let (mut giving, mut taking) = lines(WITHIN);
    let in_flight = [vec![1; 3 << 20], vec![2; 7]];
    let (mut estate, mut outside) = (Estate::default(), Vec::new());
    estate.seats.extend([(100, seat()), (101, seat())]);
    for (port, in_flight) in [(1, in_flight.clone()), (2, [vec![], vec![3]])] {
        let (connection, ends) = connection(port, in_flight);
        estate.connections.push(connection);
        outside.push(ends);
    }
    let (admitted, _ends) = connection(3, Default::default());
    estate.connections.push(Connection {
        client: None,
        ..admitted
    });
    let expected: Vec<_> = estate
        .connections
        .iter()
        .map(|it| it.told.clone())
        .collect();
    let mut taken = Estate::default();
    thread::scope(|scope| {
        let given = scope.spawn(move || {
            giving.give(&estate).unwrap();
            drop(estate.take_connections());
        });
        taking.take(&mut taken).unwrap();
        given.join().unwrap();
    });
    let told: Vec<_> = taken.connections.iter().map(|it| it.told.clone()).collect();
    assert_eq!(told, expected);
    assert_eq!(taken.seats.keys().collect::<Vec<_>>(), [&100, &101]);
    assert_eq!(taken.connections[0].in_flight, in_flight);
    assert_eq!(taken.connections[1].in_flight, [vec![], vec![3]]);
    assert!(taken.connections[1].client.is_some() && taken.connections[2].client.is_none());
    assert_eq!(taken.in_flight(), (3 << 20) + 8);
    // The streams live by the taken copies alone, and end as they are told.
    drop(taken);
    assert_eq!(end_of(&outside[0][0]), ErrorKind::ConnectionReset);
    assert_eq!(end_of(&outside[1][1]), ErrorKind::ConnectionReset);
}

#[test]
fn a_message_that_is_cut_or_bent_is_refused_without_panic() {
    let (connection, _ends) = connection(1, [vec![0; 2], vec![]]);
    let part =
        serde_json::json!({ "Connection": { "told": connection.told, "in_flight": [2, 0] } });
    let end = br#"{"End":{"connections":1}}"#;
    let message = part.to_string().into_bytes();
    let take = |messages: &[&[u8]]| {
        let (giving, mut taking) = lines(WITHIN);
        for (at, message) in messages.iter().enumerate() {
            let sockets = [connection.server.as_fd()];
            giving.send(message, &sockets[at.min(1)..]).unwrap();
        }
        drop(giving);
        taking.take(&mut Estate::default())
    };
    assert!(
        matches!(take(&[&message, &[7; 2], end]), Err(HandoverError::Gone)),
        "nobody hears the thanks"
    );
    for length in (1..message.len()).step_by(7) {
        assert!(take(&[&message[..length]]).is_err(), "cut after {length}");
        for value in [0, b'"', b'9', 255] {
            let mut bent = message.clone();
            bent[length] = value;
            // Bent names and numbers may be right ones; then the rest is missing.
            assert!(take(&[&bent]).is_err(), "{value} at {length}");
        }
    }
    for (messages, what) in [
        (vec![end.as_slice()], "fewer connections than announced"),
        (vec![&message, &[7; 3], end], "more bytes than announced"),
        (vec![&message, end], "a message in the place of bytes"),
        (
            vec![br#"{"Seat":{"queue":100}}"#.as_slice()],
            "a seat with one descriptor",
        ),
        (
            vec![br#"{"Connection":{}}"#.as_slice()],
            "a connection of nothing",
        ),
    ] {
        let error = take(&messages).unwrap_err();
        assert!(
            matches!(error, HandoverError::Malformed(_)),
            "{what}: {error}"
        );
    }
}

#[test]
fn who_belongs_to_another_user_is_refused_before_anything_is_said() {
    let (kind, flags) = (SockType::SeqPacket, SockFlag::empty());
    let (one, other) = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
    let another = Uid::from_raw(Uid::effective().as_raw() + 1);
    let refused = Successor::greet(one, Path::new(""), &terms(), another).err();
    assert!(
        matches!(refused, Some(HandoverError::Stranger { uid }) if uid == Uid::effective().as_raw())
    );
    let mut line = Line::to(other, Uid::effective(), Instant::now() + WITHIN).unwrap();
    assert!(matches!(line.receive(), Err(HandoverError::Gone)));
}

#[test]
fn who_says_nothing_is_not_waited_for() {
    let (_silent, mut line) = lines(Duration::from_millis(20));
    assert!(matches!(line.receive(), Err(HandoverError::Late)));
    let (connection, _ends) = connection(1, [vec![0; 3 << 20], vec![]]);
    let (_deaf, mut line) = lines(Duration::from_millis(20));
    let mut estate = Estate::default();
    estate.connections.push(connection);
    assert!(matches!(line.give(&estate), Err(HandoverError::Late)));
}

#[test]
fn what_cannot_be_handed_over_is_reset() {
    for suited in [true, false] {
        let (line, other) = lines(WITHIN);
        drop(other);
        let (connection, ends) = connection(1, Default::default());
        let mut estate = Estate::default();
        estate.connections.push(connection);
        let given = Successor { line, suited }.give(estate);
        assert_eq!(given.is_err(), suited, "{given:?}");
        for end in &ends {
            assert_eq!(end_of(end), ErrorKind::ConnectionReset);
        }
    }
}

#[test]
fn who_may_not_take_over_is_refused_and_who_cannot_use_it_gets_the_place_only() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("handover.sock");
    let of = |pod: Option<&str>| Terms {
        pod: pod.map(str::to_owned),
        ..terms()
    };
    for pod in ["old", "running", "new"] {
        come(&place, &of(Some(pod))).unwrap();
    }
    let (running, same) = (of(Some("running")), of(None));
    let asked = |change: fn(&mut Terms)| {
        let mut others = same.clone();
        change(&mut others);
        let reply = reply(&place, &running, &others);
        (reply.refused.is_some(), running.suit(&others))
    };
    assert_eq!(asked(|_| {}), (false, true));
    assert_eq!(asked(|it| it.format += 1), (false, false));
    assert_eq!(asked(|it| it.settings.push('0')), (false, false));
    assert!(asked(|it| it.namespace += 1).0);
    for (pod, refused) in [
        (Some("old"), true),
        (Some("running"), false),
        (Some("new"), false),
        (Some("never seen"), false),
        (None, false),
    ] {
        let reply = reply(&place, &running, &of(pod));
        assert_eq!(reply.refused.is_some(), refused, "{pod:?}");
        assert_eq!(reply.newer.is_some(), refused, "{pod:?}");
    }
}

#[tokio::test]
async fn a_daemon_is_relieved_at_its_path_once_and_nobody_waits_there_afterwards() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("handover.sock");
    assert!(!is_offered(&path), "nobody has been there");
    let offer = Offer::open(&path, terms()).unwrap();
    // In the place of one that is gone.
    let offer = {
        drop(offer);
        Offer::open(&path, terms()).unwrap()
    };
    let asked = path.clone();
    let taking = tokio::task::spawn_blocking(move || {
        assert!(is_offered(&asked));
        take_over(&asked, &terms())
    });
    let successor = offer.taken().await;
    drop(offer);
    let given = tokio::task::spawn_blocking(|| successor.give(Estate::default()));
    assert!(given.await.unwrap().unwrap());
    assert!(taking.await.unwrap().unwrap().is_some());
    assert!(!is_offered(&path), "a socket that nobody listens at");
    assert!(take_over(&path, &terms()).unwrap().is_none());
}
