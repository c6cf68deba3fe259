//! Handover to a new daemon: no stream ends, and nothing denied gets through.
pub(crate) mod rejected;

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use lab::traffic::bulk;
use lab::{Host, wait_until};
use serde_json::{Value, json};
use socket2::{Domain, SockAddr, SockRef, Socket, Type};
use testbed::runner::Test;
use testbed::streams::{dial_denied, receive_all, send_until};

use crate::streams::ends;
use testbed::{
    DEADLINE, Daemon, SOON, TestCluster, ask, connected, counter, deny_ingress, echoes, metric,
    policy, small,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    handover_keeps_every_stream_without_loss,
    policy_change_severs_connections_after_handover,
    handover_severs_denied_and_replaced_connections,
];

/// More bytes than all socket buffers and pipes of a stream can hold.
const MORE_THAN_FITS: u64 = 64 << 20;
/// Leaves time for the daemons.
const BETWEEN_WRITES: Duration = Duration::from_millis(20);

/// Everything is allowed but what comes to d, and relayed on node 0 only, which so sees all clients' own ports.
pub(crate) fn policies() -> [Value; 2] {
    let of_node_0 =
        json!({ "matchExpressions": [{ "key": "pod", "operator": "In", "values": ["a", "b"] }] });
    let spec = json!({ "podSelector": of_node_0, "policyTypes": ["Ingress", "Egress"], "ingress": [{}], "egress": [{}] });
    [policy("allow", &spec), deny_ingress("d")]
}

/// A stream through the daemon of node 0.
struct Stream {
    client: TcpStream,
    server: TcpStream,
    /// What both sides have said so far, bulk data aside.
    said: u64,
}

/// Streams of the pods of node 0 with each other, with the other node's and from there, in both families.
fn streams(bed: &TestCluster, of_each: usize) -> Vec<Stream> {
    let mut streams = Vec::new();
    for (from, to) in [("x/a", "x/b"), ("x/a", "x/c"), ("x/c", "x/b")] {
        let [from, to] = [from, to].map(|name| bed.lab.pod(name));
        for (at, port) in to.addrs(82).into_iter().zip([82, 82]) {
            assert_eq!(at.port(), port);
            for _ in 0..of_each {
                let (client, server) = ends(&from, &to, at);
                streams.push(Stream {
                    client,
                    server,
                    said: 0,
                });
            }
        }
    }
    streams
}

impl Stream {
    /// Sends a word and reads its echo.
    fn talk(&mut self, word: &[u8; 8]) {
        let mut heard = [0; 8];
        self.client.write_all(word).unwrap();
        self.server.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, word, "to the server");
        self.server.write_all(&heard).unwrap();
        self.client.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, word, "to the client");
        self.said += 8;
    }

    /// Every other time the other way round.
    fn ends(&self, turn: usize) -> (&TcpStream, &TcpStream) {
        match turn % 2 {
            0 => (&self.client, &self.server),
            _ => (&self.server, &self.client),
        }
    }
}

/// Tells all others to stop, if a test fails too.
struct Stopped<'a>(&'a AtomicBool, &'a [Stream]);

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        if thread::panicking() {
            let ends = self.1.iter().flat_map(|it| [&it.client, &it.server]);
            ends.for_each(|end| end.shutdown(Shutdown::Both).unwrap());
        }
    }
}

