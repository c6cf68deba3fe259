//! The redirect in real network namespaces: what `iptables-init` puts in, takes out and finds.
//!
//! Every test has namespaces of its own. Nothing is skipped: what is missing is a failure.
#![expect(
    clippy::unwrap_used,
    reason = "a test panics at what it cannot do; clippy knows no tests without libtest"
)]
use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::Parser;
use iptables_init::ruleset::{Kernel, QueueRule, Ruleset};
use iptables_init::settings::Settings;
use iptables_init::watch::{Part, Watch};
use kernel::bridge_addresses::{End, Owners};
use kernel::bridges::{Bridge, Port, ports_script};
use kernel::pod_links::Links;
use kernel::sets::{Groups, Sets};
use lab::traffic::UdpOutcome;
use lab::{Cluster, Host, Netns, Outcome, PodSpec, wait_until};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, sendto, socket,
};
use socket2::{Domain, Socket, Type};

const INIT: &str = env!("CARGO_BIN_EXE_iptables-init");
/// Longer than a round trip in the lab by far, shorter than a SYN's first retransmit.
const SOON: Duration = Duration::from_millis(500);
const DEADLINE: Duration = Duration::from_secs(5);
const NATIVE: Kernel = Kernel {
    queue_rule: QueueRule::Native,
    bridges: true,
};

fn main() -> ExitCode {
    lab::runner::main(&lab::tests![
        uninstall_restores_the_namespace_exactly,
        installing_again_changes_nothing,
        partial_installs_can_be_repaired_and_uninstalled,
        damage_before_the_first_check_is_found,
        wrong_sysctl_among_many_links_is_found_promptly,
        counting_that_was_switched_off_is_on_again,
        uninstall_restores_conntrack_accounting,
        new_flags_replace_rules_and_keep_set_elements,
        uninstall_restores_bridge_nf_call_settings,
        new_layout_replaces_table_and_keeps_set_elements,
        nft_native_queue_works_for_any_queue_count,
        each_debians_nft_loads_and_removes_the_rules,
        each_debians_nft_keeps_the_sets_elements,
        check_names_an_nft_that_rejects_the_rules,
        kernel_sets_match_the_scripts,
        loading_sets_without_table_names_the_remedy,
        check_names_each_thing_that_is_wrong,
        check_accepts_harmless_changes,
        check_names_packages_of_missing_programs,
        unprivileged_install_names_remedy_and_print_works,
        wrong_flags_are_usage_errors,
        init_ignores_empty_environment_variables,
        loopback_down_names_the_remedy,
        disabled_ipv6_skips_only_ipv6_routing,
        fail_closed_drops_isolated_traffic_without_a_daemon,
        fail_open_passes_all_traffic_without_a_daemon,
        non_isolated_pods_keep_access_without_a_daemon,
        held_packets_wait_in_the_configured_queues,
        check_and_reinstall_keep_queued_packets,
        full_source_rate_set_limits_by_destination,
        check_names_all_sysctls_that_break_the_redirect,
    ])
}

fn uninstall_restores_the_namespace_exactly() {
    // The first use on a machine loads modules, which adds sysctls for good.
    let first = namespace();
    init(&first, "install").ok();

    let netns = namespace();
    // What others have there, as near to ours as can be.
    sh(
        &netns,
        "nft add table inet other
        nft add chain inet other prerouting '{ type filter hook prerouting priority -99; }'
        nft add rule inet other prerouting meta mark 0x400 counter
        ip -4 rule add pref 10 fwmark 0x400/0x400 lookup 15001
        ip -4 rule add pref 11 lookup main protocol 177
        ip -4 route add unreachable 203.0.113.0/24 table 15001
        ip -6 route add unreachable 2001:db8::/32 table 15001",
    );
    let before = dump(&netns);
    for flags in [
        "",
        "--fail open",
        "--mark-mask 0xf0000 --proxy-port 7000 --queue 7 --queues 3",
        "--bridge cni0",
    ] {
        init(&netns, &format!("install {flags}")).ok();
        assert_ne!(dump(&netns), before, "{flags}: install did nothing");
        // It takes out what is there, whatever flags it is given itself.
        assert_eq!(init(&netns, "uninstall").ok(), "uninstalled\n");
        assert_eq!(dump(&netns), before, "{flags}");
        assert_eq!(
            init(&netns, "uninstall").ok(),
            "was not installed; nothing changed\n"
        );
    }
}

