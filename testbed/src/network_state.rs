//! The network settings of a namespace, to compare what was before with what is left.
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use lab::Netns;

/// Everything that the redirect and the daemon could have changed: netfilter, routing and sysctls.
pub fn network_state(netns: &Netns) -> String {
    let mut command = netns.command("sh");
    command.args([
        "-ec",
        "nft list ruleset; for f in -4 -6; do ip $f rule; ip $f route show table all; done",
    ]);
    let said = command.output().unwrap();
    assert!(said.status.success(), "{said:?}");
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
    String::from_utf8(said.stdout).unwrap() + &sysctls
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