fn handover_keeps_every_stream_without_loss() {
    let (mut bed, records) = bed();
    let [mut talking, mut idle, bulk, stalled] = [6, 6, 1, 1].map(|count| streams(&bed, count));
    let half_closed = streams(&bed, 4);
    let all = [&talking, &idle, &bulk, &stalled, &half_closed].map(Vec::len);
    let node = bed.lab.node(0);
    let [a, b, d] = ["x/a", "x/b", "x/d"].map(|name| bed.lab.pod(name));
    idle.iter_mut().for_each(|it| it.talk(b"before  "));
    half_closed.iter().enumerate().for_each(|(turn, it)| {
        let (from, to) = it.ends(turn);
        last_word(from, to);
    });
    // Nobody reads for a long time, and not much is taken in before.
    for end in stalled.iter().flat_map(|it| [&it.client, &it.server]) {
        end.set_write_timeout(None).unwrap();
        SockRef::from(end).set_recv_buffer_size(64 << 10).unwrap();
    }
    let (stop, capture) = (AtomicBool::new(false), a.capture().unwrap());
    let mut moved = BTreeMap::new();
    let (mut started, mut old, mut dials) = (BTreeMap::new(), None, Vec::new());
    thread::scope(|scope| {
        let stop = &stop;
        let _stopped = Stopped(stop, &stalled);
        let stalled = stalled.iter().enumerate().map(|(turn, it)| {
            let (from, to) = it.ends(turn);
            (
                from,
                to,
                scope.spawn(move || bulk::send(from, MORE_THAN_FITS).unwrap()),
            )
        });
        let stalled: Vec<_> = stalled.collect();
        wait_until_full(&node, stalled.len());
        let pouring = bulk.iter().map(|it| {
            let (client, server) = (&it.client, &it.server);
            let sent = [client, server]
                .map(|end| scope.spawn(move || send_until(end, stop, 128 << 10, BETWEEN_WRITES)));
            let seen = [server, client].map(|end| scope.spawn(move || receive_all(end)));
            (ends_of(&it.client), sent, seen)
        });
        let pouring: Vec<_> = pouring.collect();
        let talkers = talking.chunks_mut(12).map(|some| {
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    some.iter_mut().for_each(|it| it.talk(b"a word  "));
                }
            })
        });
        let talkers: Vec<_> = talkers.collect();
        let denied =
            scope.spawn(|| dial_denied(&a, d.addr_v4(80), Duration::from_millis(20), stop));
        let dial = || scope.spawn(|| dial_allowed(&a, b.addr_v4(80), stop));
        let allowed: Vec<_> = std::iter::repeat_with(dial).take(12).collect();

        started = start_times(&node);
        old = Some(relieve(&mut bed));
        streams(&bed, 1)
            .iter_mut()
            .for_each(|it| it.talk(b"late    "));
        idle.iter_mut().for_each(|it| it.talk(b"after   "));
        half_closed.iter().enumerate().for_each(|(turn, it)| {
            let (from, to) = it.ends(turn);
            last_word(to, from);
        });
        stop.store(true, Ordering::Relaxed);
        for (from, to, sending) in stalled {
            let seen = scope.spawn(move || receive_all(to));
            sending.join().unwrap();
            from.shutdown(Shutdown::Write).unwrap();
            assert_eq!(seen.join().unwrap(), MORE_THAN_FITS);
        }
        for (ends, sent, seen) in pouring {
            let sent = sent.map(|it| it.join().unwrap());
            assert_eq!(seen.map(|it| it.join().unwrap()), sent);
            moved.insert(ends, sent);
        }
        talkers.into_iter().for_each(|it| it.join().unwrap());
        assert!(denied.join().unwrap() > 0);
        dials.extend(allowed.into_iter().flat_map(|it| it.join().unwrap()));
    });
    let waited = dialled_meanwhile(&dials, &bed.daemon(0).log());
    println!(
        "{} first packets waited {:?} at most",
        waited.len(),
        waited.iter().max()
    );
    let none_lost = waited.iter().all(|it| *it < SOON);
    assert!(none_lost, "{waited:?}");
    assert_eq!(capture.syn_acks_from(d.addr_v4(80)), 0);
    for lost in ["no_daemon", "out_of_state"] {
        assert_eq!(counter(&node, lost), 0, "{lost}");
    }
    let taken_over = metric(&node, "portreeve_handover_connections_total");
    assert!(
        taken_over >= all.iter().sum::<usize>() as u64,
        "{taken_over}"
    );

    moved.extend(
        talking
            .iter()
            .chain(&idle)
            .map(|it| (ends_of(&it.client), [it.said; 2])),
    );
    drop((talking, idle, bulk, stalled, half_closed));
    for (ends, [sent, received]) in moved {
        let record = record_of(&records, &ends);
        assert_eq!(record["verdict"], "allow", "{record}");
        assert_eq!(record["start_time"], started[&ends], "{record}");
        assert_eq!(record["bytes.sent"], sent, "{record}");
        assert_eq!(record["bytes.received"], received, "{record}");
    }
    let mut old = old.unwrap();
    let log = old.log();
    assert!(log.contains("handover complete"), "{log}");
    assert!(
        !log.contains("in_flight=0"),
        "the test has nothing in flight: {log}"
    );
    let left = old.descriptors();
    assert!(left < 20, "it holds {left} descriptors");
    assert!(old.child.try_wait().unwrap().is_none(), "{log}");
    old.child.terminate();
    assert!(old.child.wait(DEADLINE).unwrap().success());
}

