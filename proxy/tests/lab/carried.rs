//! All but new TCP connections: decided at the first packet, then forwarded by the kernel.
pub(crate) mod records;

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use lab::traffic::{Greeting, UdpOutcome, introduce};
use lab::{Cluster, Host, PodSpec, ServiceSpec, wait_until};
use nix::errno::Errno;
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};
use testbed::runner::Test;

use testbed::{
    self, DEADLINE, SOON, TestCluster, allow_ingress, connected, deny_egress, deny_ingress, echoes,
    metric, policy, small,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    udp_is_judged_both_ways_on_both_nodes,
    reject_answers_a_denied_datagram_immediately,
    policy_change_severs_only_the_denied_udp_flow,
    sending_server_cannot_keep_denied_udp_flow_open,
    stream_older_than_policy_survives_only_if_allowed,
    a_ping_needs_a_rule_without_ports,
    parallel_dns_queries_through_service_are_both_answered,
];

/// Pairs of questions, each from a socket of its own.
const PAIRS: usize = 2000;
/// How many wait for replies at a time, where the two may go to two pods. Then the kernel forgets one after a
/// second (nf_conntrack_core.c), so its reply must not queue behind too many others on a busy machine.
const AT_ONCE: usize = 250;
const ASK: Duration = Duration::from_millis(500);

/// Lets UDP 53 and 54 come to one pod.
fn dns_to(pod: &str) -> Value {
    let ports = json!([{ "port": 53, "protocol": "UDP" }, { "port": 54, "protocol": "UDP" }]);
    let spec = json!({ "podSelector": { "matchLabels": { "pod": pod } }, "policyTypes": ["Ingress"], "ingress": [{ "ports": ports }] });
    policy(&format!("dns-to-{pod}"), &spec)
}

/// Lets one pod go out to UDP 53 and 54 only.
fn dns_from(pod: &str) -> Value {
    let ports = json!([{ "port": 53, "protocol": "UDP" }, { "port": 54, "protocol": "UDP" }]);
    let spec = json!({ "podSelector": { "matchLabels": { "pod": pod } }, "policyTypes": ["Egress"], "egress": [{ "ports": ports }] });
    policy(&format!("dns-from-{pod}"), &spec)
}

/// The small cluster, whose pods answer datagrams on 53 and 55, and not on 54.
fn bed(flags: &[&str], policies: &[Value]) -> TestCluster {
    let mut bed = TestCluster::bare(small());
    for pod in bed.lab.pods() {
        pod.serve_udp(&[53, 55]).unwrap();
    }
    bed.write_policies(policies);
    bed.enforce(flags);
    bed
}

#[track_caller]
fn ask(from: &Host, to: SocketAddr) -> UdpOutcome {
    from.ask_udp(to, b"who?", ASK).unwrap()
}

fn is_answer(outcome: &UdpOutcome) -> bool {
    matches!(outcome, UdpOutcome::Answered { .. })
}

fn udp_is_judged_both_ways_on_both_nodes() {
    let by_egress = vec![dns_from("a")];
    let by_ingress = vec![dns_to("b"), dns_to("c")];
    let by_both = [by_egress.clone(), by_ingress.clone()].concat();
    let bed = bed(&[], &[]);
    let a = bed.lab.pod("x/a");
    for policies in [by_egress, by_ingress, by_both] {
        bed.apply(&policies);
        for server in ["x/b", "x/c"] {
            let server = bed.lab.pod(server);
            for to in server.addrs(53) {
                assert!(is_answer(&ask(&a, to)), "allowed: {to} under {policies:?}");
            }
            for to in server.addrs(54) {
                assert_eq!(
                    ask(&a, to),
                    UdpOutcome::Refused,
                    "nobody listens: {to} under {policies:?}"
                );
            }
            for to in server.addrs(55) {
                assert_eq!(
                    ask(&a, to),
                    UdpOutcome::TimedOut,
                    "denied: {to} under {policies:?}"
                );
            }
        }
    }
    assert!(
        metric(
            &bed.lab.node(0),
            r#"portreeve_policy_verdicts_total{verdict="deny",direction="egress",path="kernel"}"#
        ) > 0
    );
}

fn reject_answers_a_denied_datagram_immediately() {
    let bed = bed(&["--deny", "reject"], &[dns_to("b"), dns_to("c")]);
    let a = bed.lab.pod("x/a");
    for server in ["x/b", "x/c"] {
        let [v4, v6] = bed.lab.pod(server).addrs(55);
        // icmp(7) and RFC 4443: what "administratively prohibited" is to a socket.
        assert_eq!(
            ask(&a, v4),
            UdpOutcome::Unreachable(Errno::EHOSTUNREACH),
            "{v4}"
        );
        assert_eq!(ask(&a, v6), UdpOutcome::Unreachable(Errno::EACCES), "{v6}");
    }
}

