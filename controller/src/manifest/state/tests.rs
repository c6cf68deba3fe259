//! Last good state, duplicates and differences.
use std::path::Path;

use super::*;

fn name(text: &str) -> Name {
    OsStr::new(text).into()
}

fn contents(text: &str) -> Contents {
    Contents::read(Path::new("f"), text.as_bytes().to_vec())
}

fn pod(name: &str, label: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, labels: {{v: {label}}}}}}}\n"
    )
}

fn shown(batch: Option<Batch>) -> (Vec<String>, Vec<String>) {
    let batch = batch.expect("a change");
    let events = batch.events.iter().map(|event| match event {
        Event::Upsert(Object::Pod(pod)) => format!("+{} {}", pod.key.name, pod.labels["v"]),
        Event::Upsert(other) => format!("+{}", other.key()),
        Event::Delete(key) => format!("-{key}"),
    });
    (
        events.collect(),
        batch
            .problems
            .iter()
            .map(|problem| problem.problem.clone())
            .collect(),
    )
}

#[test]
fn only_real_changes_are_sent() {
    let mut state = State::default();
    state.update(&name("a"), contents(&(pod("p", "one") + &pod("q", "one"))));
    assert_eq!(shown(state.changes()).0, ["+p one", "+q one"]);
    assert!(state.changes().is_none());

    state.update(&name("a"), contents(&(pod("q", "one") + &pod("p", "one"))));
    assert!(state.changes().is_none(), "another order is no change");

    state.update(&name("a"), contents(&(pod("q", "two") + &pod("r", "one"))));
    assert_eq!(
        shown(state.changes()).0,
        ["+q two", "+r one", "-Pod default/p"]
    );

    state.update(&name("b"), contents(&pod("r", "one")));
    state.remove(&name("a"));
    assert_eq!(
        shown(state.changes()).0,
        ["-Pod default/q"],
        "r has moved to another file"
    );
}

#[test]
fn invalid_object_keeps_last_state_while_others_change() {
    let mut state = State::default();
    state.update(&name("a"), contents(&(pod("p", "one") + &pod("q", "one"))));
    state.changes();
    state.update(&name("a"), contents(&(pod("p", "1") + &pod("q", "two"))));
    let (events, problems) = shown(state.changes());
    assert_eq!((events, problems.len()), (vec!["+q two".to_owned()], 1));
    assert!(state.faulty());

    state.update(&name("a"), contents(&(pod("p", "one") + &pod("q", "two"))));
    assert_eq!(
        shown(state.changes()),
        (vec![], vec![]),
        "the problem is gone, p never was"
    );

    state.update(&name("a"), contents(&pod("p", "1")));
    assert_eq!(shown(state.changes()).0, ["-Pod default/q"]);
    state.update(&name("a"), contents(""));
    assert_eq!(
        shown(state.changes()).0,
        ["-Pod default/p"],
        "removed from a good file"
    );
}

#[test]
fn unparsable_file_keeps_all_its_objects() {
    for (text, why) in [
        ("---\n{apiVersion: v1, kind: [", "no YAML"),
        ("---\nkind: Pod\n", "no apiVersion"),
        (
            "---\n{apiVersion: v1, kind: Pod, metadata: {}}\n",
            "no name",
        ),
        ("---\nhalf", "no mapping"),
    ] {
        let mut state = State::default();
        state.update(&name("a"), contents(&(pod("p", "one") + &pod("q", "one"))));
        state.changes();
        state.update(&name("a"), contents(&(pod("q", "two") + text)));
        let (events, problems) = shown(state.changes());
        assert_eq!((events.len(), problems.len()), (0, 1), "{why}");
    }
}

#[test]
fn later_duplicate_object_wins_with_a_warning() {
    let mut state = State::default();
    state.update(&name("b"), contents(&pod("p", "late")));
    state.update(
        &name("a"),
        contents(&(pod("p", "early") + &pod("p", "middle"))),
    );
    let batch = state.changes().unwrap();
    assert_eq!(shown(Some(batch.clone())).0, ["+p late"]);
    let said: Vec<_> = batch.problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        said,
        [
            "a, document 2, Pod default/p: given twice: this file, document 1 has it too; this one, \
             the later by file name and document, counts; remove one of them",
            "b, document 1, Pod default/p: given twice: a, document 2 has it too; this one, the \
             later by file name and document, counts; remove one of them",
        ]
    );
    assert!(
        batch
            .problems
            .iter()
            .all(|problem| problem.severity == Severity::Warning)
    );
    assert!(!state.faulty());

    state.remove(&name("b"));
    assert_eq!(shown(state.changes()).0, ["+p middle"]);
}