fn policy_change_severs_connections_after_handover() {
    let (mut bed, records) = bed();
    let [a, b, c] = ["x/a", "x/b", "x/c"].map(|name| bed.lab.pod(name));
    let [doomed, lucky] = [&b, &c].map(|to| connected(&a, to.addr_v4(80)));
    // A socket that was reset has no peer.
    let ends = ends_of(&doomed);
    relieve(&mut bed);
    [&doomed, &lucky]
        .iter()
        .for_each(|it| echoes(it, "taken over"));
    let [_, closed] = policies();
    let only_out = json!({ "podSelector": {}, "policyTypes": ["Egress"], "egress": [{}] });
    bed.apply(&[closed, deny_ingress("b"), policy("allow", &only_out)]);
    assert_eq!(end_of(&doomed), ErrorKind::ConnectionReset);
    echoes(&lucky, "still allowed");
    let record = record_of(&records, &ends);
    assert_eq!(record["verdict"], "sever", "{record}");
    assert_eq!(record["policies"], json!(["x/deny-ingress-b"]), "{record}");
}

fn handover_severs_denied_and_replaced_connections() {
    let (mut bed, records) = bed();
    let [a, b, c] = ["x/a", "x/b", "x/c"].map(|name| bed.lab.pod(name));
    let [denied, replaced] = [&b, &c].map(|to| connected(&a, to.addr_v4(80)));
    let stays = connected(&a, b.addr_v6(80));
    let ends = [&denied, &replaced].map(ends_of);
    // The new daemon follows another directory: the old one does not hear of it.
    let mut cluster = bed.lab.manifests();
    let mut objects = cluster["items"].as_array_mut().unwrap().iter_mut();
    let of_c = objects.find(|it| it["kind"] == "Pod" && it["metadata"]["name"] == "c");
    of_c.unwrap()["metadata"]["uid"] = "another".into();
    let only_c = c.addr_v4(0).ip().to_string() + "/32";
    let blocks = ["::/0", &only_c].map(|cidr| json!({ "to": [{ "ipBlock": { "cidr": cidr } }] }));
    let spec = json!({ "podSelector": {}, "policyTypes": ["Egress"], "egress": blocks });
    let state = bed.file("state.json");
    let items = json!([cluster, policy("not-to-b", &spec)]);
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": items });
    fs::write(&state, list.to_string()).unwrap();
    let source = format!("dir:{}", state.display());
    let flags = flags(&bed);
    let mut flags: Vec<_> = flags.iter().map(String::as_str).collect();
    flags.extend(["--cluster", &source]);
    bed.relieve(0, &flags);
    let cut = [(&denied, "x/not-to-b"), (&replaced, "uid another")];
    for ((stream, reason), ends) in cut.into_iter().zip(&ends) {
        assert_eq!(end_of(stream), ErrorKind::ConnectionReset, "{reason}");
        let record = record_of(&records, ends);
        assert_eq!(record["verdict"], "sever", "{record}");
        let said = record["reason"].as_str().unwrap();
        assert!(said.contains(reason), "{record}");
    }
    echoes(&stays, "allowed by the new daemon's state");
}

/// Starts one more daemon on node 0; returns the one that it takes over from.
fn relieve(bed: &mut TestCluster) -> Daemon {
    let flags = flags(bed);
    bed.relieve(0, &flags.each_ref().map(String::as_str))
}

/// The first message of a new daemon on a node.
pub(crate) fn terms_of(node: &Host) -> Value {
    let queues = thread::available_parallelism().unwrap();
    let settings = format!("--proxy-port 15001 --queue 100 --queues {queues} --mark-mask 0x3c00");
    json!({ "format": 4, "namespace": node.netns().inode(), "settings": settings })
}

/// Sends this to the handover socket of node 0's daemon.
pub(crate) fn asking(bed: &TestCluster, terms: &Value) -> Socket {
    let line = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
    let place = SockAddr::unix(bed.file("handover.sock")).unwrap();
    line.connect(&place).unwrap();
    line.set_read_timeout(Some(DEADLINE)).unwrap();
    line.send(terms.to_string().as_bytes()).unwrap();
    line
}

/// The next message; null at the end.
pub(crate) fn heard(mut line: &Socket) -> Value {
    let mut message = [0; 4096];
    match line.read(&mut message).unwrap() {
        0 => Value::Null,
        length => serde_json::from_slice(&message[..length]).unwrap(),
    }
}

pub(crate) fn end_of(mut stream: &TcpStream) -> ErrorKind {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.read(&mut [0; 1]).unwrap_err().kind()
}

/// The small cluster; the daemon of node 0 allows a handover, and writes records to the file returned.
fn bed() -> (TestCluster, PathBuf) {
    bed_with(&[])
}

