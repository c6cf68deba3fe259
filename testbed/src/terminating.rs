//! A terminating pod, from any source of state: until it is gone its rights and its
//! connections are those of any other.
//!
//! In the small cluster, a may connect to c only, and only d to a.
use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpStream};

use lab::traffic::{UdpOutcome, connect_all};
use lab::{Dial, Host, Kind};
use serde_json::{Value, json};

use crate::{DEADLINE, SOON, TestCluster, connected, echoes, policy, small};

/// The small cluster, whose pods answer datagrams too.
pub fn bed() -> TestCluster {
    let bed = TestCluster::bare(small());
    for pod in bed.lab.pods() {
        pod.serve_udp(&[53]).unwrap();
    }
    bed
}

/// What a may connect to, and what may connect to it.
pub fn policies() -> [Value; 2] {
    let pod = |name: &str| json!({ "podSelector": { "matchLabels": { "pod": name } } });
    let side = |kind: &str, key: &str, list: &str, peer: &str| {
        let mut spec = pod("a");
        spec["policyTypes"] = json!([kind]);
        spec[key] = json!([{ list: [pod(peer)] }]);
        spec
    };
    [
        policy("from-a", &side("Egress", "egress", "to", "c")),
        policy("to-a", &side("Ingress", "ingress", "from", "d")),
    ]
}

/// What a has open.
pub struct Live(Vec<TcpStream>);

impl Live {
    /// A connection from a and one to it, in each family.
    pub fn open(bed: &TestCluster) -> Self {
        let ways = ways(bed, 80, [("x/a", "x/c"), ("x/d", "x/a")]);
        Self(ways.iter().map(|(from, to)| connected(from, *to)).collect())
    }

    /// All connections still carry data.
    #[track_caller]
    pub fn goes_on(&self) {
        self.0
            .iter()
            .for_each(|stream| echoes(stream, "still here"));
    }

    /// All connections are reset.
    #[track_caller]
    pub fn gets_cut(self) {
        for mut stream in self.0 {
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            let end = stream.read(&mut [0; 1]).map_err(|error| error.kind());
            assert_eq!(end, Err(ErrorKind::ConnectionReset));
        }
    }
}

/// Tries all allowed and denied connections again.
#[track_caller]
pub fn new_connections_have_their_rights(bed: &TestCluster, when: &str) {
    for (from, to) in ways(bed, 80, [("x/a", "x/c"), ("x/d", "x/a")]) {
        echoes(&connected(&from, to), when);
    }
    for (from, to) in ways(bed, 53, [("x/a", "x/c"), ("x/d", "x/a")]) {
        let answer = from.ask_udp(to, b"who?", DEADLINE).unwrap();
        let answered = matches!(answer, UdpOutcome::Answered { .. });
        assert!(answered, "{when}: {} to {to}: {answer}", from.name());
    }
    refused(bed, [("x/a", "x/b"), ("x/c", "x/a")], when);
}

/// No connection from or to a's former address succeeds.
#[track_caller]
pub fn it_is_gone(bed: &TestCluster) {
    refused(bed, [("x/a", "x/c"), ("x/d", "x/a")], "gone");
}

#[track_caller]
fn refused(bed: &TestCluster, pairs: [(&str, &str); 2], when: &str) {
    let ways = ways(bed, 80, pairs);
    let dials: Vec<_> = ways.iter().map(|(from, to)| Dial::new(from, *to)).collect();
    for ((from, to), outcome) in ways.iter().zip(connect_all(&dials, SOON).unwrap()) {
        assert_eq!(
            outcome.kind(),
            Kind::TimedOut,
            "{when}: {} to {to}",
            from.name()
        );
    }
}

fn ways(bed: &TestCluster, port: u16, pairs: [(&str, &str); 2]) -> Vec<(Host, SocketAddr)> {
    let way = |(from, to)| {
        let from = bed.lab.pod(from);
        let to = bed.lab.pod(to).addrs(port);
        to.map(|to| (from.clone(), to))
    };
    pairs.into_iter().flat_map(way).collect()
}
