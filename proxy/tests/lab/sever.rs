//! Live connections that a change no longer allows are severed; the others lose no data.
use std::fs;
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use lab::{Host, wait_for, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use testbed::runner::Test;

use crate::carried::{flow, goes_on};
use testbed::terminating::{self, Live};
use testbed::{DEADLINE, TestCluster, connected, deny_egress, deny_ingress, echoes, policy, small};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    every_kind_of_change_severs_only_denied_flows,
    severed_connection_record_names_its_policies,
    reset_reaches_client_after_its_node_severed_flow,
    terminating_pod_keeps_rights_and_connections_until_deleted,
];

/// From the change on disk to the reset at the client.
const CUT_WITHIN: Duration = Duration::from_secs(1);

/// Lets pods with `access: yes` of namespaces with `open: yes` come to the ports `http` and `dns` of
/// `pod`.
fn allow_access(pod: &str) -> Value {
    let yes = |key: &str| json!({ "matchLabels": { key: "yes" } });
    let from = json!([{ "from": [{ "namespaceSelector": yes("open"), "podSelector": yes("access") }], "ports": [{ "port": "http" }, { "port": "dns", "protocol": "UDP" }] }]);
    let spec = json!({ "podSelector": { "matchLabels": { "pod": pod } }, "policyTypes": ["Ingress"], "ingress": from });
    policy(&format!("access-{pod}"), &spec)
}

/// The cluster state for the daemons, edited object by object.
#[derive(Clone)]
struct ClusterState {
    cluster: Value,
    policies: Vec<Value>,
}

impl ClusterState {
    fn objects(&mut self) -> &mut Vec<Value> {
        self.cluster["items"].as_array_mut().unwrap()
    }

    fn object(&mut self, kind: &str, name: &str) -> &mut Value {
        let mut objects = self.objects().iter_mut();
        objects
            .find(|it| it["kind"] == kind && it["metadata"]["name"] == name)
            .unwrap()
    }

    fn pod(&mut self, name: &str) -> &mut Value {
        self.object("Pod", name)
    }

    fn remove_pod(&mut self, name: &str) {
        self.objects()
            .retain(|it| it["kind"] != "Pod" || it["metadata"]["name"] != name);
    }

    fn policy(&mut self, name: &str) -> &mut Value {
        let mut policies = self.policies.iter_mut();
        policies.find(|it| it["metadata"]["name"] == name).unwrap()
    }

    fn write(&self, bed: &TestCluster) -> String {
        bed.write("cluster.json", &self.cluster);
        bed.write_policies(&self.policies)
    }
}

