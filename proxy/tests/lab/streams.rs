//! Streams through the proxy: every byte, every way to close one, and the cost of an idle one.
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use lab::traffic::{bulk, connect_all};
use lab::{Dial, Host, Serve, wait_until};
use socket2::SockRef;
use testbed::runner::Test;

use testbed::{
    DEADLINE, TestCluster, allow_all, connected, counter, echoes, greeted, metric, small,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    the_server_sees_the_clients_own_address,
    hundred_megabytes_arrive_unchanged_both_ways,
    bulk_in_one_direction_arrives_whole_and_ends,
    streams_end_the_same_as_without_portreeve,
    server_may_send_first_or_stay_silent,
    urgent_data_arrives_in_order,
    both_legs_of_idle_connection_have_keepalive,
    two_thousand_idle_connections_cost_two_descriptors_each,
    thousand_parallel_connects_lose_no_syn,
];

const MEGABYTE: u64 = 1 << 20;
/// Pipes that each of the daemon's threads may keep, two descriptors each.
const POOLED: usize = 32 * 2;

fn the_server_sees_the_clients_own_address() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    for client in ["x/a", "x/d"] {
        let client = bed.lab.pod(client);
        for way in bed.ways(80) {
            let greeting = greeted(&client, way.to);
            assert_eq!(greeting.server, way.server, "{}", way.what);
            assert!(
                client.addresses().contains(&greeting.client.ip()),
                "{}: {greeting:?}",
                way.what
            );
        }
    }
    // From where no proxy is: the outside, and the server's own node.
    for (from, to) in [
        (bed.lab.outside(), "x/b"),
        (bed.lab.node(1), "x/b"),
        (bed.lab.node(0), "x/b"),
    ] {
        for to in bed.lab.pod(to).addrs(80) {
            let seen = greeted(&from, to).client.ip();
            assert!(
                from.addresses().contains(&seen),
                "{} to {to} seen as {seen}",
                from.name()
            );
        }
    }
}

/// Both ends of a connection through the way: client and server.
pub(crate) fn ends(client: &Host, server: &Host, to: SocketAddr) -> (TcpStream, TcpStream) {
    let any: SocketAddr = if to.is_ipv4() {
        ([0, 0, 0, 0], to.port()).into()
    } else {
        ([0u16; 8], to.port()).into()
    };
    let listener: TcpListener = server.listen(any).unwrap();
    let stream = client
        .connect(to, DEADLINE)
        .unwrap()
        .into_stream()
        .unwrap_or_else(|error| panic!("{to}: {error}"));
    let (accepted, _) = listener.accept().unwrap();
    for end in [&stream, &accepted] {
        end.set_read_timeout(Some(DEADLINE)).unwrap();
        end.set_write_timeout(Some(DEADLINE)).unwrap();
    }
    (stream, accepted)
}

fn hundred_megabytes_arrive_unchanged_both_ways() {
    const TOTAL: u64 = 100 * MEGABYTE;
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let a = bed.lab.pod("x/a");
    for way in bed.ways(82) {
        let (client, server) = ends(&a, &bed.lab.pod(&way.server), way.to);
        thread::scope(|scope| {
            for end in [&client, &server] {
                scope.spawn(move || {
                    bulk::send(end, TOTAL).unwrap();
                    end.shutdown(std::net::Shutdown::Write).unwrap();
                });
            }
            for (end, name) in [(&client, "client"), (&server, "server")] {
                let what = &way.what;
                scope.spawn(move || {
                    let seen = bulk::receive(end).unwrap();
                    assert!(seen.is_all_of(TOTAL), "{what}: the {name} got {seen}");
                });
            }
        });
    }
}

fn bulk_in_one_direction_arrives_whole_and_ends() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let (a, b, c) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.pod("x/c"));
    for (server, total) in [(&b, 0), (&c, 1), (&b, 65_536), (&c, 3 * MEGABYTE + 7)] {
        let port = 9000 + u16::try_from(total % 1000).unwrap();
        server.serve_as(&[port], Serve::Source(total)).unwrap();
        server.serve_as(&[port + 1], Serve::Sink).unwrap();
        for to in server.addrs(port) {
            let stream = a.connect(to, DEADLINE).unwrap().into_stream().unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            assert!(
                bulk::receive(&stream).unwrap().is_all_of(total),
                "{total} from {to}"
            );
        }
        for to in server.addrs(port + 1) {
            let mut stream = a.connect(to, DEADLINE).unwrap().into_stream().unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            bulk::send(&stream, total).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, format!("{total} ok\n"), "to {to}");
        }
    }
}

