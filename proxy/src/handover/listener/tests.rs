//! Two daemons' ends of a handover, in one process.
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, SystemTime};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::super::{ConnectionState, HandoverConnection, Pod, WorkerSockets};
use super::*;
use crate::tcp::relay::Unread;
use crate::telemetry::timeline::{Onward, Seen};

/// Both ends of a line with this time limit for each message.
fn lines(within: Duration) -> (Channel, Channel) {
    let (kind, flags) = (SockType::SeqPacket, SockFlag::empty());
    let (one, other) = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
    let line = |socket| Channel::to(socket, Uid::effective(), within).unwrap();
    (line(one), line(other))
}

fn terms() -> Hello {
    Hello {
        format: FORMAT,
        namespace: 7,
        settings: "--proxy-port 15001".to_owned(),
        pod: None,
    }
}

fn known(port: u16) -> ConnectionState {
    ConnectionState {
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
fn connection(port: u16, in_flight: [Left; 2]) -> (HandoverConnection, [TcpStream; 2]) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let pair = || {
        let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (dialled, listener.accept().unwrap().0)
    };
    let ((client, ours), (to_server, server)) = (pair(), pair());
    let connection = HandoverConnection {
        state: known(port),
        server: to_server.into(),
        client: Some(ours.into()),
        in_flight,
    };
    (connection, [client, server])
}

fn bytes(bytes: Vec<u8>) -> Left {
    Left { bytes, pipe: None }
}

/// A pipe with these bytes in it, and no writer.
fn pipe(held: &[u8]) -> Unread {
    let (read, write) = nix::unistd::pipe().unwrap();
    assert_eq!(nix::unistd::write(&write, held).unwrap(), held.len());
    let bytes = held.len();
    Unread { read, bytes }
}

fn worker_sockets() -> WorkerSockets {
    let listener = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
    WorkerSockets {
        queue: listener(),
        listener: Some(listener()),
    }
}

/// How a stream ends.
fn end_of(mut stream: &TcpStream) -> ErrorKind {
    stream.read(&mut [0]).unwrap_err().kind()
}

#[test]
fn handover_transfers_everything_unchanged() {
    let (giving, mut taking) = lines(WITHIN);
    let (mut state, mut outside) = (State::default(), Vec::new());
    state
        .workers
        .extend([(100, worker_sockets()), (101, worker_sockets())]);
    let piped = |held: &[u8], rest: &[u8]| Left {
        bytes: rest.to_vec(),
        pipe: Some(pipe(held)),
    };
    for (port, in_flight) in [
        (1, [piped(b"held", b"rest"), piped(b"back", b"")]),
        (2, [bytes(vec![1; 3 << 20]), bytes(vec![2; 7])]),
        (3, [bytes(vec![]), piped(b"down", b"")]),
        (4, Default::default()),
    ] {
        let (connection, ends) = connection(port, in_flight);
        state.connections.push(connection);
        outside.push(ends);
    }
    let (admitted, _ends) = connection(5, Default::default());
    state.connections.push(HandoverConnection {
        client: None,
        ..admitted
    });
    let mut expected: Vec<_> = state
        .connections
        .iter()
        .map(|it| it.state.clone())
        .collect();
    let all = state.in_flight();
    let mut taken = State::default();
    let given = thread::scope(|scope| {
        let successor = Peer {
            line: giving,
            suited: true,
        };
        let given = scope.spawn(move || successor.give(state).unwrap());
        taking.take(&mut taken).unwrap();
        taken.from = Some(taking);
        taken.begin(5).unwrap();
        given.join().unwrap()
    });
    assert_eq!(
        (given.connections, given.reset, given.in_flight),
        (5, 0, all)
    );
    assert_eq!(taken.in_flight(), all);
    // The least expensive come first: nothing in flight, bytes, pipes.
    let order: Vec<_> = taken
        .connections
        .iter()
        .map(|it| it.state.client.port())
        .collect();
    assert_eq!(order, [4, 5, 2, 3, 1]);
    let mut known: Vec<_> = taken
        .connections
        .iter()
        .map(|it| it.state.clone())
        .collect();
    known.sort_by_key(|known| known.client.port());
    expected.sort_by_key(|known| known.client.port());
    assert_eq!(known, expected);
    assert_eq!(taken.workers.keys().collect::<Vec<_>>(), [&100, &101]);
    let rest =
        |at: usize, direction: usize| taken.connections[at].in_flight[direction].bytes.clone();
    assert_eq!([rest(2, 0), rest(2, 1)], [vec![1; 3 << 20], vec![2; 7]]);
    assert_eq!([rest(4, 0), rest(4, 1)], [b"rest".to_vec(), vec![]]);
    let held = |at: usize, direction: usize| {
        let pipe = taken.connections[at].in_flight[direction]
            .pipe
            .as_ref()
            .unwrap();
        let mut held = vec![0; pipe.bytes + 1];
        let length = nix::unistd::read(&pipe.read, &mut held).unwrap();
        held.truncate(length);
        held
    };
    assert_eq!(
        [held(4, 0), held(4, 1), held(3, 1)],
        [b"held", b"back", b"down"]
    );
    assert!(taken.connections[1].client.is_none() && taken.connections[0].client.is_some());
    // The streams live by the taken copies alone, and end as in an orderly end.
    drop(taken);
    for ends in &outside {
        assert_eq!(end_of(&ends[0]), ErrorKind::ConnectionReset);
    }
}

#[test]
fn connections_late_for_handover_are_reset() {
    let (mut giving, mut taking) = lines(WITHIN);
    let (mut state, mut outside) = (State::default(), Vec::new());
    for port in 1..=3 {
        let (connection, ends) = connection(port, Default::default());
        state.connections.push(connection);
        outside.push(ends);
    }
    let mut taken = State::default();
    thread::scope(|scope| {
        let given = scope.spawn(move || {
            assert_eq!(giving.give(&state, [Duration::ZERO, WITHIN]).unwrap(), 0);
        });
        taking.take(&mut taken).unwrap();
        assert!(taken.connections.is_empty());
        taken.from = Some(taking);
        taken.begin(0).unwrap();
        given.join().unwrap();
    });
    for end in outside.iter().flatten() {
        assert_eq!(end_of(end), ErrorKind::ConnectionReset);
    }
}

#[test]
fn old_daemon_keeps_connections_after_broken_handover() {
    for dies in [false, true] {
        let (mut giving, mut taking) = lines(WITHIN);
        let (mut state, mut taken) = (State::default(), State::default());
        let (connection, ends) = connection(1, [bytes(vec![7; 9]), Left::default()]);
        state.connections.push(connection);
        let brief = Duration::from_millis(20);
        let (error, mut state) = thread::scope(|scope| {
            let giving = scope.spawn(move || {
                let error = giving.give(&state, [WITHIN, brief]).unwrap_err();
                (error, state)
            });
            taking.take(&mut taken).unwrap();
            if dies {
                drop((taking, taken));
                return giving.join().unwrap();
            }
            let kept = giving.join().unwrap();
            // It is too late to begin.
            taken.from = Some(taking);
            let begun = taken.begin(1).unwrap_err();
            assert!(matches!(begun, HandoverError::BrokenOff(_)), "{begun}");
            kept
        });
        let expected = match dies {
            true => matches!(error, HandoverError::Gone),
            false => matches!(error, HandoverError::Late),
        };
        assert!(expected, "{error}");
        let connection = state.take_connections().remove(0);
        assert_eq!(connection.in_flight[0].bytes, [7; 9]);
        let mut client = TcpStream::from(connection.client.unwrap());
        client.write_all(b"goes on").unwrap();
        let mut heard = [0; 7];
        { &ends[0] }.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"goes on");
    }
}

