//! Golden tests of all that `install` loads: what the kernel gets is reviewed as text.
//!
//! After a wanted change: `INSTA_UPDATE=always cargo test -p iptables-init --test print`.
use clap::Parser;
use iptables_init::redirect::{Families, script};
use iptables_init::ruleset::{Kernel, QueueRule};
use iptables_init::settings::Settings;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    settings: Settings,
}

/// Everything but the number of queues as by default: that one is the machine's.
fn printed(flags: &str, queue_rule: QueueRule, families: Families) -> String {
    let queues = if flags.contains("--queues") {
        ""
    } else {
        "--queues 2"
    };
    let line = format!("iptables-init {queues} {flags}");
    let line = Line::try_parse_from(line.split_whitespace()).expect("flags of the test");
    let kernel = Kernel {
        queue_rule,
        bridges: true,
    };
    script(&line.settings, kernel, families)
}

/// The lines that `flags` change, as a diff.
fn changed_by(flags: &str, queue_rule: QueueRule) -> String {
    let default = printed("", QueueRule::Target, Families::Both);
    let other = printed(flags, queue_rule, Families::Both);
    let (olds, news): (Vec<_>, Vec<_>) = (default.lines().collect(), other.lines().collect());
    let mut diff = String::new();
    for at in 0..olds.len().max(news.len()) {
        let (old, new) = (olds.get(at), news.get(at));
        // The hash says that something changed, not what.
        if old != new && !old.is_some_and(|line| line.contains("portreeve layout")) {
            diff.extend(old.map(|line| format!("-{}\n", line.trim())));
            diff.extend(new.map(|line| format!("+{}\n", line.trim())));
        }
    }
    diff
}

/// The lines that only the default has, and those that only `flags` has, without the hash and in no place.
fn lines_changed_by(flags: &str) -> String {
    let [default, other] = ["", flags].map(|it| printed(it, QueueRule::Target, Families::Both));
    let only = |sign, these: &str, those: &str| {
        let those: Vec<_> = those.lines().collect();
        let own = these
            .lines()
            .filter(|it| !those.contains(it) && !it.contains("portreeve layout"));
        own.map(|it| format!("{sign}{}\n", it.trim()))
            .collect::<String>()
    };
    only('-', &default, &other) + &only('+', &other, &default)
}

#[test]
fn default_ruleset_matches_the_snapshot() {
    insta::assert_snapshot!("default", printed("", QueueRule::Target, Families::Both));
}

#[test]
fn native_nft_queue_needs_no_netlink_rule() {
    insta::assert_snapshot!("native_queue", changed_by("", QueueRule::Native));
}

#[test]
fn single_queue_is_not_a_range() {
    insta::assert_snapshot!("one_queue", changed_by("--queues 1", QueueRule::Native));
}

#[test]
fn another_mask_changes_marks_and_nothing_else() {
    insta::assert_snapshot!(
        "mark_mask",
        changed_by("--mark-mask 0xf0000", QueueRule::Target)
    );
}

#[test]
fn other_ports_and_queues_appear_in_the_rules() {
    let flags = "--proxy-port 7000 --queue 200 --queues 8";
    insta::assert_snapshot!("ports", changed_by(flags, QueueRule::Native));
}

#[test]
fn fail_open_passes_without_listener_or_queue() {
    let both = [QueueRule::Target, QueueRule::Native]
        .map(|queue_rule| changed_by("--fail open", queue_rule));
    insta::assert_snapshot!("fail_open", both.join("\nwith nft's own queue:\n"));
}

#[test]
fn tcp_spliced_sends_every_syn_to_the_proxy() {
    insta::assert_snapshot!("tcp_spliced", lines_changed_by("--tcp spliced"));
}

#[test]
fn tcp_kernel_has_no_part_of_the_proxy() {
    insta::assert_snapshot!("tcp_kernel", lines_changed_by("--tcp kernel"));
    let text = printed("--tcp kernel", QueueRule::Native, Families::Both);
    let mut rules = text.lines().filter(|it| !it.trim().starts_with('#'));
    let of_proxy = |line: &&str| {
        ["tproxy", "15001", "ip -", "socket"]
            .iter()
            .any(|it| line.contains(it))
    };
    assert_eq!(rules.find(of_proxy), None);
}

#[test]
fn named_bridge_only_adds_sysctls_to_disable() {
    insta::assert_snapshot!("bridge", changed_by("--bridge cni0", QueueRule::Target));
}

#[test]
fn kernel_without_bridge_family_gets_no_bridge_table() {
    let line = Line::try_parse_from(["x", "--queues", "2"]).expect("flags of the test");
    let kernel = Kernel {
        queue_rule: QueueRule::Target,
        bridges: false,
    };
    let without = script(&line.settings, kernel, Families::Both);
    assert!(without.contains("table inet portreeve {"), "{without}");
    assert!(!without.contains("table bridge"), "{without}");
}

#[test]
fn ruleset_without_ipv6_omits_only_its_routing() {
    let both = printed("", QueueRule::Target, Families::Both);
    let v4 = printed("", QueueRule::Target, Families::OnlyV4);
    let without: Vec<_> = both
        .lines()
        .filter(|line| !line.starts_with("ip -6"))
        .collect();
    assert_eq!(v4.lines().collect::<Vec<_>>(), without);
}

#[test]
fn ruleset_has_no_unfilled_placeholders() {
    for queue_rule in [QueueRule::Target, QueueRule::Native] {
        let text = printed("", queue_rule, Families::Both);
        assert!(
            !text.contains('$') && !text.contains("no value for"),
            "{text}"
        );
    }
}
