//! Planned and sudden ends of a daemon, and what remains.
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lab::traffic::bulk;
use lab::{Kind, Netns, wait_until};
use socket2::SockRef;
use testbed::runner::Test;

use crate::streams::ends;
use testbed::{
    DEADLINE, SOON, TestCluster, allow_all, allow_ingress, ask, connected, deny_ingress, echoes,
    greeted, init, network_state, small,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    killed_daemon_keeps_denials_and_non_isolated_pods,
    fail_open_passes_new_connections_without_daemon,
    sigterm_resets_streams_and_exits_in_two_seconds,
    a_killed_daemon_resets_streams_and_completes_none,
    orderly_close_delivers_pending_data,
    uninstall_after_enforcement_restores_the_node_exactly,
    removed_redirect_is_reported_and_reinstalled_one_filled,
];

fn killed_daemon_keeps_denials_and_non_isolated_pods() {
    let mut bed = TestCluster::enforced(&[], &[deny_ingress("b"), allow_ingress("c")]);
    let [a, b, c, d] = ["a", "b", "c", "d"].map(|name| bed.lab.pod(&format!("x/{name}")));
    // No policy names x/a and x/d: their connections pass no proxy.
    let live = [connected(&a, d.addr_v4(80)), connected(&d, a.addr_v6(80))];
    connected(&a, c.addr_v4(80));
    assert_eq!(
        a.connect(b.addr_v4(80), SOON).unwrap().kind(),
        Kind::TimedOut
    );
    bed.kill(0);
    bed.kill(1);
    let denied = [b.addrs(80), bed.lab.service("x/b").addrs(80)].concat();
    // Under policy, though allowed: nobody is there to say so.
    let unjudged = [c.addrs(80), bed.lab.service("x/c").addrs(80)].concat();
    let capture = a.capture().unwrap();
    let all = [denied.clone(), unjudged.clone()].concat();
    for (to, outcome) in all.iter().zip(a.connect_all(&all, SOON).unwrap()) {
        assert_eq!(outcome.kind(), Kind::TimedOut, "{to} without a daemon");
        assert_eq!(capture.syn_acks_from(*to), 0, "{to} without a daemon");
    }
    live.iter()
        .for_each(|stream| echoes(stream, "without a daemon"));
    for to in d.addrs(80) {
        assert_eq!(greeted(&a, to).server, "x/d");
    }
    bed.start(0, &[]);
    bed.start(1, &[]);
    live.iter()
        .for_each(|stream| echoes(stream, "with a new daemon"));
    for outcome in a.connect_all(&unjudged, DEADLINE).unwrap() {
        assert!(outcome.is_connected(), "{outcome}");
    }
    for (to, outcome) in denied.iter().zip(a.connect_all(&denied, SOON).unwrap()) {
        assert_eq!(outcome.kind(), Kind::TimedOut, "{to} with a new daemon");
    }
}

fn fail_open_passes_new_connections_without_daemon() {
    let mut bed = TestCluster::bare(small());
    bed.write_policies(&[deny_ingress("b"), deny_ingress("c")]);
    for node in 0..2 {
        bed.install(node, &["--fail", "open"]);
        bed.start(node, &["--fail", "open"]);
    }
    let a = bed.lab.pod("x/a");
    let targets: Vec<_> = bed.ways(80).into_iter().map(|way| way.to).collect();
    for (to, outcome) in targets.iter().zip(a.connect_all(&targets, SOON).unwrap()) {
        assert_eq!(outcome.kind(), Kind::TimedOut, "{to} while a daemon runs");
    }
    bed.kill(0);
    bed.kill(1);
    for to in &targets {
        echoes(&connected(&a, *to), "without a daemon");
    }
    bed.start(0, &["--fail", "open"]);
    bed.start(1, &["--fail", "open"]);
    for (to, outcome) in targets.iter().zip(a.connect_all(&targets, SOON).unwrap()) {
        assert_eq!(outcome.kind(), Kind::TimedOut, "{to} with a new daemon");
    }
}

