//! Streams whose receivers do not read: they end no other stream, and stay within their share of memory.
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lab::traffic::bulk::{self, Verifier};
use lab::traffic::connect_all;
use lab::{Dial, Host, wait_until};
use testbed::runner::Test;

use crate::handover::{bed_with, ends_of, flags, record_of};
use crate::streams::ends;
use testbed::{DEADLINE, TestCluster, allow_all, greeted, metric, small};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    a_handover_with_stalled_streams_keeps_the_neighbours,
    unread_bytes_of_a_pod_are_bounded,
    only_the_pods_own_streams_are_reset,
    outside_clients_not_reading_end_no_other_stream,
];

/// Both ends of a stream, of which neither reads, and what each has sent.
struct Stalled {
    ends: [TcpStream; 2],
    sent: [u64; 2],
    /// Whether an end has seen a reset.
    reset: bool,
}

/// Opens this many streams to a free port of `to`.
fn open(from: &Host, to: &Host, at: SocketAddr, count: u16) -> Vec<Stalled> {
    open_by(|_| Dial::new(from, at), to, at, count)
}

/// The same with what each is dialled by.
fn open_by(dial: impl Fn(u16) -> Dial, to: &Host, at: SocketAddr, count: u16) -> Vec<Stalled> {
    let listener = to.listen(at).unwrap();
    let mut servers: Vec<Option<TcpStream>> = (0..count).map(|_| None).collect();
    let mut clients = Vec::new();
    let numbers: Vec<_> = (0..count).collect();
    for numbers in numbers.chunks(100) {
        let dials: Vec<_> = numbers.iter().map(|number| dial(*number)).collect();
        for (number, outcome) in numbers.iter().zip(connect_all(&dials, DEADLINE).unwrap()) {
            let mut client = outcome.into_stream().unwrap();
            client.write_all(&number.to_be_bytes()).unwrap();
            clients.push(client);
        }
        for _ in numbers {
            let mut server = listener.accept().unwrap().0;
            let mut number = [0; 2];
            server.read_exact(&mut number).unwrap();
            servers[usize::from(u16::from_be_bytes(number))] = Some(server);
        }
    }
    let pairs = clients.into_iter().zip(servers.into_iter().flatten());
    pairs
        .map(|(client, server)| Stalled {
            ends: [client, server],
            sent: [0; 2],
            reset: false,
        })
        .collect()
}

/// Makes new sockets of a namespace have small receive buffers.
fn small_buffers(host: &Host, received: usize) {
    let set = |name: &str, most: usize| {
        let path = format!("/proc/sys/net/ipv4/{name}");
        fs::write(path, format!("4096 {most} {most}")).unwrap();
    };
    host.run(|| {
        set("tcp_rmem", received);
        set("tcp_wmem", 32 << 10);
    })
    .unwrap();
}

/// Sends and reads the first bytes of a stream from its client, enough for the relay to treat it as bulk.
fn flow(Stalled { ends, .. }: &Stalled) {
    const BULK: usize = 512 << 10;
    let [client, server] = ends;
    thread::scope(|scope| {
        scope.spawn(|| bulk::send(client, BULK as u64).unwrap());
        server.set_read_timeout(Some(DEADLINE)).unwrap();
        { server }.read_exact(&mut vec![0; BULK]).unwrap();
    });
}

