//! What enforcement costs: the same work over the bare network, through Portreeve and through
//! HAProxy, in one run.
//!
//! Ratios count, not figures: the ways take turns in rounds, so what else the machine does falls on
//! all of them. Client, proxy and server share the machine's cores. Run by `make bench`; this file
//! owns the order of things and must not know how a way enforces or a load is made.
mod collector;
mod flood;
mod load;
mod machine;
mod report;
mod way;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;

use load::Load;
use report::Results;
use way::{Path, Way};

/// Measures the bare network, with and without conntrack, Portreeve and HAProxy side by side and prints a Markdown table.
#[derive(Parser)]
struct Args {
    /// Fewer and shorter rounds: enough to see that nothing broke.
    #[arg(long)]
    quick: bool,
    /// How often every way has its turn at every load [default: 5, with --quick 2].
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Milliseconds that one measurement takes [default: 800, with --quick 400].
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    window: Option<u64>,
    /// Only rows whose name contains this (repeatable), like `one node, requests`.
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Only the ways of this name (repeatable).
    #[arg(long, value_name = "NAME")]
    way: Vec<String>,
    /// Another build of the daemon to measure beside this one, like `before=/tmp/portreeve`.
    #[arg(long, value_name = "NAME=PATH", value_parser = way::other_build)]
    also: Vec<way::Build>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What is measured where: everything through one proxy, and what changes most through two.
const PLAN: [(Path, &[Load]); 2] = [
    (Path::OneNode, &Load::ALL),
    (
        Path::TwoNodes,
        &[
            Load::Streams(1),
            Load::Requests,
            Load::ServerCloses,
            Load::Datagrams,
            Load::FirstDatagrams(1000),
        ],
    ),
];

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    // Before any thread: a namespace is entered by a thread, not by a process.
    lab::enter()?;
    let (rounds, window) = if args.quick { (2, 400) } else { (5, 800) };
    let rounds = args.rounds.unwrap_or(rounds);
    let window = Duration::from_millis(args.window.unwrap_or(window));

    let started = Instant::now();
    let ways = ways(args)?;
    let mut results = Results::new(ways.iter().map(|way| way.name().to_owned()).collect());
    let wanted = |row: &str| args.only.is_empty() || args.only.iter().any(|o| row.contains(o));
    for round in 1..=rounds {
        for (path, loads) in PLAN {
            for load in loads.iter().filter(|load| wanted(&load.row(path))) {
                eprintln!("round {round} of {rounds}: {}", load.row(path));
                let in_turn = ways.iter().enumerate();
                for (number, way) in in_turn.filter(|(_, way)| way.is_for(*load)) {
                    let busy = way.busy()?;
                    let _flood = way.flood(*load)?;
                    let measured = load.measure(way.client(), way.server(path), window);
                    let measured = measured.with_context(|| {
                        format!("{} did not carry \"{}\"", way.name(), load.row(path))
                    })?;
                    let spent = way.busy()?.saturating_sub(busy);
                    results.add(number, path, *load, &measured, spent);
                }
            }
        }
    }
    println!("{}", results.markdown());
    for way in &ways {
        if let Some(collector) = way.collector() {
            let spans = collector.spans()?;
            println!(
                "{}",
                report::collected(way.name(), &spans, collector.busy())
            );
        }
    }
    println!("{}", machine::facts(rounds, window, started.elapsed()));
    Ok(())
}

fn ways(args: &Args) -> anyhow::Result<Vec<Way>> {
    let wanted = |name: &str| args.way.is_empty() || args.way.iter().any(|way| way == name);
    let mut ways = Vec::new();
    if wanted(way::BARE) {
        ways.push(Way::bare()?);
    }
    if wanted(way::TRACKED) {
        ways.push(Way::tracked()?);
    }
    let own = way::own_build();
    for build in [own.clone(), own.collected()] {
        if wanted(build.name()) {
            ways.push(Way::portreeve(&build)?);
        }
    }
    if wanted(way::KERNEL) {
        ways.push(Way::portreeve(&way::own_build().forwarding())?);
    }
    if wanted(way::HAPROXY) {
        ways.push(Way::haproxy()?);
    }
    for build in &args.also {
        ways.push(Way::portreeve(build)?);
        ways.push(Way::portreeve(&build.collected())?);
    }
    anyhow::ensure!(
        !ways.is_empty(),
        "no way is left to measure; --way takes bare, \"bare + conntrack\", Portreeve, \"Portreeve with spans\" or HAProxy"
    );
    for way in &ways {
        way.assure()?;
    }
    Ok(ways)
}
