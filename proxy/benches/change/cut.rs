//! Live flows that carry a byte every now and then while changes cut a tenth of them.
//!
//! Measured: from the file's being visible to the reset at the client. The others may lose nothing,
//! which the echo of every byte proves; a loss is an error.
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::traffic::greeting;
use lab::{Cluster, PodSpec};
use serde_json::{Value, json};

use crate::bed::{Bed, policy};
use crate::figures::Spread;

/// Client pods; one of them is concerned by each change.
const CLIENTS: u32 = 10;
const PATIENCE: Duration = Duration::from_secs(10);

/// A kind of change that cuts the flows of `client-0`: what is written, or removed.
type Change = (&'static str, fn(&Bed) -> anyhow::Result<Edit>);

enum Edit {
    Write(Value),
    Remove(Value),
}

const CHANGES: [Change; 5] = [
    ("a policy is created", |_| {
        let own = json!({ "matchLabels": { "pod": "client-0" } });
        let spec = json!({ "podSelector": own, "policyTypes": ["Egress"] });
        Ok(Edit::Write(policy("deny", &spec)))
    }),
    ("the client pod is relabelled", |bed| {
        let mut pod = bed.pod("client-0")?;
        pod["metadata"]["labels"] = json!({ "pod": "client-0" });
        Ok(Edit::Write(pod))
    }),
    ("the client pod has finished", |bed| {
        let mut pod = bed.pod("client-0")?;
        pod["status"]["phase"] = json!("Succeeded");
        Ok(Edit::Write(pod))
    }),
    ("the client pod is gone", |bed| {
        Ok(Edit::Remove(bed.pod("client-0")?))
    }),
    ("another pod has the client's address", |bed| {
        let mut pod = bed.pod("client-0")?;
        pod["metadata"]["uid"] = json!("another");
        Ok(Edit::Write(pod))
    }),
];

/// Keeps this many flows alive and cuts a tenth of them by each kind of change, `rounds` times.
pub(crate) fn measure(flows: u32, interval: Duration, rounds: u32) -> anyhow::Result<()> {
    let client = |number| {
        let name = format!("client-{number}");
        PodSpec::new("bench", &name)
            .label("pod", &name)
            .label("access", "yes")
    };
    let server = PodSpec::new("bench", "server")
        .node(1)
        .label("pod", "server");
    let lab = Cluster::builder()
        .nodes(2)
        .pods((0..CLIENTS).map(client))
        .pod(server)
        .build()?;
    let mut bed = Bed::new(lab, |_| true)?;
    let from = json!([{ "from": [{ "podSelector": { "matchLabels": { "access": "yes" } } }] }]);
    let own = json!({ "matchLabels": { "pod": "server" } });
    let spec = json!({ "podSelector": own, "policyTypes": ["Ingress"], "ingress": from });
    bed.write(&policy("access", &spec))?;
    bed.lab.pod("bench/server").serve(&[80])?;
    bed.enforce(&[])?;
    let each = flows / CLIENTS;
    for (what, change) in CHANGES {
        let mut cuts = Spread::default();
        for round in 0..rounds {
            let edit = change(&bed)?;
            let took = cut_once(&bed, each, interval, &edit).with_context(|| what)?;
            cuts.extend(took);
            match &edit {
                Edit::Write(it) if it["kind"] == "NetworkPolicy" => bed.remove(it)?,
                _ => bed.write(&bed.pod("client-0")?)?,
            };
            bed.settle(&format!("cut-{round}"))?;
        }
        println!(
            "{flows} live flows, {each} concerned, {what}: cut after {cuts}; no byte of the others lost"
        );
    }
    Ok(())
}

/// Opens the flows, makes the change, and says when each concerned flow was cut.
fn cut_once(
    bed: &Bed,
    each: u32,
    interval: Duration,
    edit: &Edit,
) -> anyhow::Result<Vec<Duration>> {
    let mut doomed = open(bed, 0, each)?;
    let mut others: Vec<Vec<TcpStream>> = (1..CLIENTS)
        .map(|client| open(bed, client, each))
        .collect::<Result<_, _>>()?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let writers: Vec<_> = others
            .iter_mut()
            .map(|streams| scope.spawn(|| keep_busy(streams, interval, &stop)))
            .collect();
        let watched: Vec<_> = doomed
            .iter_mut()
            .map(|stream| scope.spawn(|| reset_at(stream)))
            .collect();
        thread::sleep(10 * interval);
        let changed = match edit {
            Edit::Write(object) => bed.write(object),
            Edit::Remove(object) => bed.remove(object),
        };
        let cut: Vec<anyhow::Result<Instant>> = watched
            .into_iter()
            .map(|it| {
                it.join()
                    .unwrap_or_else(|_| Err(anyhow::anyhow!("panicked")))
            })
            .collect();
        thread::sleep(10 * interval);
        stop.store(true, Ordering::Relaxed);
        for writer in writers {
            writer
                .join()
                .unwrap_or_else(|_| Err(anyhow::anyhow!("panicked")))
                .context("a flow that the change does not concern")?;
        }
        let changed = changed?;
        let took = |cut: anyhow::Result<Instant>| Ok(cut?.saturating_duration_since(changed));
        cut.into_iter().map(took).collect()
    })
}

fn open(bed: &Bed, client: u32, count: u32) -> anyhow::Result<Vec<TcpStream>> {
    let from = bed.lab.pod(&format!("bench/client-{client}"));
    let server = bed.lab.pod("bench/server");
    let to: Vec<_> = server
        .addrs(80)
        .into_iter()
        .cycle()
        .take(count as usize)
        .collect();
    let opened = from.connect_all(&to, PATIENCE)?;
    opened
        .into_iter()
        .map(|outcome| {
            let stream = outcome.into_stream()?;
            greeting(&stream, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(stream)
        })
        .collect()
}

/// Writes a byte on each stream every now and then; at the end every byte must have come back.
fn keep_busy(
    streams: &mut [TcpStream],
    interval: Duration,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    let mut written = 0;
    while !stop.load(Ordering::Relaxed) {
        let next = Instant::now() + interval;
        for stream in streams.iter_mut() {
            stream.write_all(b"x")?;
        }
        written += 1;
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    for stream in streams {
        let mut back = vec![0; written];
        stream.read_exact(&mut back)?;
        ensure!(
            back.iter().all(|byte| *byte == b'x'),
            "another byte came back"
        );
    }
    Ok(())
}

fn reset_at(stream: &mut TcpStream) -> anyhow::Result<Instant> {
    match stream.read(&mut [0; 1]) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(Instant::now()),
        other => anyhow::bail!("not cut, but {other:?}"),
    }
}
