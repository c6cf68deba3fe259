//! The cases that the suite took over from Kubernetes' own end-to-end tests.
use serde_json::{Value, json};

use super::steps::{delete, relabel_namespace, relabel_pod};
use super::{Case, any_of, dns, label, policy, several};
use testbed::cases::world::Change;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = fixed();
    cases.extend(changing());
    cases
}

pub(super) fn named_port_policy() -> Value {
    ingress(
        "allow-all",
        json!({}),
        json!([{"ports": [{"port": "serve-81-tcp"}]}]),
    )
}

/// Cases with one state, which some probe twice.
fn fixed() -> Vec<Case> {
    let not_x = json!([{"key": "ns", "operator": "NotIn", "values": ["x"]}]);
    let several_pods = json!({
        "namespaceSelector": {"matchExpressions": not_x},
        "podSelector": any_of("pod", &["b", "c"]),
    });
    let both = json!({
        "podSelector": label("pod", "a"),
        "policyTypes": ["Ingress", "Egress"],
        "ingress": from(&json!({"podSelector": label("pod", "b")})),
        "egress": [{"ports": [{"port": 80}, {"protocol": "UDP", "port": 53}]}],
    });
    let mut closed = both_ways();
    closed["egress"] = json!([dns()]);
    vec![
        case(
            "default deny ingress",
            vec![put(ingress("deny-ingress", json!({}), json!([])))],
        ),
        case(
            "default deny all but DNS",
            vec![put(policy("x", "deny-all-allow-dns", &closed))],
        ),
        case(
            "several selectors",
            vec![put(ingress(
                "several",
                label("pod", "a"),
                from(&several_pods),
            ))],
        ),
        case(
            "allow all",
            vec![put(ingress("allow-all", json!({}), json!([{}]))), vec![]],
        ),
        case("named port", vec![put(named_port_policy()), vec![]]),
        case(
            "ingress and egress together",
            vec![put(policy("x", "both", &both)), vec![]],
        ),
        case("client egress deny holds", vec![client_and_servers()]),
    ]
}

/// Cases in which a policy or a label changes.
fn changing() -> Vec<Case> {
    let (x_a, everybody) = (label("pod", "a"), json!({}));
    let namespace = from(&json!({"namespaceSelector": label("ns2", "updated")}));
    let client = from(&json!({"podSelector": {"matchLabels": {"pod": "b", "pod2": "updated"}}}));
    let by_namespace = put(ingress("via-ns", x_a.clone(), namespace));
    let by_client = put(ingress("via-pod", x_a, client));
    let isolated = put(ingress("isolated", label("target", "isolated"), json!([])));
    let open = put(ingress("mutates", everybody.clone(), json!([{}])));
    let shut = put(ingress("mutates", everybody, json!([])));
    let deny_all = put(policy("x", "deny-all", &both_ways()));
    let namespace_labels = [("ns", "y"), ("ns2", "updated")];
    let client_labels = [("pod", "b"), ("pod2", "updated")];
    let server_labels = [("target", "isolated")];
    vec![
        case(
            "stacked policies",
            vec![put(from_y(81)), vec![], put(from_y(80))],
        ),
        case("updated policy", vec![open, shut]),
        case(
            "updated namespace",
            vec![
                by_namespace,
                vec![relabel_namespace("y", &namespace_labels)],
            ],
        ),
        case(
            "updated client",
            vec![by_client, vec![relabel_pod(1, "x", "b", &client_labels)]],
        ),
        case(
            "updated server",
            vec![isolated, vec![relabel_pod(0, "x", "a", &server_labels)]],
        ),
        case(
            "deleted policy",
            vec![deny_all, vec![delete("x", "deny-all")]],
        ),
    ]
}

/// x/a may dial y/a only; y/a and y/b admit x/a only.
fn client_and_servers() -> Vec<Change> {
    let peer = |namespace| {
        let (namespaces, pods) = (label("ns", namespace), label("pod", "a"));
        json!([{"namespaceSelector": namespaces, "podSelector": pods}])
    };
    let client = json!({
        "podSelector": label("pod", "a"),
        "policyTypes": ["Egress"],
        "egress": [{"to": peer("y")}, {"ports": [{"protocol": "UDP", "port": 53}]}],
    });
    let server = |pod| {
        let mut server = ingress(
            &format!("allow-from-xa-on-y{pod}"),
            label("pod", pod),
            json!([{"from": peer("x")}]),
        );
        server["metadata"]["namespace"] = "y".into();
        Change::Policy(server)
    };
    vec![
        Change::Policy(policy("x", "allow-to-ns-y-pod-a", &client)),
        server("a"),
        server("b"),
    ]
}

fn case(title: &str, steps: Vec<Vec<Change>>) -> Case {
    several("upstream e2e", title, steps)
}

fn put(policy: Value) -> Vec<Change> {
    vec![Change::Policy(policy)]
}

fn from(peer: &Value) -> Value {
    json!([{"from": [peer]}])
}

/// Lets namespace y reach one port of x/a.
fn from_y(port: u16) -> Value {
    let peers = json!([{"namespaceSelector": label("ns", "y")}]);
    let rule = json!({"from": peers, "ports": [{"port": port, "protocol": "TCP"}]});
    ingress(
        &format!("allow-client-a-via-ns-selector-{port}"),
        label("pod", "a"),
        json!([rule]),
    )
}

fn both_ways() -> Value {
    json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [], "egress": []})
}

fn ingress(name: &str, pods: Value, rules: Value) -> Value {
    policy(
        "x",
        name,
        &json!({"podSelector": pods, "policyTypes": ["Ingress"], "ingress": rules}),
    )
}
