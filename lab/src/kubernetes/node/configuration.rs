//! The configuration of a node's containerd, CNI plugins and kubelet.
//!
//! Pure: values in, text out.

use std::path::Path;

use serde_json::{Value, json};

/// An image with a shell and the usual programs; what runs without a command does nothing.
pub const BUSYBOX: &str = "docker.io/lab/busybox:1";
/// The image of every pod's sandbox, by the name that clusters have it by.
pub(super) const PAUSE: &str = "registry.k8s.io/pause:3.10";
pub(super) const SOCKET: &str = "/run/containerd/containerd.sock";

/// containerd's. What it says for debugging tells when it has taken another network in. Without `CAP_SYS_RESOURCE` nobody can make a container less likely to be killed
/// than containerd itself.
pub(super) fn containerd(networks: &Path, plugins: &Path) -> String {
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[debug]
  level = "debug"
[grpc]
  address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{}"
    conf_dir = "{}"
"#,
        plugins.display(),
        networks.display()
    )
}

/// How a real node's pods are attached, by CNI plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// `ptp`: a veth each, behind an address of the node.
    Ptp,
    /// `bridge`: a bridge `cni0`, without hairpin mode.
    Bridge,
}

/// The list of CNI plugins of a pod's network.
pub(super) fn network(network: Network, pod_cidrs: &Value) -> Value {
    let ranges = pod_cidrs.as_array().into_iter().flatten();
    let ranges: Vec<_> = ranges.map(|subnet| json!([{ "subnet": subnet }])).collect();
    let mut first = match network {
        Network::Ptp => json!({ "type": "ptp" }),
        Network::Bridge => json!({ "type": "bridge", "bridge": "cni0", "isGateway": true }),
    };
    first["ipam"] = json!({
        "type": "host-local",
        "ranges": ranges,
        "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
    });
    let ports = json!({ "type": "portmap", "capabilities": { "portMappings": true } });
    json!({ "cniVersion": "1.0.0", "name": "lab", "plugins": [first, ports] })
}

/// kubelet's. Only the API server's host reaches it, so it needs no authentication.
pub(super) fn kubelet(resolver: &Path) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": format!("unix://{SOCKET}"),
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": false,
        "failSwapOn": false,
        "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
        "authorization": { "mode": "AlwaysAllow" },
        "resolvConf": resolver,
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
        // The lab ignores a full disk of the machine.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {
            "memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%",
            "imagefs.available": "0%", "imagefs.inodesFree": "0%",
        },
    })
}
