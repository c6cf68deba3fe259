//! From the first packet: pods that connect before the daemon knows them, addresses that move from pod to
//! pod, and changes that come while others dial.
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lab::{Host, PodSpec, wait_for, wait_until};
use serde_json::{Value, json};
use testbed::runner::Test;

use testbed::streams::StopOnDrop;
use testbed::{DEADLINE, TestCluster, connected, deny_ingress, echoes, policy};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    first_connect_of_unknown_pods_gets_their_rights,
    new_pod_is_unreachable_until_policies_are_known,
    first_connect_from_reused_address_has_new_rights,
    no_connection_succeeds_while_policy_denies_it,
    policy_change_severs_only_the_streams_it_denies,
];

/// Pods that start, half of them with rights.
const PODS: usize = 30;
/// The state of the cluster is late by at most this.
const LATE: Duration = Duration::from_secs(2);
const REUSES: usize = 16;
/// How long an attempt that must fail is repeated.
const TRY: Duration = Duration::from_millis(200);
/// How often a denial comes and goes ...
const FLIPS: usize = 10;
/// ... and how many connections are tried under each.
const TRIES: usize = 3;

/// Lets pods with `access: yes` come to `pod`.
fn only_with_access(pod: &str) -> Value {
    let from = json!([{ "from": [{ "podSelector": { "matchLabels": { "access": "yes" } } }] }]);
    let spec = json!({ "podSelector": { "matchLabels": { "pod": pod } }, "policyTypes": ["Ingress"], "ingress": from });
    policy(&format!("only-with-access-{pod}"), &spec)
}

/// Lets pods with `access: yes` go out, and others nowhere.
pub(crate) fn egress_by_access() -> [Value; 2] {
    let yes = json!({ "matchLabels": { "access": "yes" } });
    let no = json!({ "matchLabels": { "access": "no" } });
    [
        policy(
            "may-go",
            &json!({ "podSelector": yes, "policyTypes": ["Egress"], "egress": [{}] }),
        ),
        policy(
            "stays",
            &json!({ "podSelector": no, "policyTypes": ["Egress"] }),
        ),
    ]
}

fn access(number: usize) -> &'static str {
    ["yes", "no"][number % 2]
}

/// A pod's first act is to dial; its object comes to the daemons up to two seconds later.
fn first_connect_of_unknown_pods_gets_their_rights() {
    let [may, stays] = egress_by_access();
    let mut bed = TestCluster::enforced(&["--hold", "10s"], &[may, stays, only_with_access("c")]);
    let known = bed.lab.manifests();
    let name = |number: usize| format!("new-{number}");
    for number in 0..PODS {
        let spec = PodSpec::new("x", name(number)).node(number % 2);
        bed.lab
            .add_pod(spec.label("access", access(number)))
            .unwrap();
    }
    let all = bed.lab.manifests();
    let state_with = |pods: usize| {
        let names: Vec<_> = (0..pods).map(name).collect();
        let mut state = all.clone();
        state["items"].as_array_mut().unwrap().retain(|it| {
            let named = |list: &Value| {
                let items = list["items"].as_array().unwrap();
                items
                    .iter()
                    .any(|known| known["metadata"]["name"] == it["metadata"]["name"])
            };
            let name = it["metadata"]["name"].as_str().unwrap();
            named(&known) || names.iter().any(|it| it == name)
        });
        state
    };
    thread::scope(|scope| {
        let dialled: Vec<_> = (0..PODS)
            .map(|number| {
                let pod = bed.lab.pod(&format!("x/{}", name(number)));
                let server = bed.lab.pod(["x/b", "x/c"][number / 2 % 2]);
                let to = server.addrs(80)[number / 4 % 2];
                // What is denied is so until the pod gives up.
                let limit = if access(number) == "yes" {
                    DEADLINE
                } else {
                    2 * LATE
                };
                scope.spawn(move || (number, to, pod.connect(to, limit).unwrap()))
            })
            .collect();
        let steps = 10;
        for step in 1..=steps {
            thread::sleep(LATE / steps);
            bed.write(
                "cluster.json",
                &state_with(PODS * step as usize / steps as usize),
            );
        }
        for dialled in dialled {
            let (number, to, outcome) = dialled.join().unwrap();
            let allowed = access(number) == "yes";
            assert_eq!(
                outcome.is_connected(),
                allowed,
                "{number} to {to}: {outcome}"
            );
        }
    });
}

