//! Which connections go through the proxy (`--tcp`), and what the kernel forwards otherwise.
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use lab::traffic::{Dial, greeting};
use lab::{Host, Kind, wait_for, wait_until};
use serde_json::{Value, json};
use testbed::runner::Test;

use testbed::{
    DEADLINE, SOON, TestCluster, allow_all, connected, deny_ingress, echoes, init, metric, small,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    outside_connection_keeps_its_source_port,
    forward_rule_of_the_host_stops_allowed_connections,
    client_port_below_1024_is_kept,
    proxied_server_sees_the_clients_mss_and_dscp,
    severing_resets_both_ends_of_kernel_connection,
    kernel_connections_survive_killed_daemon_and_stay_known,
    handover_works_within_kernel_mode,
    handover_from_spliced_to_auto_keeps_streams,
    closed_kernel_connection_is_recorded_at_once,
    refused_kernel_connection_is_recorded_at_once,
    reset_connection_gives_later_syns_no_rights,
    closed_connection_gives_later_syns_no_rights,
    uninstall_without_routes_is_not_repaired,
    daemon_refuses_rules_of_another_mode,
];

fn cluster(mode: &str) -> TestCluster {
    let mut bed = TestCluster::bare(small());
    bed.set_env("PORTREEVE_TCP", mode);
    bed
}

/// Connects from a port of the client's and returns the port that the server sees.
fn port_seen(client: &Host, from: u16, to: SocketAddr) -> u16 {
    let dial = Dial::new(client, to).source_port(from);
    let stream = dial.connect(DEADLINE).unwrap().into_stream().unwrap();
    greeting(&stream, DEADLINE).unwrap().client.port()
}

fn outside_connection_keeps_its_source_port() {
    let mut bed = cluster("auto");
    bed.lab.outside().serve(&[80]).unwrap();
    bed.write_policies(&[allow_all()]);
    bed.enforce(&[]);
    let (a, outside) = (bed.lab.pod("x/a"), bed.lab.outside());
    for to in outside.addrs(80) {
        assert_eq!(port_seen(&a, 41_001, to), 41_001, "{to}");
    }
    for server in ["x/b", "x/c"] {
        for to in bed.lab.pod(server).addrs(80) {
            assert_eq!(port_seen(&outside, 41_002, to), 41_002, "{to}");
            assert_ne!(port_seen(&a, 41_003, to), 41_003, "{to}: through the proxy");
        }
    }
}

/// Such as one that keeps pods from the node's cloud credentials.
fn forward_rule_of_the_host_stops_allowed_connections() {
    let mut bed = cluster("auto");
    let (a, node, outside) = (bed.lab.pod("x/a"), bed.lab.node(0), bed.lab.outside());
    outside.serve(&[80]).unwrap();
    bed.write_policies(&[allow_all()]);
    bed.enforce(&[]);
    for to in outside.addrs(80) {
        connected(&a, to);
    }
    node.nft("table inet host { chain forward { type filter hook forward priority 0; tcp dport 80 drop; }; }")
        .unwrap();
    for to in outside.addrs(80) {
        assert_eq!(a.connect(to, SOON).unwrap().kind(), Kind::TimedOut, "{to}");
    }
}

fn client_port_below_1024_is_kept() {
    let mut bed = cluster("auto");
    bed.write_policies(&[allow_all()]);
    bed.enforce(&[]);
    for to in bed.lab.pod("x/c").addrs(80) {
        assert_eq!(port_seen(&bed.lab.pod("x/a"), 1001, to), 1001, "{to}");
    }
}

fn proxied_server_sees_the_clients_mss_and_dscp() {
    const CLASS: u32 = 46;
    let mut bed = cluster("spliced");
    bed.write_policies(&[allow_all()]);
    bed.enforce(&[]);
    let a = bed.lab.pod("x/a");
    for name in ["x/b", "x/c"] {
        let server = bed.lab.pod(name);
        server
            .nft("table inet seen { counter v4 { }; counter v6 { }; chain in { type filter hook input priority 0; \
                  ip dscp 46 tcp flags syn counter name v4; ip6 dscp 46 tcp flags syn counter name v6; }; }")
            .unwrap();
        for (to, counter) in server.addrs(90).into_iter().zip(["v4", "v6"]) {
            let listener = server.listen(to).unwrap();
            let client = a.tcp_socket(to.ip()).unwrap();
            client.set_tcp_mss(700).unwrap();
            match to {
                SocketAddr::V4(_) => client.set_tos_v4(CLASS << 2).unwrap(),
                SocketAddr::V6(_) => client.set_tclass_v6(CLASS << 2).unwrap(),
            }
            client.connect_timeout(&to.into(), DEADLINE).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            // Timestamps take 12 bytes of each segment.
            let mss = socket2::SockRef::from(&accepted).tcp_mss().unwrap();
            assert!((600..=700).contains(&mss), "{to}: {mss}");
            let mut nft = server.command("nft");
            nft.args(["list", "counter", "inet", "seen", counter]);
            let listed = String::from_utf8(nft.output().unwrap().stdout).unwrap();
            assert!(listed.contains("packets 1 "), "{to}: {listed}");
        }
    }
}