/// One way to close a stream: what both ends do, and what they observe, in words.
type Ending = (&'static str, fn(TcpStream, TcpStream) -> Vec<String>);

const ENDINGS: [Ending; 9] = [
    (
        "the client closes its side and reads on",
        |client, server| half_close(&client, &server),
    ),
    (
        "the server closes its side and reads on",
        |client, server| half_close(&server, &client),
    ),
    ("the client resets", |client, server| {
        reset_seen(client, &server)
    }),
    ("the server resets", |client, server| {
        reset_seen(server, &client)
    }),
    (
        "the client closes its side, then the server resets",
        |client, server| {
            let mut said = shut(&client, &server);
            said.extend(reset_seen(server, &client));
            said
        },
    ),
    (
        "the server closes its side, then the client resets",
        |client, server| {
            let mut said = shut(&server, &client);
            said.extend(reset_seen(client, &server));
            said
        },
    ),
    (
        "the client closes its side, then resets",
        |client, server| {
            let mut said = shut(&client, &server);
            said.extend(reset_written(client, &server));
            said
        },
    ),
    (
        "the server closes its side, then resets",
        |client, server| {
            let mut said = shut(&server, &client);
            said.extend(reset_written(server, &client));
            said
        },
    ),
    ("the client closes with data unread", |client, server| {
        (&server).write_all(b"unread").unwrap();
        client.peek(&mut [0; 6]).unwrap();
        drop(client);
        vec![read(&server)]
    }),
];

fn streams_end_the_same_as_without_portreeve() {
    let mut bed = TestCluster::bare(small());
    let bare = observe_endings(&bed);
    bed.write_policies(&[allow_all()]);
    bed.enforce(&[]);
    let enforced = observe_endings(&bed);
    for ((name, bare), (_, enforced)) in bare.iter().zip(&enforced) {
        assert_eq!(
            enforced, bare,
            "{name}; left: enforced, right: the bare network"
        );
    }
    // The bare network itself passes resets on.
    assert!(
        bare.iter()
            .any(|(_, said)| said.contains(&"ConnectionReset".to_owned())),
        "{bare:?}"
    );
}

fn observe_endings(bed: &TestCluster) -> Vec<(String, Vec<String>)> {
    let a = bed.lab.pod("x/a");
    let mut seen = Vec::new();
    for way in bed.ways(82) {
        for (name, ending) in ENDINGS {
            let (client, server) = ends(&a, &bed.lab.pod(&way.server), way.to);
            (&client).write_all(b"ping").unwrap();
            (&server).read_exact(&mut [0; 4]).unwrap();
            seen.push((format!("{name}; {}", way.what), ending(client, server)));
        }
    }
    seen
}

/// Closes one side; the other end notices, and its bytes still arrive, many of them.
fn half_close(closing: &TcpStream, other: &TcpStream) -> Vec<String> {
    let mut said = shut(closing, other);
    thread::scope(|scope| {
        scope.spawn(|| {
            bulk::send(other, MEGABYTE).unwrap();
            other.shutdown(std::net::Shutdown::Write).unwrap();
        });
        said.push(format!("then {}", bulk::receive(closing).unwrap()));
    });
    said
}

/// Closes one side after a last word, which the other end reads to its end.
fn shut(mut closing: &TcpStream, mut other: &TcpStream) -> Vec<String> {
    closing.write_all(b"last").unwrap();
    closing.shutdown(std::net::Shutdown::Write).unwrap();
    let mut heard = String::new();
    other.read_to_string(&mut heard).unwrap();
    vec![heard]
}

fn reset(stream: TcpStream) {
    SockRef::from(&stream)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(stream);
}

/// Resets from one end; the other end reads.
fn reset_seen(stream: TcpStream, other: &TcpStream) -> Vec<String> {
    reset(stream);
    vec![read(other)]
}

/// Resets from an end that has closed its sending side; the other end notices when it writes.
fn reset_written(stream: TcpStream, mut other: &TcpStream) -> Vec<String> {
    reset(stream);
    let mut said = String::new();
    wait_until(DEADLINE, "a write to fail", || match other.write(b"more") {
        Ok(_) => false,
        Err(error) => {
            said = format!("{:?}", error.kind());
            true
        }
    })
    .unwrap();
    vec![said]
}

fn read(mut stream: &TcpStream) -> String {
    match stream.read(&mut [0; 16]) {
        Ok(count) => format!("{count} bytes"),
        Err(error) => format!("{:?}", error.kind()),
    }
}

fn server_may_send_first_or_stay_silent() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let a = bed.lab.pod("x/a");
    for way in bed.ways(82) {
        let (mut client, mut server) = ends(&a, &bed.lab.pod(&way.server), way.to);
        server.write_all(b"220 ready\r\n").unwrap();
        let mut banner = [0; 11];
        client.read_exact(&mut banner).unwrap();
        assert_eq!(&banner, b"220 ready\r\n", "{}", way.what);
        // Nothing is sent: neither end learns anything.
        client
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        let silence = client.read(&mut [0; 1]).unwrap_err();
        assert_eq!(silence.kind(), io::ErrorKind::WouldBlock, "{}", way.what);
        client.write_all(b"EHLO\r\n").unwrap();
        server.read_exact(&mut [0; 6]).unwrap();
    }
}

