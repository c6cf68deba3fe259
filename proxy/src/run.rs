//! `portreeve run`: builds the parts, runs them, and takes them down.
mod follow;
mod settings;
mod source;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use controller::kube::WatchStatus;
use controller::{Batch, Index, Table, TableSettings};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::accept;
use crate::admin;
use crate::bridges::Bridges;
use crate::carried::{Carried, upkeep};
use crate::conntrack::Endings;
use crate::enforcer::Enforcer;
use crate::flows::Flows;
use crate::limits::{Bounds, Limits};
use crate::links::{Changes, PodLinks};
use crate::metrics::Metrics;
use crate::readiness::Readiness;
use crate::recorder::Recorder;
use crate::released::{PodCidrs, Released};
use crate::telemetry::{Spans, TelemetryError};
use crate::worker::Worker;

use follow::Follower;
pub(crate) use settings::{LogFormat, RunArgs};
use source::Source;

/// A worker's thread.
type Thread = std::thread::JoinHandle<std::io::Result<()>>;

/// Descriptors for everything but connections: queues, listeners, admin, pipes of bulk streams.
const DESCRIPTORS_KEPT: u64 = 1024;
/// What the last records may take to be written when the daemon stops.
const FINISH_WITHIN: Duration = Duration::from_secs(2);
/// How often nobody's connections are looked for.
const EXPIRE_EVERY: Duration = Duration::from_secs(1);

/// Enforces until SIGTERM or SIGINT. Exit code 2: flags or manifests are wrong; 1: the node is.
pub(crate) fn run(args: &RunArgs) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("portreeve: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(async {
        let source = match Source::open(args).await {
            Ok(source) => source,
            Err(refused) => {
                eprintln!("portreeve: {refused}");
                return ExitCode::from(2);
            }
        };
        match enforce(args, source).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("portreeve: {error:#}");
                // What a flag says is known to be wrong only there.
                let wrong = matches!(error.downcast_ref(), Some(TelemetryError::Settings(_)));
                ExitCode::from(if wrong { 2 } else { 1 })
            }
        }
    })
}

async fn enforce(args: &RunArgs, mut source: Source) -> anyhow::Result<()> {
    in_place(args)?;
    let mut signals = StopSignals::listen()?;
    let node: Arc<str> = args.node()?.into();
    let table = Table::new(TableSettings {
        cluster_cidrs: args.cluster_cidr.clone(),
        own_node: args.own_node.into(),
    });
    let pods = PodCidrs::new(Arc::clone(&table), Arc::clone(&node), args.pod_cidr.clone());
    let readiness = Readiness::new(source.status());
    let enforcer = enforcer(args, node, Arc::clone(&table), source.status())?;
    let (stop, stopped) = watch::channel(false);
    // Before the first state is there, which can take long: who waits wants to know for what.
    let admin = admin::bind(args.admin).await?;
    let serving = tokio::spawn(admin::serve(
        admin,
        Arc::clone(&enforcer),
        readiness.clone(),
        stopped.clone(),
    ));
    let kernel = iptables_init::probe_kernel()?;
    let released = Released::closed(pods.clone(), kernel)?;
    let mut index = Index::new(Arc::clone(&table));
    let first = first_state(&mut source, &mut index, &pods, &readiness, &enforcer);
    let touched = tokio::select! {
        () = signals.received() => return Ok(()),
        touched = first => touched?,
    };
    let changes = Changes::of_routes().context("cannot hear of changes of routes (rtnetlink)")?;
    let links = PodLinks::new(table, Arc::clone(&enforcer.node), args.pod_cidr.clone())?;
    tokio::spawn(links.follow(changes));
    follow_carried(&enforcer)?;
    let workers = start_workers(args, &enforcer, &stopped)?;
    tokio::spawn(expire(Arc::clone(&enforcer)));
    let bridges = Bridges::new(args.redirect.bridge.clone(), pods, kernel)?;
    tokio::spawn(bridges.watch(readiness.of_bridges()));
    source::lift_taint(args, &readiness, &enforcer.node);
    let following = Follower {
        source,
        index,
        enforcer: Arc::clone(&enforcer),
        released,
        readiness: readiness.clone(),
        touched,
        isolated: BTreeSet::new(),
    };
    let following = tokio::spawn(async move {
        following.follow().await;
        readiness.not_ready("this daemon no longer follows the cluster's state; restart it");
    });
    info!(node = %enforcer.node, admin = %args.admin, "enforcing");

    let ended = until_told(workers, signals, || {
        following.abort();
        stop.send_replace(true);
    });
    let result = ended.await;
    let _ = serving.await;
    enforcer.recorder.finish(FINISH_WITHIN);
    info!(node = %enforcer.node, "stopped");
    result
}

