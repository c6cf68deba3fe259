//! Policies of other systems: kinds that restrict traffic, and that Portreeve does not enforce.
//!
//! Users may expect them to be enforced, so they are reported where they are found; their contents are not read.

/// A kind of policy that is not enforced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Foreign {
    /// API group, of any version.
    pub(crate) group: &'static str,
    /// `kind` as the API writes it.
    pub(crate) kind: &'static str,
}

const fn of(group: &'static str, kind: &'static str) -> Foreign {
    Foreign { group, kind }
}

/// All kinds that are known by name.
pub(crate) const FOREIGN: [Foreign; 26] = [
    of("policy.networking.k8s.io", "AdminNetworkPolicy"),
    of("policy.networking.k8s.io", "BaselineAdminNetworkPolicy"),
    of("policy.networking.k8s.io", "ClusterNetworkPolicy"),
    of("cilium.io", "CiliumNetworkPolicy"),
    of("cilium.io", "CiliumClusterwideNetworkPolicy"),
    of("crd.projectcalico.org", "NetworkPolicy"),
    of("crd.projectcalico.org", "GlobalNetworkPolicy"),
    of("crd.projectcalico.org", "StagedNetworkPolicy"),
    of("crd.projectcalico.org", "StagedGlobalNetworkPolicy"),
    of("crd.projectcalico.org", "StagedKubernetesNetworkPolicy"),
    of("projectcalico.org", "NetworkPolicy"),
    of("projectcalico.org", "GlobalNetworkPolicy"),
    of("projectcalico.org", "StagedNetworkPolicy"),
    of("projectcalico.org", "StagedGlobalNetworkPolicy"),
    of("projectcalico.org", "StagedKubernetesNetworkPolicy"),
    of("crd.antrea.io", "NetworkPolicy"),
    of("crd.antrea.io", "ClusterNetworkPolicy"),
    of("security.antrea.tanzu.vmware.com", "NetworkPolicy"),
    of("security.antrea.tanzu.vmware.com", "ClusterNetworkPolicy"),
    of("k8s.cni.cncf.io", "MultiNetworkPolicy"),
    of("network.openshift.io", "EgressNetworkPolicy"),
    of("k8s.ovn.org", "EgressFirewall"),
    of("networking.k8s.aws", "ApplicationNetworkPolicy"),
    of("networking.k8s.aws", "ClusterNetworkPolicy"),
    of("networking.gke.io", "FQDNNetworkPolicy"),
    of("crd.nsx.vmware.com", "SecurityPolicy"),
];

/// Whether this group and kind is a policy that is not enforced: one of [`FOREIGN`], or any kind named
/// `...NetworkPolicy` outside of Kubernetes' own groups.
pub(crate) fn is_foreign(group: &str, kind: &str) -> bool {
    let known = FOREIGN
        .iter()
        .any(|it| it.group == group && it.kind.eq_ignore_ascii_case(kind));
    let named = kind.to_ascii_lowercase().ends_with("networkpolicy");
    known || named && !matches!(group, "" | "core" | "extensions" | "networking.k8s.io")
}

/// What to do about one.
pub(crate) const REMEDY: &str =
    "write it as networking.k8s.io/v1 NetworkPolicy, or leave it to the software that enforces it";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_of_other_systems_are_foreign() {
        assert!(FOREIGN.iter().all(|it| is_foreign(it.group, it.kind)));
        for (group, kind, expected) in [
            ("made-up.example", "FancyNetworkPolicy", true),
            ("cilium.io", "ciliumnetworkpolicy", true),
            ("networking.k8s.io", "NetworkPolicy", false),
            ("extensions", "NetworkPolicy", false),
            ("cilium.io", "CiliumEndpoint", false),
            ("apps", "Deployment", false),
            ("", "Service", false),
        ] {
            assert_eq!(is_foreign(group, kind), expected, "{group} {kind}");
        }
    }
}
