//! Records of flows that the kernel forwards.
use std::fs;
use std::io::Read;
use std::net::IpAddr;
use std::path::Path;

use lab::{Kind, wait_for, wait_until};
use serde_json::{Value, json};
use testbed::runner::Test;
use testbed::{self, DEADLINE, SOON, TestCluster, connected, deny_ingress, metric, small};

use super::{accounting, bed, dns_from, dns_to, flow, goes_on};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    ended_stream_is_not_reported_as_severed,
    denial_by_another_node_is_not_reported_severed,
    ended_udp_flow_is_recorded_with_its_bytes,
    severed_udp_flow_is_recorded_with_its_bytes,
    restarted_daemon_knows_the_kernel_flows,
];

fn ended_stream_is_not_reported_as_severed() {
    let bed = bed(&[], &[]);
    let (a, node) = (bed.lab.pod("x/a"), bed.lab.node(0));
    let severed = r#"portreeve_policy_verdicts_total{verdict="sever",path="kernel"}"#;
    let to = bed.lab.pod("x/b").addr_v4(80);
    let live = connected(&a, to);
    let mut ended = connected(&a, to);
    ended.shutdown(std::net::Shutdown::Write).unwrap();
    // The server closes in turn; its end of stream is the last that conntrack waits for.
    ended.read_to_end(&mut Vec::new()).unwrap();
    drop(ended);
    bed.apply(&[deny_ingress("b")]);
    wait_until(DEADLINE, "the live one to be cut", || {
        metric(&node, severed) > 0
    })
    .unwrap();
    assert_eq!(metric(&node, severed), 1, "the live one only");
    drop(live);
}

fn denial_by_another_node_is_not_reported_severed() {
    let bed = bed(&[], &[deny_ingress("c")]);
    let (a, b, node) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"), bed.lab.node(0));
    let severed = r#"portreeve_policy_verdicts_total{verdict="sever",path="kernel"}"#;
    // Its own node lets it go, so conntrack there knows it, and the server's does not let it in.
    for to in bed.lab.pod("x/c").addrs(80) {
        assert_eq!(a.connect(to, SOON).unwrap().kind(), Kind::TimedOut);
    }
    for to in bed.lab.pod("x/c").addrs(53) {
        assert!(!goes_on(&flow(&a, to)), "{to}");
    }
    let live = connected(&b, a.addr_v4(80));
    bed.apply(&[deny_ingress("c"), deny_ingress("a")]);
    wait_until(DEADLINE, "the live one to be cut", || {
        metric(&node, severed) > 0
    })
    .unwrap();
    assert_eq!(metric(&node, severed), 1, "the live one only");
    drop(live);
}

/// The records so far of kernel flows from a to a server.
fn carried_records(file: &Path, server: IpAddr) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let records = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    records
        .filter(|it| it["path"] == "kernel" && it["destination.address"] == json!(server))
        .collect()
}

/// A datagram of this many bytes with its headers (RFC 768, RFC 791, RFC 8200).
fn on_the_wire(to: IpAddr, payload: usize) -> usize {
    payload + 8 + if to.is_ipv4() { 20 } else { 40 }
}

fn ended_udp_flow_is_recorded_with_its_bytes() {
    let records = tempfile::NamedTempFile::new().unwrap();
    let flags = ["--trace-file", records.path().to_str().unwrap()];
    let mut bed = TestCluster::bare(small());
    bed.lab.pod("x/c").serve_udp(&[53]).unwrap();
    bed.write_policies(&[dns_from("a"), dns_to("c")]);
    bed.enforce(&flags);
    let a = bed.lab.pod("x/a");
    for to in bed.lab.pod("x/c").addrs(53) {
        accounting(&bed, "60");
        let flow = flow(&a, to);
        assert!(goes_on(&flow));
        let listed = testbed::ask(&bed.lab.node(0), "/connections")
            .unwrap()
            .json();
        let ours =
            |it: &Value| it["path"] == "kernel" && it["destination.address"] == json!(to.ip());
        assert!(listed.as_array().unwrap().iter().any(ours), "{listed}");
        assert!(
            carried_records(records.path(), to.ip()).is_empty(),
            "it has not ended"
        );
        accounting(&bed, "1");
        assert!(goes_on(&flow));
        // The kernel looks for what has timed out when it has time, or when we look.
        let ended = wait_for(4 * DEADLINE, "both nodes' records", || {
            let records = carried_records(records.path(), to.ip());
            (records.len() == 2).then_some(records)
        })
        .unwrap();
        for record in ended {
            assert_eq!(record["verdict"], "allow", "{record}");
            assert_eq!(record["source.k8s.pod.name"], "a", "{record}");
            let sent = 2 * on_the_wire(to.ip(), "still?".len());
            assert_eq!(record["bytes.sent"], json!(sent), "{record}");
            assert!(record["bytes.received"].as_u64() > Some(0), "{record}");
            let time = |key: &str| record[key].as_str().unwrap().to_owned();
            assert!(time("start_time") < time("end_time"), "{record}");
        }
    }
    let node = bed.lab.node(0);
    assert_eq!(metric(&node, "portreeve_kernel_flows"), 0);
    let sent = "portreeve_bytes_total{path=\"kernel\",direction=\"sent\"}";
    let both = bed
        .lab
        .pod("x/c")
        .addrs(53)
        .map(|to| on_the_wire(to.ip(), "still?".len()));
    let expected: usize = both.iter().map(|once| 2 * once).sum();
    assert_eq!(metric(&node, sent), expected as u64);
}

fn severed_udp_flow_is_recorded_with_its_bytes() {
    let records = tempfile::NamedTempFile::new().unwrap();
    let flags = ["--trace-file", records.path().to_str().unwrap()];
    let mut bed = TestCluster::bare(small());
    bed.lab.pod("x/b").serve_udp(&[53]).unwrap();
    accounting(&bed, "60");
    bed.write_policies(&[dns_to("b")]);
    bed.enforce(&flags);
    let to = bed.lab.pod("x/b").addr_v4(53);
    let flow = flow(&bed.lab.pod("x/a"), to);
    assert!(goes_on(&flow) && goes_on(&flow));
    bed.apply(&[deny_ingress("b")]);
    let severed = wait_for(DEADLINE, "the record", || {
        let mut records = carried_records(records.path(), to.ip()).into_iter();
        records.find(|record| record["verdict"] == "sever")
    })
    .unwrap();
    let sent = 2 * on_the_wire(to.ip(), "still?".len());
    assert_eq!(severed["bytes.sent"], json!(sent), "{severed}");
    assert_eq!(severed["policies"], json!(["x/deny-ingress-b"]));
    assert!(severed["start_time"].as_str() < severed["end_time"].as_str());
    assert!(!goes_on(&flow));
}

fn restarted_daemon_knows_the_kernel_flows() {
    let mut bed = bed(&[], &[dns_to("b"), dns_to("c")]);
    let a = bed.lab.pod("x/a");
    let to = bed.lab.pod("x/b").addrs(53);
    let flows = to.map(|to| flow(&a, to));
    assert!(flows.iter().all(goes_on));
    bed.kill(0);
    assert!(flows.iter().all(goes_on), "the kernel needs no daemon");
    bed.start(0, &[]);
    let node = bed.lab.node(0);
    wait_until(DEADLINE, "the flows to be known", || {
        metric(&node, "portreeve_kernel_flows") == 2
    })
    .unwrap();
    assert!(flows.iter().all(goes_on));
    bed.apply(&[deny_ingress("b")]);
    assert!(!flows.iter().any(goes_on), "a change finds them");
}
