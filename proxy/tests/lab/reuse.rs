//! Addresses that move from pod to pod, ten thousand times: each holder has its own rights and none of
//! the previous one's, for packets and by the uids in the records.
//!
//! One network namespace has the addresses of all pods, so that a generation of pods is no more than
//! a change of the cluster's state.
use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;

use lab::traffic::connect_all;
use lab::{Cluster, Dial, Host, PodSpec, wait_until};
use serde_json::{Value, json};
use testbed::runner::Test;

use crate::first::egress_by_access;
use crate::sever::reset_after;
use testbed::{DEADLINE, TestCluster, metric};

pub(crate) const TESTS: &[Test] = &testbed::tests![pods_on_reused_addresses_have_only_own_rights];

/// Pods at a time ...
const PODS: u8 = 250;
/// ... one after the other at each address, which is so handed on ten thousand times in all.
const GENERATIONS: usize = 41;
/// Host numbers of the pods' addresses begin here.
const FIRST: u8 = 2;
const SERVER: u8 = 254;

/// What became of the flows of a pod, by its uid and the protocol.
type Verdicts = BTreeMap<(String, &'static str), Vec<String>>;

fn pods_on_reused_addresses_have_only_own_rights() {
    let records = tempfile::NamedTempFile::new().unwrap();
    let bed = crowded(&["--trace-file", records.path().to_str().unwrap()]);
    let (crowd, server) = (bed.lab.pod("x/crowd"), bed.lab.pod("x/server"));
    let datagrams = sockets(&crowd, &server);
    let mut live: Vec<TcpStream> = Vec::new();
    let mut expected = Verdicts::new();
    for generation in 0..=GENERATIONS {
        let holders = if generation < GENERATIONS { PODS } else { 0 };
        let mark = tell(&bed, generation, holders);
        for stream in live.drain(..) {
            let end = reset_after(&stream);
            assert_eq!(end, Some(ErrorKind::ConnectionReset), "before {generation}");
        }
        bed.wait_in_force(&mark);
        let dials: Vec<Dial> = (0..holders)
            .map(|pod| Dial::new(&crowd, server.addrs(80)[family(pod)]).source(tcp_source(pod)))
            .collect();
        for (pod, outcome) in (0..).zip(connect_all(&dials, DEADLINE).unwrap()) {
            let right = allowed(generation, pod);
            assert_eq!(
                outcome.is_connected(),
                right,
                "{generation}, {pod}: {outcome}"
            );
            live.extend(outcome.into_stream());
        }
        for socket in &datagrams[..holders.into()] {
            socket.send(b"mine?").unwrap();
        }
        for (pod, socket) in (0..holders).zip(&datagrams) {
            let answer = socket.recv(&mut [0; 16]);
            let refused = matches!(&answer, Err(error) if error.kind() != ErrorKind::WouldBlock);
            let right = allowed(generation, pod);
            assert!(
                if right { answer.is_ok() } else { refused },
                "{generation}, {pod}: {answer:?}"
            );
            let verdict = if right { "sever" } else { "deny" };
            for protocol in ["TCP", "UDP"] {
                let flow = (uid(generation, pod), protocol);
                expected.insert(flow, vec![verdict.to_owned()]);
            }
        }
    }
    let waited = wait_until(DEADLINE, "a record of every flow", || {
        lines(records.path()) >= expected.len()
    });
    let lost = metric(&bed.lab.node(0), "portreeve_records_dropped_total");
    let seen = verdicts(records.path());
    let wrong = expected
        .iter()
        .filter(|&(flow, verdict)| seen.get(flow) != Some(verdict));
    let wrong: Vec<_> = wrong
        .map(|(flow, verdict)| (flow, verdict, seen.get(flow)))
        .collect();
    assert!(
        wrong.is_empty() && seen.len() == expected.len(),
        "{} of {} wrong ({waited:?}, {lost} records lost), such as {:?}",
        wrong.len(),
        expected.len(),
        &wrong[..wrong.len().min(5)]
    );
}

/// A node whose pods' addresses are all in one namespace; denied clients get an error at once.
fn crowded(flags: &[&str]) -> TestCluster {
    let [IpAddr::V4(v4), IpAddr::V6(v6)] = addresses(SERVER) else {
        panic!("an address of each family");
    };
    let server = PodSpec::new("x", "server").ipv4(v4).ipv6(v6);
    let pods = [PodSpec::new("x", "crowd"), server];
    let mut bed = TestCluster::bare(Cluster::builder().nodes(1).pods(pods));
    bed.lab.pod("x/server").serve_udp(&[53]).unwrap();
    let (node, crowd) = (bed.lab.node(0), bed.lab.pod("x/crowd"));
    let link = bed.lab.link_of("x/crowd").unwrap();
    let (mut of_node, mut of_pod) = (String::new(), String::new());
    for pod in 1..PODS {
        for address in addresses(FIRST + pod) {
            of_node += &format!("route add {address} dev {link}\n");
            let nodad = if address.is_ipv6() { " nodad" } else { "" };
            of_pod += &format!("addr add {address} dev eth0{nodad}\n");
        }
    }
    crowd.ip(&of_pod).unwrap();
    node.ip(&of_node).unwrap();
    // Every refusal is to be heard: no limit on the node's ICMP errors (ip-sysctl: a mask of types).
    let unlimited = [("ipv4/icmp_ratemask", "0"), ("ipv6/icmp/ratemask", "255")];
    node.netns().set_sysctls(&unlimited).unwrap();
    tell(&bed, 0, 0);
    bed.enforce(&[&["--deny", "reject"], flags].concat());
    bed
}

/// Assigns the first `holders` addresses to a generation's pods, and the rest to no pod.
fn tell(bed: &TestCluster, generation: usize, holders: u8) -> String {
    let mut state = bed.lab.manifests();
    let items = state["items"].as_array_mut().unwrap();
    let crowd = items
        .iter()
        .position(|it| it["metadata"]["name"] == "crowd");
    let crowd = items.remove(crowd.unwrap());
    items.extend((0..holders).map(|pod| holder(&crowd, generation, pod)));
    bed.write("cluster.json", &state);
    bed.write_policies(&egress_by_access())
}

fn holder(like: &Value, generation: usize, pod: u8) -> Value {
    let mut object = like.clone();
    let access = if allowed(generation, pod) {
        "yes"
    } else {
        "no"
    };
    // Every other one comes back by its name, as a StatefulSet's do.
    let name = match pod % 2 {
        0 => format!("holder-{pod}"),
        _ => format!("holder-{pod}-{generation}"),
    };
    let [v4, v6] = addresses(FIRST + pod);
    object["metadata"]["name"] = json!(name);
    object["metadata"]["uid"] = json!(uid(generation, pod));
    object["metadata"]["labels"] = json!({ "access": access });
    object["status"]["podIP"] = json!(v4);
    object["status"]["podIPs"] = json!([{ "ip": v4 }, { "ip": v6 }]);
    object
}

fn uid(generation: usize, pod: u8) -> String {
    format!("uid-{generation}-{pod}")
}

/// The opposite of what the last holder of the address may.
fn allowed(generation: usize, pod: u8) -> bool {
    (generation + usize::from(pod)).is_multiple_of(2)
}

/// Both addresses of a host number of the node's pod CIDRs.
fn addresses(host: u8) -> [IpAddr; 2] {
    let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, host.into());
    [Ipv4Addr::new(10, 244, 0, host).into(), v6.into()]
}

