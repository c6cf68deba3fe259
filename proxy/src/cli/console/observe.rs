//! `portreeve observe`: decisions as this node's daemon makes them.
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde_json::Value;

use super::client::ask;
use super::format::{coloured, end, harmless, policies, text};
use super::{ConsoleError, Daemon, Output, run};

/// Print decisions as they are made, until interrupted: source, destination, verdict and policies.
#[derive(Args, Debug)]
pub(crate) struct ObserveArgs {
    /// Only decisions about this pod, at either end
    #[arg(long, value_name = "NS/NAME")]
    pod: Option<String>,
    /// Only decisions about pods of this namespace, at either end
    #[arg(long, value_name = "N")]
    namespace: Option<String>,
    /// Only decisions with this verdict
    #[arg(long, value_enum)]
    verdict: Option<Verdict>,
    /// How to show them
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
    #[command(flatten)]
    daemon: Daemon,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Verdict {
    Allow,
    Deny,
    /// Allowed once, severed by a later change.
    Sever,
}

/// Runs `portreeve observe`.
pub(crate) fn observe(args: &ObserveArgs) -> ExitCode {
    run(follow(args))
}

async fn follow(args: &ObserveArgs) -> Result<ExitCode, ConsoleError> {
    let verdict = args.verdict.map(|verdict| match verdict {
        Verdict::Allow => "allow",
        Verdict::Deny => "deny",
        Verdict::Sever => "sever",
    });
    let parameters = [
        ("pod", args.pod.as_deref()),
        ("namespace", args.namespace.as_deref()),
        ("verdict", verdict),
    ];
    let mut answer = ask(args.daemon.admin, "/observe", &parameters).await?;
    let mut out = io::stdout().lock();
    let terminal = io::stdout().is_terminal();
    let mut waiting = Vec::new();
    while let Some(part) = answer.part().await? {
        waiting.extend_from_slice(&part);
        while let Some(at) = waiting.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = waiting.drain(..=at).collect();
            let line = String::from_utf8_lossy(line.trim_ascii());
            if line.is_empty() {
                continue;
            }
            let shown = match args.output {
                Output::Json => line.into_owned(),
                Output::Text => sentence(&serde_json::from_str(&line)?, terminal),
            };
            writeln!(out, "{shown}")?;
        }
        out.flush()?;
    }
    eprintln!("portreeve: the daemon has stopped");
    Ok(ExitCode::SUCCESS)
}

/// `12:00:00.123456 DENY x/a 10.0.0.1:4711 -> x/b 10.0.0.2:80 TCP, ingress: x/deny-all`
fn sentence(decision: &Value, terminal: bool) -> String {
    if let Some(lost) = decision.get("lost") {
        return format!(
            "({lost} decisions are not shown: they came faster than they could be read)"
        );
    }
    let time = text(decision, "time");
    let time = time
        .split_once('T')
        .map_or(time, |(_, time)| time.trim_end_matches('Z'));
    let word = text(decision, "verdict").to_ascii_uppercase();
    let rest = format!(
        "{} -> {} {}, {}: {}",
        end(decision, "source"),
        end(decision, "destination"),
        text(decision, "protocol"),
        text(decision, "direction"),
        policies(decision),
    );
    format!("{time} {} {}", coloured(&word, terminal), harmless(&rest))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn decisions_and_losses_take_one_line_each() {
        let decision = json!({
            "time": "2026-01-01T12:00:00.123456Z", "verdict": "deny", "direction": "ingress",
            "policies": ["x/deny-all"], "protocol": "TCP",
            "source.address": "10.0.0.1", "source.port": 4711,
            "source.k8s.namespace.name": "x", "source.k8s.pod.name": "a",
            "destination.address": "10.0.0.2", "destination.port": 80,
        });
        assert_eq!(
            sentence(&decision, false),
            "12:00:00.123456 DENY x/a 10.0.0.1:4711 -> 10.0.0.2:80 TCP, ingress: x/deny-all"
        );
        assert!(sentence(&json!({ "lost": 12 }), false).contains("12 decisions"));
    }
}
