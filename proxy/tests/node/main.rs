//! The DaemonSet on a real node: kubelet and containerd run our image as the manifests have it, and the pods
//! that it polices.
//!
//! One node serves all tests, one after the other; every test has a namespace of its own.
#![expect(
    clippy::unwrap_used,
    reason = "a test panics at what it cannot do; clippy knows no tests without libtest"
)]
mod daemonset;
mod enforcement;
mod network;
mod overlays;
mod pods;
mod rolling;
mod room;

use std::process::ExitCode;

const PORTREEVE: &str = env!("CARGO_BIN_EXE_portreeve");

fn main() -> ExitCode {
    testbed::set_up(PORTREEVE);
    let tests: Vec<_> = [
        daemonset::TESTS,
        enforcement::TESTS,
        rolling::TESTS,
        network::TESTS,
        overlays::TESTS,
    ]
    .concat();
    let code = testbed::runner::run(&tests);
    room::close();
    code
}
