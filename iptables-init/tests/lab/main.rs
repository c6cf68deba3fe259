//! The redirect in real network namespaces: what `iptables-init` puts in, takes out and finds.
//!
//! Every test has namespaces of its own. Nothing is skipped: what is missing is a failure.
#![expect(
    clippy::unwrap_used,
    reason = "a test panics at what it cannot do; clippy knows no tests without libtest"
)]
mod checks;
mod install;
mod rules;
mod support;
mod traffic;

use std::process::ExitCode;

fn main() -> ExitCode {
    let tests: Vec<_> = [install::TESTS, rules::TESTS, checks::TESTS, traffic::TESTS].concat();
    testbed::runner::run(&tests)
}
