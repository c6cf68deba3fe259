//! What the cyclonus suite generates: a base policy varied in one respect at a time.
//!
//! The base isolates x/a both ways: TCP 80 in from pods b and c of x and y, out to pods a and b of
//! y and z, and DNS to anywhere.
mod steps;
mod upstream;

use serde_json::{Value, json};

use testbed::cases::world::{Change, addresses};

/// One case: a list of steps, each a list of changes, with a look at all verdicts after each.
pub(crate) struct Case {
    pub(crate) category: &'static str,
    pub(crate) title: String,
    pub(crate) steps: Vec<Vec<Change>>,
}

/// The whole suite.
pub(crate) fn all() -> Vec<Case> {
    let mut cases = target();
    cases.extend(rules());
    cases.extend(peers());
    cases.extend(ports());
    cases.extend(conflicts());
    cases.push(steps::example());
    cases.extend(steps::actions());
    cases.extend(default_labels());
    cases.extend(upstream::cases());
    cases
}

const DIRECTIONS: [Direction; 2] = [
    Direction {
        list: "ingress",
        kind: "Ingress",
        peers: "from",
    },
    Direction {
        list: "egress",
        kind: "Egress",
        peers: "to",
    },
];

/// How a direction is spelled in a spec.
struct Direction {
    list: &'static str,
    kind: &'static str,
    peers: &'static str,
}

fn one(category: &'static str, title: impl Into<String>, policies: Vec<Value>) -> Case {
    several(
        category,
        title,
        vec![policies.into_iter().map(Change::Policy).collect()],
    )
}

fn several(category: &'static str, title: impl Into<String>, steps: Vec<Vec<Change>>) -> Case {
    Case {
        category,
        title: title.into(),
        steps,
    }
}

fn policy(namespace: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": namespace, "name": name},
        "spec": spec,
    })
}

fn base() -> Value {
    let port = json!([{"port": 80, "protocol": "TCP"}]);
    let peer = |pods: [&str; 2], namespaces: [&str; 2]| {
        let (pods, namespaces) = (any_of("pod", &pods), any_of("ns", &namespaces));
        json!([{"podSelector": pods, "namespaceSelector": namespaces}])
    };
    let spec = json!({
        "podSelector": {"matchLabels": {"pod": "a"}},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"ports": port, "from": peer(["b", "c"], ["x", "y"])}],
        "egress": [{"ports": port, "to": peer(["a", "b"], ["y", "z"])}, dns()],
    });
    policy("x", "base", &spec)
}

/// The base policy with the value at `pointer` (below `spec`) replaced.
fn varied(pointer: &str, value: Value) -> Value {
    let mut policy = base();
    *policy
        .pointer_mut(&format!("/spec/{pointer}"))
        .expect("the base policy has this field") = value;
    policy
}