fn urgent_data_arrives_in_order() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let a = bed.lab.pod("x/a");
    for way in bed.ways(83) {
        let (client, server) = ends(&a, &bed.lab.pod(&way.server), way.to);
        for (mut from, mut to) in [(&client, &server), (&server, &client)] {
            from.write_all(b"ab").unwrap();
            SockRef::from(from).send_out_of_band(b"c").unwrap();
            from.write_all(b"de").unwrap();
            let mut had = [0; 5];
            to.read_exact(&mut had).unwrap();
            assert_eq!(&had, b"abcde", "{}", way.what);
        }
    }
}

fn both_legs_of_idle_connection_have_keepalive() {
    const ESTABLISHED: &str = "01";
    const KEEP_ALIVE: &str = "02";
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let (a, to, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.node(0));
    let _idle = [connected(&a, to.addr_v4(80)), connected(&a, to.addr_v6(80))];
    // The timers of established sockets (proc_net_tcp).
    let timers = || {
        let read = |family| fs::read_to_string(format!("/proc/thread-self/net/{family}")).unwrap();
        let all = node.run(|| ["tcp", "tcp6"].map(read).concat()).unwrap();
        let fields = all.lines().map(|line| line.split_whitespace());
        let established = fields.filter(|it| it.clone().nth(3) == Some(ESTABLISHED));
        let timers =
            established.filter_map(|mut it| Some(it.nth(5)?.split_once(':')?.0.to_owned()));
        timers.collect::<Vec<_>>()
    };
    wait_until(DEADLINE, "keep-alive", || timers() == [KEEP_ALIVE; 4]).unwrap();
}