fn installing_again_changes_nothing() {
    let netns = namespace();
    assert_eq!(init(&netns, "install").ok(), "installed\n");
    let (handles, before) = (sh(&netns, "nft -a list ruleset"), dump(&netns));
    assert_eq!(
        init(&netns, "install").ok(),
        "already installed; nothing changed\n"
    );
    assert_eq!(
        sh(&netns, "nft -a list ruleset"),
        handles,
        "a rule was made anew"
    );
    assert_eq!(dump(&netns), before);
}

fn uninstall_restores_conntrack_accounting() {
    for before in ["0", "1"] {
        let netns = namespace();
        let counts = || sh(&netns, "sysctl -n net.netfilter.nf_conntrack_acct");
        sh(
            &netns,
            &format!("sysctl -qw net.netfilter.nf_conntrack_acct={before}"),
        );
        // Without an installed table it checks all rules.
        assert!(!init(&netns, "check").success);
        assert_eq!(counts(), format!("{before}\n"), "check");
        init(&netns, "install").ok();
        assert_eq!(counts(), "1\n", "{before} before");
        // The note outlives a table that takes the other's place.
        init(&netns, "install --fail open").ok();
        init(&netns, "uninstall").ok();
        assert_eq!(counts(), format!("{before}\n"));
    }
}

/// Where conntrack counts already, so that there is nothing to be noted in the table: a note is lost
/// with the table.
fn counting_namespace() -> Netns {
    let netns = namespace();
    sh(&netns, "sysctl -qw net.netfilter.nf_conntrack_acct=1");
    netns
}

fn partial_installs_can_be_repaired_and_uninstalled() {
    let reference = counting_namespace();
    let bare = dump(&reference);
    init(&reference, "install").ok();
    let whole = dump(&reference);
    for damage in [
        "nft delete table inet portreeve",
        "nft flush chain inet portreeve to_queue",
        "nft flush chain inet portreeve intercept",
        "nft flush chain inet portreeve installed_by",
        "nft add rule inet portreeve apply_verdict accept",
        "nft flush table inet portreeve",
        "nft delete table bridge portreeve",
        "nft flush table bridge portreeve",
        "nft delete table inet portreeve; nft flush chain bridge portreeve to_node",
        // The same number of rules, with other elements in an anonymous set.
        "nft -a list chain inet portreeve drop_tunnel | sed -n 's/.*udp dport.* # handle \\(.*\\)/replace rule inet portreeve drop_tunnel handle \\1 udp dport { 1, 2, 3 } goto drop_spoofed/p' | nft -f -",
        "nft add chain inet portreeve foreign '{ type filter hook prerouting priority -300; policy drop; }'",
        "nft 'flush chain inet portreeve input_verdict; delete chain inet portreeve input_verdict; add chain inet portreeve input_verdict { type filter hook input priority 7; policy accept; }'",
        "nft 'flush ruleset; table inet portreeve { chain intercept { type nat hook output priority 7; }; }'",
        "ip -4 rule del pref 10",
        "ip -6 rule del pref 10",
        "ip -4 rule add pref 10 fwmark 0x8/0x8 lookup 15001 protocol 177",
        "ip -4 route flush table 15001",
        "ip -6 route flush table 15001",
        "ip -4 rule del pref 10; ip -4 route flush table 15001; nft flush ruleset",
    ] {
        let netns = counting_namespace();
        init(&netns, "install").ok();
        sh(&netns, damage);
        assert!(
            !init(&netns, "check").success,
            "check did not see `{damage}`"
        );
        init(&netns, "install").ok();
        assert_eq!(sorted(&dump(&netns)), sorted(&whole), "after `{damage}`");
        init(&netns, "check").ok();
        sh(&netns, damage);
        init(&netns, "uninstall").ok();
        assert_eq!(dump(&netns), bare, "after `{damage}`");
    }
}

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