/// Waits until there is a full state that says which addresses are this node's pods; until then
/// nothing is judged and nothing released. Returns the addresses whose verdicts have changed.
///
/// # Errors
/// If manifests do not say it. The API server may yet: a Node gets its CIDRs some time after it has
/// joined.
async fn first_state(
    source: &mut Source,
    index: &mut Index,
    pods: &PodCidrs,
    readiness: &Readiness,
    enforcer: &Enforcer,
) -> anyhow::Result<BTreeSet<IpAddr>> {
    let mut touched = BTreeSet::new();
    let mut said = false;
    loop {
        let batch: Batch = source.next().await;
        let before = enforcer.table.problems();
        touched.extend(index.apply(batch));
        let problems = enforcer.table.problems();
        follow::announce(&before, &problems);
        source.tell(&problems);
        if !pods.now().is_empty() {
            return Ok(touched);
        }
        let reason = format!(
            "which addresses are pods of node {} is not known: there is no Node object of that name with spec.podCIDRs; name the node by --node, or give --pod-cidr",
            enforcer.node
        );
        if matches!(source, Source::Manifests { .. }) {
            bail!(reason);
        }
        if !said {
            warn!("{reason}");
            said = true;
        }
        readiness.not_ready(reason);
    }
}

fn enforcer(
    args: &RunArgs,
    node: Arc<str>,
    table: Arc<Table>,
    watches: Option<Arc<WatchStatus>>,
) -> anyhow::Result<Arc<Enforcer>> {
    let recorder = recorder(args, &node)?;
    Ok(Arc::new(Enforcer {
        node,
        table,
        flows: Flows::default(),
        carried: Carried::default(),
        limits: Limits::new(bounds(args)?),
        marks: args.redirect.mark_mask,
        deny: args.deny,
        hold: args.hold.into(),
        metrics: Metrics::watching(watches),
        queues: args.redirect.queue..args.redirect.queue + args.redirect.queue_count(),
        recorder,
    }))
}

/// The signals that end the daemon.
struct StopSignals {
    terminate: Signals,
    interrupt: Signals,
    _hangup: Signals,
}

impl StopSignals {
    fn listen() -> anyhow::Result<Self> {
        // Whoever started us may have blocked them, and a blocked signal is inherited.
        SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]).thread_unblock()?;
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            // State is watched; a hang-up must not end the daemon.
            _hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for SIGTERM or SIGINT.
    async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Waits for SIGTERM, SIGINT or the failure of a worker; then calls `stop` and waits for the workers.
async fn until_told(
    workers: Vec<Thread>,
    mut signals: StopSignals,
    stop: impl FnOnce(),
) -> anyhow::Result<()> {
    let (failed, mut failure) = tokio::sync::mpsc::channel(workers.len());
    for worker in workers {
        let failed = failed.clone();
        tokio::task::spawn_blocking(move || {
            let panicked = |_| Err(std::io::Error::other("a worker panicked"));
            let result = worker.join().unwrap_or_else(panicked);
            // The channel has a place for each.
            let _ = failed.try_send(result);
        });
    }
    drop(failed);
    let early = tokio::select! {
        () = signals.received() => None,
        ended = failure.recv() => ended,
    };
    stop();
    let mut result = early.unwrap_or(Ok(()));
    while let Some(ended) = failure.recv().await {
        result = result.and(ended);
    }
    result.context("a worker failed")
}

