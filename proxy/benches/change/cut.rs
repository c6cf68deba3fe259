//! Live flows that carry a byte every now and then while changes cut a tenth of them.
//!
//! Measured: from the file's being visible to the reset at each end. The others may lose nothing: the
//! server checks every byte and says at the end how many it had. A loss is an error.
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use lab::{Cluster, PodSpec};
use serde_json::{Value, json};

use crate::figures::Spread;
use crate::streams::{Sink, Streams, keep_busy, resets};
use crate::test_cluster::{TestCluster, policy};

/// Client pods; one of them is concerned by each change.
const CLIENTS: u32 = 10;
/// Threads that keep the streams busy.
const THREADS: usize = 2;
/// How long streams go on before and after the change, at least.
const AROUND: Duration = Duration::from_millis(100);

/// A kind of change that cuts the flows of `client-0`.
struct Change {
    what: &'static str,
    /// What must stand before beyond [`base`].
    before: fn(&TestCluster) -> Vec<Value>,
    edit: fn(&TestCluster) -> anyhow::Result<Edit>,
}

enum Edit {
    Write(Value),
    Remove(Value),
}

const CHANGES: [Change; 12] = [
    change("a policy is created", |_| {
        let spec = json!({ "podSelector": labelled("pod", "client-0"), "policyTypes": ["Egress"] });
        Ok(Edit::Write(policy("deny", &spec)))
    }),
    change("a policy is edited", |_| Ok(Edit::Write(first(&json!([]))))),
    change("a policy is deleted", |_| {
        Ok(Edit::Remove(first(&json!([]))))
    }),
    Change {
        what: "an ipBlock is edited",
        before: |bed| {
            let addresses = bed.lab.pod("bench/client-0").addresses();
            vec![first(&json!(addresses.map(block)))]
        },
        edit: |_| Ok(Edit::Write(first(&json!([block([192, 0, 2, 1].into())])))),
    },
    change("the client pod is relabelled", |bed| {
        relabelled(bed, "Pod", "client-0", &json!({ "pod": "client-0" }))
    }),
    change("the server pod is relabelled", |bed| {
        relabelled(bed, "Pod", "server", &json!({ "pod": "server" }))
    }),
    change("the client's namespace is relabelled", |bed| {
        relabelled(bed, "Namespace", "bench", &json!({}))
    }),
    Change {
        what: "the server's namespace is relabelled",
        before: |_| {
            let to = json!([{ "to": [{ "namespaceSelector": labelled("serves", "yes") }] }]);
            let own = labelled("pod", "client-0");
            let spec = json!({ "podSelector": own, "policyTypes": ["Egress"], "egress": to });
            vec![policy("out", &spec)]
        },
        edit: |bed| relabelled(bed, "Namespace", "served", &json!({})),
    },
    change("the server's port is renamed", |bed| {
        let mut pod = bed.object("Pod", "server")?;
        pod["spec"]["containers"][0]["ports"][0]["name"] = json!("web");
        Ok(Edit::Write(pod))
    }),
    change("the client pod has finished", |bed| {
        let mut pod = bed.object("Pod", "client-0")?;
        pod["status"]["phase"] = json!("Succeeded");
        Ok(Edit::Write(pod))
    }),
    change("the client pod is gone", |bed| {
        Ok(Edit::Remove(bed.object("Pod", "client-0")?))
    }),
    change("another pod has the client's address", |bed| {
        let mut pod = bed.object("Pod", "client-0")?;
        pod["metadata"]["uid"] = json!("another");
        Ok(Edit::Write(pod))
    }),
];

const fn change(what: &'static str, edit: fn(&TestCluster) -> anyhow::Result<Edit>) -> Change {
    Change {
        what,
        before: |_| Vec::new(),
        edit,
    }
}

fn labelled(key: &str, value: &str) -> Value {
    json!({ "matchLabels": { key: value } })
}

fn block(address: IpAddr) -> Value {
    let length = if address.is_ipv4() { 32 } else { 128 };
    json!({ "ipBlock": { "cidr": format!("{address}/{length}") } })
}

fn relabelled(bed: &TestCluster, kind: &str, name: &str, labels: &Value) -> anyhow::Result<Edit> {
    let mut object = bed.object(kind, name)?;
    object["metadata"]["labels"] = labels.clone();
    Ok(Edit::Write(object))
}

/// A policy of the server's namespace.
fn served(name: &str, own: &Value, rules: &Value) -> Value {
    let spec = json!({ "podSelector": own, "policyTypes": ["Ingress"], "ingress": rules });
    let mut served = policy(name, &spec);
    served["metadata"]["namespace"] = json!("served");
    served
}

/// What lets `client-0` in, and nothing else does.
fn first(from: &Value) -> Value {
    let rules = match from.as_array().is_some_and(Vec::is_empty) {
        true => json!([]),
        false => json!([{ "from": from, "ports": [{ "port": "http" }] }]),
    };
    served("first", &labelled("first", "yes"), &rules)
}