/// The reset of an end that sends; the other has not sent since it was severed.
fn reset_at_next_packet(mut stream: &TcpStream) -> ErrorKind {
    stream.set_read_timeout(Some(SOON)).unwrap();
    let said = stream.write_all(b"still?");
    let said = said.and_then(|()| stream.read(&mut [0; 16]));
    said.expect_err("it was severed").kind()
}

fn severing_resets_both_ends_of_kernel_connection() {
    let mut bed = cluster("kernel");
    bed.write_policies(&[allow_all()]);
    bed.enforce(&[]);
    let a = bed.lab.pod("x/a");
    for name in ["b", "c"] {
        let server = bed.lab.pod(&format!("x/{name}"));
        for to in server.addrs(90) {
            let listener = server.listen(to).unwrap();
            let client = a.connect(to, DEADLINE).unwrap().into_stream().unwrap();
            let (accepted, _) = listener.accept().unwrap();
            bed.apply(&[deny_ingress(name)]);
            let began = Instant::now();
            for end in [&client, &accepted] {
                let kind = reset_at_next_packet(end);
                assert_eq!(kind, ErrorKind::ConnectionReset, "{to}");
            }
            assert!(began.elapsed() < SOON, "{to}: {:?}", began.elapsed());
            bed.apply(&[allow_all()]);
        }
    }
}

fn kernel_connections_survive_killed_daemon_and_stay_known() {
    let mut bed = cluster("kernel");
    bed.write_policies(&[allow_all()]);
    bed.enforce(&[]);
    let (a, node) = (bed.lab.pod("x/a"), bed.lab.node(0));
    let to: Vec<_> = ["x/b", "x/c"]
        .map(|name| bed.lab.pod(name).addrs(80))
        .concat();
    let streams: Vec<_> = to.iter().map(|to| connected(&a, *to)).collect();
    bed.kill(0);
    for stream in &streams {
        echoes(stream, "without a daemon");
    }
    assert_eq!(a.connect(to[0], SOON).unwrap().kind(), Kind::TimedOut);
    bed.start(0, &[]);
    for stream in &streams {
        echoes(stream, "with the next one");
    }
    let known = || metric(&node, "portreeve_kernel_flows") >= streams.len() as u64;
    wait_until(DEADLINE, "the next daemon to list them", known).unwrap();
    bed.apply(&[deny_ingress("b"), deny_ingress("c")]);
    for stream in &streams {
        assert_eq!(reset_at_next_packet(stream), ErrorKind::ConnectionReset);
    }
}

/// Relieves the daemon of node 0 in a cluster whose mode changes from one to another; no stream ends.
fn handover_keeps_streams(from: &str, to: &str) {
    let mut bed = cluster(from);
    let socket = bed.file("handover.sock");
    let flags = ["--handover", socket.to_str().unwrap()];
    bed.write_policies(&[allow_all()]);
    bed.install(0, &[]);
    bed.start(0, &flags);
    let a = bed.lab.pod("x/a");
    let ways = bed.lab.pod("x/b").addrs(80);
    let streams = ways.map(|to| connected(&a, to));
    bed.set_env("PORTREEVE_TCP", to);
    bed.install(0, &[]);
    let _relieved = bed.relieve(0, &flags);
    for stream in &streams {
        echoes(stream, "after the handover");
    }
    for to in ways {
        echoes(&connected(&a, to), "a new one");
    }
}

fn handover_works_within_kernel_mode() {
    handover_keeps_streams("kernel", "kernel");
}

fn handover_from_spliced_to_auto_keeps_streams() {
    handover_keeps_streams("spliced", "auto");
}

fn closed_kernel_connection_is_recorded_at_once() {
    let records = tempfile::NamedTempFile::new().unwrap();
    let mut bed = cluster("kernel");
    bed.write_policies(&[allow_all()]);
    bed.enforce(&["--trace-file", records.path().to_str().unwrap()]);
    let (a, to) = (bed.lab.pod("x/a"), bed.lab.pod("x/b").addr_v4(80));
    for turn in 0..3_u64 {
        // Each time from the same port: an earlier entry of conntrack still waits for its timeout.
        let stream = a
            .connect_from(42_000, to, DEADLINE)
            .unwrap()
            .into_stream()
            .unwrap();
        greeting(&stream, DEADLINE).unwrap();
        echoes(&stream, &"x".repeat(1000));
        let port = end_by_reset(&stream);
        drop(stream);
        let found = wait_for(DEADLINE, "a record of it", || {
            let text = fs::read_to_string(records.path()).unwrap();
            let all = text
                .lines()
                .filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let of_it = all.filter(|it| it["path"] == "kernel" && it["source.port"] == json!(port));
            let of_it: Vec<_> = of_it.collect();
            (of_it.len() as u64 > turn).then_some(of_it)
        });
        let found = found.unwrap();
        assert_eq!(found.len() as u64, turn + 1, "one record each");
        let last = found.last().unwrap();
        assert_eq!(last["verdict"], "allow");
        assert!(last["bytes.sent"].as_u64().unwrap() > 1000, "{last}");
        assert!(last["bytes.received"].as_u64().unwrap() > 1000, "{last}");
    }
}

