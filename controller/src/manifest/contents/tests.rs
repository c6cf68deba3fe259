//! Which objects a file holds, and how each fault is named.
use super::*;
use crate::Severity;

fn read(text: &str) -> Contents {
    Contents::read(Path::new("f.yaml"), text.as_bytes().to_vec())
}

fn objects(contents: &Contents) -> Vec<String> {
    contents
        .entries
        .iter()
        .map(|entry| match &entry.object {
            Some(object) => {
                assert_eq!(object.key(), entry.key);
                entry.key.to_string()
            }
            None => format!("invalid {}", entry.key),
        })
        .collect()
}

fn faulty(contents: &Contents) -> bool {
    let mut problems = contents.problems.iter();
    problems.any(|problem| problem.severity == Severity::Error)
}

#[test]
fn every_form_of_list_is_unpacked() {
    for (text, expected) in [
        (
            "{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Namespace, metadata: {name: x}}]}",
            "Namespace x",
        ),
        (
            "{apiVersion: v1, kind: PodList, items: [{metadata: {name: a, namespace: x}}]}",
            "Pod x/a",
        ),
        (
            "{apiVersion: v1, kind: NodeList, items: [{metadata: {name: n1}}]}",
            "Node n1",
        ),
        (
            "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicyList, items: [{metadata: {name: p}, spec: {podSelector: {}}}]}",
            "NetworkPolicy default/p",
        ),
        (
            "{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Pod, metadata: {name: a}}]}]}",
            "Pod default/a",
        ),
    ] {
        let contents = read(text);
        assert_eq!(objects(&contents), [expected], "{text}");
        assert_eq!(contents.problems, [], "{text}");
        assert!(!contents.incomplete, "{text}");
    }
}

#[test]
fn other_kinds_are_skipped() {
    for text in [
        "{apiVersion: v1, kind: Service, metadata: {name: s}}",
        "{apiVersion: apps/v1, kind: Deployment, metadata: {name: s}}",
        "{apiVersion: v1, kind: ServiceList, items: [{metadata: {name: s}}]}",
        "{apiVersion: v1, kind: List, items: []}",
        "{apiVersion: v1, kind: List, items: null}",
        "{apiVersion: networking.k8s.io/v1, kind: Ingress, metadata: {name: i}}",
        "{apiVersion: networking.k8s.io/v1, kind: IngressList, items: []}",
        "{apiVersion: config.openshift.io/v1, kind: Node, metadata: {name: cluster}}",
        "{apiVersion: metrics.k8s.io/v1beta1, kind: PodMetrics}",
    ] {
        assert_eq!(read(text), Contents::default(), "{text}");
    }
}

#[test]
fn every_policy_of_another_system_is_a_warning() {
    for (text, objects) in [
        (
            "{apiVersion: crd.projectcalico.org/v1, kind: NetworkPolicy, metadata: {name: p}}",
            &["NetworkPolicy p"][..],
        ),
        (
            "{apiVersion: policy.networking.k8s.io/v1alpha1, kind: AdminNetworkPolicy, metadata: {name: p}}",
            &["AdminNetworkPolicy p"],
        ),
        (
            "{apiVersion: v1, kind: List, items: [{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: p, namespace: x}}, {apiVersion: k8s.ovn.org/v1, kind: EgressFirewall, metadata: {name: default, namespace: x}}]}",
            &["CiliumNetworkPolicy x/p", "EgressFirewall x/default"],
        ),
        (
            "{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicyList, items: [{metadata: {name: p}}, {metadata: {name: q}}]}",
            &["CiliumNetworkPolicy p", "CiliumNetworkPolicy q"],
        ),
        (
            "{apiVersion: cilium.io/v2, kind: CiliumEndpoint, metadata: {name: p}}",
            &[],
        ),
    ] {
        let contents = read(text);
        assert!(!faulty(&contents) && !contents.incomplete, "{text}");
        let named = contents
            .problems
            .iter()
            .filter_map(|it| it.object.as_deref());
        assert_eq!(named.collect::<Vec<_>>(), objects, "{text}");
        let enforced = |problem: &Problem| problem.problem.ends_with("is not enforced");
        assert!(contents.problems.iter().all(enforced), "{text}");
        let warning = |problem: &Problem| problem.severity == Severity::Warning;
        assert!(contents.problems.iter().all(warning), "{text}");
    }
}

#[test]
fn many_warnings_of_a_file_are_no_error() {
    let policy =
        "---\n{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: p}}\n";
    let contents = read(&policy.repeat(150));
    assert_eq!(contents.problems.len(), 101);
    assert!(!faulty(&contents));
    let contents = read(&(policy.repeat(150) + &"---\n{a: b}\n".repeat(101)));
    assert!(faulty(&contents));
}

