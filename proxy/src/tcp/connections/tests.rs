//! The table of connections, with SYNs and a clock made up.
use std::io::ErrorKind;

use socket2::SockRef;

use super::*;
use crate::limits::{Asking, ConnectionLimits, Full, Party, Pending, Source};
use crate::tcp::connect::reset_when_closed;

fn key(client: u16, server: u8) -> ConnectionKey {
    ConnectionKey {
        client: SocketAddr::from(([10, 0, 0, 1], client)),
        server: SocketAddr::from(([10, 0, 0, server], 80)),
    }
}

struct Bench {
    connections: ConnectionTable,
    limits: Arc<ConnectionLimits>,
}

impl Bench {
    fn new() -> Self {
        Self {
            connections: ConnectionTable::default(),
            limits: ConnectionLimits::new(2, 8),
        }
    }

    fn arrive(&self, key: ConnectionKey, sequence: u32) -> Result<Arrival, Full> {
        let party = |end: SocketAddr| Party {
            source: Source::Outside(end.ip()),
            namespace: None,
        };
        self.connections.arrive(key, sequence, || {
            self.limits.permit(party(key.client), party(key.server))
        })
    }

    fn new_flow(&self, key: ConnectionKey, sequence: u32) -> Arc<Connection> {
        match self.arrive(key, sequence) {
            Ok(Arrival::New(connection)) => connection,
            _ => panic!("not taken for new"),
        }
    }
}

/// A connected stream, for what needs one, and its peer.
async fn stream_and_peer() -> (TcpStream, TcpStream) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap());
    let (stream, peer) = tokio::join!(stream, listener.accept());
    let stream = stream.unwrap();
    // Legs are created like this.
    reset_when_closed(&stream).unwrap();
    (stream, peer.unwrap().0)
}

async fn stream() -> TcpStream {
    stream_and_peer().await.0
}

async fn is_reset(stream: &TcpStream) -> bool {
    let readable = tokio::time::timeout(Duration::from_secs(1), stream.readable());
    readable.await.expect("a reset wakes").unwrap();
    stream.try_read(&mut [0]).err().map(|it| it.kind()) == Some(ErrorKind::ConnectionReset)
}

#[test]
fn repeated_syn_after_new_dnat_is_same_attempt() {
    let bench = Bench::new();
    let _first = bench.new_flow(key(1, 2), 7);
    assert!(
        matches!(bench.arrive(key(1, 2), 7), Ok(Arrival::Retransmit)),
        "the same SYN"
    );
    assert!(
        matches!(bench.arrive(key(1, 3), 7), Ok(Arrival::Retransmit)),
        "sent to another pod of the Service"
    );
    assert_eq!(bench.connections.len(), 1);
}

#[test]
fn new_sequence_number_replaces_the_held_attempt() {
    let bench = Bench::new();
    let first = bench.new_flow(key(1, 2), 7);
    let second = bench.new_flow(key(1, 2), 8);
    assert_eq!(first.stage_name(), StageName::Closed);
    assert_eq!(second.stage_name(), StageName::Held);
    bench.connections.remove(&first);
    assert_eq!(
        bench.connections.len(),
        1,
        "removing the old one again leaves the new one"
    );
}

#[test]
fn same_client_port_to_another_server_is_separate() {
    let bench = Bench::new();
    let _first = bench.new_flow(key(1, 2), 7);
    let _second = bench.new_flow(key(1, 3), 8);
    assert_eq!(bench.connections.len(), 2);
}

#[test]
fn source_over_its_bound_adds_no_flow() {
    let bench = Bench::new();
    let held: Vec<_> = (1..=2)
        .map(|port| bench.new_flow(key(port, 2), 7))
        .collect();
    assert_eq!(bench.arrive(key(3, 2), 7).err(), Some(Full::Source));
    assert_eq!(bench.connections.len(), 2);
    bench.connections.remove(&held[0]);
    drop(held);
    assert!(
        matches!(bench.arrive(key(3, 2), 7), Ok(Arrival::New(_))),
        "what has ended is given back"
    );
}

#[tokio::test]
async fn admitted_connection_is_paired_once() {
    let bench = Bench::new();
    let connection = bench.new_flow(key(1, 2), 7);
    assert!(
        bench.connections.pair(&key(1, 2)).is_none(),
        "held: there is no upstream yet"
    );
    assert!(bench.connections.admit(&connection, stream().await, 0));
    assert!(
        matches!(bench.arrive(key(1, 2), 7), Ok(Arrival::Established)),
        "the SYN-ACK was lost"
    );
    assert!(bench.connections.pair(&key(1, 2)).is_some());
    assert!(bench.connections.pair(&key(1, 2)).is_none(), "once only");
    assert!(
        matches!(bench.arrive(key(1, 2), 7), Ok(Arrival::Established)),
        "a live socket answers itself"
    );
}

