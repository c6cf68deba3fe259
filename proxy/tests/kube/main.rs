//! The daemon beside a real Kubernetes: its API server, `kubectl` and kube-proxy, in the lab.
//!
//! One control plane serves all tests, one after the other; every test has a cluster of its own.
#![expect(
    clippy::unwrap_used,
    reason = "a test panics at what it cannot do; clippy knows no tests without libtest"
)]
mod api;
mod away;
mod control;
mod daemons;
mod deploy;
mod incluster;
mod lists;
mod services;
mod terminating;
mod upstream;

use std::process::ExitCode;

const PORTREEVE: &str = env!("CARGO_BIN_EXE_portreeve");

fn main() -> ExitCode {
    testbed::set_up(PORTREEVE);
    let tests: Vec<_> = [
        api::TESTS,
        away::TESTS,
        terminating::TESTS,
        lists::TESTS,
        incluster::TESTS,
        services::TESTS,
        services::small::TESTS,
        upstream::TESTS,
        deploy::TESTS,
    ]
    .concat();
    let code = testbed::runner::run(&tests);
    control::stop();
    code
}