fn new_flags_replace_rules_and_keep_set_elements() {
    let netns = namespace();
    init(&netns, "install").ok();
    fill_sets(&netns);
    let sets = sh(&netns, "nft -a list sets; nft -a list maps");
    let chains = "nft -a list chains | grep chain";
    let before = sh(&netns, chains);
    for flags in [
        "--fail open --queues 5 --queue 9",
        "--mark-mask 0xf0000",
        "--proxy-port 7000",
    ] {
        init(&netns, &format!("install {flags}")).ok();
        init(&netns, &format!("check {flags}")).ok();
        assert!(
            init(&netns, "check").stdout.contains("other flags"),
            "{flags}"
        );
        assert_eq!(
            sh(&netns, "nft -a list sets; nft -a list maps"),
            sets,
            "{flags}: elements or handles"
        );
        // A hooked chain that is made anew would flush every packet that waits in a queue.
        assert_eq!(sh(&netns, chains), before, "{flags}: a chain was made anew");
    }
    let rules = sh(&netns, "ip -4 rule; ip -6 rule");
    assert_eq!(
        rules.matches("15001").count(),
        2,
        "one rule a family is left:\n{rules}"
    );
}

fn new_layout_replaces_table_and_keeps_set_elements() {
    let netns = namespace();
    init(&netns, "install").ok();
    fill_sets(&netns);
    let sets = sh(&netns, "nft list sets; nft list maps");
    // As a version with other chains would have left it.
    sh(
        &netns,
        "nft flush chain inet portreeve installed_by
        nft add rule inet portreeve installed_by return comment '\"portreeve layout 0 content 0\"'
        nft add chain inet portreeve gone '{ type filter hook output priority 5; }'
        nft add set inet portreeve gone '{ type ipv4_addr; elements = { 10.9.9.9 }; }'
        # A pod has just begun a flow: what is counted by the second begins anew.
        nft add element inet portreeve source_rate4 '{ 10.0.0.1 limit rate over 1/second }'",
    );
    init(&netns, "install").ok();
    init(&netns, "check").ok();
    assert!(!sh(&netns, "nft list table inet portreeve").contains("gone"));
    // Where pods' addresses are routed to is not carried over: a shortcut, which the daemon lays anew.
    load(&netns, &kernel::sets::pod_links_script(&links()));
    assert_eq!(
        sorted(&sh(&netns, "nft list sets; nft list maps")),
        sorted(&sets)
    );
}

fn nft_native_queue_works_for_any_queue_count() {
    let folders = nft_of_each_release();
    // The machine's own nft, too.
    for folder in folders.iter().map(String::as_str).chain(["/usr/sbin"]) {
        understands_its_own_queue(folder);
    }
}

fn understands_its_own_queue(folder: &str) {
    for flags in [
        "--queues 1 --fail open",
        "--queues 1 --fail closed",
        "--queues 2 --fail open",
        "--queues 2 --fail closed",
        "--queues 256 --fail closed",
        "--queues 2 --tcp auto",
        "--queues 2 --tcp kernel",
    ] {
        let line = Line::try_parse_from(format!("x {flags}").split_whitespace()).unwrap();
        let ruleset = Ruleset::new(&line.settings, NATIVE);
        let netns = namespace();
        let mut command = netns.command("sh");
        command.args([
            "-ec",
            &format!("PATH={folder}:$PATH; nft -c -f - <<'END'\n{ruleset}\nEND"),
        ]);
        let ran = Ran::from(command);
        // What nft understands, it asks the kernel, which may well lack CONFIG_NFT_QUEUE.
        let asked = ran.success || ran.stderr.contains("Could not process rule");
        assert!(
            asked && !ran.stderr.contains("syntax"),
            "{folder}, {flags}: {}",
            ran.stderr
        );
    }
}

/// The folders with nft of each Debian release, each with its own libraries.
fn nft_of_each_release() -> Vec<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lab/tools/nft");
    let ask = |arguments: &[&str]| {
        let said = Command::new(&script).args(arguments).output().unwrap();
        let complaint = String::from_utf8_lossy(&said.stderr);
        assert!(said.status.success(), "{complaint}");
        String::from_utf8(said.stdout).unwrap().trim().to_owned()
    };
    let releases = ask(&["--releases"]);
    let folders: Vec<_> = releases.lines().map(|it| ask(&["--where", it])).collect();
    assert!(folders.len() >= 3, "{releases}");
    folders
}

