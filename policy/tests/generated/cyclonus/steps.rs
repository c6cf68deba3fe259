//! The cases in which objects come, change and go.
use serde_json::{Value, json};

use super::{Case, any_of, base, label, several, upstream, varied};
use testbed::cases::world::{Change, labels, pod};

pub(super) fn example() -> Case {
    several(
        "example",
        "a namespace and a pod come and go",
        vec![
            vec![Change::Policy(upstream::named_port_policy())],
            vec![relabel_namespace("w", &[("ns", "w")]), new_pod(9, "w", "a")],
            vec![no_pod("w", "a")],
            vec![Change::NoNamespace("w".into())],
            vec![],
        ],
    )
}

pub(super) fn actions() -> Vec<Case> {
    let udp = varied(
        "ingress/0/ports",
        json!([{"protocol": "UDP", "port": "serve-81-udp"}]),
    );
    let case = |title: &str, steps| several("action", title, steps);
    let mut cases = vec![
        case(
            "create and delete a policy",
            vec![vec![Change::Policy(base())], vec![delete("x", "base")]],
        ),
        case(
            "create and update a policy",
            vec![vec![Change::Policy(base())], vec![Change::Policy(udp)]],
        ),
        case(
            "create and delete a namespace",
            vec![
                vec![Change::Policy(base())],
                vec![
                    relabel_namespace("y-2", &[("ns", "y")]),
                    new_pod(9, "y-2", "a"),
                    new_pod(10, "y-2", "b"),
                ],
                vec![
                    no_pod("y-2", "a"),
                    no_pod("y-2", "b"),
                    Change::NoNamespace("y-2".into()),
                ],
            ],
        ),
        case(
            "create and delete a pod",
            vec![
                vec![Change::Policy(base())],
                vec![new_pod(9, "x", "d")],
                vec![no_pod("x", "d")],
            ],
        ),
    ];
    cases.extend(relabelling());
    cases
}

fn relabelling() -> Vec<Case> {
    let peer = |peer: Value| Change::Policy(varied("ingress/0/from", json!([peer])));
    let case = |title: &str, steps| several("action", title, steps);
    vec![
        case(
            "label a namespace so that a rule applies, and back",
            vec![
                vec![peer(json!({"namespaceSelector": label("new-ns", "qrs")}))],
                vec![relabel_namespace("y", &[("ns", "y"), ("new-ns", "qrs")])],
                vec![relabel_namespace("y", &[("ns", "y")])],
            ],
        ),
        case(
            "label a pod so that a rule applies, and back",
            vec![
                vec![peer(json!({
                    "podSelector": label("new-label", "abc"),
                    "namespaceSelector": any_of("ns", &["y", "z"]),
                }))],
                vec![relabel_pod(
                    4,
                    "y",
                    "b",
                    &[("pod", "b"), ("new-label", "abc")],
                )],
                vec![relabel_pod(4, "y", "b", &[("pod", "b")])],
            ],
        ),
    ]
}

fn new_pod(slot: usize, namespace: &str, name: &str) -> Change {
    Change::Pod(pod(slot, namespace, name, labels(&[("pod", name)])))
}

fn no_pod(namespace: &str, name: &str) -> Change {
    Change::NoPod((namespace.into(), name.into()))
}

pub(super) fn relabel_pod(
    slot: usize,
    namespace: &str,
    name: &str,
    pairs: &[(&str, &str)],
) -> Change {
    Change::Pod(pod(slot, namespace, name, labels(pairs)))
}

pub(super) fn relabel_namespace(name: &str, pairs: &[(&str, &str)]) -> Change {
    Change::Namespace(name.into(), labels(pairs))
}

pub(super) fn delete(namespace: &str, name: &str) -> Change {
    Change::NoPolicy((namespace.into(), name.into()))
}