fn policy_change_severs_only_the_denied_udp_flow() {
    let bed = bed(&[], &[dns_to("b"), dns_to("c")]);
    let a = bed.lab.pod("x/a");
    for (before, after) in [
        (
            vec![dns_to("b"), dns_to("c")],
            vec![dns_to("b"), deny_ingress("c")],
        ),
        // Until then no policy concerns c: its flows are not even looked at.
        (vec![dns_to("b")], vec![dns_to("b"), deny_ingress("c")]),
    ] {
        bed.apply(&before);
        let flows = |server: &str| bed.lab.pod(server).addrs(53).map(|to| flow(&a, to));
        let (spared, doomed) = (flows("x/b"), flows("x/c"));
        assert!(
            spared.iter().chain(&doomed).all(goes_on),
            "all allowed at first"
        );
        let changed = Instant::now();
        bed.write_policies(&after);
        wait_until(DEADLINE, "the denied flows to stop", || {
            !doomed.iter().any(goes_on)
        })
        .unwrap();
        let took = changed.elapsed();
        assert!(took < Duration::from_secs(2), "stopped only after {took:?}");
        assert!(spared.iter().all(goes_on), "b's flows are still allowed");
    }
}

/// After severing, the server's packets would otherwise start a new flow, which policy allows, with
/// the client's packets as replies. Either node may be the one that severs, and allows again.
fn sending_server_cannot_keep_denied_udp_flow_open() {
    let mut bed = bed(&[], &[]);
    let (a, c) = (bed.lab.pod("x/a"), bed.lab.pod("x/c"));
    let tickers = c.addrs(54).map(|at| Ticker::start(&c, at));
    for (allowed, denied, why) in [
        (vec![dns_to("c")], vec![deny_ingress("c")], "server's node"),
        (vec![dns_from("a")], vec![deny_egress("a")], "client's node"),
        (vec![], vec![deny_ingress("c")], "no policy before"),
    ] {
        bed.apply(&allowed);
        let flows = tickers.each_ref().map(|ticker| flow(&a, ticker.at));
        assert!(flows.iter().all(goes_on), "{why}: allowed at first");
        bed.apply(&denied);
        let stopped = || {
            flows.iter().all(|flow| {
                drain(flow);
                !goes_on(flow)
            })
        };
        wait_until(DEADLINE, "the denied flows to stop", stopped).unwrap();
        bed.kill(1);
        bed.start(1, &[]);
        assert!(stopped(), "{why}: a new daemon leaves them closed");
        bed.apply(&allowed);
        for flow in &flows {
            flow.set_read_timeout(Some(DEADLINE)).unwrap();
            let heard = flow.recv(&mut [0; 16]);
            assert!(heard.is_ok(), "{why}: the server alone sends: {heard:?}");
        }
    }
}

/// A server that sends one datagram per millisecond to the last client.
struct Ticker {
    at: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Ticker {
    fn start(host: &Host, at: SocketAddr) -> Self {
        let socket = host.run(|| UdpSocket::bind(at)).unwrap().unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(1)))
            .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut client = None;
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((_, from)) = socket.recv_from(&mut [0; 16]) {
                    client = Some(from);
                }
                if let Some(client) = client {
                    // What a client that is gone answers by ICMP is no end.
                    let _refused = socket.send_to(b"tick", client);
                }
            }
        });
        let thread = Some(thread);
        Self { at, stop, thread }
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// One pair of ends for many datagrams.
pub(crate) fn flow(from: &Host, to: SocketAddr) -> UdpSocket {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = from.run(|| UdpSocket::bind(any)).unwrap().unwrap();
    socket.connect(to).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    socket
}

pub(crate) fn goes_on(flow: &UdpSocket) -> bool {
    let mut buffer = [0; 512];
    flow.send(b"still?").is_ok() && flow.recv(&mut buffer).is_ok()
}

/// Discards earlier datagrams.
fn drain(flow: &UdpSocket) {
    flow.set_nonblocking(true).unwrap();
    while flow.recv(&mut [0; 16]).is_ok() {}
    flow.set_nonblocking(false).unwrap();
}

fn stream_older_than_policy_survives_only_if_allowed() {
    let bed = bed(&[], &[]);
    let a = bed.lab.pod("x/a");
    let to_b = bed.lab.pod("x/b").addrs(80).map(|to| connected(&a, to));
    let to_c = bed.lab.pod("x/c").addrs(80).map(|to| connected(&a, to));
    bed.apply(&[allow_ingress("b"), deny_ingress("c")]);
    for stream in &to_b {
        echoes(stream, "carried on by the kernel");
    }
    for stream in &to_c {
        stream.set_read_timeout(Some(SOON)).unwrap();
        let said = (&*stream)
            .write_all(b"anyone?")
            .and_then(|()| (&*stream).read(&mut [0; 16]));
        let kind = said.map_err(|error| error.kind());
        assert_eq!(kind, Err(ErrorKind::ConnectionReset), "denied: ended");
    }
    // New ones take the other way, and none is cut by the change.
    for to in bed.lab.pod("x/b").addrs(80) {
        echoes(&connected(&a, to), "a new one");
    }
}

