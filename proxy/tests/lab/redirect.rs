//! The redirect under a running daemon, while other software removes or changes parts of it.
use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use lab::{Cluster, Host, Kind, PodSpec, wait_until};
use testbed::runner::Test;

use crate::bridges::BRIDGE;
use testbed::{
    DEADLINE, SOON, TestCluster, allow_ingress, ask, connected, deny_ingress, echoes, greeted,
    init, metric,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    damaged_rules_come_back_and_denied_stays_denied,
    flushed_sets_are_filled_again,
    a_deleted_ip_rule_or_route_comes_back,
    damage_that_stays_makes_the_node_not_ready,
];

/// How soon a change must be noticed.
const NOTICED_WITHIN: Duration = Duration::from_secs(2);
/// The sets with notes for `uninstall` about settings to restore.
const NOTES: [&str; 3] = [" switched_on", " switched_off", " kept_from_learning"];
/// An allowed SYN is answered much earlier.
const BRIEFLY: Duration = Duration::from_millis(300);

/// One node with x/a, with x/b, to which all connections are denied, and with x/d, which the proxy serves.
fn bed() -> TestCluster {
    enforced(Cluster::builder())
}

fn enforced(cluster: lab::Builder) -> TestCluster {
    let pod = |name: &str| PodSpec::new("x", name).label("pod", name).port("http", 80);
    let pods = ["a", "b", "d"].map(pod);
    let mut bed = TestCluster::bare(cluster.nodes(1).pods(pods));
    bed.write_policies(&[deny_ingress("b"), allow_ingress("d")]);
    bed.enforce(&[]);
    bed
}

/// Runs a line of sh on the node.
fn sh(node: &Host, line: &str) {
    let mut command = node.command("sh");
    command.args(["-ec", line]);
    let said = command.output().unwrap();
    assert!(said.status.success(), "{line}: {said:?}");
}

fn faults(node: &Host, cause: &str) -> u64 {
    metric(
        node,
        &format!("portreeve_redirect_faults_total{{reason=\"{cause}\"}}"),
    )
}

fn ready(node: &Host) -> bool {
    ask(node, "/readyz").is_some_and(|it| it.status == 200)
}

