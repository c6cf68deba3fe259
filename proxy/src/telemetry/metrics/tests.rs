//! What a scrape shows of what was counted.
use std::sync::atomic::Ordering;

use super::*;

#[test]
fn every_cause_has_the_counter_of_its_name() {
    let metrics = Metrics::new();
    for (cause, times) in DropReason::ALL.into_iter().zip(1..) {
        (0..times).for_each(|_| metrics.dropped(cause));
    }
    let text = metrics.render(&Readings::default()).unwrap();
    for (cause, times) in DropReason::ALL.into_iter().zip(1..) {
        let line = format!(
            "portreeve_dropped_packets_total{{reason=\"{}\"}} {times}\n",
            cause.label()
        );
        assert!(text.contains(&line), "{line} is not in\n{text}");
    }
}

#[test]
fn connection_bytes_are_counted_once() {
    let (metrics, moved) = (Metrics::new(), Moved::default());
    moved.sent.store(100, Ordering::Relaxed);
    metrics.moved(&moved);
    metrics.moved(&moved);
    moved.sent.store(150, Ordering::Relaxed);
    moved.received.store(7, Ordering::Relaxed);
    metrics.moved(&moved);
    let text = metrics.render(&Readings::default()).unwrap();
    for line in [
        "portreeve_bytes_total{direction=\"sent\",path=\"spliced\"} 150\n",
        "portreeve_bytes_total{direction=\"received\",path=\"spliced\"} 7\n",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[test]
fn every_documented_metric_exists_from_the_start() {
    const KUBERNETES: [&str; 2] = ["portreeve_watch_", "portreeve_state_from_snapshot"];
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
    let page = std::fs::read_to_string(page).unwrap();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
    let names = rows.filter_map(|row| row.split('`').next());
    let names: Vec<_> = names
        .filter(|name| name.starts_with("portreeve_"))
        .filter(|name| !KUBERNETES.iter().any(|source| name.starts_with(source)))
        .collect();
    assert!(names.len() > 20, "{names:?}");
    let text = Metrics::new().render(&Readings::default()).unwrap();
    for name in names {
        assert!(text.contains(&format!("# TYPE {name} ")), "{name}");
        let series = [' ', '{', '_'].map(|next| format!("\n{name}{next}"));
        let has = series.iter().any(|series| text.contains(series.as_str()));
        assert!(has, "{name} has no series in\n{text}");
    }
}