/// Text, the place that is named, whether the objects of the file can still all be named.
#[test]
fn every_fault_is_named_with_its_place() {
    for (text, object, field, incomplete) in [
        ("just text", None, None, true),
        ("[1, 2]", None, None, true),
        ("{a: b}", None, Some("kind"), true),
        ("{kind: 3}", None, Some("kind"), true),
        ("{kind: Pod}", None, Some("apiVersion"), true),
        (
            "{apiVersion: v1, kind: List, items: 3}",
            None,
            Some("items"),
            true,
        ),
        (
            "{apiVersion: v1, kind: List, items: [3]}",
            None,
            Some("items[0]"),
            true,
        ),
        (
            "{apiVersion: v1, kind: Pod}",
            Some("Pod without a name"),
            Some("metadata.name"),
            true,
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: 7}}",
            Some("Pod without a name"),
            Some("metadata.name"),
            true,
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: a/b}}",
            Some("Pod a/b"),
            Some("metadata.name"),
            true,
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {generateName: a-}}",
            Some("Pod without a name"),
            Some("metadata.name"),
            true,
        ),
        (
            "{apiVersion: extensions/v1beta1, kind: NetworkPolicy, metadata: {name: p}}",
            Some("NetworkPolicy p"),
            Some("apiVersion"),
            false,
        ),
        (
            "{apiVersion: networking.k8s.io/v1beta1, kind: NetworkPolicy, metadata: {name: p, namespace: x}}",
            Some("NetworkPolicy x/p"),
            Some("apiVersion"),
            false,
        ),
        (
            "{apiVersion: v1, kind: networkpolicy, metadata: {name: p}}",
            Some("networkpolicy p"),
            Some("apiVersion"),
            false,
        ),
        (
            "{apiVersion: networking.k8s.io/v1, kind: NetworkPolciy, metadata: {name: p}}",
            Some("NetworkPolciy p"),
            Some("apiVersion"),
            true,
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {v: 1}}}",
            Some("Pod default/a"),
            Some("metadata.labels.v"),
            false,
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: a}, status: {podIP: 10.0.0}}",
            Some("Pod default/a"),
            Some("status.podIP"),
            false,
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: a}, status: {podIPs: [{ip: x}]}}",
            Some("Pod default/a"),
            Some("status.podIPs[0].ip"),
            false,
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {hostNetwork: \"yes\"}}",
            Some("Pod default/a"),
            Some("spec.hostNetwork"),
            false,
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {containers: [{ports: [{containerPort: 0}]}]}}",
            Some("Pod default/a"),
            Some("spec.containers[0].ports[0].containerPort"),
            false,
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {containers: [{ports: [{containerPort: 1, protocol: tcp}]}]}}",
            Some("Pod default/a"),
            Some("spec.containers[0].ports[0].protocol"),
            false,
        ),
        (
            "{apiVersion: v1, kind: Node, metadata: {name: n1}, spec: {podCIDR: 10.0.0.0/33}}",
            Some("Node n1"),
            Some("spec.podCIDR"),
            false,
        ),
        (
            "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p}}",
            Some("NetworkPolicy default/p"),
            Some("spec"),
            false,
        ),
        (
            "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p}, spec: {}, ingress: []}",
            Some("NetworkPolicy default/p"),
            Some("ingress"),
            false,
        ),
        (
            "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p}, spec: {ingress: [{fro: []}]}}",
            Some("NetworkPolicy default/p"),
            Some("spec.ingress[0].fro"),
            false,
        ),
        (
            "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p}, spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/33}}]}]}}",
            Some("NetworkPolicy default/p"),
            Some("spec.ingress[0].from[0].ipBlock.cidr"),
            false,
        ),
        (
            "{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Pod, metadata: {name: a}, status: {podIP: x}}]}",
            Some("Pod default/a"),
            Some("items[0].status.podIP"),
            false,
        ),
    ] {
        let contents = read(&format!("---\n# first\n---\n{text}\n"));
        let [problem] = &contents.problems[..] else {
            panic!("{text}: {:?}", contents.problems)
        };
        assert_eq!(problem.object.as_deref(), object, "{text}");
        assert_eq!(problem.field.as_deref(), field, "{text}: {problem}");
        assert_eq!(problem.document, Some(2), "{text}");
        assert_eq!(problem.file.as_deref(), Some(Path::new("f.yaml")));
        assert!(
            !problem.problem.is_empty() && !problem.remedy.is_empty(),
            "{text}"
        );
        assert_eq!(contents.incomplete, incomplete, "{text}");
        assert!(faulty(&contents), "{text}");
    }
}

#[test]
fn an_invalid_object_does_not_hide_its_neighbours() {
    let contents = read(
        "{apiVersion: v1, kind: Pod, metadata: {name: a}, status: {podIP: x}}\n---\n\
         {apiVersion: v1, kind: Pod, metadata: {name: b}}",
    );
    assert_eq!(
        objects(&contents),
        ["invalid Pod default/a", "Pod default/b"]
    );
}

#[test]
fn bytes_that_are_not_text_are_one_problem() {
    let contents = Contents::read(Path::new("f.yaml"), vec![b'a', b':', 0xff, 0xfe]);
    let [problem] = &contents.problems[..] else {
        panic!("{contents:?}")
    };
    assert_eq!(problem.problem, "not text: byte 2 is not UTF-8");
    assert!(contents.incomplete);
}

#[test]
fn thousand_faults_give_a_hundred_lines() {
    let contents = read(&"---\njust text\n".repeat(1_000));
    assert_eq!(contents.problems.len(), 101);
    assert_eq!(
        contents.problems[100].problem,
        "900 more problems are not shown"
    );
}
