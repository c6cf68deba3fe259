//! The rules and sets as the kernel and the nft of each release take them.
use std::path::Path;
use std::process::Command;

use clap::Parser;
use iptables_init::ruleset::{Kernel, QueueRule, Ruleset};
use kernel::sets::{Groups, Sets};
use testbed::runner::Test;

use crate::support::{
    INIT, Line, Ran, address, all_sets, counting_namespace, init, load, namespace, sh, some_sets,
    sorted,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    nft_native_queue_works_for_any_queue_count,
    each_debians_nft_loads_and_removes_the_rules,
    each_debians_nft_keeps_the_sets_elements,
    check_names_an_nft_that_rejects_the_rules,
    kernel_sets_match_the_scripts,
    loading_sets_without_table_names_the_remedy,
];

const NATIVE: Kernel = Kernel {
    queue_rule: QueueRule::Native,
    bridges: true,
};

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
        "--queues 2 --tcp spliced",
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
