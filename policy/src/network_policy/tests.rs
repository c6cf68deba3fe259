//! What is accepted, what is refused and where, and what is filled in.
use super::*;

fn policy(spec: &str) -> Result<NetworkPolicy, Vec<Problem>> {
    let key = PolicyKey {
        namespace: "x".into(),
        name: "p".into(),
    };
    let raw = serde_saphyr::from_str(spec).unwrap_or_else(|e| panic!("{spec}: {e}"));
    NetworkPolicy::new(key, raw)
}

/// The fields of all problems of `spec`, sorted.
fn faulty_fields(spec: &str) -> Vec<String> {
    let mut fields: Vec<String> = match policy(spec) {
        Ok(_) => Vec::new(),
        Err(problems) => problems
            .into_iter()
            .filter_map(|problem| problem.field)
            .collect(),
    };
    fields.sort();
    fields
}

#[test]
fn policy_types_default_as_in_the_api_server() {
    for (spec, ingress, egress, why) in [
        ("{}", true, false, "Ingress always"),
        ("policyTypes: []", true, false, "empty is absent"),
        ("policyTypes: ", true, false, "null is absent"),
        ("egress: []", true, false, "no egress rule, no Egress"),
        ("egress: ", true, false, "null is no rule either"),
        (
            "egress: [{}]",
            true,
            true,
            "Ingress always, Egress for the rule",
        ),
        ("ingress: []", true, false, "a denial"),
        ("ingress: [{}]", true, false, "an allowance"),
        ("policyTypes: [Ingress]", true, false, "as given"),
        ("policyTypes: [Egress]", false, true, "as given: no Ingress"),
        ("policyTypes: [Egress, Ingress]", true, true, "as given"),
        (
            "policyTypes: [Egress, Egress]",
            false,
            true,
            "twice is once",
        ),
        (
            "{policyTypes: [Egress], ingress: [{}]}",
            false,
            true,
            "rules do not add a type",
        ),
        (
            "{policyTypes: [Ingress], egress: [{}]}",
            true,
            false,
            "rules do not add a type",
        ),
    ] {
        let policy = policy(spec).unwrap();
        let isolates = [Direction::Ingress, Direction::Egress].map(|it| policy.isolates(it));
        assert_eq!(isolates, [ingress, egress], "{spec}: {why}");
    }
}

#[test]
fn missing_null_and_empty_lists_mean_the_same() {
    for (written, same) in [
        ("ingress: [{}]", "ingress: [{from: [], ports: []}]"),
        ("ingress: [{}]", "ingress:\n- from:\n  ports:\n"),
        ("egress: [{}]", "egress: [{to: , ports: []}]"),
        ("{}", "{podSelector: {}, ingress: [], egress: []}"),
    ] {
        assert_eq!(policy(written), policy(same), "{written} and {same}");
    }
    let everyone = policy("ingress: [{}]").unwrap();
    assert_eq!(
        everyone.ingress.unwrap(),
        [Rule {
            peers: [].into(),
            ports: [].into()
        }]
    );
    assert_eq!(policy("ingress: []").unwrap().ingress.unwrap(), []);
}

#[test]
fn missing_port_means_all_ports_of_the_protocol() {
    for (port, protocol, numbers) in [
        ("{}", Protocol::Tcp, PortNumbers::All),
        ("{protocol: UDP}", Protocol::Udp, PortNumbers::All),
        ("{port: 80}", Protocol::Tcp, PortNumbers::Range(80, 80)),
        (
            "{port: 1, endPort: 65535}",
            Protocol::Tcp,
            PortNumbers::Range(1, 65535),
        ),
        (
            "{port: 80, endPort: 80, protocol: SCTP}",
            Protocol::Sctp,
            PortNumbers::Range(80, 80),
        ),
        (
            "{port: http}",
            Protocol::Tcp,
            PortNumbers::Named("http".into()),
        ),
        (
            "{port: null, protocol: null, endPort: null}",
            Protocol::Tcp,
            PortNumbers::All,
        ),
    ] {
        let policy = policy(&format!("ingress: [{{ports: [{port}]}}]")).unwrap();
        assert_eq!(
            policy.ingress.unwrap()[0].ports,
            [Port { protocol, numbers }].into(),
            "{port}"
        );
    }
}

