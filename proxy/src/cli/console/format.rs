//! Formats the daemon's answers about connections for a terminal.
use std::fmt::Write;

use serde_json::Value;

/// `ALLOW`, `DENY` or `SEVER` in the colour of the other commands, on a terminal only.
pub(super) fn coloured(word: &str, terminal: bool) -> String {
    let code = match word {
        "ALLOW" => 32,
        "DENY" => 31,
        _ => 33,
    };
    if crate::cli::ask::coloured(terminal) {
        format!("\x1b[1;{code}m{word}\x1b[0m")
    } else {
        word.to_owned()
    }
}

/// An end: `x/a 10.0.0.1:4711`, or the address alone if it is no pod's.
pub(super) fn end(record: &Value, side: &str) -> String {
    let field = |key: &str| record.get(format!("{side}.{key}"));
    let text = |key: &str| field(key).and_then(Value::as_str);
    let address = text("address").unwrap_or("?");
    let port = field("port").and_then(Value::as_u64).unwrap_or_default();
    let address = if address.contains(':') {
        format!("[{address}]:{port}")
    } else {
        format!("{address}:{port}")
    };
    match (text("k8s.namespace.name"), text("k8s.pod.name")) {
        (Some(namespace), Some(pod)) => format!("{namespace}/{pod} {address}"),
        _ => address,
    }
}

/// The policies that decided: `x/deny-all, x/other`; `-` if none did.
pub(super) fn policies(record: &Value) -> String {
    let listed = record.get("policies").and_then(Value::as_array);
    let mut text = String::new();
    for policy in listed.into_iter().flatten().filter_map(Value::as_str) {
        let comma = if text.is_empty() { "" } else { ", " };
        // A `String` takes all.
        let _ = write!(text, "{comma}{policy}");
    }
    if text.is_empty() {
        "-".to_owned()
    } else {
        text
    }
}

/// A field that is text; empty if there is none.
pub(super) fn text<'a>(record: &'a Value, key: &str) -> &'a str {
    record.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// Escapes control characters, since users choose the names.
pub(super) fn harmless(line: &str) -> String {
    line.chars()
        .map(|at| if at.is_control() { '\u{fffd}' } else { at })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn endpoints_are_shown_by_pod_and_address() {
        let record = json!({
            "source.address": "10.0.0.1", "source.port": 4711,
            "source.k8s.namespace.name": "x", "source.k8s.pod.name": "a",
            "destination.address": "fd00::1", "destination.port": 80,
        });
        assert_eq!(end(&record, "source"), "x/a 10.0.0.1:4711");
        assert_eq!(end(&record, "destination"), "[fd00::1]:80");
    }

    #[test]
    fn terminal_escapes_in_names_are_removed() {
        assert_eq!(harmless("x/\x1b[2Ja"), "x/\u{fffd}[2Ja");
    }
}
