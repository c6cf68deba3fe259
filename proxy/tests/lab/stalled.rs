//! Streams whose receivers do not read: they end no other stream, and take what they may and no more.
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use lab::Host;
use lab::runner::Test;
use lab::traffic::bulk::{self, Verifier};

use crate::handover::{bed, flags};
use crate::streams::ends;
use crate::support::{DEADLINE, greeted, metric};

pub(crate) const TESTS: &[Test] =
    &lab::tests![a_handover_with_stalled_streams_keeps_the_neighbours];

/// Both ends of a stream, of which neither reads, and what each has sent.
struct Stalled {
    ends: [TcpStream; 2],
    sent: [u64; 2],
}

/// Opens so many streams, to a port of `to` at which nobody listens.
fn open(from: &Host, to: &Host, at: SocketAddr, count: u16) -> Vec<Stalled> {
    let listener = to.listen(at).unwrap();
    let mut servers: Vec<Option<TcpStream>> = (0..count).map(|_| None).collect();
    let mut clients = Vec::new();
    let numbers: Vec<_> = (0..count).collect();
    for numbers in numbers.chunks(100) {
        let targets = vec![at; numbers.len()];
        for (number, outcome) in numbers
            .iter()
            .zip(from.connect_all(&targets, DEADLINE).unwrap())
        {
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
        })
        .collect()
}

/// Has sockets of a namespace take in little from now on.
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

/// Has the first bytes of a stream from its client read, so many that the relay takes it for bulk.
fn flow(Stalled { ends, sent }: &mut Stalled) {
    const BULK: u64 = 512 << 10;
    let [client, server] = &*ends;
    thread::scope(|scope| {
        scope.spawn(|| bulk::send(client, BULK).unwrap());
        server.set_read_timeout(Some(DEADLINE)).unwrap();
        { server }.read_exact(&mut vec![0; BULK as usize]).unwrap();
    });
    sent[0] = 0;
}

/// Has all send until the network takes no more for a while, each end at most so much.
fn fill(streams: &mut [Stalled], most: u64) {
    const SETTLED: Duration = Duration::from_millis(100);
    let mut chunk = vec![0; 64 << 10];
    for end in streams.iter().flat_map(|it| &it.ends) {
        end.set_nonblocking(true).unwrap();
    }
    let mut last = Instant::now();
    while last.elapsed() < SETTLED {
        let mut moved = false;
        for Stalled { ends, sent } in &mut *streams {
            for (mut end, sent) in ends.iter().zip(sent) {
                let room = chunk.len().min(usize::try_from(most - *sent).unwrap());
                bulk::fill(*sent, &mut chunk[..room]);
                match end.write(&chunk[..room]) {
                    Ok(count) => {
                        *sent += count as u64;
                        moved |= count > 0;
                    }
                    // A stream that was reset takes nothing any more.
                    Err(_) => {}
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
    true
}

fn a_handover_with_stalled_streams_keeps_the_neighbours() {
    const STALLED: u16 = 800;
    const PIPED: u16 = 200;
    let (mut bed, _) = bed();
    let [a, b, d] = ["x/a", "x/b", "x/d"].map(|name| bed.lab.pod(name));
    let neighbours: Vec<_> = (0..20)
        .map(|turn| ends(&a, &b, b.addrs(82)[turn % 2]))
        .collect();
    // What is on its way is with the daemon, in pipes, and not in sockets.
    small_buffers(&bed.lab.node(0), 256 << 10);
    let [v4, v6] = b.addrs(83);
    let mut stalled = open(&d, &b, v4, STALLED - PIPED);
    fill(&mut stalled, 192 << 10);
    let mut piped = open(&d, &b, v6, PIPED);
    piped.iter_mut().for_each(flow);
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
    let flags = flags(&bed);
    let began = Instant::now();
    let old = bed.relieve(0, &flags.each_ref().map(String::as_str));
    println!("relieved within {:?}", began.elapsed());
    talk(b"after   ");
    greeted(&a, b.addr_v4(80));
    let log = old.log();
    println!(
        "{}",
        log.lines()
            .find(|line| line.contains("this daemon rests"))
            .unwrap_or_default()
    );
    assert!(log.contains("this daemon rests"), "{log}");
    assert!(!log.contains("in_flight=0"), "{log}");
    let node = bed.lab.node(0);
    println!(
        "{} live",
        metric(&node, "portreeve_connections{stage=\"live\"}")
    );
    // What was on its way arrives.
    let whole = stalled
        .iter()
        .chain(&piped)
        .filter(|it| is_whole(it))
        .count();
    println!("{whole} of {STALLED} stalled streams are whole");
    assert_eq!(whole, usize::from(STALLED));
}
