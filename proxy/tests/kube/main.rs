//! The daemon beside a real Kubernetes: its API server, `kubectl` and kube-proxy, in the lab.
//!
//! One control plane serves all tests, one after the other; every test has a cluster of its own.
#![expect(
    clippy::unwrap_used,
    reason = "a test panics at what it cannot do; clippy knows no tests without libtest"
)]
mod account;
mod api;
mod away;
#[path = "../lab/cases.rs"]
mod cases;
mod control;
mod daemons;
mod deploy;
#[path = "../lab/dials.rs"]
mod dials;
#[path = "../lab/ending.rs"]
mod ending;
mod incluster;
mod lists;
mod services;
#[expect(dead_code, reason = "the lab's other tests use more")]
#[path = "../lab/stage.rs"]
mod stage;
#[expect(dead_code, reason = "the lab's other tests use more")]
#[path = "../lab/support.rs"]
mod support;
mod terminating;
mod upstream;

use std::process::ExitCode;

fn main() -> ExitCode {
    support::raise_descriptor_limit();
    let tests: Vec<_> = [
        api::TESTS,
        away::TESTS,
        terminating::TESTS,
        lists::TESTS,
        incluster::TESTS,
        services::TESTS,
        upstream::TESTS,
        deploy::TESTS,
    ]
    .concat();
    let code = lab::runner::main(&tests);
    control::stop();
    code
}