fn sigterm_resets_streams_and_exits_in_two_seconds() {
    let mut bed = TestCluster::enforced(&[], &[allow_all()]);
    let (a, c) = (bed.lab.pod("x/a"), bed.lab.pod("x/c"));
    let listener = c.listen(c.addr_v4(82)).unwrap();
    let busy = connected(&a, c.addr_v4(80));
    let client = a
        .connect(c.addr_v4(82), DEADLINE)
        .unwrap()
        .into_stream()
        .unwrap();
    let (server, _) = listener.accept().unwrap();
    // A dial that is still held when the end comes.
    let blackhole = bed.lab.blackhole(80)[0];
    let held = a.connect(blackhole, Duration::from_millis(100)).unwrap();
    assert_eq!(held.kind(), Kind::TimedOut);
    let started = Instant::now();
    let daemon = bed.daemon(0);
    daemon.child.terminate();
    let status = daemon.child.wait(Duration::from_secs(2));
    assert!(
        status.as_ref().is_ok_and(std::process::ExitStatus::success),
        "{status:?}\n{}",
        daemon.log()
    );
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "{:?}",
        started.elapsed()
    );
    for (stream, what) in [
        (&busy, "client"),
        (&client, "idle client"),
        (&server, "server"),
    ] {
        assert_eq!(ended_by(stream), "ConnectionReset", "the {what}");
    }
    // The other node's daemon goes on.
    assert!(bed.daemon(1).child.try_wait().unwrap().is_none());
}

/// How a stream ends: a plain end looks like a complete answer.
fn ended_by(mut stream: &TcpStream) -> String {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    match stream.read(&mut [0; 1]) {
        Ok(count) => format!("{count} bytes"),
        Err(error) => format!("{:?}", error.kind()),
    }
}

/// A truncated stream that ends with a FIN looks complete (RFC 9293, 3.6).
fn a_killed_daemon_resets_streams_and_completes_none() {
    const FLOWING: usize = 1 << 20;
    let mut bed = TestCluster::enforced(&[], &[allow_all()]);
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"));
    let mut pairs = Vec::new();
    for to in b.addrs(82) {
        pairs.extend((0..5).map(|_| ends(&a, &b, to)));
    }
    let received: Vec<_> = pairs.iter().map(|_| AtomicUsize::new(0)).collect();
    thread::scope(|scope| {
        let mut readers = Vec::new();
        for (turn, ((client, server), received)) in pairs.iter().zip(&received).enumerate() {
            let (from, to, what) = match turn % 5 {
                0 => (server, client, "a download"),
                1 => (client, server, "an upload"),
                2 => (
                    server,
                    client,
                    "a download of a client that said its last word",
                ),
                3 => (
                    client,
                    server,
                    "an upload to a server that said its last word",
                ),
                _ => (client, server, "an idle stream"),
            };
            if turn % 5 == 2 || turn % 5 == 3 {
                to.shutdown(Shutdown::Write).unwrap();
                assert_eq!({ from }.read(&mut [0; 1]).unwrap(), 0, "{what}");
            }
            let pours = turn % 5 != 4;
            if pours {
                scope.spawn(move || bulk::send(from, u64::MAX).unwrap_err());
            } else {
                received.store(FLOWING, Ordering::Relaxed);
                readers.push((what, scope.spawn(move || ended_by(from))));
            }
            let reader = scope.spawn(move || {
                let mut buffer = vec![0; 64 << 10];
                loop {
                    match { to }.read(&mut buffer) {
                        Ok(0) => return "a complete stream".to_owned(),
                        Ok(count) => received.fetch_add(count, Ordering::Relaxed),
                        Err(error) => return format!("{:?}", error.kind()),
                    };
                }
            });
            readers.push((what, reader));
        }
        let flow = || {
            received
                .iter()
                .all(|it| it.load(Ordering::Relaxed) >= FLOWING)
        };
        wait_until(DEADLINE, "all to flow", flow).unwrap();
        bed.kill(0);
        for (what, reader) in readers {
            assert_eq!(reader.join().unwrap(), "ConnectionReset", "{what}");
        }
    });
}

fn orderly_close_delivers_pending_data() {
    const TOTAL: u64 = 40 << 10;
    let mut bed = TestCluster::enforced(&[], &[allow_all()]);
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"));
    let mut streams = Vec::new();
    for to in b.addrs(82) {
        let (client, server) = ends(&a, &b, to);
        // So that most of it has to wait in the daemon's socket.
        SockRef::from(&client).set_recv_buffer_size(2048).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!((&server).read(&mut [0; 1]).unwrap(), 0);
        bulk::send(&server, TOTAL).unwrap();
        drop(server);
        streams.push(client);
    }
    // The daemon has closed both sides of each; the waiting bytes are in the kernel and do not need it.
    bed.wait_for_no_connection();
    assert!(waiting_to_be_sent(bed.lab.node(0).netns()) > 0);
    let first = bulk::receive(&streams[0]).unwrap();
    bed.kill(0);
    let second = bulk::receive(&streams[1]).unwrap();
    for seen in [first, second] {
        assert!(seen.is_all_of(TOTAL), "{seen}");
    }
}

