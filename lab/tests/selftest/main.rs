//! The lab's tests of itself: what the other tests rely on.
//!
//! Has a main of its own (`harness = false`): the namespaces are entered before any thread runs.

#![expect(
    clippy::unwrap_used,
    reason = "without a harness clippy does not know it for a test"
)]

mod clusters;
mod lifetime;
mod reachability;
mod traffic;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use lab::traffic::greeting;
use lab::{Cluster, PodSpec, ServiceSpec};

/// For what must happen.
const LIMIT: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    // A test starts this program again, to kill it.
    if std::env::args().nth(1).as_deref() == Some("--hold-a-child") {
        return lifetime::hold_a_child();
    }
    let tests: Vec<_> = [
        reachability::TESTS,
        traffic::TESTS,
        clusters::TESTS,
        lifetime::TESTS,
    ]
    .concat();
    testbed::runner::run(&tests)
}

fn two_pods() -> Cluster {
    Cluster::builder()
        .nodes(2)
        .pod(PodSpec::new("x", "a").node(0))
        .pod(PodSpec::new("x", "b").node(1))
        .build()
        .unwrap()
}

fn web() -> lab::Builder {
    let backend = |name, node| PodSpec::new("x", name).node(node).label("app", "web");
    Cluster::builder()
        .nodes(2)
        .pod(backend("b1", 0))
        .pod(backend("b2", 1))
        .pod(PodSpec::new("x", "client").node(0))
        .pod(PodSpec::new("y", "b3").node(0).label("app", "web"))
        .service(
            ServiceSpec::new("x", "web")
                .selects("app", "web")
                .port(80, 8080),
        )
        .service(
            ServiceSpec::new("x", "none")
                .selects("app", "nothing")
                .port(80, 8080),
        )
}

/// The server that answered at `to`, and the client's address as the server saw it.
fn seen(from: &lab::Host, to: SocketAddr) -> (String, std::net::IpAddr) {
    let outcome = from.connect(to, LIMIT).unwrap();
    assert!(outcome.is_connected(), "{} to {to}: {outcome}", from.name());
    let mut stream = outcome.into_stream().unwrap();
    let greeting = greeting(&stream, LIMIT).unwrap();
    stream.write_all(b"ping").unwrap();
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"ping");
    (greeting.server, greeting.client.ip())
}