/// Says what is missing on this node before anything is started.
fn in_place(args: &RunArgs) -> anyhow::Result<()> {
    let mut fatal = Vec::new();
    for finding in iptables_init::inspect(&args.redirect) {
        if finding.fatal {
            fatal.push(finding.to_string());
        } else {
            warn!("{finding}");
        }
    }
    if !fatal.is_empty() {
        bail!("this node is not ready:\n  {}", fatal.join("\n  "));
    }
    Ok(())
}

/// As many connections as descriptors allow, two each; one source may have half of them.
fn bounds(args: &RunArgs) -> anyhow::Result<Bounds> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let limit = match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    };
    let total = usize::try_from(limit.saturating_sub(DESCRIPTORS_KEPT) / 2)?.max(64);
    let total = args.max_connections.map_or(total, |most| most.min(total));
    let per_source = args
        .max_connections_per_source
        .unwrap_or(total / 2)
        .min(total);
    Ok(Bounds { per_source, total })
}

fn recorder(args: &RunArgs, node: &Arc<str>) -> anyhow::Result<Recorder> {
    let recorder = Recorder::off()
        .with_log()
        .context("the thread that logs what is refused cannot be started; see the process limits")?
        .with_spans(Spans::start(&args.telemetry, Arc::clone(node))?);
    let Some(path) = &args.trace_file else {
        return Ok(recorder);
    };
    recorder.with_file(path, Arc::clone(node)).with_context(|| {
        format!(
            "cannot open trace file {}; its directory must exist and be writable",
            path.display()
        )
    })
}

/// Binds every queue before the first listener: a SYN that finds a listener must find its queue.
fn start_workers(
    args: &RunArgs,
    enforcer: &Arc<Enforcer>,
    stopped: &watch::Receiver<bool>,
) -> anyhow::Result<Vec<Thread>> {
    let settings = &args.redirect;
    let mut workers = Vec::new();
    let count = settings.queue_count();
    for number in 0..count {
        let queue = settings.queue + number;
        let worker = Worker::start(number.into(), count.into(), queue, Arc::clone(enforcer), stopped.clone())
            .with_context(|| format!("cannot bind NFQUEUE {queue}: is another daemon running, or another program on that queue? (--queue chooses others)"))?;
        workers.push(worker);
    }
    let port = settings.proxy_port;
    let listeners = workers.iter().map(|_| accept::listen(port)).collect::<Result<Vec<_>, _>>()
        .with_context(|| format!("cannot listen on port {port}: is it in use? (--proxy-port chooses another, for iptables-init too)"))?;
    Ok(workers
        .into_iter()
        .zip(listeners)
        .map(|(worker, listener)| worker.listen(listener))
        .collect())
}

/// To be called before the first flow: whose beginning nobody heard, of its end none is told.
fn follow_carried(enforcer: &Arc<Enforcer>) -> anyhow::Result<()> {
    let endings = Endings::listen(enforcer.marks.carried())
        .context("cannot listen to conntrack; load it with `modprobe nf_conntrack_netlink`")?;
    tokio::spawn(upkeep::follow(Arc::clone(enforcer), endings));
    tokio::spawn(upkeep::forget_cut(Arc::clone(enforcer)));
    Ok(())
}

/// Ends connections that nobody waits for any more.
async fn expire(enforcer: Arc<Enforcer>) {
    let mut every = tokio::time::interval(EXPIRE_EVERY);
    loop {
        every.tick().await;
        enforcer.flows.expire(Instant::now());
    }
}