#[test]
fn port_validation_matches_the_api_server() {
    for (port, faulty, why) in [
        ("{port: 0}", &["port"][..], "from 1"),
        ("{port: -1}", &["port"], "from 1"),
        ("{port: 65536}", &["port"], "to 65535"),
        ("{port: 18446744073709551615}", &["port"], "to 65535"),
        ("{port: '80'}", &["port"], "a name has a letter"),
        ("{port: ''}", &["port"], "a name is not empty"),
        ("{port: HTTP}", &["port"], "lower case"),
        ("{port: a--b}", &["port"], "one hyphen at a time"),
        ("{port: abcdefghijklmnop}", &["port"], "16 characters"),
        ("{endPort: 80}", &["endPort"], "a range has a beginning"),
        (
            "{port: http, endPort: 80}",
            &["endPort"],
            "a name begins no range",
        ),
        ("{port: -x, endPort: 80}", &["endPort", "port"], "both"),
        ("{port: 80, endPort: 79}", &["endPort"], "backwards"),
        ("{port: 80, endPort: 65536}", &["endPort"], "to 65535"),
        ("{port: 0, endPort: 80}", &["port"], "from 1"),
        (
            "{port: 0, endPort: -1}",
            &["endPort", "endPort", "port"],
            "no port and backwards",
        ),
        ("{protocol: tcp}", &["protocol"], "upper case"),
        ("{protocol: ICMP}", &["protocol"], "has no ports"),
        ("{protocol: ''}", &["protocol"], "empty is not absent"),
        (
            "{protocol: X, port: 0, endPort: 65536}",
            &["endPort", "port", "protocol"],
            "all",
        ),
    ] {
        for rule in ["ingress", "egress"] {
            let expected: Vec<_> = faulty
                .iter()
                .map(|field| format!("spec.{rule}[1].ports[1].{field}"))
                .collect();
            let spec = format!("{rule}: [{{}}, {{ports: [{{port: 1}}, {port}]}}]");
            assert_eq!(faulty_fields(&spec), expected, "{port}: {why}");
        }
    }
}

#[test]
fn peer_validation_matches_the_api_server() {
    for (peer, faulty, why) in [
        ("{}", &[""][..], "nobody"),
        (
            "{podSelector: , namespaceSelector: , ipBlock: }",
            &[""],
            "null is missing",
        ),
        (
            "{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}",
            &[""],
            "two kinds in one",
        ),
        (
            "{ipBlock: {cidr: 10.0.0.0/8}, namespaceSelector: {}}",
            &[""],
            "two kinds in one",
        ),
        (
            "{ipBlock: {cidr: x}, podSelector: {matchLabels: {/: x}}}",
            &["", ".ipBlock.cidr", ".podSelector.matchLabels"],
            "all problems",
        ),
        ("{ipBlock: {}}", &[".ipBlock.cidr"], "no block"),
        (
            "{ipBlock: {cidr: 10.0.0.1}}",
            &[".ipBlock.cidr"],
            "no prefix length",
        ),
        (
            "{ipBlock: {cidr: 10.0.0.0/33}}",
            &[".ipBlock.cidr"],
            "too long a prefix",
        ),
        (
            "{ipBlock: {cidr: 10.0.0/24}}",
            &[".ipBlock.cidr"],
            "no address",
        ),
        (
            "{ipBlock: {cidr: ' 10.0.0.0/8'}}",
            &[".ipBlock.cidr"],
            "space",
        ),
        (
            "{ipBlock: {cidr: '::ffff:10.0.0.0/104'}}",
            &[".ipBlock.cidr"],
            "mapped",
        ),
        (
            "{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}",
            &[".ipBlock.except[0]"],
            "the whole block",
        ),
        (
            "{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/7]}}",
            &[".ipBlock.except[0]"],
            "more than the block",
        ),
        (
            "{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16, 11.0.0.0/16]}}",
            &[".ipBlock.except[1]"],
            "outside",
        ),
        (
            "{ipBlock: {cidr: 0.0.0.0/0, except: ['2001:db8::/32']}}",
            &[".ipBlock.except[0]"],
            "another family",
        ),
        (
            "{ipBlock: {cidr: '::/0', except: ['::ffff:0.0.0.0/96']}}",
            &[".ipBlock.except[0]"],
            "would except nothing",
        ),
        (
            "{ipBlock: {cidr: 10.0.0.0/8, except: [x, '']}}",
            &[".ipBlock.except[0]", ".ipBlock.except[1]"],
            "each exception",
        ),
        (
            "{ipBlock: {cidr: x, except: [y]}}",
            &[".ipBlock.cidr", ".ipBlock.except[0]"],
            "block and exception",
        ),
        (
            "{namespaceSelector: {matchLabels: {a: -x}}, podSelector: {matchLabels: {a b: x}}}",
            &[".namespaceSelector.matchLabels", ".podSelector.matchLabels"],
            "both selectors",
        ),
    ] {
        for (rule, peers) in [("ingress", "from"), ("egress", "to")] {
            let expected: Vec<_> = faulty
                .iter()
                .map(|field| format!("spec.{rule}[0].{peers}[1]{field}"))
                .collect();
            let spec = format!("{rule}: [{{{peers}: [{{podSelector: {{}}}}, {peer}]}}]");
            assert_eq!(faulty_fields(&spec), expected, "{peer}: {why}");
        }
    }
}

