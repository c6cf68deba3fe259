//! The daemons' decisions: the records of `--trace-file`, grouped by reason.
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

/// How long records may take to reach the file.
const WRITTEN: Duration = Duration::from_secs(2);

/// Connections that were decided for one reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) count: usize,
    /// `x/a → y/b:80` of the first of them.
    pub(super) example: String,
    /// The nodes whose daemons decided.
    pub(super) nodes: Vec<String>,
}

/// All decisions so far.
#[derive(Debug, Default)]
pub(super) struct Decisions {
    /// By reason.
    pub(super) denied: BTreeMap<String, Group>,
    pub(super) allowed: BTreeMap<String, Group>,
}

impl Decisions {
    /// Reads the records once there are `denied` denials, or after a timeout.
    pub(super) fn read(files: &[PathBuf], denied: usize) -> Self {
        let mut decisions = Self::of(files);
        // Too few are not an error here: the caller counts.
        let _in_time = lab::wait_until(WRITTEN, "the daemons' records", || {
            decisions = Self::of(files);
            count(&decisions.denied) >= denied
        });
        decisions
    }

    fn of(files: &[PathBuf]) -> Self {
        let mut decisions = Self::default();
        for file in files {
            let text = fs::read_to_string(file).unwrap_or_default();
            // The last line may be incomplete.
            let records = text
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok());
            records.for_each(|record: Value| decisions.add(&record));
        }
        decisions
    }

    fn add(&mut self, record: &Value) {
        let text = |key: &str| record[key].as_str().unwrap_or_default();
        let groups = match text("verdict") {
            "deny" => &mut self.denied,
            "allow" => &mut self.allowed,
            _ => return,
        };
        let reason = text("reason");
        let reason = reason
            .strip_prefix("Denied: ")
            .or_else(|| reason.strip_prefix("Allowed: "));
        let reason = reason
            .unwrap_or_else(|| text("reason"))
            .trim_end_matches('.');
        let end = |side: &str| match &record[format!("{side}.k8s.pod.name")] {
            Value::String(pod) => {
                format!("{}/{pod}", text(&format!("{side}.k8s.namespace.name")))
            }
            _ => text(&format!("{side}.address")).to_owned(),
        };
        let group = groups.entry(reason.to_owned()).or_default();
        group.count += 1;
        if group.count == 1 {
            let port = &record["destination.port"];
            group.example = format!("{} → {}:{port}", end("source"), end("destination"));
        }
        let node = text("k8s.node.name");
        if !group.nodes.iter().any(|known| known == node) {
            group.nodes.push(node.to_owned());
        }
    }
}

/// The number of decisions in all groups.
pub(super) fn count(groups: &BTreeMap<String, Group>) -> usize {
    groups.values().map(|group| group.count).sum()
}

/// The groups, the most frequent first.
pub(super) fn ranked(groups: &BTreeMap<String, Group>) -> Vec<(&str, &Group)> {
    let mut ranked: Vec<_> = groups
        .iter()
        .map(|(reason, group)| (reason.as_str(), group))
        .collect();
    ranked.sort_by_key(|(_, group)| std::cmp::Reverse(group.count));
    ranked
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn records_are_grouped_by_reason() {
        let mut decisions = Decisions::default();
        for (node, from) in [("n1", "a"), ("n2", "b"), ("n1", "c")] {
            decisions.add(&json!({
                "verdict": "deny", "reason": "Denied: so it is.", "k8s.node.name": node,
                "source.k8s.namespace.name": "x", "source.k8s.pod.name": from,
                "destination.address": "10.0.0.9", "destination.port": 80,
            }));
        }
        let expected = Group {
            count: 3,
            example: "x/a → 10.0.0.9:80".into(),
            nodes: vec!["n1".into(), "n2".into()],
        };
        assert_eq!(ranked(&decisions.denied), [("so it is", &expected)]);
        assert!(decisions.allowed.is_empty());
    }
}