#[tokio::test]
async fn new_attempt_waits_once_for_live_connection() {
    let bench = Bench::new();
    let connection = bench.new_flow(key(1, 2), 7);
    assert!(bench.connections.admit(&connection, stream().await, 0));
    assert!(bench.connections.pair(&key(1, 2)).is_some());
    assert!(matches!(
        bench.arrive(key(1, 2), 9),
        Ok(Arrival::PortReuse(_))
    ));
    assert!(
        matches!(bench.arrive(key(1, 2), 10), Ok(Arrival::Retransmit)),
        "one waits already; a flood must not fill the queue"
    );
    assert!(
        !connection.closed_within(Duration::ZERO).await,
        "it goes on"
    );
    let Ok(Arrival::PortReuse(last)) = bench.arrive(key(1, 2), 9) else {
        panic!("none waits any more");
    };
    bench.connections.remove(&connection);
    assert!(last.closed_within(Duration::from_secs(1)).await);
    assert!(matches!(bench.arrive(key(1, 2), 9), Ok(Arrival::New(_))));
}

#[tokio::test]
async fn severing_resets_a_connection_without_running_relay() {
    let bench = Bench::new();
    let connection = bench.new_flow(key(1, 2), 7);
    let (to_server, server) = stream_and_peer().await;
    let (to_client, client) = stream_and_peer().await;
    assert!(bench.connections.admit(&connection, to_server, 0));
    let (_, upstream) = bench.connections.pair(&key(1, 2)).unwrap();
    let legs = Arc::new(Legs {
        server: upstream.stream,
        client: to_client,
    });
    connection.lend(&legs);
    connection.close();
    for stream in [&client, &server, &legs.client, &legs.server] {
        assert!(is_reset(stream).await);
    }
    tokio::time::timeout(Duration::from_secs(1), connection.close_requested())
        .await
        .expect("the relay is notified too");
}

#[tokio::test]
async fn abandoned_attempts_expire() {
    let bench = Bench::new();
    let held = bench.new_flow(key(1, 2), 7);
    let admitted = bench.new_flow(key(2, 2), 7);
    assert!(bench.connections.admit(&admitted, stream().await, 0));
    let at = |seconds| held.started + Duration::from_secs(seconds);
    assert_eq!(
        bench.connections.expire(at(3)),
        0,
        "the client may still repeat its SYN"
    );
    held.last_syn.store(3000, Ordering::Relaxed);
    assert_eq!(
        bench.connections.expire(at(9)),
        0,
        "it did, and would again at 7 s"
    );
    assert_eq!(bench.connections.expire(at(11)), 1, "it did not");
    tokio::time::timeout(Duration::from_secs(1), held.close_requested())
        .await
        .expect("the connecting task is notified");
    bench.connections.remove(&held);
    assert_eq!(
        bench.connections.expire(at(75)),
        1,
        "the handshake was never completed"
    );
    assert_eq!(bench.connections.len(), 0);
}

#[tokio::test]
async fn severed_connection_is_not_admitted() {
    let bench = Bench::new();
    let closing = bench.new_flow(key(1, 2), 7);
    closing.close();
    let (upstream, server) = stream_and_peer().await;
    assert!(
        !bench.connections.admit(&closing, upstream, 0),
        "its SYN would be answered"
    );
    assert!(is_reset(&server).await, "the server saw no complete stream");

    let bench = Bench::new();
    let replaced = bench.new_flow(key(2, 2), 7);
    let _ = bench.new_flow(key(2, 2), 8);
    assert!(!bench.connections.admit(&replaced, stream().await, 0));
}

#[tokio::test]
async fn an_admitted_connection_ends_by_a_reset() {
    type End = fn(&ConnectionTable, &Arc<Connection>);
    let ends: [(End, &str); 3] = [
        (
            |connections, connection| assert!(connections.give_way(connection).is_some()),
            "gives way",
        ),
        (
            |connections, connection| {
                assert_eq!(
                    connections.expire(connection.started + ACCEPT_WITHIN * 2),
                    1
                );
            },
            "expires",
        ),
        (|connections, _| connections.end_all(), "the daemon stops"),
    ];
    for (end, why) in ends {
        let bench = Bench::new();
        let connection = bench.new_flow(key(1, 2), 7);
        let (upstream, server) = stream_and_peer().await;
        assert!(bench.connections.admit(&connection, upstream, 0));
        end(&bench.connections, &connection);
        assert!(is_reset(&server).await, "{why}");
        assert!(bench.connections.pair(&key(1, 2)).is_none(), "{why}");
        assert_eq!(bench.connections.len(), 0, "{why}");
    }
}