fn each_debians_nft_loads_and_removes_the_rules() {
    for folder in nft_of_each_release() {
        let netns = namespace();
        sh(
            &netns,
            &format!(
                "PATH={folder}:$PATH
                iptables-init install; iptables-init check
                iptables-init install | grep -q ^already
                iptables-init install --fail open --mark-mask 0xf0000 --queues 1
                iptables-init uninstall; test -z \"$(nft list ruleset)\""
            ),
        );
    }
}

/// Elements as the daemon writes them, and how a table with another layout takes them over.
fn each_debians_nft_keeps_the_sets_elements() {
    for folder in nft_of_each_release() {
        let netns = namespace();
        let path = format!("PATH={folder}:$PATH\n");
        sh(&netns, &format!("{path} iptables-init install"));
        let list = format!("{path} nft list sets; nft list maps");
        let script = all_sets();
        sh(&netns, &format!("{path} nft -f - <<'END'\n{script}END"));
        let before = sh(&netns, &list);
        assert!(before.contains("fd00:1::3"), "{folder}: {before}");
        sh(
            &netns,
            &format!(
                "{path} nft flush chain inet portreeve installed_by
                iptables-init install | grep -q ^installed"
            ),
        );
        assert_eq!(sorted(&sh(&netns, &list)), sorted(&before), "{folder}");
    }
}

/// nft 1.1.2 refused a rule of an earlier version like this.
fn check_names_an_nft_that_rejects_the_rules() {
    let netns = namespace();
    let mut command = netns.command("sh");
    let script = format!(
        r#"nft=$(command -v nft || echo /usr/sbin/nft); bin=$(mktemp -d); trap 'rm -r $bin' EXIT
        cat >$bin/nft <<END
#!/bin/sh
input=\$(cat)
case "\$1 \$input" in
  -c*own_node_judged*) echo "/dev/stdin:52:3-25: Error: conflicting protocols specified: unknown vs. tcp" >&2; exit 1 ;;
esac
printf '%s\n' "\$input" | $nft "\$@"
END
        chmod +x $bin/nft
        PATH=$bin:$PATH {INIT} check"#
    );
    command.args(["-c", &script]);
    let said = Ran::from(command);
    assert_eq!(said.code, Some(1));
    let named = "error: nft refuses the rules of this version: conflicting protocols specified: unknown vs. tcp; ";
    assert!(said.stdout.contains(named), "{said:?}");
}

fn kernel_sets_match_the_scripts() {
    let netns = counting_namespace();
    init(&netns, "install").ok();
    let first = some_sets();
    load(&netns, &first.replace_script());
    let mut second = first.clone();
    second.pods.remove(&"10.1.2.0/24".parse().unwrap());
    second.egress_non_isolated.remove(&address("10.1.2.3"));
    second.ingress_non_isolated.insert(address("fd00:1::9"));
    second.selves.clear();
    load(&netns, &second.change_script(&first).unwrap());
    let changed = sh(&netns, "nft list sets; nft list maps");
    let nothing = Sets {
        bridged: Some(Groups::Stay),
        ..Sets::default()
    };
    load(&netns, &nothing.replace_script());
    assert!(
        !sh(&netns, "nft list sets; nft list maps").contains("elements"),
        "replacing by nothing empties"
    );
    load(&netns, &second.replace_script());
    assert_eq!(changed, sh(&netns, "nft list sets; nft list maps"));
    assert!(
        changed.contains("10.1.0.0/16"),
        "the CIDR that covered the one taken out:\n{changed}"
    );
}

fn loading_sets_without_table_names_the_remedy() {
    let netns = namespace();
    let refused = netns
        .run(|| kernel::sets::load(&some_sets().replace_script()))
        .unwrap();
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("run `iptables-init install` first"), "{text}");
}

