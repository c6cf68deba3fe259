//! The controllers and the scheduler that a real node needs.
//!
//! Knows none of the objects.

use std::path::Path;

use super::error::KubernetesError;
use super::start::{self, Programs};
use crate::netns::Netns;
use crate::process::Child;

/// Those that pods on a node need; all of them would be some forty.
const CONTROLLERS: &str = "daemonset-controller,serviceaccount-controller,\
    root-ca-certificate-publisher-controller,node-lifecycle-controller,namespace-controller,\
    garbage-collector-controller";

/// kube-controller-manager and kube-scheduler; they end with this value.
#[derive(Debug)]
pub struct Controllers {
    _manager: Child,
    _scheduler: Child,
}

pub(super) fn start(
    netns: &Netns,
    programs: &Programs,
    directory: &Path,
) -> Result<Controllers, KubernetesError> {
    let kubeconfig = start::admin_kubeconfig(directory);
    let mut manager = netns.command(&programs.controller_manager);
    manager.arg(format!("--controllers={CONTROLLERS}"));
    let authority = start::authority(directory);
    manager.arg(format!("--root-ca-file={}", authority.display()));
    let mut scheduler = netns.command(&programs.scheduler);
    for command in [&mut manager, &mut scheduler] {
        command.arg(format!("--kubeconfig={}", kubeconfig.display()));
        // There is one of each, and it has no clients.
        command.args(["--leader-elect=false", "--secure-port=0"]);
    }
    Ok(Controllers {
        _manager: start::spawn(manager, directory, "controller-manager")?,
        _scheduler: start::spawn(scheduler, directory, "scheduler")?,
    })
}