/// The same, whose daemon of node 0 has more flags.
pub(crate) fn bed_with(more: &[&str]) -> (TestCluster, PathBuf) {
    let mut bed = TestCluster::bare(small());
    bed.write_policies(&policies());
    let flags = flags(&bed);
    let flags: Vec<_> = flags
        .iter()
        .map(String::as_str)
        .chain(more.iter().copied())
        .collect();
    for (node, flags) in [(0, &flags[..]), (1, &[])] {
        bed.install(node, &[]);
        bed.start(node, flags);
    }
    let records = bed.file("records");
    (bed, records)
}

pub(crate) fn flags(bed: &TestCluster) -> [String; 4] {
    let path = |name| bed.file(name).display().to_string();
    let [handover, trace_file] = ["--handover", "--trace-file"].map(str::to_owned);
    [handover, path("handover.sock"), trace_file, path("records")]
}

/// Sends a last word and closes; the other end reads both.
fn last_word(mut from: &TcpStream, mut to: &TcpStream) {
    from.write_all(b"last").unwrap();
    from.shutdown(Shutdown::Write).unwrap();
    let mut heard = String::new();
    to.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "last");
}

/// Dials what is allowed again and again; it always answers. Returns when each dial began, and how long it took.
fn dial_allowed(from: &Host, to: SocketAddr, stop: &AtomicBool) -> Vec<(SystemTime, Duration)> {
    let mut dials = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let began = SystemTime::now();
        let outcome = from.connect(to, DEADLINE).unwrap();
        dials.push((began, outcome.latency().unwrap()));
        outcome.into_stream().unwrap();
        // What waits while a daemon starts is dropped (docs/handover.md); let it not be all.
        thread::sleep(Duration::from_millis(40));
    }
    dials
}

/// How long the dials took that began while the daemon with this log took over.
fn dialled_meanwhile(dials: &[(SystemTime, Duration)], log: &str) -> Vec<Duration> {
    let line = log.lines().find(|line| line.contains("took over")).unwrap();
    let end = humantime::parse_rfc3339(line.split_whitespace().next().unwrap()).unwrap();
    let (_, took) = line.split_once("milliseconds=").unwrap();
    let begin = end - Duration::from_millis(took.trim().parse().unwrap());
    let meanwhile = dials
        .iter()
        .filter(|(began, _)| (begin..end).contains(began));
    meanwhile.map(|(_, took)| *took).collect()
}

/// Waits until the daemon has buffered unread data of this many streams.
fn wait_until_full(node: &Host, full: usize) {
    let bytes = |it: &Value| ["bytes.sent", "bytes.received"].map(|key| it[key].as_u64().unwrap());
    wait_until(DEADLINE, "streams to fill", || {
        let live = connections(node);
        let of = live.values().flat_map(bytes);
        of.filter(|bytes| *bytes > 32 << 10).count() >= full
    })
    .unwrap();
}

/// The one record of a connection.
pub(crate) fn record_of(file: &Path, ends: &Ends) -> Value {
    let records = || -> Vec<Value> {
        let text = fs::read_to_string(file).unwrap();
        let whole = text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        whole.filter(|it| ends_in(it) == *ends).collect()
    };
    wait_until(DEADLINE, "a record", || !records().is_empty()).unwrap();
    let [record] = &records()[..] else {
        panic!("two records of one connection: {:?}", records());
    };
    record.clone()
}

/// Client and server, as records have them.
pub(crate) type Ends = [(String, u64); 2];

fn ends_in(record: &Value) -> Ends {
    ["source", "destination"].map(|end| {
        let of = |what| &record[format!("{end}.{what}")];
        let address = of("address").as_str().unwrap().to_owned();
        (address, of("port").as_u64().unwrap())
    })
}

pub(crate) fn ends_of(client: &TcpStream) -> Ends {
    let ends = [client.local_addr(), client.peer_addr()];
    ends.map(Result::unwrap)
        .map(|end| (end.ip().to_string(), end.port().into()))
}

/// What the daemon of a node relays.
fn connections(node: &Host) -> BTreeMap<Ends, Value> {
    let listed = ask(node, "/connections").unwrap().json();
    let listed = listed
        .as_array()
        .unwrap()
        .iter()
        .filter(|it| it["path"] == "spliced");
    listed.map(|it| (ends_in(it), it.clone())).collect()
}

fn start_times(node: &Host) -> BTreeMap<Ends, Value> {
    let started = |(ends, it): (Ends, Value)| (ends, it["start_time"].clone());
    connections(node).into_iter().map(started).collect()
}