/// A change, and which streams to c it severs. Those of a and d are allowed before.
type Change = (&'static str, &'static [&'static str], fn(&mut ClusterState));

const CHANGES: &[Change] = &[
    ("a policy is created", &["a"], |state| {
        state.policies.push(deny_egress("a"));
    }),
    ("a policy is edited", &["a"], |state| {
        state.policy("access-c")["spec"]["ingress"] = json!([]);
    }),
    ("a policy is deleted", &["a"], |state| {
        let access = |policy: &Value| policy["metadata"]["name"] == "access-c";
        state.policies.retain(|policy| !access(policy));
    }),
    ("an ipBlock is edited", &["d"], |state| {
        let block = json!([{ "from": [{ "ipBlock": { "cidr": "192.0.2.0/24" } }] }]);
        state.policy("d-by-address")["spec"]["ingress"] = block;
    }),
    ("the client pod is relabelled", &["a"], |state| {
        state.pod("a")["metadata"]["labels"] = json!({ "pod": "a" });
    }),
    (
        "the server pod comes under another policy",
        &["a", "d"],
        |state| {
            state.pod("c")["metadata"]["labels"] = json!({ "pod": "closed" });
        },
    ),
    ("the client's namespace is relabelled", &["a"], |state| {
        state.object("Namespace", "x")["metadata"]["labels"] = json!({ "open": "no" });
    }),
    ("the server's port is renamed", &["a"], |state| {
        let ports = &mut state.pod("c")["spec"]["containers"][0]["ports"];
        ports[0]["name"] = json!("web");
        ports[1]["name"] = json!("names");
    }),
    ("the client pod has finished", &["a"], |state| {
        state.pod("a")["status"]["phase"] = json!("Succeeded");
    }),
    ("the client pod is gone", &["a"], |state| {
        state.remove_pod("a");
    }),
    ("the server pod is gone", &["a", "d"], |state| {
        state.remove_pod("c");
    }),
    (
        "a pod that may do the same has the client's address",
        &["a"],
        |state| {
            let metadata = &mut state.pod("a")["metadata"];
            metadata["name"] = json!("a2");
            metadata["uid"] = json!("another");
        },
    ),
    (
        "the client pod is deleted and created again",
        &["a"],
        |state| {
            state.pod("a")["metadata"]["uid"] = json!("another");
        },
    ),
    ("the client pod is terminating", &[], |state| {
        state.pod("a")["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    }),
];

fn every_kind_of_change_severs_only_denied_flows() {
    let records = tempfile::NamedTempFile::new().unwrap();
    let bed = open_bed(&["--trace-file", records.path().to_str().unwrap()]);
    let server = bed.lab.pod("x/c");
    server.serve_udp(&[53]).unwrap();
    let state = state_of(&bed);
    for (what, cut, change) in CHANGES {
        let flows = ["a", "d"].map(|name| Flows::new(&bed.lab.pod(&format!("x/{name}")), &server));
        let (doomed, spared): (Vec<_>, Vec<_>) = ["a", "d"]
            .iter()
            .zip(&flows)
            .partition(|(name, _)| cut.contains(name));
        let before = all_records(records.path()).len();
        let severed = |flows: &Flows, protocol: &str| {
            let new = all_records(records.path()).split_off(before);
            let of = |it: &Value, address| it["source.address"] == json!(address);
            let severed = |it: &&Value| it["verdict"] == "sever" && it["protocol"] == protocol;
            let severed: Vec<_> = new.iter().filter(severed).collect();
            flows
                .client
                .map(|address| severed.iter().any(|it| of(it, address)))
        };
        let mut changed = state.clone();
        change(&mut changed);
        let at = Instant::now();
        let mark = changed.write(&bed);
        for (_, flows) in &doomed {
            for stream in &flows.streams {
                let end = reset_after(stream);
                assert_eq!(end, Some(ErrorKind::ConnectionReset), "{what}");
            }
        }
        let took = at.elapsed();
        assert!(took < CUT_WITHIN, "{what}: cut only after {took:?}");
        for (name, flows) in &doomed {
            for protocol in ["TCP", "UDP"] {
                let recorded = || severed(flows, protocol) == [true; 2];
                let reason = format!("{what}: records of {name}'s {protocol} flows");
                wait_until(DEADLINE, reason, recorded).unwrap();
            }
        }
        bed.wait_in_force(&mark);
        for (name, flows) in &spared {
            flows.streams.iter().for_each(|stream| echoes(stream, what));
            assert!(flows.datagrams.iter().all(goes_on), "{what}");
            for protocol in ["TCP", "UDP"] {
                assert_eq!(severed(flows, protocol), [false; 2], "{what}: {name}");
            }
        }
        drop(flows);
        bed.wait_in_force(&state.write(&bed));
    }
}

/// What a client has open to a server, in both families.
struct Flows {
    client: [IpAddr; 2],
    streams: [TcpStream; 2],
    datagrams: [UdpSocket; 2],
}

impl Flows {
    fn new(client: &Host, server: &Host) -> Self {
        let datagrams = server.addrs(53).map(|to| flow(client, to));
        assert!(datagrams.iter().all(goes_on));
        Self {
            client: client.addresses(),
            streams: server.addrs(80).map(|to| connected(client, to)),
            datagrams,
        }
    }
}

fn all_records(file: &Path) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap();
    text.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

fn severed_connection_record_names_its_policies() {
    let records = tempfile::NamedTempFile::new().unwrap();
    let path = records.path().to_str().unwrap().to_owned();
    let bed = open_bed(&["--trace-file", &path]);
    let to: SocketAddr = bed.lab.pod("x/c").addr_v4(80);
    let stream = connected(&bed.lab.pod("x/a"), to);
    bed.apply(&[deny_ingress("c")]);
    assert_eq!(reset_after(&stream), Some(ErrorKind::ConnectionReset));
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

/// The client's node only forwards the connection, since before its pod was isolated; the server's node
/// relays it, and learns of the change later.
fn reset_reaches_client_after_its_node_severed_flow() {
    let records = tempfile::NamedTempFile::new().unwrap();
    let mut bed = open_bed(&["--trace-file", records.path().to_str().unwrap()]);
    let server = bed.lab.pod("x/c");
    let streams = server
        .addrs(80)
        .map(|to| connected(&bed.lab.pod("x/a"), to));
    let servers_node = Pid::from_raw(bed.daemon(1).child.id().cast_signed());
    kill(servers_node, Signal::SIGSTOP).unwrap();
    let mut state = state_of(&bed);
    state.policies.push(deny_egress("a"));
    let mark = state.write(&bed);
    let cut = || {
        let records = all_records(records.path());
        let severed = |it: &&Value| it["verdict"] == "sever" && it["k8s.node.name"] == "node-0";
        records.iter().filter(severed).count() == streams.len()
    };
    wait_until(DEADLINE, "the client's node to cut", cut).unwrap();
    kill(servers_node, Signal::SIGCONT).unwrap();
    for stream in &streams {
        assert_eq!(reset_after(stream), Some(ErrorKind::ConnectionReset));
    }
    bed.wait_in_force(&mark);
}

fn terminating_pod_keeps_rights_and_connections_until_deleted() {
    let mut bed = terminating::bed();
    bed.write_policies(&terminating::policies());
    bed.enforce(&["--hold", "300ms"]);
    let mut state = ClusterState {
        cluster: bed.lab.manifests(),
        policies: terminating::policies().to_vec(),
    };
    let live = Live::open(&bed);
    terminating::new_connections_have_their_rights(&bed, "running");
    let metadata = &mut state.pod("a")["metadata"];
    metadata["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    metadata["deletionGracePeriodSeconds"] = json!(30);
    bed.wait_in_force(&state.write(&bed));
    live.goes_on();
    terminating::new_connections_have_their_rights(&bed, "terminating");
    live.goes_on();
    state.remove_pod("a");
    let mark = state.write(&bed);
    live.gets_cut();
    bed.wait_in_force(&mark);
    terminating::it_is_gone(&bed);
}

/// Namespace x is open and a has access to c by its port's name; d comes by its address.
fn open_bed(flags: &[&str]) -> TestCluster {
    let mut bed = TestCluster::bare(small());
    state_of(&bed).write(&bed);
    bed.enforce(flags);
    bed
}

fn state_of(bed: &TestCluster) -> ClusterState {
    let blocks: Vec<_> = bed
        .lab
        .pod("x/d")
        .addresses()
        .iter()
        .map(|address| {
            let length = if address.is_ipv4() { 32 } else { 128 };
            json!({ "ipBlock": { "cidr": format!("{address}/{length}") } })
        })
        .collect();
    let spec = json!({ "podSelector": { "matchLabels": { "pod": "c" } }, "policyTypes": ["Ingress"], "ingress": [{ "from": blocks }] });
    let closed = json!({ "podSelector": { "matchLabels": { "pod": "closed" } }, "policyTypes": ["Ingress"] });
    let mut state = ClusterState {
        cluster: bed.lab.manifests(),
        policies: vec![
            allow_access("c"),
            policy("d-by-address", &spec),
            policy("closed", &closed),
        ],
    };
    state.pod("a")["metadata"]["labels"]["access"] = json!("yes");
    let dns = json!({ "name": "dns", "containerPort": 53, "protocol": "UDP" });
    let ports = &mut state.pod("c")["spec"]["containers"][0]["ports"];
    ports.as_array_mut().unwrap().push(dns);
    state.object("Namespace", "x")["metadata"]["labels"] = json!({ "open": "yes" });
    state
}

/// Reads until the stream ends, and how it ended; `None`: by a plain close.
pub(crate) fn reset_after(mut stream: &TcpStream) -> Option<ErrorKind> {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut rest = Vec::new();
    stream
        .read_to_end(&mut rest)
        .err()
        .map(|error| error.kind())
}
