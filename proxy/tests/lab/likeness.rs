//! A client cannot distinguish the gate from the network: it gets the same results.
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use lab::{Capture, Host, Kind, Outcome};
use nix::errno::Errno;
use testbed::runner::Test;

use testbed::{
    DEADLINE, SEVERAL_SYNS, SOON, TestCluster, allow_all, allow_ingress, deny_egress, deny_ingress,
    small,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    client_sees_the_same_as_without_portreeve,
    denied_client_sees_a_silent_host,
    reject_resets_a_denied_client_immediately,
    proxied_client_connects_with_one_syn,
];

/// What a client sees of a dial.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    what: String,
    errno: Option<Errno>,
    syns: usize,
    syn_acks: usize,
}

fn client_sees_the_same_as_without_portreeve() {
    let mut bed = TestCluster::bare(small());
    let mut on_bare = look(&bed);
    bed.write_policies(&[allow_all()]);
    bed.enforce(&[]);
    let enforced = look(&bed);
    for (bare, enforced) in on_bare.iter_mut().zip(&enforced) {
        // On the lab's links an ICMPv6 error can come back within connect(), while the socket is locked: Linux then
        // repeats the SYN (net/ipv6/tcp_ipv6.c, tcp_v6_err). A held SYN has left that call.
        if bare.errno == Some(Errno::ENETUNREACH) && bare.syns == 2 {
            bare.syns = enforced.syns.clamp(1, 2);
        }
        assert_eq!(
            enforced,
            bare,
            "left: enforced, right: the bare network\n{}",
            bed.logs()
        );
    }
    let expected = [
        None,
        Some(Errno::ECONNREFUSED),
        Some(Errno::ETIMEDOUT),
        Some(Errno::EHOSTUNREACH),
        Some(Errno::ENETUNREACH),
    ];
    for errno in expected {
        assert!(
            on_bare.iter().any(|seen| seen.errno == errno),
            "{errno:?} is not among {on_bare:?}"
        );
    }
}

/// Dials whatever there is from x/a, all at once.
fn look(bed: &TestCluster) -> Vec<Seen> {
    let a = bed.lab.pod("x/a");
    let mut targets: Vec<(String, SocketAddr)> = Vec::new();
    let mut add = |what: &str, to: &[SocketAddr]| {
        targets.extend(to.iter().map(|to| (format!("{what} {to}"), *to)));
    };
    for way in bed.ways(80) {
        add(&format!("open, {}", way.what), &[way.to]);
    }
    for way in bed.ways(83) {
        add(&format!("closed, {}", way.what), &[way.to]);
    }
    let outside = bed.lab.outside();
    add("closed outside", &outside.addrs(99));
    add("closed on another node", &bed.lab.node(1).addrs(99));
    add("closed on the own node", &bed.lab.node(0).addrs(99));
    add("nobody answers", &bed.lab.blackhole(80));
    add("no way", &bed.lab.unreachable(80));
    let capture = a.capture().unwrap();
    let addresses: Vec<SocketAddr> = targets.iter().map(|(_, to)| *to).collect();
    let outcomes = a.connect_all(&addresses, SEVERAL_SYNS).unwrap();
    targets
        .into_iter()
        .zip(outcomes)
        .map(|((what, to), outcome)| seen(what, to, &outcome, &capture))
        .collect()
}

fn seen(what: String, to: SocketAddr, outcome: &Outcome, capture: &Capture) -> Seen {
    Seen {
        what,
        errno: outcome.errno(),
        syns: capture.syns_to(to),
        syn_acks: capture.syn_acks_from(to),
    }
}

/// Denied connections: by ingress on the same node and across, and by egress.
fn denied(bed: &TestCluster) -> Vec<(Host, Vec<SocketAddr>)> {
    let servers = ["x/b", "x/c"]
        .map(|key| [bed.lab.pod(key).addrs(80), bed.lab.service(key).addrs(80)].concat());
    vec![
        (bed.lab.pod("x/a"), servers.concat()),
        (
            bed.lab.pod("x/d"),
            [
                bed.lab.pod("x/a").addrs(80).to_vec(),
                servers[1].clone(),
                bed.lab.outside().addrs(80).to_vec(),
            ]
            .concat(),
        ),
    ]
}

fn policies() -> [serde_json::Value; 4] {
    [
        deny_ingress("b"),
        deny_ingress("c"),
        deny_egress("d"),
        allow_ingress("a"),
    ]
}

fn denied_client_sees_a_silent_host() {
    let bed = TestCluster::enforced(&[], &policies());
    // Nobody is there, and nobody denies it: x/a may send what it likes, and no proxy sees it.
    let (nobody, a) = (bed.lab.blackhole(80)[0], bed.lab.pod("x/a"));
    let asked = a.capture().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| a.connect(nobody, SEVERAL_SYNS).unwrap());
        for (client, targets) in denied(&bed) {
            scope.spawn(|| hears_nothing(client, targets, || asked.syns_to(nobody)));
        }
    });
}

fn hears_nothing(client: Host, targets: Vec<SocketAddr>, asked_nobody: impl Fn() -> usize) {
    let capture = client.capture().unwrap();
    let outcomes = client.connect_all(&targets, SEVERAL_SYNS).unwrap();
    for (to, outcome) in targets.iter().zip(outcomes) {
        let what = format!("{} to {to}: {outcome}", client.name());
        assert_eq!(outcome.kind(), Kind::TimedOut, "{what}");
        assert_eq!(capture.syns_to(*to), asked_nobody(), "{what}");
        let heard = capture.count(|packet| packet.protocol == 6 && packet.source == *to);
        assert_eq!(heard, 0, "{what}");
    }
}

fn reject_resets_a_denied_client_immediately() {
    let bed = TestCluster::enforced(&["--deny", "reject"], &policies());
    for (client, targets) in denied(&bed) {
        let capture = client.capture().unwrap();
        let started = Instant::now();
        let outcomes = client.connect_all(&targets, DEADLINE).unwrap();
        assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
        for (to, outcome) in targets.iter().zip(outcomes) {
            let what = format!("{} to {to}: {outcome}", client.name());
            assert_eq!(outcome.errno(), Some(Errno::ECONNREFUSED), "{what}");
            assert_eq!(
                (capture.syns_to(*to), capture.syn_acks_from(*to)),
                (1, 0),
                "{what}"
            );
            let resets = capture.count(|packet| packet.flags.is_reset() && packet.source == *to);
            assert_eq!(resets, 1, "{what}");
        }
    }
}

fn proxied_client_connects_with_one_syn() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let a = bed.lab.pod("x/a");
    for way in bed.ways(80) {
        let capture = a.capture().unwrap();
        let outcome = a.connect(way.to, DEADLINE).unwrap();
        let latency = outcome.latency().unwrap_or(Duration::MAX);
        assert!(latency < SOON, "{}: {outcome}", way.what);
        assert_eq!(
            (capture.syns_to(way.to), capture.syn_acks_from(way.to)),
            (1, 1),
            "{}",
            way.what
        );
    }
}
