//! A large cluster, nearly all of it elsewhere, that never holds still.
//!
//! Measured: the daemon of one node, its memory, its CPU time, from its start until it is ready, and
//! from a policy's being written to its effect on a live connection.
use std::fmt;
use std::io::{ErrorKind, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::traffic::greeting;
use lab::{Cluster, PodSpec};
use serde_json::{Value, json};

use crate::figures::Spread;
use crate::large::Large;
use crate::source::Kind;
use crate::test_cluster::{TestCluster, policy};

const PATIENCE: Duration = Duration::from_secs(10);
/// How often a policy comes and goes meanwhile.
const EVERY: Duration = Duration::from_secs(1);

/// The head of the table whose rows are [`Cost`]s.
pub(crate) const HEAD: &str = "\
| source | pods | namespaces | policies | ready after | changes a second | CPU of a core | policy to effect, median | p99 | measured | memory when ready | at the end | at most | written to disk |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|";

/// What a cluster costs the daemon of a node.
pub(crate) struct Cost {
    source: Kind,
    cluster: Large,
    ready: Duration,
    changes: u32,
    took: Duration,
    busy: Duration,
    effects: Spread,
    /// Resident memory when ready, at the end, and at most, in kB.
    memory: [u64; 3],
    /// Bytes, from ready to the end.
    written: u64,
}

/// Watches a cluster of this many pods with so many changes a second for a while.
pub(crate) fn measure(
    source: Kind,
    pods: u32,
    changes: u32,
    watched: Duration,
) -> anyhow::Result<Cost> {
    let cluster = Large { pods };
    let spec = |name: &str| PodSpec::new("bench", name).label("pod", name);
    let lab = Cluster::builder()
        .nodes(1)
        .pods([spec("client"), spec("server")])
        .build()?;
    let mut bed = TestCluster::empty(lab, source)?;
    bed.lab.pod("bench/server").serve(&[80])?;
    let mut frame = bed.objects();
    frame.extend(cluster.frame());
    let mut content: Vec<_> = cluster.content().collect();
    content.push(gate(&json!([{}])));
    bed.source.fill(&frame, &content)?;
    let ready = bed.enforce(&[])?;

    let at_first = bed.memory("VmRSS")?;
    let (busy, written, begun) = (bed.busy()?, bed.written()?, Instant::now());
    let end = AtomicBool::new(false);
    let (effects, changes) = thread::scope(|scope| {
        let churn = scope.spawn(|| churn(&bed, cluster, changes, &end));
        let effects = effects(&bed, begun + watched);
        end.store(true, Ordering::Relaxed);
        let changes = churn.join().unwrap_or_else(|panic| {
            std::panic::resume_unwind(panic);
        });
        anyhow::Ok((effects?, changes?))
    })?;
    Ok(Cost {
        source,
        cluster,
        ready,
        changes,
        took: begun.elapsed(),
        busy: bed.busy()? - busy,
        effects,
        memory: [at_first, bed.memory("VmRSS")?, bed.memory("VmHWM")?],
        written: bed.written()? - written,
    })
}

/// Changes the labels of one pod after the other until the end; returns how many it changed.
fn churn(
    bed: &TestCluster,
    cluster: Large,
    a_second: u32,
    end: &AtomicBool,
) -> anyhow::Result<u32> {
    let begun = Instant::now();
    let mut change = 0;
    while !end.load(Ordering::Relaxed) {
        change += 1;
        bed.write(&cluster.pod(change * 7919 % cluster.pods, change))?;
        let next = begun + Duration::from_secs(1) * change / a_second;
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(change)
}

fn effects(bed: &TestCluster, until: Instant) -> anyhow::Result<Spread> {
    let mut effects = Spread::default();
    while Instant::now() < until {
        let next = Instant::now() + EVERY;
        effects.add(effect(bed)?);
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(effects)
}

/// How long a policy takes to cut a live connection, which is possible again afterwards.
fn effect(bed: &TestCluster) -> anyhow::Result<Duration> {
    let to = bed.lab.pod("bench/server").addr_v4(80);
    let dialled = bed.lab.pod("bench/client").connect(to, PATIENCE)?;
    let mut stream = dialled.into_stream().context("before the policy")?;
    greeting(&stream, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let changed = bed.write(&gate(&json!([])))?;
    let end = stream.read(&mut [0; 1]);
    let took = changed.elapsed();
    ensure!(
        matches!(&end, Err(error) if error.kind() != ErrorKind::WouldBlock),
        "the policy did not cut the connection: {end:?}"
    );
    bed.write(&gate(&json!([{}])))?;
    bed.allows(&bed.lab.node(0), "bench/client", "bench/server")?;
    Ok(took)
}

/// The policy of the server that comes and goes: it has the server policed all the time.
fn gate(ingress: &Value) -> Value {
    let own = json!({ "matchLabels": { "pod": "server" } });
    let spec = json!({ "podSelector": own, "policyTypes": ["Ingress"], "ingress": ingress });
    policy("server", &spec)
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let took = self.took.as_secs_f64();
        let [ready, end, most] = self.memory.map(|kilobytes| kilobytes / 1024);
        write!(
            f,
            "| {:?} | {} | {} | {} | {:.1} s | {:.1} | {:.1} % | {:.0} ms | {:.0} ms | {} | {ready} MiB | {end} MiB | {most} MiB | {:.0} kB/s |",
            self.source,
            self.cluster.pods,
            self.cluster.namespaces(),
            self.cluster.policies(),
            self.ready.as_secs_f64(),
            f64::from(self.changes) / took,
            100.0 * self.busy.as_secs_f64() / took,
            self.effects.percentile(50).as_secs_f64() * 1e3,
            self.effects.percentile(99).as_secs_f64() * 1e3,
            self.effects.count(),
            self.written as f64 / 1e3 / took,
        )
    }
}
