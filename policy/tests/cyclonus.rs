//! The 230 cases of the cyclonus suite as generated tables, every verdict against a naive oracle.
//!
//! The same categories, cases and counts; where cyclonus probes what it finds served, all nine
//! pods are asked for 80 and 81 over TCP, UDP and SCTP, a port that nobody serves, and ICMP.
mod support {
    pub(crate) mod cluster;
    pub(crate) mod oracle;
}
mod generated {
    pub(crate) mod cyclonus;
}

use std::collections::BTreeMap;

use generated::cyclonus::{Case, all};
use support::cluster::{self, change, check_against_oracle, pairs};
use support::oracle::Question;
use testbed::cases::world::World;

/// Ports and protocols of each verdict.
const PROBES: [(Option<u16>, &str); 8] = [
    (Some(80), "TCP"),
    (Some(81), "TCP"),
    (Some(80), "UDP"),
    (Some(81), "UDP"),
    (Some(80), "SCTP"),
    (Some(81), "SCTP"),
    (Some(82), "TCP"),
    (None, "1"),
];

#[test]
fn the_suite_has_all_its_categories_and_cases() {
    let mut counts = BTreeMap::new();
    for case in all() {
        *counts.entry(case.category).or_insert(0) += 1;
    }
    let expected = [
        ("action", 6),
        ("conflict", 16),
        ("example", 1),
        ("namespace default label", 2),
        ("peers", 112),
        ("port/protocol", 70),
        ("rules", 4),
        ("target", 6),
        ("upstream e2e", 13),
    ];
    assert_eq!(counts, BTreeMap::from(expected));
    assert_eq!(counts.values().sum::<i32>(), 230);
}

#[test]
fn target_and_rules_cases_agree_with_the_documentation() {
    check(&["target", "rules"]);
}

#[test]
fn peers_cases_agree_with_the_documentation() {
    check(&["peers"]);
}

#[test]
fn port_and_protocol_cases_agree_with_the_documentation() {
    check(&["port/protocol"]);
}

#[test]
fn conflict_cases_agree_with_the_documentation() {
    check(&["conflict"]);
}

#[test]
fn action_and_example_cases_agree_with_the_documentation() {
    check(&["action", "example", "namespace default label"]);
}

#[test]
fn upstream_e2e_cases_agree_with_the_documentation() {
    check(&["upstream e2e"]);
}

/// Takes the steps of every case of the categories, one cluster growing with them, and compares
/// each verdict of each state with the oracle.
fn check(categories: &[&str]) {
    let cases: Vec<Case> = all()
        .into_iter()
        .filter(|case| categories.contains(&case.category))
        .collect();
    assert!(!cases.is_empty(), "no case of {categories:?}");
    for case in cases {
        let mut world = World::nine_pods();
        let mut cluster = cluster::cluster(&world);
        for (number, step) in case.steps.iter().enumerate() {
            for one in step {
                world.apply(one);
                change(&mut cluster, one);
            }
            let at = format!("{}: {}, step {}", case.category, case.title, number + 1);
            every_verdict(&at, &world, &cluster);
        }
    }
}

fn every_verdict(at: &str, world: &World, cluster: &policy::Cluster) {
    let addresses = world
        .pods
        .values()
        .flat_map(|pod| pod.addresses.iter().copied())
        .collect();
    for (from, to) in pairs(&addresses) {
        for (port, protocol) in PROBES {
            let question = Question {
                from,
                to,
                port,
                protocol,
                own_node_is_judged: false,
            };
            check_against_oracle(at, world, cluster, &question);
        }
    }
}
