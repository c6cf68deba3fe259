//! Edge cases of rules, exempt traffic, and the wording of reasons.
use super::*;
use crate::{Cluster, Labels, Namespace, NetworkPolicy, Pod, PodKey, PodPort};

const CLIENT: &str = "10.0.0.1";
const SERVER: &str = "10.0.0.2";
const NODE: &str = "192.0.2.1";

fn pod(name: &str, addresses: &[&str], ports: &[(&str, u16, Protocol)]) -> Pod {
    let ports = ports.iter().map(|&(name, number, protocol)| PodPort {
        name: (!name.is_empty()).then(|| name.into()),
        number,
        protocol,
    });
    Pod {
        key: PodKey {
            namespace: "x".into(),
            name: name.into(),
        },
        uid: name.into(),
        labels: Labels::from([("pod".into(), name.into())]),
        node: "node".into(),
        host_network: false,
        ports: ports.collect(),
        addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        finished: false,
        terminating: false,
        started: "".into(),
        oversized: false,
    }
}

/// Pods x/client and x/server on one node, under x/p1, x/p2 and so on with these specs.
fn cluster_under(specs: &[&str]) -> Cluster {
    let mut cluster = Cluster::default();
    let node = Node {
        name: "node".into(),
        addresses: vec![NODE.parse().unwrap()],
        pod_cidrs: Vec::new(),
    };
    let _ = cluster.upsert_node(node);
    let _ = cluster.upsert_namespace(Namespace::new("x", Labels::new()));
    let ports = [
        ("web", 80, Protocol::Tcp),
        ("web", 8080, Protocol::Tcp),
        ("web", 81, Protocol::Udp),
        ("", 82, Protocol::Tcp),
    ];
    let _ = cluster.upsert_pod(pod("client", &[CLIENT], &[("web", 90, Protocol::Tcp)]));
    let _ = cluster.upsert_pod(pod("server", &[SERVER, "2001:db8::2"], &ports));
    for (index, spec) in specs.iter().enumerate() {
        let key = PolicyKey {
            namespace: "x".into(),
            name: format!("p{}", index + 1).into(),
        };
        let policy = NetworkPolicy::new(key, serde_saphyr::from_str(spec).unwrap()).unwrap();
        let _ = cluster.upsert_policy(policy);
    }
    cluster
}

#[track_caller]
fn ask(
    cluster: &Cluster,
    (from, to): (&str, &str),
    port: Option<u16>,
    protocol: Protocol,
    own_node: OwnNode,
) -> Verdict {
    let party = |text: &str| cluster.party(text.parse().unwrap());
    let verdict = judge(party(from), party(to), port, protocol, own_node);
    let allowed = allows(party(from), party(to), port, protocol, own_node);
    assert_eq!(
        verdict.allowed(),
        allowed,
        "judge and allows agree: {verdict:?}"
    );
    verdict
}

#[test]
fn a_rule_with_ports_allows_just_those() {
    use Protocol::{Other, Sctp, Tcp, Udp};
    for (ports, asked, protocol, expected, why) in [
        (
            "[]",
            Some(1),
            Udp,
            true,
            "no ports is every port of every protocol",
        ),
        ("[]", None, Other(1), true, "and protocols without ports"),
        ("[{}]", Some(1), Tcp, true, "every port of TCP"),
        ("[{}]", Some(0), Tcp, true, "port 0 is a port on the wire"),
        ("[{}]", Some(1), Udp, false, "TCP only"),
        ("[{}]", None, Other(1), false, "TCP only"),
        (
            "[{}]",
            None,
            Tcp,
            false,
            "a port that is not known is no port of the rule's",
        ),
        (
            "[{}, {port: 80}]",
            Some(81),
            Tcp,
            true,
            "ports are alternatives",
        ),
        ("[{port: 80}]", Some(80), Tcp, true, "the port"),
        ("[{port: 80}]", Some(80), Sctp, false, "SCTP is not TCP"),
        (
            "[{port: 80, protocol: SCTP}]",
            Some(80),
            Tcp,
            false,
            "TCP is not SCTP",
        ),
        ("[{port: 80}]", Some(81), Tcp, false, "another port"),
        (
            "[{port: 80, endPort: 82}]",
            Some(82),
            Tcp,
            true,
            "the last of the range",
        ),
        (
            "[{port: 80, endPort: 82}]",
            Some(83),
            Tcp,
            false,
            "after the range",
        ),
        (
            "[{port: 80, endPort: 82}]",
            Some(79),
            Tcp,
            false,
            "before the range",
        ),
        (
            "[{port: 90}, {port: 1, endPort: 100}, {port: 5, protocol: UDP}]",
            Some(95),
            Tcp,
            true,
            "in a range around another port",
        ),
        (
            "[{port: 65535}, {port: 1, protocol: UDP}]",
            Some(65535),
            Tcp,
            true,
            "the last port",
        ),
        (
            "[{port: 65535}, {port: 1, protocol: UDP}]",
            Some(2),
            Udp,
            false,
            "not the next range",
        ),
        (
            "[{port: web}]",
            Some(80),
            Tcp,
            true,
            "the name on the destination",
        ),
        (
            "[{port: web}]",
            Some(8080),
            Tcp,
            true,
            "another container's port of that name",
        ),
        (
            "[{port: web}]",
            Some(90),
            Tcp,
            false,
            "the name on the source does not count",
        ),
        (
            "[{port: web}]",
            Some(81),
            Tcp,
            false,
            "the name is for UDP there",
        ),
        (
            "[{port: web, protocol: UDP}]",
            Some(81),
            Udp,
            true,
            "the name and its protocol",
        ),
        (
            "[{port: web}]",
            Some(82),
            Tcp,
            false,
            "a port without a name",
        ),
        (
            "[{port: none}, {port: 82}]",
            Some(82),
            Tcp,
            true,
            "a name that nobody has, or 82",
        ),
    ] {
        for (rules, select) in [("ingress", "server"), ("egress", "client")] {
            let cluster = cluster_under(&[&format!(
                "{{podSelector: {{matchLabels: {{pod: {select}}}}}, {rules}: [{{ports: {ports}}}], \
                 policyTypes: [{}]}}",
                if rules == "ingress" {
                    "Ingress"
                } else {
                    "Egress"
                }
            )]);
            let verdict = ask(&cluster, (CLIENT, SERVER), asked, protocol, OwnNode::Allow);
            assert_eq!(
                verdict.allowed(),
                expected,
                "{rules} {ports} {asked:?} {protocol}: {why}"
            );
        }
    }
}