/// By which family a pod's TCP goes; its UDP goes by the other.
fn family(pod: u8) -> usize {
    usize::from(pod / 2 % 2)
}

fn tcp_source(pod: u8) -> IpAddr {
    addresses(FIRST + pod)[family(pod)]
}

/// A socket for each address: its ends stay the same from holder to holder.
fn sockets(crowd: &Host, server: &Host) -> Vec<UdpSocket> {
    let open = |pod: u8| {
        let other = 1 - family(pod);
        let socket = UdpSocket::bind(SocketAddr::new(addresses(FIRST + pod)[other], 0)).unwrap();
        socket.connect(server.addrs(53)[other]).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket
    };
    crowd.run(|| (0..PODS).map(open).collect()).unwrap()
}

fn lines(records: &Path) -> usize {
    fs::read_to_string(records).unwrap().lines().count()
}

fn verdicts(records: &Path) -> Verdicts {
    let mut verdicts = Verdicts::new();
    for line in fs::read_to_string(records).unwrap().lines() {
        let record: Value = serde_json::from_str(line).unwrap();
        let text = |key: &str| record[key].as_str().unwrap_or_default().to_owned();
        let protocol = if record["protocol"] == "TCP" {
            "TCP"
        } else {
            "UDP"
        };
        let flow = (text("source.k8s.pod.uid"), protocol);
        verdicts.entry(flow).or_default().push(text("verdict"));
    }
    verdicts
}
