//! A large cluster, nearly all of it elsewhere, that never holds still.
//!
//! Measured: the CPU of the daemon of one node, and from the file of a policy being visible to its
//! effect on a live connection.
use std::io::Read;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::traffic::greeting;
use lab::{Cluster, PodSpec};
use serde_json::{Value, json};

use crate::bed::{Bed, policy};
use crate::figures::Spread;

const PATIENCE: Duration = Duration::from_secs(10);
/// How often a policy comes and goes meanwhile.
const EVERY: Duration = Duration::from_secs(1);

/// Watches a cluster of this many pods with so many changes a second for a while.
pub(crate) fn measure(pods: u32, changes: u32, watched: Duration) -> anyhow::Result<()> {
    let spec = |name: &str| PodSpec::new("bench", name).label("pod", name);
    let lab = Cluster::builder()
        .nodes(1)
        .pods([spec("client"), spec("server")])
        .build()?;
    let mut bed = Bed::new(lab, |_| true)?;
    bed.lab.pod("bench/server").serve(&[80])?;
    let policies = pods / 5;
    for number in 0..pods {
        bed.write(&pod(number, 0))?;
    }
    for number in 0..policies {
        bed.write(&policy_of(number))?;
    }
    let begun = Instant::now();
    bed.enforce(&[])?;
    println!(
        "{pods} pods and {policies} policies: ready after {:?}",
        begun.elapsed()
    );

    let (busy, begun) = (bed.busy()?, Instant::now());
    let mut effects = Spread::default();
    let mut due = begun + EVERY;
    for change in 0.. {
        let now = Instant::now();
        if now.duration_since(begun) >= watched {
            break;
        }
        if now >= due {
            effects.add(effect(&bed)?);
            due = Instant::now() + EVERY;
        }
        bed.write(&pod(change * 7919 % pods, change))?;
        let next = begun + Duration::from_secs(1) * change / changes;
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    let (busy, took) = (bed.busy()? - busy, begun.elapsed());
    println!(
        "{changes} pod changes a second for {took:.1?}: {:.1} % of a core; policy to effect {effects}",
        100.0 * busy.as_secs_f64() / took.as_secs_f64()
    );
    Ok(())
}

/// Pods of some applications in some namespaces, on other nodes; relabelled with each change.
fn pod(number: u32, change: u32) -> Value {
    let (high, low) = (number / 250, number % 250 + 1);
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": format!("team-{}", number % 50),
            "name": format!("pod-{number}"),
            "uid": format!("uid-{number}"),
            "labels": { "app": format!("app-{}", (number + change) % 40), "tier": format!("tier-{}", number % 3) },
        },
        "spec": { "nodeName": format!("other-{}", number % 100), "containers": [{ "name": "main", "image": "none" }] },
        "status": {
            "phase": "Running",
            "podIP": format!("10.{}.{}.{low}", 100 + high / 250, high % 250),
            "startTime": "2026-01-01T00:00:00Z",
        },
    })
}

/// What most policies are: who of an application may be talked to by another.
fn policy_of(number: u32) -> Value {
    let app = |number: u32| json!({ "matchLabels": { "app": format!("app-{}", number % 40) } });
    let from = json!([{ "podSelector": app(number + 1) }, { "namespaceSelector": {}, "podSelector": app(number + 2) }]);
    let ports = json!([{ "port": 80 + number % 20 }]);
    let mut it = policy(
        &format!("policy-{number}"),
        &json!({ "podSelector": app(number), "ingress": [{ "from": from, "ports": ports }] }),
    );
    it["metadata"]["namespace"] = json!(format!("team-{}", number % 50));
    it
}

/// How long a policy takes to cut a live connection, which is possible again afterwards.
fn effect(bed: &Bed) -> anyhow::Result<Duration> {
    let own = json!({ "matchLabels": { "pod": "server" } });
    let both =
        |rules: Value| json!({ "podSelector": own, "policyTypes": ["Ingress"], "ingress": rules });
    bed.write(&policy("server", &both(json!([{}]))))?;
    bed.settle("open")?;
    let to = bed.lab.pod("bench/server").addr_v4(80);
    let dialled = bed.lab.pod("bench/client").connect(to, PATIENCE)?;
    let mut stream = dialled.into_stream().context("before the policy")?;
    greeting(&stream, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let changed = bed.write(&policy("server", &both(json!([]))))?;
    let end = stream.read(&mut [0; 1]);
    ensure!(
        end.is_err(),
        "the policy did not cut the connection: {end:?}"
    );
    Ok(changed.elapsed())
}