fn refused_kernel_connection_is_recorded_at_once() {
    let records = tempfile::NamedTempFile::new().unwrap();
    let mut bed = cluster("kernel");
    bed.write_policies(&[allow_all()]);
    bed.enforce(&["--trace-file", records.path().to_str().unwrap()]);
    let (a, to) = (bed.lab.pod("x/a"), bed.lab.pod("x/b").addr_v4(93));
    let refused = a.connect(to, SOON).unwrap();
    assert_eq!(refused.kind(), Kind::Refused);
    let record = wait_for(DEADLINE, "a record of it", || {
        let text = fs::read_to_string(records.path()).unwrap();
        let mut all = text
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        all.find(|it| it["destination.port"] == 93)
    })
    .unwrap();
    let reason = record["reason"].as_str().unwrap();
    assert!(
        reason.contains("Not connected: the server refused it"),
        "{record}"
    );
}

/// Makes the end of a stream a reset, so that its port is free at once. Returns the port.
fn end_by_reset(stream: &TcpStream) -> u16 {
    let socket = socket2::SockRef::from(stream);
    socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
    stream.local_addr().unwrap().port()
}

/// Connects from one port, has the server end each connection, denies, and connects from the same port: conntrack still
/// has the entries.
fn later_syns_have_no_rights(end: impl Fn(&TcpStream)) {
    let mut bed = cluster("kernel");
    bed.write_policies(&[allow_all()]);
    bed.enforce(&[]);
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"));
    let listeners = b.addrs(92).map(|to| (to, b.listen(to).unwrap()));
    for (to, listener) in &listeners {
        let client = a.connect_from(42_100, *to, DEADLINE).unwrap();
        let mut client = client.into_stream().unwrap();
        let (accepted, _) = listener.accept().unwrap();
        end(&accepted);
        drop(accepted);
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        // The end of the stream, or a reset.
        let heard = client.read(&mut [0; 1]).map_err(|error| error.kind());
        assert!(
            matches!(heard, Ok(0) | Err(ErrorKind::ConnectionReset)),
            "{to}: {heard:?}"
        );
    }
    bed.apply(&[deny_ingress("b")]);
    for (to, _listener) in &listeners {
        let outcome = a.connect_from(42_100, *to, SOON).unwrap();
        assert_eq!(outcome.kind(), Kind::TimedOut, "{to}");
    }
}

/// Conntrack lets a SYN with the same ports pass as part of such a connection for ten seconds.
fn reset_connection_gives_later_syns_no_rights() {
    later_syns_have_no_rights(|accepted| {
        end_by_reset(accepted);
    });
}

fn closed_connection_gives_later_syns_no_rights() {
    later_syns_have_no_rights(|_| ());
}

fn uninstall_without_routes_is_not_repaired() {
    let mut bed = cluster("kernel");
    bed.write_policies(&[deny_ingress("b")]);
    bed.enforce(&[]);
    let (a, node) = (bed.lab.pod("x/a"), bed.lab.node(0));
    let to = bed.lab.pod("x/b").addr_v4(80);
    assert_eq!(a.connect(to, SOON).unwrap().kind(), Kind::TimedOut);
    // What vanishes otherwise is repaired.
    node.nft("flush ruleset").unwrap();
    let repaired = || a.connect(to, SOON).unwrap().kind() == Kind::TimedOut;
    wait_until(DEADLINE, "the tables to be back", || {
        testbed::ask(&node, "/readyz").is_some_and(|it| it.status == 200) && repaired()
    })
    .unwrap();
    assert!(init(&node, "uninstall", &[]).status.success());
    let gone = || testbed::ask(&node, "/readyz").unwrap().status != 200;
    wait_until(DEADLINE, "the daemon to see it", gone).unwrap();
    assert!(a.connect(to, DEADLINE).unwrap().is_connected());
}

fn daemon_refuses_rules_of_another_mode() {
    let bed = cluster("spliced");
    bed.install(0, &[]);
    let command = bed.run_command(0, &["--tcp", "kernel"]);
    let said = command.output().unwrap();
    assert!(!said.status.success());
    let text = String::from_utf8_lossy(&said.stderr);
    assert!(text.contains("other flags"), "{text}");
}
