//! `portreeve explain`: whether X may connect to Y, and why, under the daemon's current policy.
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::Args;
use policy::Protocol;

use super::client::ask;
use super::format::coloured;
use super::{ConsoleError, Daemon, Output, run};

/// Check whether X may connect to Y under the policy that this node's daemon enforces. Exit status 0: allowed. 1: denied. 2:
/// the question is wrong or no daemon answers.
#[derive(Args, Debug)]
pub(crate) struct ExplainArgs {
    /// Who opens the connection: namespace/pod or an IP address
    #[arg(long, value_name = "X")]
    from: String,
    /// To whom: namespace/pod or an IP address
    #[arg(long, value_name = "Y")]
    to: String,
    /// To which port of it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    /// TCP, UDP or SCTP
    #[arg(long, value_name = "PROTOCOL", default_value = "TCP", value_parser = crate::cli::ask::protocol)]
    protocol: Protocol,
    /// How to answer
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
    #[command(flatten)]
    daemon: Daemon,
}

/// Runs `portreeve explain`.
pub(crate) fn explain(args: &ExplainArgs) -> ExitCode {
    run(answer(args))
}

async fn answer(args: &ExplainArgs) -> Result<ExitCode, ConsoleError> {
    let (port, protocol) = (args.port.to_string(), args.protocol.to_string());
    let text = args.output == Output::Text;
    let parameters = [
        ("from", Some(args.from.as_str())),
        ("to", Some(&args.to)),
        ("port", Some(&port)),
        ("protocol", Some(&protocol)),
        ("output", text.then_some("text")),
    ];
    let answer = ask(args.daemon.admin, "/explain", &parameters).await?;
    let said = answer.text().await?;
    let mut out = io::stdout().lock();
    let allowed = if text {
        let (word, rest) = said.split_once(' ').unwrap_or((&said, ""));
        write!(out, "{} {rest}", coloured(word, io::stdout().is_terminal()))?;
        word == "ALLOW"
    } else {
        write!(out, "{said}")?;
        serde_json::from_str::<serde_json::Value>(&said)?["verdict"] == "allow"
    };
    out.flush()?;
    Ok(ExitCode::from(u8::from(!allowed)))
}