#[test]
fn named_port_matches_only_pod_destinations() {
    let cluster = cluster_under(&["{policyTypes: [Egress], egress: [{ports: [{port: web}]}]}"]);
    for (to, expected) in [(SERVER, true), ("198.51.100.1", false)] {
        let verdict = ask(
            &cluster,
            (CLIENT, to),
            Some(80),
            Protocol::Tcp,
            OwnNode::Allow,
        );
        assert_eq!(verdict.allowed(), expected, "{to}");
    }
}

#[test]
fn ip_block_matches_any_owner_of_the_address() {
    let cluster = cluster_under(&[
        "{policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 0.0.0.0/0, except: [10.0.0.3/32]}}]}]}",
    ]);
    for (to, expected, why) in [
        (SERVER, true, "a pod"),
        ("198.51.100.1", true, "nobody's"),
        ("10.0.0.3", false, "an exception"),
        ("2001:db8::2", false, "the same pod by another family"),
    ] {
        let verdict = ask(
            &cluster,
            (CLIENT, to),
            Some(80),
            Protocol::Tcp,
            OwnNode::Allow,
        );
        assert_eq!(verdict.allowed(), expected, "{to}: {why}");
    }
}

#[test]
fn pod_reaches_itself_and_its_node_despite_policy() {
    let deny = "policyTypes: [Ingress, Egress]";
    let cluster = cluster_under(&[deny]);
    let (node, this) = (Some(Exempt::Node), Some(Exempt::SelfTraffic));
    for (from, to, allow, judged, why) in [
        (CLIENT, CLIENT, this, this, "itself"),
        (
            SERVER,
            "2001:db8::2",
            this,
            this,
            "itself by its other address",
        ),
        (NODE, CLIENT, node, node, "kubelet's probes"),
        (
            CLIENT,
            NODE,
            node,
            None,
            "the pod to its node, judged if asked for",
        ),
        (CLIENT, "192.0.2.2", None, None, "another node"),
        ("192.0.2.2", CLIENT, None, None, "another node"),
        (CLIENT, SERVER, None, None, "another pod"),
        (NODE, NODE, None, None, "a node is no pod"),
    ] {
        for (own_node, expected) in [(OwnNode::Allow, allow), (OwnNode::Judge, judged)] {
            let verdict = ask(&cluster, (from, to), Some(80), Protocol::Tcp, own_node);
            assert_eq!(
                verdict.exempt, expected,
                "{from} to {to} {own_node:?}: {why}"
            );
            let isolated = [verdict.egress.isolated, verdict.ingress.isolated];
            let pods = [from, to].map(|text| cluster.party(text.parse().unwrap()).endpoint);
            assert_eq!(
                isolated,
                pods.map(|pod| pod.is_some()),
                "both sides are always filled in"
            );
        }
    }
}

