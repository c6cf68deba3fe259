//! Pods that start at a rate and dial as their first act, written for the daemons up to two seconds late.
//!
//! Every other one may go out. Denied handshakes that complete and allowed first tries that fail
//! are errors. The added wait of an allowed one is what passes between its SYN, or its object's
//! becoming visible if that is later, and its connection.
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use lab::{Cluster, PodSpec};
use serde_json::json;

use crate::figures::Spread;
use crate::test_cluster::{TestCluster, policy};

/// The state of the cluster is late by at most this.
const LATE: Duration = Duration::from_secs(2);
/// How long a pod tries.
const PATIENCE: Duration = Duration::from_secs(6);

/// What became of a first try.
struct Tried {
    allowed: bool,
    connected: Option<Instant>,
    dialled: Instant,
}

/// Starts this many pods, so many in a second.
pub(crate) fn measure(pods: u32, rate: u32) -> anyhow::Result<()> {
    let name = |number: u32| format!("pod-{number}");
    let access = |number: u32| {
        if number.is_multiple_of(2) {
            "yes"
        } else {
            "no"
        }
    };
    let new = (0..pods).map(|number| {
        let spec = PodSpec::new("bench", name(number)).node((number % 2) as usize);
        spec.label("access", access(number))
    });
    let server = PodSpec::new("bench", "server").node(1);
    let lab = Cluster::builder().nodes(2).pods(new).pod(server).build()?;
    let mut bed = TestCluster::new(lab, |pod| pod == "server")?;
    for access in ["yes", "no"] {
        let egress = if access == "yes" {
            json!([{}])
        } else {
            json!([])
        };
        let own = json!({ "matchLabels": { "access": access } });
        let spec = json!({ "podSelector": own, "policyTypes": ["Egress"], "egress": egress });
        bed.write(&policy(access, &spec))?;
    }
    let server = bed.lab.pod("bench/server");
    server.serve(&[80])?;
    bed.enforce(&["--hold", "10s"])?;

    let to: SocketAddr = server.addr_v4(80);
    let objects: Vec<_> = (0..pods)
        .map(|number| bed.object("Pod", &name(number)))
        .collect::<Result<_, _>>()?;
    let visible: Mutex<Vec<Option<Instant>>> = Mutex::new(vec![None; pods as usize]);
    let begun = Instant::now();
    let tried: Vec<anyhow::Result<Tried>> = thread::scope(|scope| {
        let tries: Vec<_> = (0..pods)
            .map(|number| {
                let host = bed.lab.pod(&format!("bench/{}", name(number)));
                let starts = begun + Duration::from_secs(number.into()) / rate;
                scope.spawn(move || {
                    thread::sleep(starts.saturating_duration_since(Instant::now()));
                    let dialled = Instant::now();
                    let outcome = host.connect(to, PATIENCE)?;
                    let connected = outcome.is_connected().then(Instant::now);
                    let allowed = access(number) == "yes";
                    Ok(Tried {
                        allowed,
                        connected,
                        dialled,
                    })
                })
            })
            .collect();
        let mut changes: Vec<(Instant, usize)> = (0..pods)
            .map(|number| {
                // Spread evenly and in no order: 997 is a prime.
                let late = LATE * (number * 997 % pods) / pods;
                let starts = begun + Duration::from_secs(number.into()) / rate;
                (starts + late, number as usize)
            })
            .collect();
        changes.sort_unstable();
        for (at, number) in changes {
            thread::sleep(at.saturating_duration_since(Instant::now()));
            if let Ok(at) = bed.write(&objects[number]) {
                visible.lock().unwrap_or_else(PoisonError::into_inner)[number] = Some(at);
            }
        }
        let join = |it: thread::ScopedJoinHandle<'_, _>| {
            it.join()
                .unwrap_or_else(|_| Err(anyhow::anyhow!("a pod panicked")))
        };
        tries.into_iter().map(join).collect()
    });
    report(pods, rate, tried, &visible.into_inner().unwrap_or_default())
}

fn report(
    pods: u32,
    rate: u32,
    tried: Vec<anyhow::Result<Tried>>,
    visible: &[Option<Instant>],
) -> anyhow::Result<()> {
    let (mut failed, mut completed, mut waits) = (0, 0, Spread::default());
    for (tried, visible) in tried.into_iter().zip(visible) {
        let tried = tried?;
        match (tried.allowed, tried.connected) {
            (true, Some(connected)) => {
                let ready = visible.map_or(tried.dialled, |visible| visible.max(tried.dialled));
                waits.add(connected.saturating_duration_since(ready));
            }
            (true, None) => failed += 1,
            (false, Some(_)) => completed += 1,
            (false, None) => {}
        }
    }
    println!(
        "{pods} pods at {rate} a second, known up to {LATE:?} late: denied handshakes completed {completed}, \
         allowed first tries failed {failed}; added wait {waits}"
    );
    ensure!(
        completed == 0 && failed == 0,
        "a pod did not get its rights"
    );
    Ok(())
}
