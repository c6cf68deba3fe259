//! The alert rules and the dashboard: they match docs/metrics.md, and promtool accepts them.
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).expect(path)
}

/// The metrics that a text names; a histogram's series count as the histogram.
fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|at: char| !at.is_ascii_alphanumeric() && at != '_');
    words
        .filter(|word| word.starts_with("portreeve_"))
        .map(|word| {
            let histogram = ["_bucket", "_sum", "_count"]
                .into_iter()
                .find_map(|ending| word.strip_suffix(ending));
            histogram.unwrap_or(word).to_owned()
        })
        .collect()
}

/// The metrics that docs/metrics.md has a line for.
fn documented() -> BTreeSet<String> {
    let page = read("docs/metrics.md");
    let lines = page
        .lines()
        .filter(|line| line.starts_with("| `portreeve_"));
    lines
        .filter_map(|line| Some(line.split('`').nth(1)?.to_owned()))
        .collect()
}

fn promtool(arguments: [&str; 3]) {
    let said = Command::new(root().join("lab/tools/promtool"))
        .args(arguments)
        .current_dir(root())
        .output()
        .expect("lab/tools/promtool");
    assert!(
        said.status.success(),
        "promtool {arguments:?}:\n{}{}",
        String::from_utf8_lossy(&said.stdout),
        String::from_utf8_lossy(&said.stderr)
    );
}

#[test]
fn alerts_and_dashboard_name_documented_metrics_only() {
    let documented = documented();
    assert!(documented.len() > 10, "found only {documented:?}");
    for file in ["alerts.yaml", "alerts-test.yaml", "dashboard.json"] {
        let file = format!("deploy/monitoring/{file}");
        let used = named(&read(&file));
        assert!(!used.is_empty(), "{file} names no metric");
        let unknown: Vec<_> = used.difference(&documented).collect();
        assert!(
            unknown.is_empty(),
            "{file} names what docs/metrics.md does not have: {unknown:?}"
        );
    }
}

#[test]
fn documented_metrics_are_in_alerts_or_dashboard() {
    let shown = named(&read("deploy/monitoring/alerts.yaml"))
        .into_iter()
        .chain(named(&read("deploy/monitoring/dashboard.json")))
        .collect();
    let documented = documented();
    let unseen: Vec<_> = documented.difference(&shown).collect();
    assert!(
        unseen.is_empty(),
        "docs/metrics.md has what no panel and no alert looks at: {unseen:?}"
    );
}

#[test]
fn dashboard_can_be_imported_by_grafana() {
    let dashboard: serde_json::Value =
        serde_json::from_str(&read("deploy/monitoring/dashboard.json")).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let mut ids = BTreeSet::new();
    for panel in panels {
        assert!(ids.insert(panel["id"].as_u64()), "an id twice: {panel}");
        assert!(panel["gridPos"]["w"].is_u64(), "no place: {panel}");
        if panel["type"] != "row" {
            let targets = panel["targets"].as_array().expect("targets");
            assert!(targets.iter().all(|it| it["expr"].is_string()), "{panel}");
        }
    }
    assert!(dashboard["uid"].is_string() && dashboard["schemaVersion"].is_u64());
}

#[test]
fn promtool_finds_no_fault_in_the_alert_rules() {
    promtool(["check", "rules", "deploy/monitoring/alerts.yaml"]);
}

#[test]
fn alerts_fire_only_when_they_should() {
    promtool(["test", "rules", "deploy/monitoring/alerts-test.yaml"]);
}
