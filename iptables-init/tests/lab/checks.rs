//! What `check` and the watch find in a damaged redirect.
use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use clap::Parser;
use iptables_init::watch::{Part, Watch};
use lab::Outcome;
use socket2::{Domain, Socket, Type};
use testbed::runner::Test;

use crate::support::{
    INIT, Lab, Line, NonIsolated, Ran, SOON, counting_namespace, init, namespace, sh,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    damage_before_the_first_check_is_found,
    wrong_sysctl_among_many_links_is_found_promptly,
    counting_that_was_switched_off_is_on_again,
    check_names_each_thing_that_is_wrong,
    check_accepts_harmless_changes,
    check_names_packages_of_missing_programs,
    check_names_all_sysctls_that_break_the_redirect,
];

fn damage_before_the_first_check_is_found() {
    let settings = Line::parse_from(["x"]).settings;
    for (damage, whole) in [
        ("true", true),
        ("nft flush chain inet portreeve intercept", false),
        ("nft insert rule inet portreeve intercept accept", false),
        ("nft flush chain bridge portreeve redirect_up", false),
    ] {
        let netns = counting_namespace();
        init(&netns, "install").ok();
        sh(&netns, damage);
        let watched = netns.run(|| {
            let kernel = iptables_init::probe_kernel().unwrap();
            let mut watch = Watch::begin(&settings, kernel).unwrap();
            // Found at each look until it is put back.
            for _ in 0..2 {
                let found = watch.look().unwrap();
                assert!(!found.installed_again, "{damage}");
                assert_eq!(found.damages.is_empty(), whole, "{damage}");
                if !whole {
                    assert_eq!(found.damages[0].part, Part::Rules, "{damage}");
                    assert!(found.damages[0].ours, "{damage}");
                }
            }
            let found = watch.look().unwrap();
            watch.put_back(&found.damages).unwrap();
            let found = watch.look().unwrap();
            assert!(found.damages.is_empty(), "{damage}: {found:?}");
            assert_eq!(found.installed_again, !whole, "{damage}");
        });
        watched.unwrap();
        init(&netns, "check").ok();
    }
}

/// One look each half second, and two seconds to find it.
fn wrong_sysctl_among_many_links_is_found_promptly() {
    let netns = counting_namespace();
    init(&netns, "install").ok();
    sh(
        &netns,
        "seq 150 | sed 's/.*/link add many& type veth peer name other&/' | ip -batch -",
    );
    let settings = Line::parse_from(["x"]).settings;
    let watched = netns.run(|| {
        let kernel = iptables_init::probe_kernel().unwrap();
        let mut watch = Watch::begin(&settings, kernel).unwrap();
        for link in ["many1", "many75", "other150"] {
            let name = format!("/proc/sys/net/ipv4/conf/{link}/src_valid_mark");
            fs::write(&name, "1").unwrap();
            let found = (0..4).any(|_| {
                let damages = watch.look().unwrap().damages;
                damages.iter().any(|it| it.what.contains(link))
            });
            assert!(found, "{link}");
            fs::write(&name, "0").unwrap();
            assert_eq!(watch.look().unwrap().damages, []);
        }
    });
    watched.unwrap();
}

fn counting_that_was_switched_off_is_on_again() {
    let netns = counting_namespace();
    init(&netns, "install").ok();
    let settings = Line::parse_from(["x"]).settings;
    let looks = netns.run(|| {
        let kernel = iptables_init::probe_kernel().unwrap();
        let mut watch = Watch::begin(&settings, kernel).unwrap();
        ["1", "0"].map(|value| {
            fs::write("/proc/sys/net/netfilter/nf_conntrack_acct", value).unwrap();
            watch.look().unwrap().counts_again
        })
    });
    assert_eq!(looks.unwrap(), [false, true]);
    let counts = sh(&netns, "sysctl -n net.netfilter.nf_conntrack_acct");
    assert_eq!(counts, "1\n");
    init(&netns, "check").ok();
}