#[tokio::test]
async fn client_reset_ends_only_its_half_open_connection() {
    let bench = Bench::new();
    let connection = bench.new_flow(key(1, 2), 7);
    let reset = |sequence| bench.connections.reset_by_client(&key(1, 2), sequence);
    assert!(reset(8).is_none(), "nobody has answered its SYN");
    let (upstream, server) = stream_and_peer().await;
    assert!(bench.connections.admit(&connection, upstream, 0));
    for forged in [7, 9, u32::MAX] {
        assert!(reset(forged).is_none(), "another sequence number");
    }
    assert!(reset(8).is_some());
    assert!(is_reset(&server).await);
    assert_eq!(bench.connections.len(), 0);

    let live = bench.new_flow(key(2, 2), 7);
    assert!(bench.connections.admit(&live, stream().await, 0));
    assert!(bench.connections.pair(&key(2, 2)).is_some());
    assert!(bench.connections.reset_by_client(&key(2, 2), 8).is_none());
}

#[tokio::test]
async fn live_connection_is_never_displaced() {
    let bench = Bench::new();
    let held = bench.new_flow(key(1, 2), 7);
    assert_eq!(bench.connections.give_way(&held), Some(StageName::Held));
    let notified = tokio::time::timeout(Duration::from_secs(1), held.close_requested());
    notified.await.expect("the connecting task is notified");

    let live = bench.new_flow(key(2, 2), 7);
    assert!(bench.connections.admit(&live, stream().await, 0));
    assert!(bench.connections.pair(&key(2, 2)).is_some());
    assert_eq!(bench.connections.give_way(&live), None);
    assert!(!live.is_closing());
}

#[tokio::test]
async fn a_place_is_freed_once_live_or_over() {
    let bench = Bench::new();
    let half_open = Pending::new(8, 8);
    let enter = |connection: &Arc<Connection>| {
        let asking = Asking {
            source: Source::Outside([10, 0, 0, 1].into()),
            is_bound: true,
        };
        let asked = Source::Outside([10, 0, 0, 2].into());
        let (place, _) = half_open
            .enter(
                asking,
                asked,
                Arc::downgrade(connection),
                connection.started,
            )
            .unwrap();
        connection.takes(place);
    };
    let connections: Vec<_> = (1..=2)
        .map(|port| bench.new_flow(key(port, 2), 7))
        .collect();
    connections.iter().for_each(enter);
    assert!(bench.connections.admit(&connections[0], stream().await, 0));
    assert_eq!(half_open.len(), 2, "admitted is half-open too");
    assert!(bench.connections.pair(&key(1, 2)).is_some());
    assert_eq!(half_open.len(), 1, "live");
    bench.connections.remove(&connections[1]);
    assert_eq!(half_open.len(), 0, "over");
}

#[tokio::test]
async fn no_syn_goes_to_a_closed_socket() {
    let live = async |bench: &Bench| {
        let connection = bench.new_flow(key(1, 2), 7);
        assert!(bench.connections.admit(&connection, stream().await, 0));
        let (_, upstream) = bench.connections.pair(&key(1, 2)).unwrap();
        let (client, peer) = stream_and_peer().await;
        let legs = Arc::new(Legs {
            server: upstream.stream,
            client,
        });
        connection.lend(&legs);
        (connection, legs, peer)
    };
    let syn = |bench: &Bench| bench.arrive(key(1, 2), 7).unwrap();
    let bench = Bench::new();
    let (connection, legs, peer) = live(&bench).await;
    assert!(matches!(syn(&bench), Arrival::Established), "an old copy");
    reset_when_closed(&peer).unwrap();
    drop(peer);
    assert!(is_reset(&legs.client).await);
    assert!(
        matches!(syn(&bench), Arrival::Retransmit),
        "the client has reset it"
    );
    assert!(!connection.takes_syn());

    let bench = Bench::new();
    let (connection, _legs, _peer) = live(&bench).await;
    assert!(connection.takes_syn());
    connection.close();
    assert!(
        matches!(syn(&bench), Arrival::Retransmit),
        "a change has closed it"
    );
    assert!(!connection.takes_syn());

    let bench = Bench::new();
    let (connection, legs, _peer) = live(&bench).await;
    drop(legs);
    assert!(!connection.takes_syn(), "its task is about to take it out");
}

#[tokio::test]
async fn only_live_connections_get_keepalive() {
    let bench = Bench::new();
    let keeps_alive = |legs: &Legs| SockRef::from(&legs.server).keepalive().unwrap();
    let admitted = bench.new_flow(key(1, 2), 7);
    assert!(bench.connections.admit(&admitted, stream().await, 0));
    bench.connections.keep_alive();
    let (live, upstream) = bench.connections.pair(&key(1, 2)).unwrap();
    let (server, client) = (upstream.stream, stream().await);
    let legs = Arc::new(Legs { server, client });
    live.lend(&legs);
    assert!(!keeps_alive(&legs), "it was not live yet");
    bench.connections.keep_alive();
    assert!(keeps_alive(&legs));
    // It is done once.
    SockRef::from(&legs.server).set_keepalive(false).unwrap();
    bench.connections.keep_alive();
    assert!(!keeps_alive(&legs));
}