#[test]
fn damaged_handover_message_is_rejected_without_panic() {
    let (connection, _ends) = connection(1, Default::default());
    let load = |bytes: usize, piped: usize| serde_json::json!({ "bytes": bytes, "piped": piped });
    let of = |client: bool, in_flight: [serde_json::Value; 2]| {
        let known = &connection.state;
        let part = serde_json::json!({ "state": known, "client": client, "in_flight": in_flight });
        serde_json::json!({ "Connection": part })
            .to_string()
            .into_bytes()
    };
    let message = of(false, [load(2, 0), load(0, 0)]);
    let end = br#"{"End":{"connections":1}}"#;
    let take = |messages: &[&[u8]]| {
        let (giving, mut taking) = lines(WITHIN);
        for (at, message) in messages.iter().enumerate() {
            let sockets = [connection.server.as_fd()];
            giving.send(message, &sockets[at.min(1)..]).unwrap();
        }
        drop(giving);
        taking.take(&mut State::default())
    };
    assert!(take(&[&message, &[7; 2], end]).is_ok());
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
            vec![&message, &[7; 2], br#"{"Worker":{"queue":100}}"#],
            "a worker without a descriptor",
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
fn handover_peer_of_another_user_is_rejected() {
    let (kind, flags) = (SockType::SeqPacket, SockFlag::empty());
    let (one, other) = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
    let another = Uid::from_raw(Uid::effective().as_raw() + 1);
    let refused = Peer::greet(one, Path::new(""), &terms(), another).err();
    assert!(
        matches!(refused, Some(HandoverError::Stranger { uid }) if uid == Uid::effective().as_raw())
    );
    let mut line = Channel::to(other, Uid::effective(), WITHIN).unwrap();
    assert!(matches!(line.receive(), Err(HandoverError::Gone)));
}

#[test]
fn silent_handover_peer_times_out() {
    let (_silent, mut line) = lines(Duration::from_millis(20));
    assert!(matches!(line.receive(), Err(HandoverError::Late)));
    let (connection, _ends) = connection(1, [bytes(vec![0; 3 << 20]), Left::default()]);
    let (_deaf, mut line) = lines(Duration::from_millis(20));
    let mut state = State::default();
    state.connections.push(connection);
    let given = line.give(&state, [WITHIN, WITHIN]);
    assert!(matches!(given, Err(HandoverError::Late)));
}

#[test]
fn connections_not_handed_over_are_reset_or_kept() {
    for suited in [true, false] {
        let (line, other) = lines(WITHIN);
        drop(other);
        let (connection, ends) = connection(1, Default::default());
        let mut state = State::default();
        state.connections.push(connection);
        let given = Peer { line, suited }.give(state);
        match given {
            Ok(given) => assert_eq!((suited, given.connections, given.reset), (false, 0, 1)),
            Err(kept) => assert!(suited && kept.state.connections.len() == 1),
        }
        for end in &ends {
            assert_eq!(end_of(end), ErrorKind::ConnectionReset);
        }
    }
}

#[test]
fn unfit_successor_is_rejected_or_gets_no_connections() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("handover.sock");
    let of = |pod: Option<&str>| Hello {
        pod: pod.map(str::to_owned),
        ..terms()
    };
    for pod in ["old", "running", "new"] {
        come(&place, &of(Some(pod))).unwrap();
    }
    let (running, same) = (of(Some("running")), of(None));
    let asked = |change: fn(&mut Hello)| {
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
async fn handover_offer_is_taken_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("handover.sock");
    assert!(!is_offered(&path), "nobody has been there");
    let offer = Listener::open(&path, terms()).unwrap();
    // In the place of one that is gone.
    let offer = {
        drop(offer);
        Listener::open(&path, terms()).unwrap()
    };
    let asked = path.clone();
    let taking = tokio::task::spawn_blocking(move || {
        assert!(is_offered(&asked));
        take_over(&asked, &terms())
    });
    let successor = offer.taken().await;
    drop(offer);
    let given = tokio::task::spawn_blocking(|| successor.give(State::default()));
    let taken = taking.await.unwrap().unwrap();
    taken.unwrap().begin(0).unwrap();
    assert!(given.await.unwrap().unwrap().suited);
    assert!(!is_offered(&path), "a socket that nobody listens at");
    assert!(take_over(&path, &terms()).unwrap().is_none());
}
