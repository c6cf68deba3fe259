//! Where the daemons of a bench have the cluster's state from, and how it becomes another one there:
//! files in a directory, or a real Kubernetes API server.
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::ValueEnum;
use lab::kubernetes::ControlPlane;
use lab::{Cluster, Command};
use serde_json::{Value, json};

/// A kind of source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// A directory with one file for each object, so that a change costs the daemons one file.
    Files,
    /// etcd and kube-apiserver; daemons have the DaemonSet's rights.
    Api,
}

pub(crate) enum Source {
    Files(PathBuf),
    Api {
        control: Box<ControlPlane>,
        kubeconfig: PathBuf,
        states: PathBuf,
    },
}

impl Source {
    /// One that has nothing yet, which may use `directory`.
    pub(crate) fn new(kind: Kind, directory: &Path, lab: &Cluster) -> anyhow::Result<Self> {
        if kind == Kind::Files {
            let manifests = directory.join("manifests");
            fs::create_dir(&manifests)?;
            return Ok(Self::Files(manifests));
        }
        let own = directory.join("kubernetes");
        fs::create_dir(&own)?;
        let control = Box::new(ControlPlane::start(&own)?);
        control.join(lab)?;
        Ok(Self::Api {
            kubeconfig: testbed::account::kubeconfig(&control)?,
            control,
            states: directory.join("states"),
        })
    }

    /// Has all these objects, of which what comes first is what the others need.
    pub(crate) fn fill(&self, frame: &[Value], content: &[Value]) -> anyhow::Result<()> {
        match self {
            Self::Files(_) => {
                for object in frame.iter().chain(content) {
                    self.write(object)?;
                }
            }
            Self::Api { control, .. } => {
                control.publish(frame)?;
                let dressed: Vec<_> = content.iter().map(dressed).collect();
                control.create(&dressed)?;
            }
        }
        Ok(())
    }

    /// Tells the daemons of an object, and says when they could see it at the earliest.
    pub(crate) fn write(&self, object: &Value) -> anyhow::Result<Instant> {
        match self {
            Self::Files(manifests) => {
                let name = file_name(object);
                let new = manifests.with_file_name(format!("new-{name}"));
                fs::write(&new, object.to_string())?;
                let at = Instant::now();
                fs::rename(new, manifests.join(name))?;
                Ok(at)
            }
            Self::Api { control, .. } => {
                let mut object = object.clone();
                // Of a pod that runs only labels can change.
                if object["kind"] == "Pod" {
                    object["spec"].take();
                    object["metadata"]["uid"].take();
                }
                let at = Instant::now();
                control.apply(&object)?;
                Ok(at)
            }
        }
    }

    /// Tells the daemons that an object is gone.
    pub(crate) fn remove(&self, object: &Value) -> anyhow::Result<Instant> {
        let at = Instant::now();
        match self {
            Self::Files(manifests) => fs::remove_file(manifests.join(file_name(object)))?,
            Self::Api { control, .. } => control.delete(object)?,
        }
        Ok(at)
    }

    /// Has a daemon follow it.
    pub(crate) fn follow(&self, node: &str, daemon: &mut Command) {
        match self {
            Self::Files(manifests) => {
                daemon.args(["--cluster", &format!("dir:{}", manifests.display())]);
            }
            Self::Api {
                kubeconfig, states, ..
            } => {
                daemon.args(["--cluster", "kube", "--state-dir"]);
                daemon.arg(states.join(node)).env("KUBECONFIG", kubeconfig);
            }
        }
    }
}

fn file_name(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_lowercase();
    let metadata = &object["metadata"];
    format!(
        "{}-{}-{}.json",
        text(&object["kind"]),
        text(&metadata["namespace"]),
        text(&metadata["name"])
    )
}

/// A pod with what pods of real clusters have beside what policy looks at: some 5 kB.
fn dressed(object: &Value) -> Value {
    let mut pod = object.clone();
    if pod["kind"] != "Pod" {
        return pod;
    }
    let environment = |number| json!({ "name": format!("SETTING_{number}"), "value": format!("http://service-{number}.example.svc:8080/") });
    let probe = json!({ "httpGet": { "path": "/healthz", "port": "http" }, "periodSeconds": 10 });
    let container = json!({
        "name": "main",
        "image": "registry.example.org/team/application:1.2.3",
        "args": ["--listen=:8080", "--log-format=json"],
        "env": (0..10).map(environment).collect::<Vec<_>>(),
        "ports": [{ "name": "http", "containerPort": 8080 }, { "name": "metrics", "containerPort": 9090 }],
        "resources": { "requests": { "cpu": "100m", "memory": "128Mi" }, "limits": { "memory": "256Mi" } },
        "readinessProbe": probe,
        "livenessProbe": probe,
        "volumeMounts": [{ "name": "settings", "mountPath": "/etc/application" }],
    });
    pod["spec"]["containers"] = json!([container]);
    pod["spec"]["volumes"] =
        json!([{ "name": "settings", "configMap": { "name": "application" } }]);
    pod["metadata"]["annotations"] = json!({
        "checksum/settings": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "prometheus.io/scrape": "true",
    });
    let since = "2026-01-01T00:00:00Z";
    let condition =
        |kind: &str| json!({ "type": kind, "status": "True", "lastTransitionTime": since });
    let conditions = ["Initialized", "Ready", "ContainersReady", "PodScheduled"];
    pod["status"]["conditions"] = conditions.map(condition).into();
    pod["status"]["containerStatuses"] = json!([{
        "name": "main", "ready": true, "started": true, "restartCount": 0,
        "image": "registry.example.org/team/application:1.2.3",
        "imageID": "registry.example.org/team/application@sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "containerID": "containerd://9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "state": { "running": { "startedAt": since } },
    }]);
    pod
}
