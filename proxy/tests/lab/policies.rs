//! The cases of the policy crate, replayed on the wire from manifests on disk.
use std::fs;

use lab::runner::Test;
use serde_json::{Value, json};

use crate::cases::world::{Change, World};
use crate::stage::{self, Source, Stage};
use crate::support::{Bed, marker};

pub(crate) const TESTS: &[Test] = &lab::tests![
    the_policies_of_the_kubernetes_documentation_hold_on_real_connections,
    the_upstream_cases_hold_on_the_wire_by_tcp_udp_and_sctp,
    the_recipes_hold_on_real_connections,
    what_the_known_suites_leave_out_holds_on_real_connections,
];

fn the_policies_of_the_kubernetes_documentation_hold_on_real_connections() {
    replay("docs", 13);
}

fn the_upstream_cases_hold_on_the_wire_by_tcp_udp_and_sctp() {
    replay("upstream", 48);
}

fn the_recipes_hold_on_real_connections() {
    replay("recipes", 14);
}

fn what_the_known_suites_leave_out_holds_on_real_connections() {
    replay("more", 7);
}

/// Replays every case of a directory.
fn replay(directory: &str, at_least: usize) {
    let cases = stage::cases(directory, at_least);
    let mut stage = Stage::new(&cases, |bed| Manifests::new(bed));
    stage.play_all(&cases);
}

/// The whole state in one file of the watched directory, so that it comes into force as one.
pub(crate) struct Manifests(());

impl Manifests {
    /// In place of the lab's own manifests.
    pub(crate) fn new(bed: &Bed) -> Self {
        fs::remove_file(bed.manifests().join("cluster.json")).unwrap();
        Self(())
    }
}

impl Source for Manifests {
    fn step(&mut self, bed: &Bed, nodes: &[Value], world: &World, _: &[Change]) {
        let mark = bed.mark();
        let mut items = stage::objects(nodes, world);
        items.push(marker(&mark));
        bed.write(
            "state.json",
            &json!({ "apiVersion": "v1", "kind": "List", "items": items }),
        );
        bed.wait_in_force(&mark);
    }
}