/// What is made wrong, the flags of `check`, and what it says then.
const WRONGS: &[(&str, &str, &str)] = &[
    (
        "nft delete table inet portreeve",
        "",
        "table inet portreeve is not there; run",
    ),
    ("true", "--fail open", "installed with other flags"),
    ("true", "--queue 7", "-j NFQUEUE --queue-balance 7:"),
    (
        "nft flush chain inet portreeve to_queue",
        "",
        "in chain to_queue",
    ),
    (
        "nft add rule inet portreeve isolated return",
        "",
        "chain isolated of nft table inet portreeve was changed",
    ),
    (
        "nft insert rule inet portreeve client_leg accept; nft -a list chain inet portreeve client_leg | sed -n 's/.*goto divert # handle /delete rule inet portreeve client_leg handle /p' | nft -f -",
        "",
        "a rule, chain or set of nft tables portreeve was changed",
    ),
    (
        "nft add table inet portreeve '{ flags dormant; }'",
        "",
        "a rule, chain or set of nft tables portreeve was changed",
    ),
    (
        "ip -4 rule add pref 9 lookup main; ip -4 route add default dev lo",
        "",
        "another IPv4 rule or route comes before",
    ),
    (
        "ip -6 route add unreachable default table 15001 metric 1",
        "",
        "another IPv6 rule or route comes before",
    ),
    ("ip -4 rule del pref 10", "", "the IPv4 `ip rule`"),
    ("ip -6 rule del pref 10", "", "the IPv6 `ip rule`"),
    ("true", "--mark-mask 0xf0", "the IPv4 `ip rule`"),
    ("ip -4 route flush table 15001", "", "the IPv4 route"),
    ("ip link set lo down", "", "the IPv6 route"),
    (
        "true",
        "--bridge cni0",
        "sysctl net.bridge.bridge-nf-call-iptables is 1",
    ),
    (
        "nft flush chain bridge portreeve redirect_up",
        "",
        "chain redirect_up of nft table bridge portreeve was changed",
    ),
    (
        "nft delete table bridge portreeve",
        "",
        "of nft table bridge portreeve was changed",
    ),
    (
        "iptables-init install --bridge br7; ip link add br7 type bridge nf_call_ip6tables 1",
        "--bridge br7",
        "bridge br7 itself looks into IP packets",
    ),
    ("true", "--queue 65535 --queues 2", "take a lower --queue"),
    (
        "sysctl -qw net.ipv4.conf.all.src_valid_mark=1",
        "",
        "net.ipv4.conf.all.src_valid_mark is 1",
    ),
    (
        "sysctl -qw net.ipv4.conf.default.src_valid_mark=1",
        "",
        "net.ipv4.conf.default.src_valid_mark is 1",
    ),
    (
        "ip link add eth7.1 type veth peer name eth8; sysctl -qw net/ipv4/conf/eth7.1/src_valid_mark=1",
        "",
        "`sysctl -w net/ipv4/conf/eth7.1/src_valid_mark=0`",
    ),
    (
        "ip link add kube-ipvs0 type bridge",
        "",
        "(there is a link kube-ipvs0)",
    ),
    (
        "sysctl -qw net.ipv4.tcp_fwmark_accept=1",
        "",
        "net.ipv4.tcp_fwmark_accept is 1",
    ),
];

fn check_names_each_thing_that_is_wrong() {
    for (wrong, flags, expected) in WRONGS {
        let netns = namespace();
        init(&netns, "install").ok();
        sh(&netns, wrong);
        let check = init(&netns, &format!("check {flags}"));
        assert!(!check.success, "`{wrong}` {flags}: check was content");
        let line = check.stdout.lines().find(|line| line.contains(expected));
        let line = line.unwrap_or_else(|| panic!("`{wrong}` {flags}: {}", check.stdout));
        assert!(
            line.starts_with("error: ") && line.contains("; "),
            "no remedy: {line}"
        );
    }
}

