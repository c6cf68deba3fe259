//! The source of the cluster's state: one interface to manifests and the Kubernetes API.
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::bail;
use controller::kube::{KubeSettings, KubeSource, WatchStatus};
use controller::manifest::ManifestSource;
use controller::{Batch, Problem};

use super::settings::RunArgs;
use crate::node::readiness::Readiness;

/// The source of the cluster's state.
pub(super) enum Source {
    Manifests {
        source: Box<ManifestSource>,
        /// The full state, until it is asked for.
        first: Option<Batch>,
    },
    Kube(Box<KubeSource>),
}

impl Source {
    /// Opens what `--cluster` names.
    ///
    /// # Errors
    /// What is wrong with the flags, the manifests or the client configuration.
    pub(super) async fn open(args: &RunArgs) -> anyhow::Result<Self> {
        if let Some(path) = args.cluster.strip_prefix("dir:") {
            if args.startup_taint.is_some() {
                bail!(
                    "--startup-taint is about the API server's Node; give --cluster kube with it"
                );
            }
            let (source, first) = ManifestSource::open(&PathBuf::from(path))?;
            return Ok(Self::Manifests {
                source: Box::new(source),
                first: Some(first),
            });
        }
        if args.cluster != "kube" {
            bail!(
                "the source {:?} is not known; give --cluster kube or --cluster dir:PATH",
                args.cluster
            );
        }
        let settings = KubeSettings {
            node: args.node()?,
            state_dir: args.state_dir.clone(),
            state_max_age: args.state_max_age.into(),
        };
        Ok(Self::Kube(Box::new(KubeSource::start(settings).await?)))
    }

    /// Waits for the next change; the first is the full state. Cancel safe.
    pub(super) async fn next(&mut self) -> Batch {
        match self {
            Self::Manifests { source, first } => match first.take() {
                Some(first) => first,
                None => source.next().await,
            },
            Self::Kube(source) => source.next().await,
        }
    }

    /// How the watches of the Kubernetes API are doing.
    pub(super) fn status(&self) -> Option<Arc<WatchStatus>> {
        match self {
            Self::Manifests { .. } => None,
            Self::Kube(source) => Some(source.status()),
        }
    }

    /// Reports diagnostics to the authors of the objects, where that is possible.
    pub(super) fn report(&mut self, problems: &[Problem]) {
        match self {
            Self::Manifests { .. } => {}
            Self::Kube(source) => source.report(problems),
        }
    }
}

/// Removes the `--startup-taint` from this Node as soon as the daemon is ready, if it is given.
pub(super) fn lift_taint(args: &RunArgs, readiness: &Readiness, node: &Arc<str>) {
    let Some(key) = args.startup_taint.clone() else {
        return;
    };
    let (readiness, node) = (readiness.clone(), Arc::clone(node));
    tokio::spawn(async move {
        readiness.awaited().await;
        controller::kube::lift_taint(&node, &key).await;
    });
}
