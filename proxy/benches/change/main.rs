//! How soon a change of the cluster takes effect, and what is lost meanwhile: pods that dial before
//! anybody knows them, live flows that a change cuts, and a large cluster that never holds still.
//!
//! Figures for people, not a test; what must hold is checked all the same, and a breach is an error.
//! Run by `cargo bench -p proxy --bench change`. This file owns the order of things.
mod churn;
mod cut;
mod figures;
mod large;
mod source;
mod start;
mod streams;
mod test_cluster;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use source::Kind;

/// Measures how changes take effect, and prints what it found.
#[derive(Parser)]
struct Args {
    /// What to measure (repeatable) [default: all].
    #[arg(long, value_enum)]
    only: Vec<Part>,
    /// Pods that start, for each rate.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(2..=500))]
    pods: u32,
    /// Pods that start in a second (repeatable).
    #[arg(long, default_values_t = [1, 50], value_parser = clap::value_parser!(u32).range(1..))]
    rate: Vec<u32>,
    /// Live flows, a tenth of which each change concerns.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(10..=4000))]
    flows: u32,
    /// Nodes that those flows cross.
    #[arg(long, default_value_t = 2, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=2))]
    nodes: usize,
    /// Milliseconds between two bytes of a flow.
    #[arg(long, default_value_t = 10)]
    interval: u64,
    /// How often each kind of change is measured.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Pods of the large cluster, 250 of them on our node; a fifth as many policies (repeatable).
    #[arg(long, default_values_t = [1_000, 10_000])]
    cluster: Vec<u32>,
    /// Where the large cluster is kept (repeatable).
    #[arg(long, value_enum, default_values_t = [Kind::Files, Kind::Api])]
    source: Vec<Kind>,
    /// Changes of pods of the large cluster in a second.
    #[arg(long, default_value_t = 20)]
    changes: u32,
    /// Seconds that the large cluster is watched for.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Pods whose first act is to dial.
    Start,
    /// Live flows that a change cuts.
    Cut,
    /// A large cluster with changes all the time.
    Churn,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("change: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    // Before any thread: a namespace is entered by a thread, not by a process.
    lab::enter()?;
    test_cluster::raise_descriptor_limit()?;
    let wanted = |part| args.only.is_empty() || args.only.contains(&part);
    if wanted(Part::Start) {
        for rate in &args.rate {
            start::measure(args.pods, *rate)?;
        }
    }
    if wanted(Part::Cut) {
        let interval = Duration::from_millis(args.interval);
        cut::measure(args.flows, args.nodes, interval, args.rounds)?;
    }
    if wanted(Part::Churn) {
        let watched = Duration::from_secs(args.seconds);
        println!("{}", churn::HEAD);
        for source in &args.source {
            for pods in &args.cluster {
                println!("{}", churn::measure(*source, *pods, args.changes, watched)?);
            }
        }
    }
    println!("load average at the end: {}", figures::load());
    Ok(())
}
