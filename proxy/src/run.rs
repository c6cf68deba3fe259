//! `portreeve run`: builds the parts, runs them, and takes them down.
mod follow;
mod reclaim;
mod settings;
mod shutdown;
mod source;
mod workers;

use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use controller::kube::WatchStatus;
use controller::{Index, Table, TableSettings};
use iptables_init::settings::Tcp;
use kernel::conntrack::{Endings, Report};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tracing::{info, warn};

use crate::admin::{self, Admin};
use crate::enforcer::{Draining, Enforcer};
use crate::handover::standby::{self, Rest, Standby};
use crate::handover::{Outgoing, State};
use crate::kernel_flows::KernelFlows;
use crate::limits::{ConnectionLimits, Pending, WAITING_OF_SOURCE};
use crate::node::bridges::Bridges;
use crate::node::conntrack;
use crate::node::occupancy::Vacancies;
use crate::node::pod_links::PodLinks;
use crate::node::pod_sets::{LocalPods, PodSets};
use crate::node::readiness::Readiness;
use crate::node::reconcile::reconcile;
use crate::node::redirect::Redirect;
use crate::tcp::connections::ConnectionTable;
use crate::tcp::relay;
use crate::tcp::unread::Unread;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::recorder::Recorder;
use crate::telemetry::spans::{Spans, TelemetryError};

use follow::{Follower, Progress, first_state};
pub(crate) use settings::{LogFormat, RunArgs};
use shutdown::{Ended, Running, StopSignals, Thread};
use source::Source;
use workers::start_workers;

/// How often abandoned connections are removed.
const EXPIRE_EVERY: Duration = Duration::from_secs(1);

/// Enforces until SIGTERM or SIGINT. Exit code 2: invalid flags or manifests; 1: an error of the node.
pub(crate) fn run(args: &RunArgs) -> ExitCode {
    match work_and_rest(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("portreeve: {error:#}");
            // Some flags are validated only there.
            let wrong = error.is::<Unusable>()
                || matches!(
                    error.downcast_ref(),
                    Some(
                        TelemetryError::Settings(_)
                            | TelemetryError::Tls(_)
                            | TelemetryError::Url { .. }
                    )
                );
            ExitCode::from(if wrong { 2 } else { 1 })
        }
    }
}

/// Why there is no cluster state to follow: invalid flags, manifests or client configuration.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Unusable(anyhow::Error);

/// Enforces; stands by while another daemon enforces, then enforces again; resumes at once the connections that no
/// other daemon took over.
fn work_and_rest(args: &RunArgs) -> anyhow::Result<()> {
    let mut resting: Option<(Standby, StopSignals)> = None;
    let mut kept = None;
    loop {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start")?;
        let (standby, mut signals, ended) = runtime.block_on(async {
            let source = Source::open(args).await.map_err(Unusable)?;
            in_place(args)?;
            let (standby, mut signals) = match resting.take() {
                Some(again) => again,
                None => (
                    Standby::new(
                        args.handover.clone(),
                        &args.redirect,
                        args.pod(),
                        args.admin,
                    )?,
                    StopSignals::listen()?,
                ),
            };
            let ended = enforce(args, &standby, source, &mut signals, kept.take()).await;
            anyhow::Ok((standby, signals, ended))
        })?;
        let rest = match ended {
            Ok(Ended::Stopped) => return Ok(()),
            Ok(Ended::Relieved) => Rest::Relieved,
            Ok(Ended::Kept(state)) => {
                runtime.shutdown_background();
                kept = Some(state);
                resting = Some((standby, signals));
                continue;
            }
            Err(error) => {
                let Some(rest) = standby.rest_for(&error) else {
                    return Err(error);
                };
                warn!("waiting: {error:#}");
                rest
            }
        };
        if !standby.rest(runtime, signals.received(), rest)? {
            return Ok(());
        }
        info!("resuming enforcement");
        resting = Some((standby, signals));
    }
}

async fn enforce(
    args: &RunArgs,
    standby: &Standby,
    mut source: Source,
    signals: &mut StopSignals,
    kept: Option<State>,
) -> anyhow::Result<Ended> {
    let node: Arc<str> = args.node()?.into();
    let table = table(args, &node);
    let pods = LocalPods::new(Arc::clone(&table), Arc::clone(&node), args.pod_cidr.clone());
    let vacancies = Vacancies::new(Arc::clone(&table));
    let readiness = Readiness::new(source.status());
    let enforcer = enforcer(args, node, Arc::clone(&table), source.status())?;
    let (stop, stopped) = watch::channel(false);
    let (pod, outgoing) = (Arc::default(), Arc::default());
    let patience = kept.as_ref().map(|_| standby::FREE_WITHIN);
    let serve = async || open_admin(args, patience, &pod, &enforcer, &readiness, &stopped).await;
    // Before the first state is there, which can take long: /readyz shows the reason. A daemon that is about
    // to hand over still has the port.
    let is_first = kept.is_none() && !standby.is_due();
    let serving = if is_first { Some(serve().await?) } else { None };
    let kernel = iptables_init::probe_kernel()?;
    let redirect = Redirect::now(&args.redirect, kernel)?;
    let pod_sets = PodSets::closed(pods.clone(), kernel)?;
    let mut index = Index::new(Arc::clone(&table));
    let first = first_state(&mut source, &mut index, &pods, &readiness, &enforcer);
    let touched = tokio::select! {
        () = signals.received() => return Ok(Ended::Stopped),
        touched = first => touched?,
    };
    let links = PodLinks::new(pods.clone(), vacancies.clone(), readiness.is_heard())?;
    let bridges = Bridges::new(&args.redirect.bridge, pods, vacancies.clone(), kernel)?;
    // From here on live connections may depend on this daemon.
    let began = kept.is_none().then(Instant::now);
    let state = standby.take_over(kept).await?;
    let serving = match serving {
        Some(serving) => serving,
        None => serve().await?,
    };
    let (workers, mut tasks) = begin(args, &enforcer, &outgoing, &stopped, state, began)?;
    let watched = (links, bridges, redirect);
    let renewed = crate::node::watch(&mut tasks, &readiness, &enforcer, watched);
    source::lift_taint(args, &readiness, &enforcer.node);
    let following = Follower {
        source,
        index,
        enforcer: Arc::clone(&enforcer),
        pod_sets,
        readiness: readiness.clone(),
        touched,
        vacancies,
        renewed,
        stopped,
        progress: Progress::begin(),
    };
    let following = reconcile(following, readiness, "follows the cluster's state");
    let following = tokio::spawn(following);
    info!(node = %enforcer.node, admin = %args.admin, "enforcing");

    let running = Running {
        outgoing,
        workers,
        following,
        tasks,
        serving,
        stop,
    };
    let offer = standby.offer(&pod);
    running.until_ended(&enforcer, signals, offer).await
}