/// Runs `damage`, and waits until it is noticed, and then until everything is repaired.
fn put_back(bed: &TestCluster, damage: &str, cause: &str, meanwhile: impl FnOnce()) {
    let node = bed.lab.node(0);
    let before = faults(&node, cause);
    sh(&node, damage);
    let since = Instant::now();
    meanwhile();
    wait_until(NOTICED_WITHIN, damage, || faults(&node, cause) > before)
        .unwrap_or_else(|error| panic!("{error}\n{}", bed.logs()));
    let noticed = since.elapsed();
    wait_until(DEADLINE, damage, || {
        ready(&node) && init(&node, "check", &[]).status.success()
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", bed.logs()));
    println!(
        "noticed after {noticed:?}, whole after {:?}: {damage}",
        since.elapsed()
    );
}

fn denied(bed: &TestCluster) {
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"));
    for to in b.addrs(80) {
        let outcome = a.connect(to, BRIEFLY).unwrap();
        assert_eq!(outcome.kind(), Kind::TimedOut, "{to}\n{}", bed.logs());
    }
}

fn damaged_rules_come_back_and_denied_stays_denied() {
    let mut bed = bed();
    let (a, d) = (bed.lab.pod("x/a"), bed.lab.pod("x/d"));
    let live = connected(&a, d.addr_v4(80));
    for (damage, cause) in [
        ("nft flush chain inet portreeve intercept", "rules"),
        (
            "nft -a list chain inet portreeve isolated | sed -n '0,/tcp flags/ s/.*tcp flags.* # handle /delete rule inet portreeve isolated handle /p' | nft -f -",
            "rules",
        ),
        ("nft insert rule inet portreeve intercept accept", "rules"),
        ("nft add table inet portreeve '{ flags dormant; }'", "rules"),
        ("nft flush chain bridge portreeve redirect_up", "rules"),
    ] {
        put_back(&bed, damage, cause, || {});
        denied(&bed);
        echoes(&live, damage);
    }
    for damage in ["nft delete table inet portreeve", "nft flush ruleset"] {
        put_back(&bed, damage, "table", || {});
        denied(&bed);
        greeted(&a, d.addr_v4(80));
    }
    bed.daemon(0)
        .says("chain inet portreeve intercept; this daemon has repaired it");
}

fn sets(node: &Host) -> String {
    let mut nft = node.command("nft");
    nft.args(["list", "sets"]);
    String::from_utf8(nft.output().unwrap().stdout).unwrap()
}

/// The sets that have elements, of what `nft list sets` says, with their tables.
fn filled(listing: &str) -> impl Iterator<Item = String> {
    let (mut table, mut set) = (String::new(), String::new());
    listing.lines().map(str::trim).filter_map(move |line| {
        if let Some(name) = line.strip_prefix("table ") {
            table = name.trim_end_matches(" {").to_owned();
        } else if let Some(name) = line.strip_prefix("set ") {
            set = format!("{table} {}", name.trim_end_matches(" {"));
        } else if line.starts_with("elements") {
            return Some(set.clone());
        }
        None
    })
}

fn flushed_sets_are_filled_again() {
    let bed = enforced(Cluster::builder().gateway(BRIDGE));
    let node = bed.lab.node(0);
    let ports = || filled(&sets(&node)).any(|it| it == "bridge portreeve target_ports");
    wait_until(DEADLINE, "the ports' addresses", ports).unwrap();
    let list = || sets(&node);
    let before = list();
    // Every one that the daemon fills.
    let filled: Vec<_> = filled(&before)
        .filter(|set| !NOTES.iter().any(|it| set.ends_with(it)))
        .collect();
    assert!(filled.len() > 12, "{filled:?}");
    for set in filled {
        sh(&node, &format!("nft flush set {set}"));
        wait_until(DEADLINE, &set, || list() == before)
            .unwrap_or_else(|error| panic!("{error}\n{}\n{}", list(), bed.logs()));
    }
    let a = bed.lab.pod("x/a").addr_v4(0).ip();
    for damage in [
        format!("nft delete element inet portreeve egress_non_isolated4 '{{ {a} }}'"),
        "nft add element inet portreeve own_node_judged '{ ipv4 }'".to_owned(),
    ] {
        put_back(&bed, &damage, "elements", || {});
        wait_until(DEADLINE, &damage, || list() == before).unwrap();
    }
    denied(&bed);
}

fn a_deleted_ip_rule_or_route_comes_back() {
    let bed = bed();
    let (a, d) = (&bed.lab.pod("x/a"), bed.lab.pod("x/d"));
    let live: [TcpStream; 2] = d.addrs(80).map(|to| connected(a, to));
    for (damage, cause) in [
        ("ip -4 rule del pref 10", "ip_rule"),
        ("ip -6 rule del pref 10", "ip_rule"),
        // As systemd-networkd does when it is restarted.
        ("ip -4 rule del pref 10; ip -6 rule del pref 10", "ip_rule"),
        ("ip -4 route flush table 15001", "route"),
        ("ip -6 route flush table 15001", "route"),
        ("ip link set lo down; ip link set lo up", "route"),
    ] {
        let [v4, v6] = d.addrs(80);
        // A client that connects meanwhile succeeds when it repeats its SYN, through the proxy.
        let dialled = std::thread::scope(|scope| {
            let mut dials = Vec::new();
            put_back(&bed, damage, cause, || {
                dials.extend([v4, v6].map(|to| scope.spawn(move || connected(a, to))));
                live.iter()
                    .for_each(|mut it| it.write_all(b"meanwhile").unwrap());
            });
            let join = |it: std::thread::ScopedJoinHandle<'_, _>| it.join().unwrap();
            dials.into_iter().map(join).collect::<Vec<TcpStream>>()
        });
        dialled.iter().for_each(|it| echoes(it, damage));
        for stream in &live {
            let mut back = [0; 9];
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            let read = std::io::Read::read_exact(&mut &*stream, &mut back);
            read.unwrap_or_else(|error| panic!("{damage}: {error}"));
        }
    }
    denied(&bed);
}

fn damage_that_stays_makes_the_node_not_ready() {
    let bed = bed();
    let node = bed.lab.node(0);
    let (a, d) = (bed.lab.pod("x/a"), bed.lab.pod("x/d"));
    let link = "$(ls /proc/sys/net/ipv4/conf | grep -v -e all -e default -e lo -e eth | head -1)";
    let set = |name: &str, value: u8| format!("sysctl -qw net/ipv4/{name}={value}");
    let sysctl = |name: &str| (set(name, 1), set(name, 0), name.replace('/', "."));
    let rule = "rule add pref 9 fwmark 0x400/0x400 unreachable";
    for (damage, undo, named) in [
        sysctl("conf/all/src_valid_mark"),
        (
            set(&format!("conf/{link}/src_valid_mark"), 1),
            set(&format!("conf/{link}/src_valid_mark"), 0),
            "src_valid_mark is 1".to_owned(),
        ),
        sysctl("tcp_fwmark_accept"),
        (
            format!("ip -4 {rule}"),
            "ip -4 rule del pref 9".to_owned(),
            "another IPv4 rule or route".to_owned(),
        ),
        (
            format!("ip -6 {rule}"),
            "ip -6 rule del pref 9".to_owned(),
            "another IPv6 rule or route".to_owned(),
        ),
    ] {
        sh(&node, &damage);
        let reported = || {
            let answer = ask(&node, "/readyz").unwrap();
            answer.status == 503 && answer.body.contains(&named)
        };
        wait_until(NOTICED_WITHIN, &damage, reported).unwrap();
        sh(&node, &undo);
        wait_until(DEADLINE, &undo, || ready(&node)).unwrap();
        greeted(&a, d.addr_v4(80));
    }
    // A setting that only costs performance is noted, and the node stays ready.
    sh(&node, "sysctl -qw net.ipv4.tcp_timestamps=0");
    let answer = ask(&node, "/readyz").unwrap();
    assert_eq!(answer.status, 200);
    assert!(answer.body.contains("tcp_timestamps is 0"), "{answer:?}");
    // An uninstallation is not repaired.
    assert!(init(&node, "uninstall", &[]).status.success());
    let reported = || {
        let answer = ask(&node, "/readyz").unwrap();
        answer.status == 503 && answer.body.contains("iptables-init install")
    };
    wait_until(NOTICED_WITHIN, "the daemon to say so", reported).unwrap();
    let back = wait_until(SOON, "it to be put back", || {
        init(&node, "check", &[]).status.success()
    });
    assert!(back.is_err(), "it was put back");
    assert!(reported());
}
