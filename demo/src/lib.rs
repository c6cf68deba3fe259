//! `portreeve demo`: a demo cluster on one machine: observed connectivity beside the expected one.
//!
//! Builds a cluster of network namespaces, runs the real init step and the real daemon on each
//! node, connects every pod to every pod, and compares the results with the expected verdicts. The
//! daemon runs as a separate process, as in a cluster.
mod decisions;
mod error;
mod grid;
mod plan;
mod policies;
mod probe;
mod report;
mod run;
mod span_proxy;
mod terminal;
mod testbed;

use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use controller::manifest;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use error::DemoError;
use plan::Plan;
use span_proxy::SpanProxy;
use terminal::Terminal;
use testbed::{Daemons, Programs};

/// The Kubernetes documentation's policies, and pods for them.
const SAMPLES: [&str; 2] = [
    include_str!("../../deploy/samples/pods.yaml"),
    include_str!("../../deploy/samples/policies.yaml"),
];
/// Exit status when the demo cannot run: invalid input, missing privilege, a missing tool.
const NO_DEMO: u8 = 2;

/// Run a demo cluster of network namespaces on this machine, with the real init step and
/// daemon on each node, real connections from every pod to every pod.
///
/// Exit status 0: all connections behaved as policy specifies. 1: some did not. 2: the demo could
/// not run; see standard error. Needs no root where user namespaces are allowed; leaves
/// nothing behind.
#[derive(clap::Args, Debug)]
pub struct DemoArgs {
    /// Your own pods and policies, a manifest file or a directory of them
    #[arg(long, value_name = "PATH")]
    manifests: Option<PathBuf>,
    /// Keep the cluster running until Ctrl-C, and print how to enter its pods
    #[arg(long)]
    keep: bool,
    /// Plain text, and a summary in JSON as the last line
    #[arg(long)]
    headless: bool,
    /// Send a span per connection to the Jaeger at this URL, such as http://localhost:4317
    #[arg(long, value_name = "URL")]
    jaeger: Option<String>,
}

/// Runs `portreeve demo`. To be called before any thread runs.
#[must_use]
pub fn demo(args: &DemoArgs) -> ExitCode {
    match prepare(args) {
        Ok(demo) => watched(demo),
        Err(error) => {
            complain(&error);
            ExitCode::from(NO_DEMO)
        }
    }
}

/// Checks all inputs before anything is built, and enters the namespaces.
fn prepare(args: &DemoArgs) -> Result<run::Demo, DemoError> {
    let started = Instant::now();
    let programs = Programs::find()?;
    let samples;
    let path = match &args.manifests {
        Some(path) => path.clone(),
        None => {
            samples = in_memory(&SAMPLES.join("---\n")).map_err(DemoError::State)?;
            PathBuf::from(format!("/proc/self/fd/{}", samples.as_raw_fd()))
        }
    };
    let (plan, policies) = read(&path)?;
    // With spare connections: a daemon may reconnect.
    let connections = 2 * plan.nodes.len();
    let span_proxy = args.jaeger.as_deref();
    let span_proxy = span_proxy
        .map(|url| SpanProxy::open(url, connections))
        .transpose()?;
    single_threaded();
    let entered = lab::enter()?;
    // Both ends of every connection are in this process. A lower limit only slows it down.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _as_it_was = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    Ok(run::Demo {
        terminal: Terminal::new(args.headless),
        own: args.manifests.clone(),
        keep: args.keep,
        headless: args.headless,
        entered,
        started,
        plan,
        expected: policies,
        programs,
        span_proxy: span_proxy.map(Arc::new),
        daemons: Daemons::default(),
        settled: Arc::default(),
    })
}

fn read(path: &Path) -> Result<(Plan, Vec<policy::NetworkPolicy>), DemoError> {
    let loaded = manifest::load(path)?;
    let mut plan = Plan::of(&loaded.cluster, policies::read(path)?)?;
    plan.notes
        .extend(loaded.problems.iter().map(ToString::to_string));
    Ok((plan, loaded.cluster.policies().cloned().collect()))
}

/// A file in memory only.
fn in_memory(text: &str) -> std::io::Result<std::fs::File> {
    let file = memfd_create("samples", MFdFlags::MFD_CLOEXEC)?;
    let mut file = std::fs::File::from(file);
    file.write_all(text.as_bytes())?;
    Ok(file)
}

/// Waits until the kernel has removed the manifest parser's thread, which has ended.
fn single_threaded() {
    let alone = || std::fs::read_dir("/proc/self/task").map_or(true, |tasks| tasks.count() == 1);
    // After a timeout, entering the namespaces fails with a better error.
    let _in_time = lab::wait_until(
        Duration::from_secs(2),
        "the parser's thread to be gone",
        alone,
    );
}

/// Runs the demo on a separate thread, so that a signal ends it at any time.
///
/// Signals are caught and not blocked: a blocked signal would stay blocked in the daemons.
fn watched(demo: run::Demo) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let watched = runtime.and_then(|runtime| {
        runtime.block_on(async {
            let mut interrupt = signal(SignalKind::interrupt())?;
            let mut terminate = signal(SignalKind::terminate())?;
            let (daemons, settled) = (demo.daemons.clone(), Arc::clone(&demo.settled));
            let (end, ended) = oneshot::channel::<()>();
            let worker = thread::spawn(move || {
                // Dropped when the thread ends, even by a panic.
                let _end = end;
                demo.run()
            });
            let signal = tokio::select! {
                _ = ended => return Ok(outcome(worker.join())),
                _ = interrupt.recv() => SignalKind::interrupt(),
                _ = terminate.recv() => SignalKind::terminate(),
            };
            interrupted(signal, &daemons, &settled)
        })
    });
    watched.unwrap_or_else(|error| {
        complain(&DemoError::Signals(error));
        ExitCode::from(NO_DEMO)
    })
}

fn outcome(result: thread::Result<Result<bool, DemoError>>) -> ExitCode {
    match result {
        Ok(Ok(agree)) => ExitCode::from(u8::from(!agree)),
        Ok(Err(error)) => {
            complain(&error);
            ExitCode::from(NO_DEMO)
        }
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Ends everything now. After the report, this is the normal end of `--keep`.
fn interrupted(signal: SignalKind, daemons: &Daemons, settled: &OnceLock<bool>) -> ! {
    daemons.stop();
    let code = match settled.get() {
        Some(agree) => i32::from(!agree),
        // The exit status that shells use for signals.
        None => 128 + signal.as_raw_value(),
    };
    eprintln!("\nportreeve: stopped; nothing is left behind");
    // The demo's thread is still running; its namespaces end with the process.
    std::process::exit(code)
}

/// Prints the error to standard error, one diagnostic per line.
fn complain(error: &DemoError) {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(deeper) = cause {
        let said = deeper.to_string();
        if !text.contains(&said) {
            text.push_str(&format!(" ({said})"));
        }
        cause = deeper.source();
    }
    for line in text.lines() {
        eprintln!("portreeve: {line}");
    }
}
