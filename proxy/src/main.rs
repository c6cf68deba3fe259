//! `portreeve`: the per-node daemon and its command line.
mod admin;
mod cli;
mod enforcer;
mod gate;
mod handover;
mod kernel_flows;
mod limits;
mod node;
mod run;
mod tcp;
mod telemetry;
mod worker;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use cli::{ask, console};
use tracing_subscriber::EnvFilter;

use run::LogFormat;

/// Kubernetes NetworkPolicy without eBPF: one daemon a node, no sidecars.
#[derive(Parser)]
#[command(name = "portreeve", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Enforce policies on this node until stopped. Needs `iptables-init install` before it.
    Run(Box<run::RunArgs>),
    /// Check whether X may connect to Y, and by which policy. Needs no privilege and no daemon.
    Check(ask::CheckArgs),
    /// Print the verdict for every pair of pods. Needs no privilege and no daemon.
    Matrix(ask::MatrixArgs),
    Explain(console::ExplainArgs),
    Connections(console::ConnectionsArgs),
    Observe(console::ObserveArgs),
    Ready(console::ReadyArgs),
    Demo(demo::DemoArgs),
}

fn main() -> ExitCode {
    let cli: Cli = iptables_init::arguments::parse();
    match cli.command {
        Command::Run(args) => {
            log_to_stderr(args.log_format);
            run::run(&args)
        }
        Command::Check(args) => ask::check(&args),
        Command::Matrix(args) => ask::matrix(&args),
        Command::Explain(args) => console::explain(&args),
        Command::Connections(args) => console::connections(&args),
        Command::Observe(args) => console::observe(&args),
        Command::Ready(args) => console::ready(&args),
        Command::Demo(args) => demo::demo(&args),
    }
}

/// `RUST_LOG` chooses what is logged (default `info`).
fn log_to_stderr(format: LogFormat) {
    let log = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")),
        );
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
}