/// Starts enforcing: resumes the connections of `state` and accepts new ones.
fn begin(
    args: &RunArgs,
    enforcer: &Arc<Enforcer>,
    outgoing: &Arc<Outgoing>,
    stopped: &watch::Receiver<bool>,
    state: Option<State>,
    since: Option<Instant>,
) -> anyhow::Result<(Vec<Thread>, JoinSet<()>)> {
    let mut tasks = JoinSet::new();
    follow_kernel_flows(args.redirect.tcp, enforcer, &mut tasks)?;
    let workers = start_workers(args, enforcer, outgoing, stopped, state, since)?;
    tasks.spawn(expire(Arc::clone(enforcer)));
    reclaim::start(Arc::clone(enforcer), stopped.clone())?;
    Ok((workers, tasks))
}

/// Opens the admin port. With `patience` it waits for a daemon that did not take over to close it.
async fn open_admin(
    args: &RunArgs,
    patience: Option<Duration>,
    pod: &Arc<OnceLock<String>>,
    enforcer: &Arc<Enforcer>,
    readiness: &Readiness,
    stopped: &watch::Receiver<bool>,
) -> anyhow::Result<JoinHandle<()>> {
    let bind = async || admin::bind(args.admin).await;
    let admin = standby::once_free(bind, patience.unwrap_or_default()).await?;
    let (enforcer, readiness) = (Arc::clone(enforcer), readiness.clone());
    let answering = Admin::new(enforcer, readiness, Arc::clone(pod));
    let serving = admin::serve(admin, answering, stopped.clone());
    Ok(tokio::spawn(serving))
}

fn table(args: &RunArgs, node: &str) -> Arc<Table> {
    Table::new(TableSettings {
        cluster_cidrs: args.cluster_cidr.clone(),
        own_node: args.own_node.into(),
        node: node.to_owned(),
    })
}

fn enforcer(
    args: &RunArgs,
    node: Arc<str>,
    table: Arc<Table>,
    watches: Option<Arc<WatchStatus>>,
) -> anyhow::Result<Arc<Enforcer>> {
    let recorder = recorder(args, &node)?;
    let bounds = args.bounds()?;
    relay::allow_pipes(bounds.pipes);
    Ok(Arc::new(Enforcer {
        node,
        table,
        connections: ConnectionTable::new(args.redirect.mark_mask),
        kernel_flows: KernelFlows::default(),
        limits: ConnectionLimits::new(bounds.per_source, bounds.total),
        half_open: Pending::new(bounds.half_open / 3 * 2, bounds.half_open),
        waiting: Pending::new(WAITING_OF_SOURCE, bounds.waiting),
        unread: Unread::new(args.max_unread.saturating_mul(1 << 20)),
        marks: args.redirect.mark_mask,
        deny: args.deny,
        hold: args.hold.into(),
        metrics: Metrics::watching(watches),
        queues: args.redirect.queue..args.redirect.queue + args.redirect.queue_count(),
        recorder,
        draining: Draining::default(),
    }))
}

/// Checks what is missing on this node before anything is started.
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

fn recorder(args: &RunArgs, node: &Arc<str>) -> anyhow::Result<Recorder> {
    let recorder = Recorder::off()
        .with_log()
        .context("cannot start the thread that logs denied connections; see the process limits")?
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

/// Call this before the first flow: conntrack reports the end only of flows that began while somebody listened.
fn follow_kernel_flows(
    tcp: Tcp,
    enforcer: &Arc<Enforcer>,
    tasks: &mut JoinSet<()>,
) -> anyhow::Result<()> {
    let report = match tcp {
        Tcp::Spliced => Report::Deleted,
        Tcp::Auto | Tcp::Kernel => Report::Closed,
    };
    let endings = Endings::listen(enforcer.marks.accepted(), report)
        .context("cannot listen to conntrack; load it with `modprobe nf_conntrack_netlink`")?;
    conntrack::spawn(tasks, enforcer, endings);
    Ok(())
}

/// Ends abandoned connections, and sets keep-alive on live ones, so that the kernel detects servers that are gone.
async fn expire(enforcer: Arc<Enforcer>) {
    let mut every = tokio::time::interval(EXPIRE_EVERY);
    loop {
        every.tick().await;
        enforcer.connections.expire(Instant::now());
        enforcer.connections.keep_alive();
    }
}