fn uninstall_restores_bridge_nf_call_settings() {
    const READ: &str = "cat /proc/sys/net/bridge/bridge-nf-call-iptables /proc/sys/net/bridge/bridge-nf-call-ip6tables";
    for (before, install, installed) in [
        ("1\n1\n", "install --bridge cni0", "0\n0\n"),
        ("0\n1\n", "install --bridge cni0", "0\n0\n"),
        ("0\n0\n", "install --bridge cni0", "0\n0\n"),
        ("1\n1\n", "install", "1\n1\n"),
    ] {
        let netns = namespace();
        let values: Vec<_> = before.split_whitespace().collect();
        for (name, value) in ["iptables", "ip6tables"].iter().zip(values) {
            let name = format!("bridge/bridge-nf-call-{name}");
            netns.set_sysctls(&[(&name, value)]).unwrap();
        }
        init(&netns, install).ok();
        assert_eq!(sh(&netns, READ), installed, "{install}, {before}");
        let again = init(&netns, install).ok();
        assert_eq!(again, "already installed; nothing changed\n");
        // What is noted survives other flags and another layout.
        init(&netns, &format!("{install} --fail open")).ok();
        init(&netns, "uninstall").ok();
        assert_eq!(sh(&netns, READ), before, "{install}");
    }
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

fn unprivileged_install_names_remedy_and_print_works() {
    let netns = namespace();
    let unprivileged = |call: &str| {
        let mut command = netns.command("setpriv");
        command.args([
            "--bounding-set",
            "-net_admin",
            "--inh-caps=-all",
            "--",
            INIT,
            call,
        ]);
        Ran::from(command)
    };
    for call in ["check", "install", "uninstall"] {
        let ran = unprivileged(call);
        assert!(!ran.success, "{call}");
        let text = ran.stdout + &ran.stderr;
        assert!(
            text.contains("run as root or with CAP_NET_ADMIN"),
            "{call}: {text}"
        );
    }
    let printed = unprivileged("print").ok();
    assert!(printed.contains("table inet portreeve {"), "{printed}");
}

fn wrong_flags_are_usage_errors() {
    for flags in [
        "",
        "install --frobnicate",
        "install --mark-mask 0x7",
        "install --mark-mask red",
        "install --proxy-port 0",
        "install --queues 0",
        "install --fail ajar",
        "install --bridge a_name_that_is_too_long",
        "install --bridge cni0,a/b",
        "start",
    ] {
        let ran = init(&namespace(), flags);
        assert_eq!(ran.code, Some(2), "{flags}: {}", ran.stderr);
    }
}

fn init_ignores_empty_environment_variables() {
    let netns = namespace();
    let empty = "PROXY_PORT QUEUE QUEUES MARK_MASK BRIDGE FAIL"
        .split(' ')
        .map(|flag| format!("export PORTREEVE_{flag}=; "))
        .collect::<String>();
    sh(&netns, &format!("{empty} iptables-init install"));
    assert_eq!(init(&netns, "check").ok(), "all is in place\n");
}

fn loopback_down_names_the_remedy() {
    let netns = namespace();
    sh(&netns, "ip link set lo down");
    let ran = init(&netns, "install");
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("ip link set lo up"), "{}", ran.stderr);
    sh(&netns, "ip link set lo up; iptables-init install");
    assert_eq!(init(&netns, "check").ok(), "all is in place\n");
}

fn disabled_ipv6_skips_only_ipv6_routing() {
    let netns = namespace();
    sh(&netns, "sysctl -qw net.ipv6.conf.all.disable_ipv6=1");
    init(&netns, "install").ok();
    let said = init(&netns, "check").ok();
    assert!(said.contains("note: IPv6 is disabled"), "{said}");
    assert!(!sh(&netns, "ip -6 rule").contains("15001"));
    init(&netns, "uninstall").ok();
}

fn fail_closed_drops_isolated_traffic_without_a_daemon() {
    let lab = Lab::new("install --fail closed", NonIsolated::Nobody);
    for (tcp, udp) in lab.a_to_b() {
        assert!(matches!(tcp, Outcome::TimedOut), "{tcp:?}");
        assert!(matches!(udp, UdpOutcome::TimedOut), "{udp:?}");
    }
    let counter = sh(
        lab.node.netns(),
        "nft list counter inet portreeve no_daemon",
    );
    assert!(!counter.contains("packets 0"), "{counter}");
}

