//! The cases under `tests/cases`: files that hold policies and the truth table they ask for.
//!
//! One `check` for all of them; a new scenario is a new file. Every table is also put to the naive
//! oracle that the generated tests rely on.
mod support {
    pub(crate) mod cluster;
    pub(crate) mod oracle;
}

use std::fs;
use std::io::Error;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use support::cluster;
use support::oracle::{self, Question};
use testbed::cases::world::World;
use testbed::cases::{Case, Family, Grid, Probe, Step};

#[test]
fn upstream_end_to_end_cases_pass() {
    check_directory("upstream", 48);
}

#[test]
fn network_policy_recipes_pass() {
    check_directory("recipes", 14);
}

#[test]
fn kubernetes_documentation_policies_pass() {
    check_directory("docs", 13);
}

#[test]
fn additional_conformance_cases_pass() {
    check_directory("more", 7);
}

/// Checks every file; tells of all that fail.
fn check_directory(directory: &str, at_least: usize) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/cases")
        .join(directory);
    let cases = load_all(&path);
    assert!(
        cases.len() >= at_least,
        "{}: {} files, expected {at_least} or more",
        path.display(),
        cases.len()
    );
    let failures: Vec<String> = cases.iter().filter_map(|case| check(case).err()).collect();
    assert!(
        failures.is_empty(),
        "{} of {} cases fail\n\n{}",
        failures.len(),
        cases.len(),
        failures.join("\n")
    );
}

/// Every `*.yaml` of `directory`, in the order of their names.
#[expect(
    clippy::disallowed_methods,
    reason = "the cases are files; the crate itself reads none"
)]
fn load_all(directory: &Path) -> Vec<Case> {
    let entries = fs::read_dir(directory).unwrap_or_else(|error| unreadable(directory, &error));
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("a file's name").path())
        .collect();
    files.retain(|file| {
        file.extension()
            .is_some_and(|extension| extension == "yaml")
    });
    files.sort();
    let text =
        |file: &PathBuf| fs::read_to_string(file).unwrap_or_else(|error| unreadable(file, &error));
    files
        .iter()
        .map(|file| Case::parse(file, &text(file)))
        .collect()
}

fn unreadable(path: &Path, error: &Error) -> ! {
    panic!("{}: {error}", path.display())
}

/// Takes the steps of `case` and compares every grid with what the crate says, over every address
/// family, and with the naive oracle.
fn check(case: &Case) -> Result<(), String> {
    let mut world = case.start.clone();
    let mut incremental = cluster::cluster(&world);
    for step in &case.steps {
        for change in &step.changes {
            world.apply(change);
            cluster::change(&mut incremental, change);
        }
        let afresh = cluster::cluster(&world);
        for probe in &step.probes {
            let ours = |cluster| {
                move |question: &Question<'_>| cluster::judge(cluster, question).allowed()
            };
            compare(case, step, probe, "observed", ours(&incremental))?;
            compare(
                case,
                step,
                probe,
                "observed in a cluster built afresh",
                ours(&afresh),
            )?;
            compare(case, step, probe, "said by the oracle", |question| {
                oracle::answer(&world, question).allowed()
            })?;
            details_agree(case, probe, &world, &incremental);
        }
    }
    Ok(())
}

fn compare(
    case: &Case,
    step: &Step,
    probe: &Probe,
    who: &str,
    allowed: impl Fn(&Question<'_>) -> bool,
) -> Result<(), String> {
    for family in [Family::IPv4, Family::IPv6] {
        if probe.family.is_some_and(|only| only != family) {
            continue;
        }
        let seen = observe(case, probe, family, &allowed);
        if seen != probe.expected {
            let (port, protocol) = (probe.port, &probe.protocol);
            let Case {
                file,
                title,
                reason,
                ..
            } = case;
            let (file, does) = (file.display(), &step.does);
            let grid = seen.draw(&probe.expected);
            return Err(format!(
                "{file}\n  {title}\n  because: {reason}\n  after: {does}\n  \
                 {port}/{protocol} over {family:?}, {who} (differences in brackets):\n{grid}"
            ));
        }
    }
    Ok(())
}

/// Fills the grid of `probe` in; what cannot be asked over `family` is taken as expected.
fn observe(
    case: &Case,
    probe: &Probe,
    family: Family,
    allowed: impl Fn(&Question<'_>) -> bool,
) -> Grid {
    let mut grid = probe.expected.clone();
    for (row, from) in probe.expected.parties.iter().enumerate() {
        for (column, to) in probe.expected.parties.iter().enumerate() {
            let ends = (address(case, from, family), address(case, to, family));
            if let ((Some(from), Some(to)), Some(cell)) = (ends, &mut grid.cells[row][column]) {
                *cell = allowed(&question(probe, from, to));
            }
        }
    }
    grid
}

/// The crate gives the oracle's reasons too.
fn details_agree(case: &Case, probe: &Probe, world: &World, cluster: &policy::Cluster) {
    for family in [Family::IPv4, Family::IPv6] {
        let parties = &probe.expected.parties;
        let addresses = parties
            .iter()
            .filter_map(|party| address(case, party, family))
            .collect();
        for (from, to) in cluster::pairs(&addresses) {
            let at = case.file.display().to_string();
            cluster::check_against_oracle(&at, world, cluster, &question(probe, from, to));
        }
    }
}

fn address(case: &Case, party: &str, family: Family) -> Option<IpAddr> {
    case.addresses(party)
        .iter()
        .copied()
        .find(|&address| Family::of(address) == family)
}

fn question(probe: &Probe, from: IpAddr, to: IpAddr) -> Question<'_> {
    Question {
        from,
        to,
        port: Some(probe.port),
        protocol: &probe.protocol,
        own_node_is_judged: false,
    }
}

#[test]
fn a_step_lists_its_manifests_among_its_changes() {
    let case = Case::parse(Path::new("inline.yaml"), MANIFEST_AND_LABEL);
    let step = &case.steps[0];
    assert_eq!((step.manifests.len(), step.changes.len()), (1, 2));
}

const MANIFEST_AND_LABEL: &str = "
title: a label and a policy
reason: one step may do both
pods: [{pod: x/a, labels: {}}]
steps:
  - does: label x/a and isolate it
    label-pods: {x/a: {pod: a}}
    apply: [{metadata: {namespace: x, name: deny}, spec: {podSelector: {matchLabels: {pod: a}}}}]
    expect:
      - probe: 80/TCP
        grid: |
          to   x/a
          x/a   .
";

#[test]
fn incomplete_case_is_rejected() {
    for (written, broken, why) in [
        ("x/a   .", "x/a   X", "a pod that does not reach itself"),
        ("x/a   .", "x/a   .  .", "a cell too many"),
        ("x/a   .", "x/b   .", "a row of another pod"),
        ("x/a   .", "", "no row"),
        ("80/TCP", "80/ICMP", "no such protocol"),
        ("label-pods", "label-pod", "a key that does not exist"),
    ] {
        let text = MANIFEST_AND_LABEL.replace(written, broken);
        let read = std::panic::catch_unwind(|| Case::parse(Path::new("inline.yaml"), &text));
        assert!(read.is_err(), "{why} goes unnoticed");
    }
}