fn dns() -> Value {
    json!({"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]})
}

fn any_of(key: &str, values: &[&str]) -> Value {
    json!({"matchExpressions": [{"key": key, "operator": "In", "values": values}]})
}

fn label(key: &str, value: &str) -> Value {
    json!({"matchLabels": {key: value}})
}

fn target() -> Vec<Case> {
    let namespaces = ["x", "y", "z"].map(|namespace| {
        let mut policy = base();
        policy["metadata"]["namespace"] = namespace.into();
        one("target", format!("namespace {namespace}"), vec![policy])
    });
    let selectors = [json!({}), label("pod", "a"), any_of("pod", &["a", "b"])].map(|selector| {
        one(
            "target",
            format!("pods {selector}"),
            vec![varied("podSelector", selector)],
        )
    });
    namespaces.into_iter().chain(selectors).collect()
}

fn rules() -> Vec<Case> {
    let of = |direction: &Direction| {
        let list = direction.list;
        [("deny all", json!([])), ("allow all", json!([{}]))].map(|(what, rules)| {
            one(
                "rules",
                format!("{list}: {what}"),
                vec![varied(list, rules)],
            )
        })
    };
    DIRECTIONS.iter().flat_map(of).collect()
}

/// Empty, each single peer, and each pair of peers, in both directions.
fn peers() -> Vec<Case> {
    let kinds = peer_kinds();
    let mut cases = Vec::new();
    for direction in &DIRECTIONS {
        let mut case = |title: String, peers: Value| {
            let pointer = format!("{}/0/{}", direction.list, direction.peers);
            let title = format!("{}: {title}", direction.list);
            cases.push(one("peers", title, vec![varied(&pointer, peers)]));
        };
        case("empty".into(), json!([]));
        for (index, (name, peer)) in kinds.iter().enumerate() {
            case((*name).into(), json!([peer]));
            for (second, other) in &kinds[index + 1..] {
                case(format!("{name}, {second}"), json!([peer, other]));
            }
        }
    }
    cases
}

/// Selectors that are missing, empty and by label, in all their combinations, and blocks around
/// the address of z/c.
fn peer_kinds() -> Vec<(&'static str, Value)> {
    let [z_c, _] = addresses(8);
    assert_eq!(
        z_c.to_string(),
        "10.244.1.18",
        "the blocks below are around z/c"
    );
    let (pods, namespaces) = (label("pod", "c"), label("ns", "x"));
    vec![
        ("empty pods, no ns", json!({"podSelector": {}})),
        ("pods by label, no ns", json!({"podSelector": pods})),
        ("no pods, empty ns", json!({"namespaceSelector": {}})),
        (
            "empty pods, empty ns",
            json!({"podSelector": {}, "namespaceSelector": {}}),
        ),
        (
            "pods by label, empty ns",
            json!({"podSelector": pods, "namespaceSelector": {}}),
        ),
        (
            "no pods, ns by label",
            json!({"namespaceSelector": namespaces}),
        ),
        (
            "empty pods, ns by label",
            json!({"podSelector": {}, "namespaceSelector": namespaces}),
        ),
        (
            "pods by label, ns by label",
            json!({"podSelector": pods, "namespaceSelector": namespaces}),
        ),
        ("ipBlock", json!({"ipBlock": {"cidr": "10.244.1.0/24"}})),
        (
            "ipBlock with except",
            json!({"ipBlock": {"cidr": "10.244.1.0/24", "except": ["10.244.1.16/28"]}}),
        ),
    ]
}

fn ports() -> Vec<Case> {
    let mut lists: Vec<Value> = vec![json!([])];
    lists.extend(single_ports().into_iter().map(|port| json!([port])));
    lists.extend([
        json!([{}, {"port": 80}]),
        json!([{}, {"port": "serve-80-tcp"}]),
        json!([{}, {"protocol": "UDP"}]),
        json!([{"port": 80}, {"port": 81}]),
        json!([{"port": 80}, {"port": "serve-81-tcp"}]),
        json!([{"port": 80}, {"protocol": "UDP", "port": "serve-81-udp"}]),
        json!([{"protocol": "UDP", "port": 80}, {"protocol": "UDP", "port": "serve-81-udp"}]),
    ]);
    let of = |direction: &'static Direction| {
        let list = direction.list;
        let case = move |ports: &Value| {
            one(
                "port/protocol",
                format!("{list}: {ports}"),
                vec![varied(&format!("{list}/0/ports"), ports.clone())],
            )
        };
        lists.iter().map(case).collect::<Vec<_>>()
    };
    DIRECTIONS.iter().flat_map(of).collect()
}

/// Protocols by numbers, names, ranges; a name of another protocol, and ports that nobody serves.
fn single_ports() -> Vec<Value> {
    let mut ports = Vec::new();
    for protocol in [None, Some("TCP"), Some("UDP"), Some("SCTP")] {
        for number in [None, Some(80), Some(81)] {
            let mut port = json!({});
            if let Some(protocol) = protocol {
                port["protocol"] = protocol.into();
            }
            if let Some(number) = number {
                port["port"] = number.into();
            }
            ports.push(port);
        }
    }
    for protocol in ["TCP", "UDP", "SCTP"] {
        for number in [80, 81] {
            let name = format!("serve-{number}-{}", protocol.to_lowercase());
            ports.push(json!({"protocol": protocol, "port": name}));
        }
    }
    for (protocol, last) in [
        ("TCP", 80),
        ("TCP", 84),
        ("UDP", 80),
        ("UDP", 84),
        ("SCTP", 80),
        ("SCTP", 84),
    ] {
        ports.push(json!({"protocol": protocol, "port": 53, "endPort": last}));
    }
    ports.push(json!({"protocol": "TCP", "port": "serve-81-udp"}));
    ports.push(json!({"protocol": "TCP", "port": "serve-7981-udp"}));
    ports.push(json!({"protocol": "TCP", "port": 7981}));
    ports
}

fn default_labels() -> Vec<Case> {
    let peers = json!([{"namespaceSelector": label("kubernetes.io/metadata.name", "z")}]);
    let case = |d: &Direction| {
        let pointer = format!("{}/0/{}", d.list, d.peers);
        one(
            "namespace default label",
            d.list,
            vec![varied(&pointer, peers.clone())],
        )
    };
    DIRECTIONS.iter().map(case).collect()
}

/// Policies of one direction that disagree about one end, or about the two ends of one flow.
fn conflicts() -> Vec<Case> {
    let everything = || json!([{}]);
    let nothing = || json!([]);
    let all_pods = |d: &Direction| json!([{d.peers: [{"namespaceSelector": {}}]}]);
    let no_pods = |d: &Direction| {
        let nobody = label("this-will-never-happen", "qrs123");
        json!([{d.peers: [{"namespaceSelector": nobody}]}])
    };
    let all_addresses = |d: &Direction| json!([{d.peers: [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}]);
    let no_addresses = |d: &Direction| json!([{d.peers: [{"ipBlock": {"cidr": "0.0.0.0/31"}}]}]);
    let [ingress, egress] = &DIRECTIONS;

    let mut cases = vec![
        conflict(
            "deny all from source, allow all to destination",
            &[(egress, "x", nothing()), (ingress, "y", everything())],
        ),
        conflict(
            "allow all from source, deny all to destination",
            &[(egress, "x", everything()), (ingress, "y", nothing())],
        ),
        conflict(
            "deny all and allow all from source",
            &[(egress, "x", nothing()), (egress, "x", everything())],
        ),
        conflict(
            "deny all and allow all to destination",
            &[(ingress, "y", nothing()), (ingress, "y", everything())],
        ),
    ];
    for d in [egress, ingress] {
        for (title, rules) in [
            ("deny all, allow all pods", vec![nothing(), all_pods(d)]),
            (
                "deny all, allow all addresses",
                vec![nothing(), all_addresses(d)],
            ),
            (
                "deny all addresses, allow all pods",
                vec![no_addresses(d), all_pods(d)],
            ),
            (
                "deny all pods, allow all addresses",
                vec![no_pods(d), all_addresses(d)],
            ),
            ("deny all addresses", vec![no_addresses(d)]),
            ("deny all pods", vec![no_pods(d)]),
        ] {
            let policies: Vec<_> = rules.into_iter().map(|rules| (d, "x", rules)).collect();
            cases.push(conflict(&format!("{}: {title}", d.list), &policies));
        }
    }
    cases
}

/// Policies for x/b or y/c; where egress is isolated, DNS is let through by one more.
fn conflict(title: &str, parts: &[(&Direction, &str, Value)]) -> Case {
    let mut policies = Vec::new();
    for (number, (direction, namespace, rules)) in parts.iter().enumerate() {
        let pod = if *namespace == "x" { "b" } else { "c" };
        let spec = json!({
            "podSelector": label("pod", pod),
            "policyTypes": [direction.kind],
            direction.list: rules,
        });
        policies.push(policy(namespace, &format!("part-{number}"), &spec));
    }
    if parts
        .iter()
        .any(|(direction, ..)| direction.list == "egress")
    {
        let spec =
            json!({"podSelector": label("pod", "b"), "policyTypes": ["Egress"], "egress": [dns()]});
        policies.push(policy("x", "allow-dns", &spec));
    }
    one("conflict", title, policies)
}