fn fail_open_passes_all_traffic_without_a_daemon() {
    let lab = Lab::new("install --fail open", NonIsolated::Nobody);
    for (tcp, udp) in lab.a_to_b() {
        assert!(matches!(tcp, Outcome::Connected { .. }), "{tcp:?}");
        assert!(matches!(udp, UdpOutcome::Answered { .. }), "{udp:?}");
    }
}

fn non_isolated_pods_keep_access_without_a_daemon() {
    let lab = Lab::new("install --fail closed", NonIsolated::Both);
    for (tcp, udp) in lab.a_to_b() {
        assert!(matches!(tcp, Outcome::Connected { .. }), "{tcp:?}");
        assert!(matches!(udp, UdpOutcome::Answered { .. }), "{udp:?}");
    }
}

fn held_packets_wait_in_the_configured_queues() {
    let lab = Lab::new("install --queue 31 --queues 2", NonIsolated::Nobody);
    let node = lab.node.netns();
    let _queues: Vec<OwnedFd> = [31, 32]
        .map(|number| node.run(|| queue(number)).unwrap())
        .into();
    for address in lab.b.addresses() {
        let waiting = lab.waiting();
        let outcome = lab
            .a
            .ask_udp(SocketAddr::new(address, 90), b"?", SOON)
            .unwrap();
        assert!(matches!(outcome, UdpOutcome::TimedOut), "{outcome:?}");
        wait_until(DEADLINE, "a packet to wait in queue 31 or 32", || {
            lab.waiting() > waiting
        })
        .unwrap();
    }
}

fn check_and_reinstall_keep_queued_packets() {
    let flags = "--queue 31 --queues 2";
    let lab = Lab::new(&format!("install {flags}"), NonIsolated::Nobody);
    let node = lab.node.netns();
    let _queues = [31, 32].map(|number| node.run(|| queue(number)).unwrap());
    for address in lab.b.addresses() {
        let _unanswered = lab.a.ask_udp(SocketAddr::new(address, 90), b"?", SOON);
    }
    wait_until(DEADLINE, "both datagrams to wait", || lab.waiting() == 2).unwrap();
    for call in ["check", "install", "print"] {
        init(node, &format!("{call} {flags}")).ok();
        assert_eq!(lab.waiting(), 2, "after `{call}`");
    }
}

/// The bound is 10,000 packets a second; here the destination has used up its own.
fn full_source_rate_set_limits_by_destination() {
    let lab = Lab::new("install --queue 31 --queues 2", NonIsolated::Nobody);
    let node = lab.node.netns();
    let _queues = [31, 32].map(|number| node.run(|| queue(number)).unwrap());
    let sources: Vec<String> = (0..=u16::MAX)
        .map(|n| {
            let [high, low] = n.to_be_bytes();
            format!("198.18.{high}.{low} timeout 1h")
        })
        .collect();
    for some in sources.chunks(4096) {
        load(
            node,
            &format!(
                "add element inet portreeve source_rate4 {{ {} }}",
                some.join(", ")
            ),
        );
    }
    let b = lab.b.ipv4();
    let spent = format!("{b} limit rate over 1/day burst 1 packets timeout 1h");
    load(
        node,
        &format!("add element inet portreeve destination_rate4 {{ {spent} }}"),
    );
    for _ in 0..3 {
        let _unanswered = lab.a.ask_udp(SocketAddr::new(b.into(), 90), b"?", SOON);
    }
    let flood = || sh(node, "nft list counter inet portreeve rate_limited");
    assert!(flood().contains("packets 2 "), "{}", flood());
    // The other family has room.
    let v6 = SocketAddr::new(lab.b.ipv6().into(), 90);
    let _unanswered = lab.a.ask_udp(v6, b"?", SOON);
    wait_until(DEADLINE, "both datagrams to wait", || lab.waiting() == 2).unwrap();
}

fn check_names_all_sysctls_that_break_the_redirect() {
    // Queued packets pass, so that a listener alone is all the daemon that is needed.
    let lab = Lab::new("install --fail open", NonIsolated::Nobody);
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
            init(node, "check --fail open").success,
            works,
            "{sysctl}: check"
        );
        node.set_sysctls(&[(name, before.unwrap().unwrap().trim())])
            .unwrap();
    }
}

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    settings: Settings,
}

