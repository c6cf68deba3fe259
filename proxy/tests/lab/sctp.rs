//! SCTP, decided by its ports. The test machines have no SCTP sockets, so the packets of both ends are
//! made by hand.
use std::fs;
use std::net::SocketAddr;

use lab::traffic::Way;
use lab::traffic::craft::{self, SCTP_INIT, SCTP_INIT_ACK};
use lab::{Capture, Host, wait_until};
use serde_json::{Value, json};
use testbed::runner::Test;

use testbed::{DEADLINE, TestCluster, deny_egress, deny_ingress, metric, policy, small};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    sctp_ports_are_judged_both_ways_on_nodes,
    sctp_replies_pass_only_in_their_association,
];

/// The tag that an INIT asks its peer to use, as the lab makes it.
const TAG: u32 = 7;

/// The conformance suite's case: a rule for SCTP on port 80 and no other.
fn only_sctp_80(pod: &str, direction: &str) -> Value {
    let ports = json!([{ "port": 80, "protocol": "SCTP" }]);
    let mut spec =
        json!({ "podSelector": { "matchLabels": { "pod": pod } }, "policyTypes": [direction] });
    spec[direction.to_lowercase()] = json!([{ "ports": ports }]);
    policy(&format!("sctp-{direction}-{pod}").to_lowercase(), &spec)
}

/// An association attempt, observed at its server.
struct Attempt<'a> {
    bed: &'a TestCluster,
    client: Host,
    server: Host,
    capture: Capture,
}

impl<'a> Attempt<'a> {
    fn new(bed: &'a TestCluster, client: &str, server: &str) -> Self {
        let (client, server) = (bed.lab.pod(client), bed.lab.pod(server));
        let capture = server.capture().unwrap();
        Self {
            bed,
            client,
            server,
            capture,
        }
    }

    fn denials(&self) -> u64 {
        let of = |node: Host| {
            metric(
                &node,
                r#"portreeve_policy_verdicts_total{verdict="deny",path="kernel"}"#,
            )
        };
        self.bed.lab.nodes().map(of).sum()
    }

    fn sends(&self, from: SocketAddr, to: SocketAddr, tag: u32, chunk: u8) {
        let packet = craft::sctp(from, to, tag, chunk);
        self.client.injector().unwrap().send(&packet).unwrap();
    }

    fn arrived(&self, from: SocketAddr, to: SocketAddr) -> usize {
        self.capture.count(|it| {
            it.way == Way::In && (it.protocol, it.source, it.destination) == (132, from, to)
        })
    }

    #[track_caller]
    fn passes(&self, source: u16, port: u16, tag: u32, chunk: u8) {
        let ends = self
            .client
            .addrs(source)
            .into_iter()
            .zip(self.server.addrs(port));
        for (from, to) in ends {
            self.sends(from, to, tag, chunk);
            wait_until(DEADLINE, format!("SCTP from {from} at {to}"), || {
                self.arrived(from, to) == 1
            })
            .unwrap();
        }
    }

    #[track_caller]
    fn is_denied(&self, source: u16, port: u16, tag: u32, chunk: u8) {
        let ends = self
            .client
            .addrs(source)
            .into_iter()
            .zip(self.server.addrs(port));
        for (from, to) in ends {
            let before = self.denials();
            self.sends(from, to, tag, chunk);
            wait_until(DEADLINE, format!("SCTP from {from} to {to} denied"), || {
                self.denials() > before
            })
            .unwrap();
            assert_eq!(self.arrived(from, to), 0, "{from} to {to}");
        }
    }
}

fn sctp_ports_are_judged_both_ways_on_nodes() {
    let mut bed = TestCluster::bare(small());
    let trace = bed.file("trace.json");
    bed.enforce(&["--trace-file", trace.to_str().unwrap()]);
    for policies in [
        vec![only_sctp_80("a", "Egress")],
        vec![only_sctp_80("b", "Ingress"), only_sctp_80("c", "Ingress")],
    ] {
        bed.apply(&policies);
        for server in ["x/b", "x/c"] {
            let attempt = Attempt::new(&bed, "x/a", server);
            attempt.passes(5000, 80, 0, SCTP_INIT);
            attempt.is_denied(5001, 81, 0, SCTP_INIT);
            let tcp = attempt
                .client
                .connect(attempt.server.addr_v4(80), testbed::SOON);
            assert_eq!(tcp.unwrap().kind(), lab::Kind::TimedOut, "no rule for TCP");
        }
    }
    let records = fs::read_to_string(trace).unwrap();
    let denied = records.lines().any(|line| {
        let record: Value = serde_json::from_str(line).unwrap();
        record["protocol"] == "SCTP"
            && record["path"] == "kernel"
            && record["verdict"] == "deny"
            && record["destination.port"] == 81
    });
    assert!(denied, "{records}");
}

fn sctp_replies_pass_only_in_their_association() {
    let mut bed = TestCluster::bare(small());
    // a may only begin, b may only be begun with: what comes back is no flow of its own.
    bed.write_policies(&[
        only_sctp_80("a", "Egress"),
        deny_ingress("a"),
        only_sctp_80("b", "Ingress"),
        deny_egress("b"),
    ]);
    bed.enforce(&[]);
    let (there, back) = (
        Attempt::new(&bed, "x/a", "x/b"),
        Attempt::new(&bed, "x/b", "x/a"),
    );
    back.is_denied(80, 5000, TAG, SCTP_INIT_ACK);
    there.passes(5000, 80, 0, SCTP_INIT);
    back.passes(80, 5000, TAG, SCTP_INIT_ACK);
    back.is_denied(80, 5001, TAG, SCTP_INIT_ACK);
    back.is_denied(5000, 80, 0, SCTP_INIT);
}