fn two_thousand_idle_connections_cost_two_descriptors_each() {
    const IDLE: usize = 2000;
    let mut bed = TestCluster::enforced(&[], &[allow_all()]);
    let (a, c) = (bed.lab.pod("x/a"), bed.lab.pod("x/c"));
    // Every thread has done its first work.
    (0..8).for_each(|_| drop(connected(&a, c.addr_v4(80))));
    let quiet = |bed: &mut TestCluster, most: [usize; 2], what: &str| {
        let wait = wait_until(DEADLINE, what, || {
            (0..2).all(|node| bed.daemon(node).descriptors() <= most[node])
        });
        if let Err(error) = wait {
            panic!(
                "{error}: {:?}, at most {most:?}",
                [0, 1].map(|node| bed.daemon(node).descriptors())
            );
        }
    };
    bed.wait_for_no_connection();
    let before = [0, 1].map(|node| bed.daemon(node).descriptors());

    let mut idle = Vec::new();
    while idle.len() < IDLE {
        let targets = [c.addr_v4(80), c.addr_v6(80)].repeat(100);
        for outcome in a.connect_all(&targets, DEADLINE).unwrap() {
            idle.push(outcome.into_stream().unwrap());
        }
    }
    // Each has carried its greeting.
    for stream in &idle {
        lab::traffic::greeting(stream, DEADLINE).unwrap();
    }
    // The asking itself is a connection for a moment.
    quiet(
        &mut bed,
        before.map(|count| count + 2 * IDLE),
        "two descriptors a connection",
    );
    for node in bed.lab.nodes() {
        // None goes past the proxy.
        assert_eq!(metric(&node, "portreeve_connections"), IDLE as u64);
    }

    // Some become bulk, and are idle again.
    for chunk in idle.chunks(16).take(4) {
        thread::scope(|scope| {
            for mut stream in chunk {
                scope.spawn(move || {
                    let mut reader = stream.try_clone().unwrap();
                    thread::scope(|inner| {
                        inner.spawn(|| bulk::send(stream, 4 * MEGABYTE).unwrap());
                        let mut left = 4 * MEGABYTE;
                        let mut buffer = vec![0; 65_536];
                        while left > 0 {
                            left -= reader.read(&mut buffer).unwrap() as u64;
                        }
                    });
                    stream.write_all(b"x").unwrap();
                });
            }
        });
    }
    let threads = thread::available_parallelism().unwrap().get();
    let pooled = before.map(|count| count + 2 * IDLE + POOLED * threads);
    quiet(
        &mut bed,
        pooled,
        "the pipes of bulk streams to be given back",
    );
    for stream in idle.iter().rev().take(20) {
        echoes(stream, "still there");
    }
    drop(idle);
    quiet(
        &mut bed,
        before.map(|count| count + POOLED * threads),
        "all to be closed",
    );
}

/// How long a client waits for an answer to its first SYN (RFC 6298).
const FIRST_REPEAT: Duration = Duration::from_secs(1);

/// On a machine that is too busy to answer within a second a client retransmits its SYN, as it should; no
/// SYN may be lost on any.
fn thousand_parallel_connects_lose_no_syn() {
    const AT_ONCE: u16 = 1000;
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let a = bed.lab.pod("x/a");
    for (turn, way) in (0..).zip(bed.ways(80)) {
        // A range for each way: one port towards a pod and its Service at once is another matter.
        let first = 33_000 + turn * AT_ONCE;
        let ports = first..first + AT_ONCE;
        let dials: Vec<_> = ports
            .clone()
            .map(|port| Dial::new(&a, way.to).source_port(port))
            .collect();
        let capture = a.capture().unwrap();
        let outcomes = connect_all(&dials, DEADLINE).unwrap();
        let failed = outcomes.iter().filter(|it| !it.is_connected()).count();
        let what = &way.what;
        assert_eq!(failed, 0, "{what}\n{}", bed.logs());
        let packets = capture.packets();
        let mut syns = BTreeMap::new();
        for packet in packets.iter().filter(|packet| packet.is_syn_to(way.to)) {
            *syns.entry(packet.source.port()).or_insert(0) += 1;
        }
        for (port, outcome) in ports.zip(&outcomes) {
            let prompt = outcome.latency() < Some(FIRST_REPEAT);
            assert!(
                !prompt || syns[&port] == 1,
                "{what}: {outcome}, {}",
                syns[&port]
            );
        }
    }
    for node in bed.lab.nodes() {
        for lost in [
            "portreeve_queue_drops_total",
            "portreeve_dropped_packets_total",
        ] {
            assert_eq!(metric(&node, lost), 0, "{lost} on {}", node.name());
        }
        for lost in ["rate_limited", "no_daemon", "out_of_state", "spoofed"] {
            assert_eq!(counter(&node, lost), 0, "{lost} on {}", node.name());
        }
    }
    for host in bed.lab.nodes().chain(bed.lab.pods()) {
        assert_eq!(
            listen_drops(&host),
            0,
            "of the listeners of {}",
            host.name()
        );
    }
}

/// Connections that the kernel dropped at a listener of a host (`TcpExt: ListenDrops`).
fn listen_drops(host: &Host) -> u64 {
    let read = || fs::read_to_string("/proc/thread-self/net/netstat").unwrap();
    let text = host.run(read).unwrap();
    let lines: Vec<Vec<&str>> = text
        .lines()
        .filter(|line| line.starts_with("TcpExt:"))
        .map(|line| line.split(' ').collect())
        .collect();
    let at = lines[0].iter().position(|name| *name == "ListenDrops");
    lines[1][at.unwrap()].parse().unwrap()
}