/// A node with two pods that nobody policed yet, and the redirect on it.
struct Lab {
    _cluster: Cluster,
    node: Host,
    a: Host,
    b: Host,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum NonIsolated {
    Nobody,
    Both,
}

impl Lab {
    fn new(install: &str, non_isolated: NonIsolated) -> Self {
        let cluster = Cluster::builder()
            .nodes(1)
            .pod(PodSpec::new("x", "a").node(0))
            .pod(PodSpec::new("x", "b").node(0))
            .build()
            .unwrap();
        let (node, a, b) = (cluster.node(0), cluster.pod("x/a"), cluster.pod("x/b"));
        b.serve(&[80]).unwrap();
        b.serve_udp(&[90]).unwrap();
        init(node.netns(), install).ok();
        let pods: Vec<IpAddr> = a.addresses().into_iter().chain(b.addresses()).collect();
        let mut sets = Sets::default();
        sets.pods
            .extend(pods.iter().map(|pod| ipnet::IpNet::from(*pod)));
        sets.selves.extend(&pods);
        if non_isolated == NonIsolated::Both {
            sets.egress_non_isolated.extend(&pods);
            sets.ingress_non_isolated.extend(&pods);
        }
        load(node.netns(), &sets.replace_script());
        Self {
            _cluster: cluster,
            node,
            a,
            b,
        }
    }

    /// What becomes of a connection and of a datagram, in both families.
    fn a_to_b(&self) -> Vec<(Outcome, UdpOutcome)> {
        let ask = |address| {
            let tcp = self.a.connect(SocketAddr::new(address, 80), SOON).unwrap();
            (
                tcp,
                self.a
                    .ask_udp(SocketAddr::new(address, 90), b"?", SOON)
                    .unwrap(),
            )
        };
        self.b.addresses().into_iter().map(ask).collect()
    }

