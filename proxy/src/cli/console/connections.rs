//! `portreeve connections`: the current connections of this node.
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Args;
use comfy_table::{CellAlignment, Table};
use serde_json::Value;

use super::client::ask;
use super::format::{end, harmless, policies, text};
use super::{ConsoleError, Daemon, Output, run};

/// List the current connections of this node.
#[derive(Args, Debug)]
pub(crate) struct ConnectionsArgs {
    /// Only connections of this pod, at either end
    #[arg(long, value_name = "NS/NAME")]
    pod: Option<String>,
    /// Only connections of pods of this namespace, at either end
    #[arg(long, value_name = "N")]
    namespace: Option<String>,
    /// How to answer
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
    #[command(flatten)]
    daemon: Daemon,
}

/// Runs `portreeve connections`.
pub(crate) fn connections(args: &ConnectionsArgs) -> ExitCode {
    run(answer(args))
}

async fn answer(args: &ConnectionsArgs) -> Result<ExitCode, ConsoleError> {
    let parameters = [
        ("pod", args.pod.as_deref()),
        ("namespace", args.namespace.as_deref()),
    ];
    let answer = ask(args.daemon.admin, "/connections", &parameters).await?;
    let said = answer.text().await?;
    let mut out = io::stdout().lock();
    match args.output {
        Output::Json => write!(out, "{said}")?,
        Output::Text => write!(out, "{}", table(&serde_json::from_str::<Vec<_>>(&said)?))?,
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

fn table(connections: &[Value]) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header([
        "STAGE", "SINCE", "FROM", "TO", "PROTOCOL", "PATH", "SENT", "RECEIVED", "POLICIES",
    ]);
    for it in connections {
        let bytes = |key: &str| it.get(key).and_then(Value::as_u64).unwrap_or(0).to_string();
        let row = [
            text(it, "stage").to_owned(),
            text(it, "start_time").to_owned(),
            end(it, "source"),
            end(it, "destination"),
            text(it, "protocol").to_owned(),
            text(it, "path").to_owned(),
            bytes("bytes.sent"),
            bytes("bytes.received"),
            policies(it),
        ];
        table.add_row(row.map(|cell| harmless(&cell)));
    }
    for column in [6, 7] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    format!("{}\n", table.trim_fmt())
}
