//! The daemon in the lab: the real init step and the real `portreeve` on every node, real
//! connections between pods.
//!
//! Every test has a cluster of its own; nothing is skipped: what is missing is a failure.
#![expect(
    clippy::unwrap_used,
    reason = "a test panics at what it cannot do; clippy knows no tests without libtest"
)]
mod addresses;
mod admin;
mod bounds;
mod bridges;
mod carried;
mod changes;
mod console;
mod cookies;
mod first;
mod flood;
mod full_disk;
mod handover;
mod helpers;
mod image;
mod isolation;
mod likeness;
mod logs;
mod martians;
mod modes;
mod neighbour;
mod odd;
mod own_node;
mod page;
mod pmtu;
mod policies;
mod ports;
mod redirect;
mod restart;
mod reuse;
mod same_ends;
mod sctp;
mod sever;
mod spans;
mod spoof;
mod stalled;
mod startup;
mod strange;
mod streams;
mod surge;
mod tenants;
mod topology;

use std::process::ExitCode;

const PORTREEVE: &str = env!("CARGO_BIN_EXE_portreeve");

fn main() -> ExitCode {
    testbed::set_up(PORTREEVE);
    let tests: Vec<_> = [
        policies::TESTS,
        carried::TESTS,
        carried::records::TESTS,
        isolation::TESTS,
        odd::TESTS,
        own_node::TESTS,
        pmtu::TESTS,
        helpers::TESTS,
        same_ends::TESTS,
        sctp::TESTS,
        spoof::TESTS,
        martians::TESTS,
        changes::TESTS,
        likeness::TESTS,
        modes::TESTS,
        streams::TESTS,
        topology::TESTS,
        bridges::TESTS,
        bridges::frames::TESTS,
        sever::TESTS,
        first::TESTS,
        flood::TESTS,
        full_disk::TESTS,
        reuse::TESTS,
        addresses::TESTS,
        ports::TESTS,
        cookies::TESTS,
        bounds::TESTS,
        bounds::handshakes::TESTS,
        redirect::TESTS,
        restart::TESTS,
        handover::TESTS,
        handover::rejected::TESTS,
        stalled::TESTS,
        surge::TESTS,
        tenants::TESTS,
        admin::TESTS,
        logs::TESTS,
        spans::TESTS,
        console::TESTS,
        page::TESTS,
        startup::TESTS,
        image::TESTS,
    ]
    .concat();
    testbed::runner::run(&tests)
}