/// Bytes in the send queues of a namespace's TCP sockets.
fn waiting_to_be_sent(netns: &Netns) -> u64 {
    let read = |name| fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap();
    let tables = netns.run(|| read("tcp") + &read("tcp6")).unwrap();
    let queues = tables.lines().filter_map(|line| {
        let (sent, _) = line.split_whitespace().nth(4)?.split_once(':')?;
        u64::from_str_radix(sent, 16).ok()
    });
    queues.sum()
}

fn uninstall_after_enforcement_restores_the_node_exactly() {
    // The first use on a machine loads modules, which adds sysctls for good.
    drop(TestCluster::enforced(&[], &[allow_all()]));
    let mut bed = TestCluster::bare(small());
    let nodes = [bed.lab.node(0), bed.lab.node(1)];
    let before = nodes.each_ref().map(|node| network_state(node.netns()));
    bed.write_policies(&[deny_ingress("b"), allow_ingress("c")]);
    bed.enforce(&[]);
    let a = bed.lab.pod("x/a");
    let targets: Vec<_> = bed.ways(80).into_iter().map(|way| way.to).collect();
    let _live = a.connect_all(&targets, SOON).unwrap();
    bed.apply(&[allow_all()]);
    let _more = a.connect_all(&targets, DEADLINE).unwrap();
    for (at, node) in nodes.iter().enumerate() {
        assert_ne!(
            network_state(node.netns()),
            before[at],
            "install did nothing"
        );
        let daemon = bed.daemon(at);
        daemon.child.terminate();
        assert!(daemon.child.wait(DEADLINE).unwrap().success());
        let said = init(node, "uninstall", &[]);
        assert!(said.status.success(), "{said:?}");
        assert_eq!(network_state(node.netns()), before[at], "{}", node.name());
    }
    // And the network is bare again: what was denied is not.
    for to in targets {
        greeted(&a, to);
    }
}

fn removed_redirect_is_reported_and_reinstalled_one_filled() {
    let bed = TestCluster::enforced(&[], &[deny_ingress("b")]);
    let node = bed.lab.node(0);
    let [a, b, d] = ["x/a", "x/b", "x/d"].map(|name| bed.lab.pod(name));
    let sets = |names: &[&str]| {
        let list = names.iter().map(|name| {
            let mut nft = node.command("nft");
            nft.args(["list", "set", "inet", "portreeve", name]);
            String::from_utf8(nft.output().unwrap().stdout).unwrap()
        });
        list.collect::<Vec<_>>()
    };
    let filled = [
        "pods4",
        "egress_non_isolated4",
        "ingress_non_isolated4",
        "pod_links",
    ];
    let before = sets(&filled);
    assert!(
        before.iter().all(|set| set.contains("elements")),
        "{before:?}"
    );
    assert!(init(&node, "uninstall", &[]).status.success());
    let reported = || {
        let answer = ask(&node, "/readyz").unwrap();
        answer.status == 503 && answer.body.contains("iptables-init install")
    };
    wait_until(DEADLINE, "the daemon to say so", reported).unwrap();
    // Let through by nobody.
    let passed = connected(&a, b.addr_v4(80));

    bed.install(0, &[]);
    let ready = || ask(&node, "/readyz").is_some_and(|it| it.status == 200);
    wait_until(DEADLINE, "the daemon to be ready", ready).unwrap();
    wait_until(DEADLINE, "the sets to be filled", || {
        sets(&filled) == before
    })
    .unwrap();
    let outcome = a.connect(b.addr_v4(80), SOON).unwrap();
    assert_eq!(outcome.kind(), Kind::TimedOut);
    greeted(&a, d.addr_v4(80));
    // It is judged at its next packet.
    (&passed).write_all(b"a word").unwrap();
    passed.set_read_timeout(Some(SOON)).unwrap();
    assert!((&passed).read(&mut [0; 8]).is_err());
}