#[test]
fn each_side_names_its_allowing_or_isolating_policies() {
    let from =
        |label: &str| format!("{{from: [{{podSelector: {{matchLabels: {{pod: {label}}}}}}}]}}");
    let server = "podSelector: {matchLabels: {pod: server}}";
    let cluster = cluster_under(&[
        &format!(
            "{{{server}, ingress: [{}, {}, {{}}]}}",
            from("z"),
            from("client")
        ),
        &format!("{{{server}, ingress: [{}]}}", from("z")),
        &format!("{{{server}, ingress: [{}]}}", from("client")),
    ]);
    let verdict = ask(
        &cluster,
        (CLIENT, SERVER),
        Some(80),
        Protocol::Tcp,
        OwnNode::Allow,
    );
    assert_eq!(
        serde_json::to_value(&verdict).unwrap(),
        serde_json::json!({
            "egress": {"isolated": false, "allowed": true, "policies": [], "rules": []},
            "ingress": {"isolated": true, "allowed": true, "policies": ["x/p1", "x/p3"], "rules": [
                {"policy": "x/p1", "index": 1}, {"policy": "x/p1", "index": 2},
                {"policy": "x/p3", "index": 0}]},
            "exempt": null
        })
    );
    let denied = cluster_under(&["ingress: []", "policyTypes: [Egress]", "{}"]);
    let verdict = ask(
        &denied,
        (CLIENT, SERVER),
        Some(80),
        Protocol::Tcp,
        OwnNode::Allow,
    );
    assert_eq!(
        serde_json::to_value(&verdict).unwrap(),
        serde_json::json!({
            "egress": {"isolated": true, "allowed": false, "policies": ["x/p2"], "rules": []},
            "ingress": {"isolated": true, "allowed": false, "policies": ["x/p1", "x/p3"], "rules": []},
            "exempt": null
        })
    );
}

#[test]
fn a_reason_is_one_sentence() {
    for (specs, (from, to), expected) in [
        (
            &[][..],
            (CLIENT, SERVER),
            "Allowed: no policy isolates the source for egress or the destination for ingress.",
        ),
        (
            &["policyTypes: [Ingress, Egress]"],
            (CLIENT, CLIENT),
            "Allowed: a pod always reaches itself.",
        ),
        (
            &["policyTypes: [Ingress, Egress]"],
            (CLIENT, NODE),
            "Allowed: a pod and the node it runs on always reach each other.",
        ),
        (
            &["ingress: [{}]", "ingress: [{}]", "ingress: [{}]"],
            (CLIENT, SERVER),
            "Allowed: the source is not isolated for egress, and the destination's ingress is \
             allowed by x/p1 (spec.ingress[0]), x/p2 (spec.ingress[0]) and x/p3 (spec.ingress[0]).",
        ),
        (
            &["policyTypes: [Egress]", "ingress: []"],
            (CLIENT, SERVER),
            "Denied: the source is isolated for egress by x/p1, and no rule allows this; and the \
             destination is isolated for ingress by x/p2, and no rule allows this.",
        ),
        (
            &["{policyTypes: [Ingress, Egress], egress: [{}]}", "{}"],
            (CLIENT, SERVER),
            "Denied: the destination is isolated for ingress by x/p1 and x/p2, and no rule allows \
             this.",
        ),
    ] {
        let cluster = cluster_under(specs);
        let verdict = ask(
            &cluster,
            (from, to),
            Some(80),
            Protocol::Tcp,
            OwnNode::Allow,
        );
        assert_eq!(verdict.reason(), expected);
    }
}

#[test]
fn an_explanation_of_many_rules_is_short() {
    let many = format!("ingress: [{}]", vec!["{}"; 5000].join(", "));
    let specs: Vec<&str> = vec![&many, &many, "ingress: [{}]"];
    let cluster = cluster_under(&specs);
    let party = |text: &str| cluster.party(text.parse().unwrap());
    let (from, to) = (party(CLIENT), party(SERVER));
    let decided = crate::decide(from, to, Some(80), Protocol::Tcp, OwnNode::Allow);
    let explained = decided.explain(from.endpoint, to.endpoint);
    let names: Vec<_> = explained
        .ingress
        .policies
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(names, ["x/p1", "x/p2", "x/p3"], "every policy that allows");
    assert_eq!(explained.ingress.rules.len(), 32);
    let reason = explained.reason();
    assert!(
        reason.ends_with("x/p1 (spec.ingress[31]) and 2 more."),
        "{reason}"
    );
    assert!(reason.len() < 2_000, "{} bytes", reason.len());
    let exact = judge(from, to, Some(80), Protocol::Tcp, OwnNode::Allow);
    assert_eq!(
        exact.ingress.rules.len(),
        10_001,
        "asked offline, all are named"
    );
    assert!(exact.reason().len() < 2_000);
}