/// The policies between all changes: the others come by a label that no change touches.
fn base() -> [Value; 2] {
    let others = json!([{ "from": [{ "namespaceSelector": {}, "podSelector": labelled("access", "others") }] }]);
    let from = json!([{ "namespaceSelector": labelled("open", "yes"), "podSelector": labelled("access", "first") }]);
    [
        served("others", &labelled("pod", "server"), &others),
        first(&from),
    ]
}

/// Keeps this many flows alive between the two ends of as many `nodes` and cuts a tenth of them by each kind
/// of change, `rounds` times.
pub(crate) fn measure(
    flows: u32,
    nodes: usize,
    interval: Duration,
    rounds: u32,
) -> anyhow::Result<()> {
    let mut bed = served_bed(nodes)?;
    let sink = Sink::new(bed.lab.pod("served/server"))?;
    bed.enforce(&[])?;
    let each = flows / CLIENTS;
    for change in &CHANGES {
        let mut cuts = Spread::default();
        let mut intervals = Spread::default();
        for round in 0..rounds {
            let before = (change.before)(&bed);
            for object in &before {
                bed.write(object)?;
            }
            bed.settle("before")?;
            let edit = (change.edit)(&bed)?;
            let (took, apart) =
                cut_once(&bed, &sink, each, interval, &edit).context(change.what)?;
            cuts.extend(took);
            intervals.extend(apart);
            let (Edit::Write(edited) | Edit::Remove(edited)) = edit;
            for object in before.iter().chain([&edited]) {
                restore(&bed, object)?;
            }
            bed.settle(&format!("after-{round}"))?;
        }
        println!(
            "{flows} live flows, {each} concerned, a byte each {:.1} ms, {}: cut after {cuts}; no byte of the others lost",
            intervals.percentile(100).as_secs_f64() * 1e3,
            change.what
        );
    }
    Ok(())
}

/// The cluster, with nothing enforced yet.
fn served_bed(nodes: usize) -> anyhow::Result<TestCluster> {
    let client = |number| {
        let name = format!("client-{number}");
        let access = if number == 0 { "first" } else { "others" };
        PodSpec::new("bench", &name)
            .label("pod", &name)
            .label("access", access)
    };
    let server = PodSpec::new("served", "server")
        .node(nodes - 1)
        .label("pod", "server")
        .label("first", "yes")
        .port("http", 80);
    let mut lab = Cluster::builder()
        .nodes(nodes)
        .pods((0..CLIENTS).map(client))
        .pod(server)
        .build()?;
    lab.relabel_namespace("bench", [("open", "yes")]);
    lab.relabel_namespace("served", [("serves", "yes")]);
    let bed = TestCluster::new(lab, |_| true)?;
    for policy in base() {
        bed.write(&policy)?;
    }
    Ok(bed)
}

/// Takes back what was done to an object.
fn restore(bed: &TestCluster, object: &Value) -> anyhow::Result<()> {
    let same = |it: &&Value| {
        it["kind"] == object["kind"] && it["metadata"]["name"] == object["metadata"]["name"]
    };
    match bed.objects().iter().chain(&base()).find(same) {
        Some(original) => bed.write(original)?,
        None => bed.remove(object)?,
    };
    Ok(())
}

/// Opens the flows, makes the change, and says how long each end of the concerned flows lived on, and how
/// far apart the bytes of a flow were.
fn cut_once(
    bed: &TestCluster,
    sink: &Sink,
    each: u32,
    interval: Duration,
    edit: &Edit,
) -> anyhow::Result<(Vec<Duration>, Vec<Duration>)> {
    let open = |client| {
        let from = bed.lab.pod(&format!("bench/client-{client}"));
        Streams::open(&from, sink, each, client == 0)
    };
    let mut all: Vec<Streams> = (0..CLIENTS).map(open).collect::<Result<_, _>>()?;
    let ends = all[0].ends()?;
    let stop = AtomicBool::new(false);
    let around = AROUND.max(10 * interval);
    thread::scope(|scope| {
        let share = all.len().div_ceil(THREADS);
        let mut busy = Vec::new();
        while !all.is_empty() {
            let streams: Vec<_> = all.drain(..share.min(all.len())).collect();
            busy.push(scope.spawn(|| keep_busy(streams, interval, &stop)));
        }
        let watching = scope.spawn(|| resets(&ends));
        thread::sleep(around);
        let changed = match edit {
            Edit::Write(object) => bed.write(object),
            Edit::Remove(object) => bed.remove(object),
        };
        let resets = joined(watching);
        thread::sleep(around);
        stop.store(true, Ordering::Relaxed);
        let intervals = busy.into_iter().map(joined).collect::<Result<_, _>>();
        let intervals = intervals.context("a flow that the change does not concern")?;
        let changed = changed?;
        let took = |reset: Instant| reset.saturating_duration_since(changed);
        Ok((resets?.into_iter().map(took).collect(), intervals))
    })
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, anyhow::Result<T>>) -> anyhow::Result<T> {
    let panicked = |_| Err(anyhow::anyhow!("panicked"));
    thread.join().unwrap_or_else(panicked)
}
