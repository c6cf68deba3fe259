//! Installing, installing again, and uninstalling.

use kernel::pod_links::Links;
use lab::Netns;
use testbed::network_state;
use testbed::runner::Test;

use crate::support::{INIT, Ran, all_sets, counting_namespace, init, load, namespace, sh, sorted};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    uninstall_restores_the_namespace_exactly,
    installing_again_changes_nothing,
    partial_installs_can_be_repaired_and_uninstalled,
    uninstall_restores_conntrack_accounting,
    new_flags_replace_rules_and_keep_set_elements,
    uninstall_restores_bridge_nf_call_settings,
    new_layout_replaces_table_and_keeps_set_elements,
    unprivileged_install_names_remedy_and_print_works,
    wrong_flags_are_usage_errors,
    init_ignores_empty_environment_variables,
    loopback_down_names_the_remedy,
    disabled_ipv6_skips_only_ipv6_routing,
];

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
    let before = network_state(&netns);
    for flags in [
        "",
        "--fail open",
        "--mark-mask 0xf0000 --proxy-port 7000 --queue 7 --queues 3",
        "--bridge cni0",
    ] {
        init(&netns, &format!("install {flags}")).ok();
        assert_ne!(
            network_state(&netns),
            before,
            "{flags}: install did nothing"
        );
        // It takes out what is there, whatever flags it is given itself.
        assert_eq!(init(&netns, "uninstall").ok(), "uninstalled\n");
        assert_eq!(network_state(&netns), before, "{flags}");
        assert_eq!(
            init(&netns, "uninstall").ok(),
            "was not installed; nothing changed\n"
        );
    }
}

fn installing_again_changes_nothing() {
    let netns = namespace();
    assert_eq!(init(&netns, "install").ok(), "installed\n");
    let (handles, before) = (sh(&netns, "nft -a list ruleset"), network_state(&netns));
    assert_eq!(
        init(&netns, "install").ok(),
        "already installed; nothing changed\n"
    );
    assert_eq!(
        sh(&netns, "nft -a list ruleset"),
        handles,
        "a rule was created again"
    );
    assert_eq!(network_state(&netns), before);
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

fn partial_installs_can_be_repaired_and_uninstalled() {
    let reference = counting_namespace();
    let bare = network_state(&reference);
    init(&reference, "install").ok();
    let whole = network_state(&reference);
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
        assert_eq!(
            sorted(&network_state(&netns)),
            sorted(&whole),
            "after `{damage}`"
        );
        init(&netns, "check").ok();
        sh(&netns, damage);
        init(&netns, "uninstall").ok();
        assert_eq!(network_state(&netns), bare, "after `{damage}`");
    }
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
        // A hooked chain that is created again would flush every packet that waits in a queue.
        assert_eq!(
            sh(&netns, chains),
            before,
            "{flags}: a chain was created again"
        );
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
        # A pod has just begun a flow: the rate of its source is counted from zero.
        nft add element inet portreeve source_rate4 '{ 10.0.0.1 limit rate over 1/second }'",
    );
    init(&netns, "install").ok();
    init(&netns, "check").ok();
    assert!(!sh(&netns, "nft list table inet portreeve").contains("gone"));
    // Where pods' addresses are routed to is not carried over: a shortcut, which the daemon writes again.
    load(&netns, &kernel::sets::pod_links_script(&links()));
    assert_eq!(
        sorted(&sh(&netns, "nft list sets; nft list maps")),
        sorted(&sets)
    );
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