#[test]
fn selector_validation_matches_the_api_server() {
    let long = "a".repeat(64);
    for (selector, faulty, why) in [
        ("{matchLabels: {'': x}}", "matchLabels", "no key"),
        ("{matchLabels: {a/b/c: x}}", "matchLabels", "two slashes"),
        (
            "{matchLabels: {a: 'x y'}}",
            "matchLabels",
            "space in a value",
        ),
        (
            &format!("{{matchLabels: {{a: {long}}}}}"),
            "matchLabels",
            "64 characters",
        ),
        (
            "{matchExpressions: [{operator: Exists}]}",
            "matchExpressions[0].key",
            "no key",
        ),
        (
            "{matchExpressions: [{key: a}]}",
            "matchExpressions[0].operator",
            "no operator",
        ),
        (
            "{matchExpressions: [{key: a, operator: in, values: [x]}]}",
            "matchExpressions[0].operator",
            "operators have capitals",
        ),
        (
            "{matchExpressions: [{key: a, operator: Gt, values: ['1']}]}",
            "matchExpressions[0].operator",
            "for nodes only",
        ),
        (
            "{matchExpressions: [{key: a, operator: In}]}",
            "matchExpressions[0].values",
            "In needs values",
        ),
        (
            "{matchExpressions: [{key: a, operator: NotIn, values: []}]}",
            "matchExpressions[0].values",
            "NotIn needs values",
        ),
        (
            "{matchExpressions: [{key: a, operator: Exists, values: [x]}]}",
            "matchExpressions[0].values",
            "Exists takes none",
        ),
        (
            "{matchExpressions: [{key: a, operator: DoesNotExist, values: [x]}]}",
            "matchExpressions[0].values",
            "DoesNotExist takes none",
        ),
        (
            "{matchExpressions: [{key: a, operator: Exists}, {key: a, operator: In, values: [x, /]}]}",
            "matchExpressions[1].values[1]",
            "a value that no label can have",
        ),
    ] {
        let spec = format!("podSelector: {selector}");
        assert_eq!(
            faulty_fields(&spec),
            [format!("spec.podSelector.{faulty}")],
            "{spec}: {why}"
        );
    }
}

#[test]
fn policy_type_validation_matches_the_api_server() {
    for (types, faulty) in [
        ("[ingress]", &["spec.policyTypes[0]"][..]),
        ("[Ingress, '']", &["spec.policyTypes[1]"]),
        ("[Ingress, Egress, Ingress]", &["spec.policyTypes"]),
        (
            "[Ingress, Egress, X]",
            &["spec.policyTypes", "spec.policyTypes[2]"],
        ),
    ] {
        assert_eq!(
            faulty_fields(&format!("policyTypes: {types}")),
            faulty,
            "{types}"
        );
    }
}

#[test]
fn name_validation_matches_the_api_server() {
    let key = PolicyKey {
        namespace: "X".into(),
        name: "".into(),
    };
    let problems = NetworkPolicy::new(key, v1::NetworkPolicySpec::default()).unwrap_err();
    let fields: Vec<_> = problems
        .iter()
        .filter_map(|problem| problem.field.as_deref())
        .collect();
    assert_eq!(fields, ["metadata.namespace", "metadata.name"]);
}

#[test]
fn rules_of_unlisted_policy_types_are_validated() {
    let spec = "{policyTypes: [Egress], ingress: [{ports: [{port: 0}]}]}";
    assert_eq!(faulty_fields(spec), ["spec.ingress[0].ports[0].port"]);
}

#[test]
fn error_names_field_problem_and_remedy() {
    let problems =
        policy("ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}]}]");
    assert_eq!(
        problems.unwrap_err()[0].to_string(),
        "spec.ingress[0].from[0].ipBlock.except[0]: 11.0.0.0/16 does not lie strictly within \
         10.0.0.0/8; name a part of 10.0.0.0/8, with a longer prefix"
    );
}

#[test]
fn bits_after_a_blocks_prefix_do_not_count() {
    let written =
        policy("ingress: [{from: [{ipBlock: {cidr: 10.1.2.3/8, except: [10.9.9.9/16]}}]}]");
    let same = policy("ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.9.0.0/16]}}]}]");
    assert_eq!(written, same);
}