    /// How many packets wait in queues 31 and 32.
    fn waiting(&self) -> u32 {
        let read = || fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue");
        let queues = self.node.netns().run(read).unwrap().unwrap();
        let rows = queues
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        rows.filter(|row| ["31", "32"].contains(&row[0]))
            .map(|row| row[2].parse::<u32>().unwrap())
            .sum()
    }
}

/// Takes packets of an NFQUEUE and never answers (linux/netfilter/nfnetlink_queue.h).
fn queue(number: u16) -> OwnedFd {
    let protocol = SockProtocol::NetlinkNetFilter;
    let fd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        protocol,
    )
    .unwrap();
    let bind = [&[8, 0, 1, 0], &[1, 0, 0, 0][..]].concat();
    let whole_packets = [&[9, 0, 2, 0], &[0, 0, 0xff, 0xff, 2, 0, 0, 0][..]].concat();
    for attribute in [bind, whole_packets] {
        let length = u32::try_from(20 + attribute.len()).unwrap();
        let message = [
            &length.to_ne_bytes()[..],
            &(3 << 8 | 2_u16).to_ne_bytes(),
            &1_u16.to_ne_bytes(),
            &[0; 8],
            &[0, 0],
            &number.to_be_bytes(),
            &attribute,
        ];
        sendto(
            fd.as_raw_fd(),
            &message.concat(),
            &NetlinkAddr::new(0, 0),
            MsgFlags::empty(),
        )
        .unwrap();
    }
    fd
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

/// A namespace that forwards, as a node's does.
fn namespace() -> Netns {
    let netns = Netns::new().unwrap();
    sh(
        &netns,
        "ip link set lo up; sysctl -qw net.ipv4.ip_forward=1",
    );
    netns
}

fn some_sets() -> Sets {
    let addresses = |list: &[&str]| list.iter().map(|text| address(text)).collect();
    Sets {
        pods: [
            "10.1.0.0/16",
            "10.1.2.0/24",
            "10.3.0.0/24",
            "10.3.1.0/24",
            "10.3.2.0/24",
            "fd00:1::/64",
        ]
        .map(|net| net.parse().unwrap())
        .into(),
        cluster: ["10.0.0.0/8", "fd00::/16"]
            .map(|net| net.parse().unwrap())
            .into(),
        egress_non_isolated: addresses(&["10.1.2.3", "10.1.2.4", "fd00:1::3"]),
        ingress_non_isolated: addresses(&["10.1.2.3", "fd00:1::4"]),
        selves: addresses(&["10.1.2.3", "fd00:1::3"]),
        own_node_judged: true,
        bridged: Some(Groups::Pass),
    }
}

fn links() -> Links {
    Links {
        pods: ["cali0a@x", "1veth"].map(str::to_owned).into(),
        // A link that is there, and one that has gone.
        link_sources: [1, 4711]
            .map(|index| (index, "10.1.2.3".parse().unwrap()))
            .into(),
        ..Links::default()
    }
}

fn fill_sets(netns: &Netns) {
    load(netns, &kernel::sets::pod_links_script(&links()));
    load(netns, &all_sets());
    // Where bridges have ports of pods, `check` looks at these.
    for name in ["iptables", "ip6tables"] {
        let name = format!("bridge/bridge-nf-call-{name}");
        netns.set_sysctls(&[(&name, "0")]).unwrap();
    }
}

/// The script that fills every set that is kept when the layout changes.
fn all_sets() -> String {
    let bridge = Bridge {
        name: "cni0".into(),
        address: "0a:58:0a:f4:00:01".into(),
        addresses: ["10.3.0.1", "fd00:1::1"].map(address).into(),
        ports: ["pod0", "ip", "3"]
            .map(|name| Port {
                name: name.into(),
                index: 1,
                address: "0a:58:0a:f4:00:01".into(),
                peer: None,
            })
            .into(),
        looks_into_ip: false,
        learns_unseen: false,
    };
    let ends = ["pod0", "ip", "3"]
        .into_iter()
        .zip(5..)
        .map(|(port, n)| End {
            port: port.into(),
            link: [2, 0, 0, 0, 0, n],
            addresses: vec![
                address(&format!("10.3.0.{n}")),
                address(&format!("fd00:1::{n}")),
            ],
        });
    let bridges = [bridge];
    let owners = Owners::default().now(&bridges, &ends.collect::<Vec<_>>());
    some_sets().replace_script() + &ports_script(&bridges) + &owners.script()
}

fn load(netns: &Netns, script: &str) {
    netns.run(|| kernel::sets::load(script)).unwrap().unwrap();
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Everything that `install` could have changed: netfilter, routing and every sysctl.
fn dump(netns: &Netns) -> String {
    let tables = sh(
        netns,
        "nft list ruleset; for f in -4 -6; do ip $f rule; ip $f route show table all; done",
    );
    let mut sysctls = BTreeMap::new();
    netns
        .run(|| read_tree(Path::new("/proc/sys/net"), &mut sysctls))
        .unwrap();
    // How many connections are tracked is no setting.
    sysctls.retain(|name, _| !name.ends_with("nf_conntrack_count"));
    let sysctls: String = sysctls
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    tables + &sysctls
}

fn read_tree(directory: &Path, into: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(directory).unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() {
            read_tree(&entry.path(), into);
        } else if let Ok(value) = fs::read(entry.path()) {
            let value = String::from_utf8_lossy(&value).into_owned();
            into.insert(entry.path().display().to_string(), value);
        }
    }
}

/// The lines in order: chains that were made at another time are listed elsewhere.
fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<_> = text.lines().map(str::trim).collect();
    lines.sort_unstable();
    lines
}

fn init(netns: &Netns, arguments: &str) -> Ran {
    let mut command = netns.command(INIT);
    command.args(arguments.split_whitespace());
    Ran::from(command)
}

fn sh(netns: &Netns, script: &str) -> String {
    let programs = Path::new(INIT).parent().unwrap().display();
    let mut command = netns.command("sh");
    command.args(["-ec", &format!("PATH=$PATH:{programs}; {script}")]);
    Ran::from(command).ok()
}

/// How a program ended and what it said.
#[derive(Debug)]
struct Ran {
    success: bool,
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl From<lab::Command> for Ran {
    fn from(command: lab::Command) -> Self {
        let output = command.output().unwrap();
        Self {
            success: output.status.success(),
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ran {
    /// Its standard output.
    #[track_caller]
    fn ok(self) -> String {
        assert!(self.success, "{}{}", self.stdout, self.stderr);
        self.stdout
    }
}
