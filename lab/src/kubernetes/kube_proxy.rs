//! The real kube-proxy on a node of the lab.
//!
//! Knows its configuration, not its rules.

use std::path::Path;

use serde_json::json;

use super::error::KubernetesError;
use super::start::{self, KUBE_PROXY_TOKEN, Programs};
use super::{API_V4, write};
use crate::cluster::{Host, plan};
use crate::process::Child;

/// How kube-proxy writes its rules (`--proxy-mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyMode {
    /// By `iptables`, the default.
    Iptables,
    /// By `nft`.
    Nftables,
}

impl ProxyMode {
    fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
        }
    }
}

pub(super) fn start(
    programs: &Programs,
    directory: &Path,
    node: &Host,
    mode: ProxyMode,
) -> Result<Child, KubernetesError> {
    let name = format!("kube-proxy-{}", node.name());
    let kubeconfig = start::write_kubeconfig(directory, &name, API_V4, KUBE_PROXY_TOKEN)?;
    let configuration = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": mode.name(),
        "hostnameOverride": node.name(),
        "clusterCIDR": format!("{},{}", plan::CLUSTER_V4, plan::CLUSTER_V6),
        "clientConnection": { "kubeconfig": kubeconfig },
        // A namespace that is not the first one cannot change these.
        "conntrack": { "maxPerCore": 0 },
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
    });
    let file = directory.join(format!("{name}.json"));
    let file = write(file, &configuration.to_string())?;
    let mut proxy = node.command(&programs.kube_proxy);
    proxy.arg("--config").arg(file);
    start::spawn(proxy, directory, &name)
}
