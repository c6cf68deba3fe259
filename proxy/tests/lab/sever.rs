//! Live connections that a change no longer allows are cut; the others lose nothing.
use std::fs;
use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use lab::runner::Test;
use lab::wait_for;
use serde_json::{Value, json};

use crate::support::{Bed, DEADLINE, connected, deny_ingress, echoes, policy, small};

pub(crate) const TESTS: &[Test] = &lab::tests![
    a_change_that_denies_a_live_connection_cuts_it_and_no_other,
    a_severed_connection_is_recorded_with_the_policies_that_did_it,
];

/// From the change on disk to the reset at the client.
const CUT_WITHIN: Duration = Duration::from_secs(1);

/// Lets pods with `access: yes` of namespaces with `open: yes` come to `pod`.
fn allow_access(pod: &str) -> Value {
    let yes = |key: &str| json!({ "matchLabels": { key: "yes" } });
    let from =
        json!([{ "from": [{ "namespaceSelector": yes("open"), "podSelector": yes("access") }] }]);
    let spec = json!({ "podSelector": { "matchLabels": { "pod": pod } }, "policyTypes": ["Ingress"], "ingress": from });
    policy(&format!("access-{pod}"), &spec)
}

/// What is changed, whether it leaves d's connections allowed, and how.
type Change = (&'static str, bool, fn(&mut Bed));

fn a_change_that_denies_a_live_connection_cuts_it_and_no_other() {
    let changes: &[Change] = &[
        ("the policy is edited", false, |bed| {
            bed.write_policies(&[allow_access("b"), deny_ingress("c")]);
        }),
        ("the client pod is relabelled", true, |bed| {
            bed.lab.relabel_pod("x/a", [("pod", "a")]).unwrap();
            bed.write_cluster();
        }),
        ("the server pod comes under another policy", false, |bed| {
            bed.lab.relabel_pod("x/c", [("pod", "closed")]).unwrap();
            bed.write_cluster();
        }),
        ("the client's namespace is relabelled", true, |bed| {
            bed.lab.relabel_namespace("x", [("open", "no")]);
            bed.write_cluster();
        }),
    ];
    for (what, spares, change) in changes {
        let mut bed = open_bed(&[]);
        let (a, d) = (bed.lab.pod("x/a"), bed.lab.pod("x/d"));
        let to = bed.lab.pod("x/c").addrs(80);
        let mut doomed = to.map(|to| connected(&a, to));
        // d is allowed by its address, whatever labels say.
        let others = to.map(|to| connected(&d, to));
        let changed = Instant::now();
        change(&mut bed);
        for stream in &mut doomed {
            assert_eq!(
                reset_after(stream),
                Some(std::io::ErrorKind::ConnectionReset),
                "{what}"
            );
        }
        let took = changed.elapsed();
        assert!(took < CUT_WITHIN, "{what}: cut only after {took:?}");
        for stream in others.iter().filter(|_| *spares) {
            echoes(stream, "still here");
        }
    }
}

fn a_severed_connection_is_recorded_with_the_policies_that_did_it() {
    let records = tempfile::NamedTempFile::new().unwrap();
    let path = records.path().to_str().unwrap().to_owned();
    let bed = open_bed(&["--trace-file", &path]);
    let to: SocketAddr = bed.lab.pod("x/c").addr_v4(80);
    let mut stream = connected(&bed.lab.pod("x/a"), to);
    bed.apply(&[deny_ingress("c")]);
    assert_eq!(
        reset_after(&mut stream),
        Some(std::io::ErrorKind::ConnectionReset)
    );
    let severed = wait_for(DEADLINE, "a record of it", || {
        let text = fs::read_to_string(&path).unwrap();
        let mut records = text
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        records.find(|record| record["verdict"] == "sever")
    })
    .unwrap();
    assert_eq!(severed["policies"], json!(["x/deny-ingress-c"]));
    assert_eq!(severed["direction"], "ingress");
    assert_eq!(severed["source.k8s.pod.name"], "a");
    assert_eq!(severed["destination.k8s.pod.name"], "c");
}

/// Namespace x is open and a has access to c; d comes by its address.
fn open_bed(flags: &[&str]) -> Bed {
    let cluster = small().namespace("x", [("open", "yes")]);
    let mut bed = Bed::bare(cluster);
    bed.lab
        .relabel_pod("x/a", [("pod", "a"), ("access", "yes")])
        .unwrap();
    bed.write_cluster();
    let d = bed.lab.pod("x/d").addresses();
    let blocks: Vec<_> = d
        .iter()
        .map(|address| {
            let length = if address.is_ipv4() { 32 } else { 128 };
            json!({ "ipBlock": { "cidr": format!("{address}/{length}") } })
        })
        .collect();
    let spec = json!({ "podSelector": { "matchLabels": { "pod": "c" } }, "policyTypes": ["Ingress"], "ingress": [{ "from": blocks }] });
    let closed = json!({ "podSelector": { "matchLabels": { "pod": "closed" } }, "policyTypes": ["Ingress"] });
    bed.write_policies(&[
        allow_access("c"),
        policy("d-by-address", &spec),
        policy("closed", &closed),
    ]);
    bed.enforce(flags);
    bed
}

/// Reads until the stream ends, and how it ended; `None`: by a plain close.
fn reset_after(stream: &mut TcpStream) -> Option<std::io::ErrorKind> {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut rest = Vec::new();
    stream
        .read_to_end(&mut rest)
        .err()
        .map(|error| error.kind())
}
