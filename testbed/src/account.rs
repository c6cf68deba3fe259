//! The DaemonSet's account in the lab's control plane: its rights, from `deploy/`, and no others.
use std::path::PathBuf;

use lab::kubernetes::{ControlPlane, KubernetesError};

/// Where the DaemonSet's account lives.
pub const NAMESPACE: &str = "portreeve-system";

/// A kubeconfig of the account.
pub fn kubeconfig(control: &ControlPlane) -> Result<PathBuf, KubernetesError> {
    let namespace = format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: {NAMESPACE}}}}}");
    control.kubectl(&["apply", "-f", "-"], &namespace)?;
    let rights = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/base/rbac.yaml");
    control.kubectl(&["-n", NAMESPACE, "apply", "-f", rights], "")?;
    let token = control.token(NAMESPACE, "portreeve")?;
    control.kubeconfig("portreeve", &token)
}
