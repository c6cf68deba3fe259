//! Pods with more labels or ports than are kept.
use super::*;

/// x/a with this many labels and ports, all of them in use by policies.
fn large(labels: usize, ports: usize) -> Pod {
    let mut pod = pod("x/a", A);
    pod.labels
        .extend((1..labels).map(|number| (format!("k{number}").into(), "v".into())));
    pod.ports = (0..ports)
        .map(|_| PodPort {
            name: Some("http".into()),
            number: 80,
            protocol: Protocol::Tcp,
        })
        .collect();
    pod.bounded()
}

/// Whether x/a may connect to x/b, and x/b to x/a.
fn open(cluster: &Cluster) -> [bool; 2] {
    [tcp80(cluster, A, B), tcp80(cluster, B, A)]
}

#[test]
fn oversized_pod_is_isolated_and_keeps_no_labels() {
    let allow = "{podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{}], egress: [{}]}";
    for policed in [false, true] {
        let mut cluster = three_pods();
        if policed {
            let _ = cluster.upsert_policy(policy("x/allow", allow));
        }
        for (labels, ports, opened) in [
            (Pod::LABELS, Pod::PORTS, true),
            (Pod::LABELS + 1, 0, false),
            (1, 1, true),
            (1, Pod::PORTS + 1, false),
            (1, 1, true),
        ] {
            let version = cluster.findings_version();
            let touched = cluster.upsert_pod(large(labels, ports));
            assert!(opened || !touched.is_empty(), "its flows are judged again");
            assert_eq!(
                open(&cluster),
                [opened; 2],
                "{labels} labels, {ports} ports"
            );
            let known = cluster.pod(&pod_key("x/a")).unwrap();
            assert_eq!(known.labels.is_empty() && known.ports.is_empty(), !opened);
            let named: Vec<_> = cluster.oversized().cloned().collect();
            assert_eq!(named.is_empty(), opened, "{named:?}");
            assert!(
                opened == named.is_empty() && (opened || cluster.findings_version() != version)
            );
        }
        let _ = cluster.upsert_pod(large(Pod::LABELS + 1, 0));
        let _ = cluster.remove_pod(&pod_key("x/a"));
        assert_eq!(cluster.oversized().count(), 0);
    }
}