fn a_ping_needs_a_rule_without_ports() {
    let bed = bed(&[], &[]);
    let a = bed.lab.pod("x/a");
    for (policies, expected, why) in [
        (vec![], true, "no policy"),
        (
            vec![allow_ingress("b"), allow_ingress("c")],
            true,
            "a rule without ports",
        ),
        (
            vec![dns_to("b"), dns_to("c")],
            false,
            "rules with ports only",
        ),
        (vec![deny_ingress("b"), deny_ingress("c")], false, "no rule"),
    ] {
        bed.apply(&policies);
        for server in ["x/b", "x/c"] {
            assert_eq!(
                pings(&a, bed.lab.pod(server).ipv4().into()),
                expected,
                "{server}: {why}"
            );
        }
    }
}

/// A resolver asks for A and AAAA at once: DNAT may send the two first packets of one flow to two pods.
fn parallel_dns_queries_through_service_are_both_answered() {
    let dns = ServiceSpec::new("x", "dns")
        .selects("serves", "dns")
        .port_of(53, 53, lab::Protocol::Udp);
    let server = |name: &str, node: usize| {
        PodSpec::new("x", name)
            .node(node)
            .label("serves", "dns")
            .label("pod", name)
    };
    let client = PodSpec::new("x", "a").node(0).label("pod", "a");
    let pods = [client, server("b", 0), server("c", 1)];
    let mut bed = TestCluster::bare(Cluster::builder().nodes(2).pods(pods).service(dns));
    let servers = ["x/b", "x/c"].map(|name| bed.lab.pod(name));
    let _servers = servers.map(|pod| {
        let (netns, addresses) = (pod.netns(), pod.addresses());
        introduce(netns, pod.name(), lab::Protocol::Udp, &addresses, &[53]).unwrap()
    });
    bed.write_policies(&[dns_from("a"), dns_to("b"), dns_to("c")]);
    bed.enforce(&[]);
    let a = bed.lab.pod("x/a");
    for to in bed.lab.service("x/dns").addrs(53) {
        let sockets: Vec<_> = (0..PAIRS).map(|_| flow(&a, to)).collect();
        let mut met = BTreeSet::new();
        let at_once = if to.is_ipv4() { PAIRS } else { AT_ONCE };
        for (round, sockets) in sockets.chunks(at_once).enumerate() {
            for socket in sockets {
                socket.set_read_timeout(Some(DEADLINE)).unwrap();
                for question in [b"A", b"Q"] {
                    socket.send(question).unwrap();
                }
            }
            for (number, socket) in sockets.iter().enumerate() {
                let what = format!("{to}, round {round}, pair {number}");
                let [one, other] = [1, 2].map(|answer| {
                    let mut said = [0; 512];
                    let count = socket.recv(&mut said);
                    let count = count.unwrap_or_else(|error| panic!("{what}, {answer}: {error}"));
                    Greeting::parse(&said[..count]).unwrap().server
                });
                assert!(one == other || to.is_ipv6(), "{what}: {one}, {other}");
                met.insert(one);
            }
        }
        assert_eq!(met.len(), 2, "{to}: {met:?}");
    }
}

/// Whether an echo request (RFC 792) is answered.
fn pings(from: &Host, to: IpAddr) -> bool {
    let open = || Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4));
    let socket = from.run(open).unwrap().unwrap();
    socket.connect(&SocketAddr::new(to, 0).into()).unwrap();
    // Type 8, code 0, checksum of all that follows: 0xf7fd for identifier 1 and sequence 1.
    socket.send(&[8, 0, 0xf7, 0xfd, 0, 1, 0, 1]).unwrap();
    socket.set_read_timeout(Some(ASK)).unwrap();
    let mut answer = [0; 64];
    let deadline = Instant::now() + ASK;
    while Instant::now() < deadline {
        match (&socket).read(&mut answer) {
            // The IPv4 header stands before it.
            Ok(length) if length >= 28 && answer[20] == 0 => return true,
            Ok(_) => thread::yield_now(),
            Err(_) => return false,
        }
    }
    false
}

/// Enables conntrack accounting, and sets the UDP timeout to `timeout` seconds.
pub(crate) fn accounting(bed: &TestCluster, timeout: &str) {
    for node in bed.lab.nodes() {
        let sysctls = [
            ("netfilter/nf_conntrack_acct", "1"),
            ("netfilter/nf_conntrack_udp_timeout", timeout),
            ("netfilter/nf_conntrack_udp_timeout_stream", timeout),
        ];
        node.netns().set_sysctls(&sysctls).unwrap();
    }
}
