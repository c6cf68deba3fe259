//! `kubectl get pods,namespaces,nodes,networkpolicies,services -A -o yaml` is a valid source.
use std::path::Path;

use controller::manifest::load;
use policy::{OwnNode, Protocol, allows};

#[test]
fn kubectl_get_output_is_a_valid_source() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/kubectl-get.yaml");
    let loaded = load(&path).unwrap();
    assert_eq!(loaded.problems, []);
    let cluster = loaded.cluster;
    assert_eq!(cluster.pods().count(), 5);
    assert_eq!(cluster.nodes().count(), 3);
    assert_eq!(cluster.pod_cidrs().len(), 5);
    assert_eq!(cluster.policies().count(), 1);
    assert_eq!(cluster.endpoints().count(), 4, "two pods of two families");

    for (from, to, port, expected, why) in [
        (
            "10.244.1.5",
            "10.244.2.9",
            80,
            true,
            "http is port 80 of web",
        ),
        (
            "fd00:10:244:1::5",
            "fd00:10:244:2::9",
            80,
            true,
            "the other family",
        ),
        (
            "10.244.1.5",
            "10.244.2.9",
            9090,
            true,
            "a port of a sidecar",
        ),
        (
            "10.244.1.5",
            "10.244.2.9",
            7,
            false,
            "a port of an init container that has ended",
        ),
        ("172.18.0.2", "10.244.2.9", 80, false, "not the client"),
        (
            "172.18.0.4",
            "10.244.2.9",
            80,
            true,
            "the node that web runs on",
        ),
        (
            "10.244.2.9",
            "10.244.1.5",
            80,
            true,
            "nothing isolates the client",
        ),
    ] {
        let (from_address, to_address) = (from.parse().unwrap(), to.parse().unwrap());
        let (source, destination) = (cluster.party(from_address), cluster.party(to_address));
        let allowed = allows(
            source,
            destination,
            Some(port),
            Protocol::Tcp,
            OwnNode::Allow,
        );
        assert_eq!(allowed, expected, "{from} -> {to}:{port}: {why}");
    }
}

#[test]
fn source_without_a_manifest_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.out"), [0x7f, b'E', b'L', b'F', 0]).unwrap();
    let error = load(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("no manifests") && error.contains("kubectl get"),
        "{error}"
    );
}

#[test]
fn problems_of_all_files_are_reported_together() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.yaml"), "kind: [").unwrap();
    std::fs::write(dir.path().join("b.json"), "{\"kind\": \"Pod\"}").unwrap();
    std::fs::write(dir.path().join("c.yml"), [0xff]).unwrap();
    let error = load(dir.path()).unwrap_err();
    assert_eq!(error.problems.len(), 3);
    let text = error.to_string();
    for file in [
        "a.yaml, document 1",
        "b.json, document 1",
        "c.yml: not text",
    ] {
        assert!(text.contains(file), "{file}: {text}");
    }
}