/// Sends on all streams until the network accepts no more for a while, at most this much from each end.
fn fill(streams: &mut [Stalled], most: u64) {
    const SETTLED: Duration = Duration::from_millis(100);
    let mut chunk = vec![0; 64 << 10];
    for end in streams.iter().flat_map(|it| &it.ends) {
        end.set_nonblocking(true).unwrap();
    }
    let mut last = Instant::now();
    while last.elapsed() < SETTLED {
        let mut moved = false;
        for Stalled { ends, sent, reset } in &mut *streams {
            for (mut end, sent) in ends.iter().zip(sent) {
                let room = chunk.len().min(usize::try_from(most - *sent).unwrap());
                bulk::fill(*sent, &mut chunk[..room]);
                match end.write(&chunk[..room]) {
                    Ok(count) => {
                        *sent += count as u64;
                        moved |= count > 0;
                    }
                    Err(error) => *reset |= error.kind() != ErrorKind::WouldBlock,
                }
            }
        }
        match moved {
            true => last = Instant::now(),
            false => thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Reads all that was sent on a stream, both ways; false if it was reset.
fn is_whole(stream: &Stalled) -> bool {
    if stream.reset {
        return false;
    }
    let [client, server] = &stream.ends;
    for (mut from, sent) in [(server, stream.sent[0]), (client, stream.sent[1])] {
        from.set_nonblocking(false).unwrap();
        from.set_read_timeout(Some(DEADLINE)).unwrap();
        let (mut seen, mut buffer) = (Verifier::default(), vec![0; 64 << 10]);
        while seen.count() < sent {
            match from.read(&mut buffer) {
                Ok(0) => panic!("a complete stream after {seen} of {sent}"),
                Ok(count) => seen.take(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return false,
                Err(error) => panic!("{error} after {seen} of {sent}"),
            }
        }
        assert!(seen.is_all_of(sent), "{seen} of {sent}");
    }
    // A reset can follow the last byte.
    let is_open = |mut end: &TcpStream| {
        end.set_nonblocking(true).unwrap();
        matches!(end.read(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock)
    };
    is_open(client) && is_open(server)
}

fn a_handover_with_stalled_streams_keeps_the_neighbours() {
    const STALLED: u16 = 5000;
    const PIPED: u16 = 200;
    let (mut bed, _) = bed_with(&["--max-unread", "4096"]);
    let [a, b, d] = ["x/a", "x/b", "x/d"].map(|name| bed.lab.pod(name));
    let neighbours: Vec<_> = (0..20)
        .map(|turn| ends(&a, &b, b.addrs(82)[turn % 2]))
        .collect();
    // The bytes in flight are in the daemon's pipes, not in sockets.
    small_buffers(&bed.lab.node(0), 256 << 10);
    // Buffers of pods count against the memory of all TCP sockets of the machine, beyond which the kernel drops segments.
    let set_buffers = |most| {
        [&a, &b, &d]
            .into_iter()
            .for_each(|pod| small_buffers(pod, most));
    };
    set_buffers(8 << 10);
    let [v4, v6] = b.addrs(83);
    // Of two pods: the descriptors of a small machine do not allow one of them that many.
    let by = |number| Dial::new([&a, &d][usize::from(number % 2)], v4);
    let mut stalled = open_by(by, &b, v4, STALLED - PIPED);
    fill(&mut stalled, 64 << 10);
    set_buffers(256 << 10);
    let mut piped = open(&d, &b, v6, PIPED);
    piped.iter().for_each(flow);
    fill(&mut piped, 2 << 20);
    let talk = |word: &[u8; 8]| {
        for (client, server) in &neighbours {
            for (mut from, mut to) in [(client, server), (server, client)] {
                let mut heard = [0; 8];
                from.write_all(word).unwrap();
                to.read_exact(&mut heard).unwrap();
                assert_eq!(&heard, word);
            }
        }
    };
    talk(b"before  ");
    let mut flags = flags(&bed).to_vec();
    flags.extend(["--max-unread", "4096"].map(str::to_owned));
    let peak = bed.daemon(0).peak_memory();
    let began = Instant::now();
    let flags: Vec<_> = flags.iter().map(String::as_str).collect();
    let old = bed.relieve(0, &flags);
    println!("relieved within {:?}", began.elapsed());
    talk(b"after   ");
    greeted(&a, b.addr_v4(80));
    // The bytes in pipes stay there.
    let grown = old.peak_memory() - peak;
    assert!(grown < 16 << 20, "{grown} bytes more");
    let log = old.log();
    println!(
        "{}",
        log.lines()
            .find(|line| line.contains("standing by"))
            .unwrap_or_default()
    );
    assert!(log.contains("standing by"), "{log}");
    assert!(!log.contains("in_flight=0"), "{log}");
    let node = bed.lab.node(0);
    println!(
        "{} live",
        metric(&node, "portreeve_connections{stage=\"live\"}")
    );
    // The bytes in flight arrive.
    let whole = stalled
        .iter()
        .chain(&piped)
        .filter(|it| is_whole(it))
        .count();
    println!("{whole} of {STALLED} stalled streams are whole");
    assert_eq!(whole, usize::from(STALLED));
}

/// Memory of the TCP sockets of a node's namespace, received and to be sent.
fn socket_memory(node: &Host) -> usize {
    let mut ss = node.command("ss");
    ss.args(["-tnmH"]);
    let said = ss.output().unwrap();
    assert!(said.status.success(), "{said:?}");
    let text = String::from_utf8(said.stdout).unwrap();
    let numbers = text.split(['(', ',', ')']).filter_map(|part| {
        // r: received; w: queued to be sent. Others have two letters.
        let number = part.strip_prefix('r').or_else(|| part.strip_prefix('w'))?;
        number.parse::<usize>().ok()
    });
    numbers.sum()
}

/// How long so many bytes take from one host to another.
fn transfer(from: &Host, to: &Host, at: SocketAddr) -> Duration {
    const TOTAL: u64 = 64 << 20;
    let (client, server) = ends(from, to, at);
    let began = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            bulk::send(&client, TOTAL).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
        });
        assert!(bulk::receive(&server).unwrap().is_all_of(TOTAL));
    });
    began.elapsed()
}

fn unread_bytes_of_a_pod_are_bounded() {
    const STREAMS: u16 = 100;
    const BOUND: usize = 128 << 20;
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let [a, b, d] = ["x/a", "x/b", "x/d"].map(|name| bed.lab.pod(name));
    let node = bed.lab.node(0);
    let alone = transfer(&a, &b, b.addr_v4(82));
    let mut streams = open(&d, &b, b.addr_v4(83), STREAMS);
    let (filled, mut peak) = (AtomicBool::new(false), 0);
    thread::scope(|scope| {
        scope.spawn(|| {
            fill(&mut streams, 2 << 20);
            filled.store(true, Ordering::Relaxed);
        });
        while !filled.load(Ordering::Relaxed) {
            peak = peak.max(socket_memory(&node));
        }
    });
    let beside = transfer(&a, &b, b.addr_v4(84));
    let ratio = beside.as_secs_f64() / alone.as_secs_f64();
    let after = socket_memory(&node);
    println!(
        "{} MiB at most, {} then, neighbour {ratio:.2} times as long",
        peak >> 20,
        after >> 20
    );
    // It grows for a moment before it is measured.
    assert!(peak < BOUND + BOUND / 4, "{peak} bytes");
    assert!(after < BOUND, "{after} bytes");
    assert_eq!(metric(&node, "portreeve_unread_resets_total"), 0);
    assert!(metric(&node, "portreeve_unread_bytes") > 1 << 20);
    let sent: u64 = streams.iter().flat_map(|it| it.sent).sum();
    assert!(sent > BOUND as u64, "only {sent} bytes were sent");
    let whole = streams.iter().filter(|it| is_whole(it)).count();
    assert_eq!(whole, usize::from(STREAMS));
}

fn only_the_pods_own_streams_are_reset() {
    const STREAMS: u16 = 60;
    const BOUND: usize = 8 << 20;
    let (mut bed, records) = bed_with(&["--max-unread", "16"]);
    let [a, b, d] = ["x/a", "x/b", "x/d"].map(|name| bed.lab.pod(name));
    let node = bed.lab.node(0);
    let neighbour = ends(&a, &b, b.addr_v6(82));
    let mut streams = open(&d, &b, b.addr_v4(83), STREAMS);
    let ends: Vec<_> = streams.iter().map(|it| ends_of(&it.ends[0])).collect();
    fill(&mut streams, 1 << 20);
    let within =
        || (metric(&node, "portreeve_unread_resets_total") > 0) && socket_memory(&node) < BOUND;
    wait_until(DEADLINE, "the bound to hold", within).unwrap();
    bed.daemon(0).says("more unread bytes than its share");
    (&neighbour.0).write_all(b"word").unwrap();
    (&neighbour.1).read_exact(&mut [0; 4]).unwrap();
    greeted(&a, b.addr_v4(80));
    let reset: Vec<_> = streams.iter().map(|it| !is_whole(it)).collect();
    let at = reset.iter().position(|reset| *reset).unwrap();
    let record = record_of(&records, &ends[at]);
    let reason = record["reason"].as_str().unwrap();
    assert!(
        reason.contains("more unread bytes than its share"),
        "{record}"
    );
    assert_eq!(record["verdict"], "allow", "{record}");
    let count = reset.iter().filter(|reset| **reset).count();
    println!("{count} of {STREAMS} were reset");
    assert_eq!(metric(&node, "portreeve_unread_resets_total"), count as u64);
}

/// From a network each (RFC 3849), with less each than the neighbour.
fn outside_clients_not_reading_end_no_other_stream() {
    const STRANGERS: u16 = 100;
    let mut bed = TestCluster::bare(small());
    bed.set_env("PORTREEVE_TCP", "spliced");
    bed.write_policies(&[allow_all()]);
    bed.enforce(&["--max-unread", "16"]);
    let [a, b, d] = ["x/a", "x/b", "x/d"].map(|name| bed.lab.pod(name));
    let (outside, node) = (bed.lab.outside(), bed.lab.node(0));
    let stranger = |number: u16| Ipv6Addr::new(0x2001, 0xdb8, 0xbad, number, 0, 0, 0, 1);
    let own: String = (0..STRANGERS)
        .map(|number| format!("addr add {}/128 dev lo nodad\n", stranger(number)))
        .collect();
    outside.ip(&own).unwrap();
    let mut route = bed.lab.fabric().command("ip");
    let via = outside.ipv6().to_string();
    route.args(["-6", "route", "add", "2001:db8:bad::/48", "via", &via]);
    assert!(route.output().unwrap().status.success());
    let mut neighbour = open(&a, &b, b.addr_v4(83), 1);
    fill(&mut neighbour, 1 << 20);
    let at = d.addr_v6(83);
    let dial = |number| Dial::new(&outside, at).source(stranger(number).into());
    let mut strangers = open_by(dial, &d, at, STRANGERS);
    fill(&mut strangers, 1 << 20);
    let resets = || metric(&node, "portreeve_unread_resets_total");
    wait_until(DEADLINE, "the bound to be met", || resets() > 0).unwrap();
    fill(&mut neighbour, 1 << 20);
    assert!(is_whole(&neighbour[0]), "{} were reset", resets());
}
