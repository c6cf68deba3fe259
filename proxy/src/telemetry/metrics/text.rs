//! From OpenMetrics text, which the library writes, to the Prometheus text format, which everything
//! reads: <https://prometheus.io/docs/instrumenting/exposition_formats/>.

/// The same metrics in the Prometheus text format, version 0.0.4: a family is named as its samples
/// are, there are no units, no end mark, and an info is a gauge.
pub(super) fn prometheus(openmetrics: &str) -> String {
    let mut out = String::with_capacity(openmetrics.len());
    let mut help = None;
    for line in openmetrics.lines() {
        if let Some(named) = line.strip_prefix("# HELP ") {
            help = named.split_once(' ');
        } else if let Some((family, kind)) = line
            .strip_prefix("# TYPE ")
            .and_then(|named| named.split_once(' '))
        {
            let (ending, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                other => ("", other),
            };
            if let Some((_, text)) = help.take() {
                out.push_str(&format!("# HELP {family}{ending} {text}\n"));
            }
            out.push_str(&format!("# TYPE {family}{ending} {kind}\n"));
        } else if !line.starts_with('#') {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openmetrics_becomes_prometheus_text_format() {
        let openmetrics = "# HELP a_build Of what.\n# TYPE a_build info\na_build_info{version=\"1\"} 1\n\
             # HELP a_hits Hits.\n# TYPE a_hits counter\na_hits_total{x=\"#\"} 2\n\
             # HELP a_wait_seconds Wait.\n# TYPE a_wait_seconds histogram\n# UNIT a_wait_seconds seconds\na_wait_seconds_sum 0.5\n\
             # EOF\n";
        assert_eq!(
            prometheus(openmetrics),
            "# HELP a_build_info Of what.\n# TYPE a_build_info gauge\na_build_info{version=\"1\"} 1\n\
             # HELP a_hits_total Hits.\n# TYPE a_hits_total counter\na_hits_total{x=\"#\"} 2\n\
             # HELP a_wait_seconds Wait.\n# TYPE a_wait_seconds histogram\na_wait_seconds_sum 0.5\n"
        );
    }
}