/// Others dial the address from before there is a pod, and its object comes late.
fn new_pod_is_unreachable_until_policies_are_known() {
    let mut bed = TestCluster::enforced(&["--hold", "10s"], &[only_with_access("new")]);
    for (name, node, access) in [("near", 0, "no"), ("far", 1, "no"), ("friend", 1, "yes")] {
        let spec = PodSpec::new("x", name).node(node).label("access", access);
        bed.lab.add_pod(spec).unwrap();
    }
    bed.write_cluster();
    let to = SocketAddr::from(([10, 244, 0, 200], 80));
    let (over, tries) = (AtomicBool::new(false), [0, 0].map(AtomicUsize::new));
    let more = |what: &str| {
        let before = tries.each_ref().map(|tried| tried.load(Ordering::Relaxed));
        wait_until(DEADLINE, what, || {
            let now = tries.iter().zip(before);
            now.clone()
                .all(|(now, before)| now.load(Ordering::Relaxed) > before + 2)
        })
        .unwrap();
    };
    let strangers = ["x/near", "x/far"].map(|name| bed.lab.pod(name));
    thread::scope(|scope| {
        let _over = StopOnDrop(&over);
        let dialling: Vec<_> = strangers
            .iter()
            .zip(&tries)
            .map(|(stranger, tried)| {
                let over = &over;
                scope.spawn(move || {
                    while !over.load(Ordering::Relaxed) {
                        let outcome = stranger.connect(to, TRY).unwrap();
                        assert!(!outcome.is_connected(), "{}: {outcome}", stranger.name());
                        tried.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        more("tries before there is a pod");
        let spec = PodSpec::new("x", "new").node(0).label("pod", "new");
        let new = bed
            .lab
            .add_pod(spec.ipv4(Ipv4Addr::new(10, 244, 0, 200)))
            .unwrap();
        new.serve(&[80]).unwrap();
        more("tries before anybody knows it");
        bed.write_cluster();
        let friend = bed.lab.pod("x/friend").connect(to, DEADLINE).unwrap();
        more("tries once it is known");
        over.store(true, Ordering::Relaxed);
        for dialled in dialling {
            dialled.join().unwrap();
        }
        assert!(friend.is_connected(), "{friend}");
    });
}

/// The uids by which connections of this address were judged, by verdict.
fn uids(records: &Path, source: IpAddr) -> BTreeMap<String, Vec<String>> {
    let mut uids: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in fs::read_to_string(records).unwrap().lines() {
        let record: Value = serde_json::from_str(line).unwrap();
        if record["source.address"] == json!(source) {
            let text = |key: &str| record[key].as_str().unwrap_or_default().to_owned();
            let verdicts = uids.entry(text("source.k8s.pod.uid")).or_default();
            verdicts.push(text("verdict"));
        }
    }
    uids
}

/// The last holder is gone; the next one dials before anybody knows it.
fn first_connect_from_reused_address_has_new_rights() {
    let records = tempfile::NamedTempFile::new().unwrap();
    let [may, stays] = egress_by_access();
    let flags = ["--trace-file", records.path().to_str().unwrap()];
    let mut bed = TestCluster::enforced(&flags, &[may, stays]);
    let to = bed.lab.pod("x/c").addr_v4(80);
    let mut expected = BTreeMap::new();
    let mut address = None;
    for number in 0..REUSES {
        let mut spec = PodSpec::new("x", format!("holder-{number}")).node(0);
        if let Some(address) = address {
            spec = spec.ipv4(address);
        }
        let spec = spec.label("access", access(number));
        let pod = bed.lab.add_pod(spec).unwrap();
        address = Some(pod.ipv4());
        let limit = if access(number) == "yes" {
            DEADLINE
        } else {
            Duration::from_millis(700)
        };
        let outcome = thread::scope(|scope| {
            let dialled = scope.spawn(|| pod.connect(to, limit).unwrap());
            thread::sleep(Duration::from_millis(30 * (number as u64 % 4)));
            bed.write_cluster();
            dialled.join().unwrap()
        });
        let allowed = access(number) == "yes";
        assert_eq!(outcome.is_connected(), allowed, "{number}: {outcome}");
        let manifests = bed.lab.manifests();
        let mut objects = manifests["items"].as_array().unwrap().iter();
        let name = format!("holder-{number}");
        let object = objects.find(|it| it["metadata"]["name"] == name.as_str());
        let uid = object.unwrap()["metadata"]["uid"]
            .as_str()
            .unwrap()
            .to_owned();
        expected.insert(uid, if allowed { "allow" } else { "deny" });
        drop(outcome);
        bed.lab.remove_pod(&format!("x/{name}")).unwrap();
        bed.write_cluster();
        let mark = bed.write_policies(&egress_by_access());
        bed.wait_in_force(&mark);
    }
    let address = address.unwrap().into();
    wait_for(DEADLINE, "a record of every pod", || {
        let uids = uids(records.path(), address);
        expected
            .keys()
            .all(|uid| uids.contains_key(uid))
            .then_some(())
    })
    .unwrap();
    for (uid, verdicts) in uids(records.path(), address) {
        let right = expected.get(&uid).copied();
        // What the pod left behind may have been cut with it.
        let fits = |verdict: &String| {
            Some(verdict.as_str()) == right || right == Some("allow") && verdict == "sever"
        };
        assert!(
            verdicts.iter().all(fits),
            "{uid}: {verdicts:?}, not {right:?}"
        );
    }
}

/// Pods dial all the time while a server's isolation comes and goes, which moves it between the
/// gate and the kernel's sets.
fn no_connection_succeeds_while_policy_denies_it() {
    let bed = TestCluster::enforced(&[], &[]);
    let probes: Mutex<Vec<(Instant, Instant, bool)>> = Mutex::default();
    let mut denials = Vec::new();
    let stop = AtomicBool::new(false);
    let targets = bed.lab.pod("x/b").addrs(80);
    thread::scope(|scope| {
        for from in ["x/a", "x/c"] {
            let from = bed.lab.pod(from);
            let (stop, probes) = (&stop, &probes);
            scope.spawn(move || {
                for to in targets.into_iter().cycle() {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let begun = Instant::now();
                    let connected = from.connect(to, Duration::from_millis(100)).unwrap();
                    let probe = (begun, Instant::now(), connected.is_connected());
                    probes.lock().unwrap().push(probe);
                }
            });
        }
        let _stopped = Stop(&stop);
        for _ in 0..FLIPS {
            bed.apply(&[deny_ingress("b")]);
            let since = Instant::now();
            wait_until(
                DEADLINE,
                "tries that begin and end under the denial",
                || {
                    let probes = probes.lock().unwrap();
                    probes.iter().filter(|probe| probe.0 >= since).count() >= TRIES
                },
            )
            .unwrap();
            denials.push((since, Instant::now()));
            bed.apply(&[]);
        }
    });
    let probes = probes.into_inner().unwrap();
    let under = |probe: &(Instant, Instant, bool)| {
        let within = |(from, to): &(Instant, Instant)| probe.0 >= *from && probe.1 <= *to;
        denials.iter().any(within)
    };
    let (denied, others): (Vec<(Instant, Instant, bool)>, Vec<_>) =
        probes.into_iter().partition(under);
    assert!(denied.iter().all(|probe| !probe.2), "one got through");
    assert!(others.iter().any(|probe| probe.2), "it was open in between");
}

struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn policy_change_severs_only_the_streams_it_denies() {
    const BYTES: usize = 60;
    let mut bed = TestCluster::enforced(&[], &[]);
    for name in ["x/a", "x/d"] {
        let label = name.trim_start_matches("x/");
        bed.lab
            .relabel_pod(name, [("pod", label), ("access", "yes")])
            .unwrap();
    }
    bed.write_cluster();
    bed.apply(&[only_with_access("c")]);
    let to = bed.lab.pod("x/c").addrs(80);
    let open = |from: &str, count: usize| -> Vec<TcpStream> {
        let from: Host = bed.lab.pod(from);
        let to: Vec<SocketAddr> = to.into_iter().cycle().take(count).collect();
        to.into_iter().map(|to| connected(&from, to)).collect()
    };
    let (doomed, others) = (open("x/a", 10), open("x/d", 90));
    let changed = Mutex::new(None);
    thread::scope(|scope| {
        let cut: Vec<_> = doomed
            .iter()
            .map(|mut stream| {
                scope.spawn(move || {
                    stream.set_read_timeout(Some(DEADLINE)).unwrap();
                    let end = stream.read(&mut [0; 1]);
                    (end.map_err(|error| error.kind()), Instant::now())
                })
            })
            .collect();
        for round in 0..BYTES {
            if round == BYTES / 3 {
                *changed.lock().unwrap() = Some(Instant::now());
                bed.write_policies(&[only_with_access("c"), testbed::deny_egress("a")]);
            }
            for mut stream in &others {
                stream.write_all(b"x").unwrap();
            }
            thread::sleep(Duration::from_millis(10));
        }
        let changed = changed.lock().unwrap().unwrap();
        for cut in cut {
            let (end, at) = cut.join().unwrap();
            assert_eq!(end, Err(std::io::ErrorKind::ConnectionReset));
            let took = at.duration_since(changed);
            assert!(took < Duration::from_secs(1), "cut only after {took:?}");
        }
    });
    for mut stream in &others {
        let mut back = [0; BYTES];
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.read_exact(&mut back).unwrap();
        assert_eq!(back, [b'x'; BYTES]);
        echoes(stream, "and goes on");
    }
}