fn check_accepts_harmless_changes() {
    for (odd, expected) in [
        ("true", "all is in place\n"),
        (
            "sysctl -qw net.ipv4.conf.all.rp_filter=1",
            "all is in place\n",
        ),
        (
            "sysctl -qw net.ipv4.conf.lo.src_valid_mark=1",
            "all is in place\n",
        ),
        (
            "sysctl -qw net.ipv4.ip_forward=0",
            "note: sysctl net.ipv4.ip_forward is 0",
        ),
        (
            "sysctl -qw net.ipv6.fwmark_reflect=1",
            "note: sysctl net.ipv6.fwmark_reflect is 1",
        ),
        (
            "sysctl -qw net.ipv4.tcp_timestamps=0",
            "note: sysctl net.ipv4.tcp_timestamps is 0: a pod that opens and closes more than 232",
        ),
        (
            "sysctl -qw net.netfilter.nf_conntrack_acct=0",
            "note: sysctl net.netfilter.nf_conntrack_acct is 0",
        ),
        (
            "sysctl -qw net.netfilter.nf_conntrack_events=0",
            "note: sysctl net.netfilter.nf_conntrack_events is 0",
        ),
    ] {
        let netns = namespace();
        init(&netns, "install").ok();
        sh(&netns, odd);
        let said = init(&netns, "check").ok();
        assert!(said.starts_with(expected), "`{odd}`: {said}");
    }
}

fn check_names_packages_of_missing_programs() {
    for (program, package) in [("nft", "nftables"), ("ip", "iproute2")] {
        let netns = namespace();
        init(&netns, "install").ok();
        let hidden = format!(
            "for d in /usr/sbin /sbin /usr/bin /bin; do
                if [ -e $d/{program} ]; then mount --bind /dev/null $d/{program}; fi
            done"
        );
        for call in ["check", "install", "uninstall"] {
            let mut command = netns.command("unshare");
            command.args([
                "--mount",
                "sh",
                "-ec",
                &format!("{hidden}; exec {INIT} {call}"),
            ]);
            let ran = Ran::from(command);
            assert!(!ran.success, "{call} without {program}");
            let text = ran.stdout + &ran.stderr;
            assert!(
                text.contains(&format!("apt-get install {package}")),
                "{call}: {text}"
            );
        }
    }
}

fn check_names_all_sysctls_that_break_the_redirect() {
    // Queued packets pass, so that a listener alone is all the daemon that is needed.
    let lab = Lab::new("install --fail open --tcp spliced", NonIsolated::Nobody);
    let node = lab.node.netns();
    let _listener = node.run(transparent_listener).unwrap();
    for (sysctl, works) in [
        ("ipv4/conf/all/rp_filter=0", true),
        ("ipv4/conf/all/rp_filter=1", true),
        ("ipv4/conf/all/rp_filter=2", true),
        ("ipv4/conf/all/src_valid_mark=1", false),
        ("ipv4/tcp_fwmark_accept=1", false),
        ("ipv4/conf/all/src_valid_mark=0", true),
    ] {
        let (name, value) = sysctl.split_once('=').unwrap();
        let before = node.run(|| fs::read_to_string(Path::new("/proc/sys/net").join(name)));
        node.set_sysctls(&[(name, value)]).unwrap();
        // Nobody serves there: who answers is the listener.
        let outcome = lab.a.connect(lab.b.addr_v4(81), SOON).unwrap();
        let connected = matches!(outcome, Outcome::Connected { .. });
        assert_eq!(connected, works, "{sysctl}: {outcome:?}");
        assert_eq!(
            init(node, "check --fail open --tcp spliced").success,
            works,
            "{sysctl}: check"
        );
        node.set_sysctls(&[(name, before.unwrap().unwrap().trim())])
            .unwrap();
    }
}

fn transparent_listener() -> Socket {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.set_ip_transparent_v4(true).unwrap();
    listener
        .bind(&SocketAddr::from(([0, 0, 0, 0], 15001)).into())
        .unwrap();
    listener.listen(16).unwrap();
    listener
}
