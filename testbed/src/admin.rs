//! What a node's daemon and its redirect say: the admin port, metrics, counters of nft.
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};

use lab::{Host, wait_until};
use serde_json::Value;

use crate::DEADLINE;

const ADMIN: u16 = 15020;

/// An answer of the admin port.
#[derive(Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// Status line and headers, in lower case.
    pub head: String,
    /// What follows them.
    pub body: String,
}

impl Answer {
    /// The body, which must be JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Asks the admin port of a node's daemon; `None` without one.
pub fn ask(node: &Host, path: &str) -> Option<Answer> {
    ask_by(node, "GET", path)
}

/// The same with another method.
pub fn ask_by(node: &Host, method: &str, path: &str) -> Option<Answer> {
    ask_as(node, "localhost", method, path)
}

/// Sends a request with another Host header.
pub fn ask_as(node: &Host, host: &str, method: &str, path: &str) -> Option<Answer> {
    let connect = || TcpStream::connect((Ipv4Addr::LOCALHOST, ADMIN));
    let mut stream = node.run(connect).unwrap().ok()?;
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let request = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some(Answer {
        status,
        head: head.to_lowercase(),
        body: body.to_owned(),
    })
}

/// Whether a daemon has the policy `mark`, and the kernel's sets match its table.
pub fn in_force(node: &Host, mark: &str) -> bool {
    let named = format!("{mark}\"");
    let Some(policies) = ask(node, "/policies").filter(|it| it.body.contains(&named)) else {
        return false;
    };
    assert_eq!(policies.status, 200, "{policies:?}");
    // The policy is in the table by now; what counts then is that the kernel is in step.
    let table = metric(node, "portreeve_table_generation");
    wait_until(DEADLINE, "the kernel's sets", || {
        metric(node, "portreeve_enforced_generation") >= table
    })
    .is_ok()
}

/// The sum of a metric's series that have all the labels of `name`, other labels or not; 0 if there
/// is none yet.
pub fn metric(node: &Host, name: &str) -> u64 {
    let (name, labels) = split_labels(name);
    let answer = ask(node, "/metrics").unwrap();
    let series = answer.body.lines().filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let (its_name, its_labels) = split_labels(series);
        let matches = its_name == name && labels.iter().all(|label| its_labels.contains(label));
        matches.then(|| value.parse::<u64>().unwrap())
    });
    series.sum()
}

/// How many packets a counter of the redirect has seen.
pub fn counter(node: &Host, name: &str) -> u64 {
    counter_of(node, "inet", name)
}

/// The same of the table of another family.
pub fn counter_of(node: &Host, family: &str, name: &str) -> u64 {
    let mut nft = node.command("nft");
    nft.args(["-j", "list", "counter", family, "portreeve", name]);
    let said = nft.output().unwrap();
    let listing: Value = serde_json::from_slice(&said.stdout).unwrap();
    let objects = listing["nftables"].as_array().unwrap();
    objects
        .iter()
        .find_map(|object| object["counter"]["packets"].as_u64())
        .unwrap()
}

fn split_labels(series: &str) -> (&str, Vec<&str>) {
    match series.trim_end_matches('}').split_once('{') {
        Some((name, labels)) => (name, labels.split(',').collect()),
        None => (series, Vec::new()),
    }
}
