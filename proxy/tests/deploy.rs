//! The contents of `deploy/`, checked without a cluster: kustomize and Helm build it with the same
//! result, its settings are flags of the programs, its containers have only the declared privileges.
//!
//! Needs `make tools`: kubectl and helm.
#![expect(clippy::unwrap_used, reason = "a panic is how a test helper fails")]
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

const PORTREEVE: &str = env!("CARGO_BIN_EXE_portreeve");
const NAMESPACE: &str = "portreeve-system";
/// What an operator applies, with the chart's values that ask for the same.
const INSTALLS: &[(&str, &[&str])] = &[
    ("base", &[]),
    ("overlays/bridge", &["bridges={cni0}"]),
    ("overlays/jaeger", &["jaeger.enabled=true"]),
    ("overlays/startup-taint", &["startupTaint.enabled=true"]),
    ("overlays/uninstall", &["uninstall=true", "bridges={cni0}"]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn deploy(path: &str) -> PathBuf {
    root().join("deploy").join(path)
}

/// A program of lab/tools.
fn tool(module: &str, program: &str) -> Command {
    let mut build = Command::new(root().join("lab/tools/build"));
    let folder = said(build.args(["--where", module]));
    Command::new(Path::new(folder.trim()).join(program))
}

/// What a program that succeeds says.
fn said(command: &mut Command) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{command:?}: {stderr}");
    String::from_utf8(stdout).unwrap()
}

type Objects = BTreeMap<String, Value>;

/// Objects by kind and name.
fn objects(yaml: &str) -> Objects {
    let documents: Vec<Option<Value>> = serde_saphyr::from_multiple(yaml).unwrap();
    let named = documents.into_iter().flatten().map(|object| {
        let key = [&object["kind"], &object["metadata"]["name"]];
        let key = key.map(|part| part.as_str().unwrap_or_else(|| panic!("{object}")));
        (key.join(" "), object)
    });
    named.collect()
}

fn kustomized(directory: &str) -> Objects {
    let mut kubectl = tool("kubernetes", "kubectl");
    objects(&said(kubectl.arg("kustomize").arg(deploy(directory))))
}

fn charted(values: &[&str]) -> Objects {
    let mut helm = tool("helm", "helm");
    helm.args(["template", "portreeve", "--namespace", NAMESPACE]);
    helm.arg(deploy("helm/portreeve"));
    for value in values {
        helm.args(["--set", value]);
    }
    objects(&said(&mut helm))
}

/// Every pod template with its object's key.
fn templates(objects: &Objects) -> impl Iterator<Item = (&String, &Value)> {
    let all = objects
        .iter()
        .map(|(key, object)| (key, &object["spec"]["template"]["spec"]));
    all.filter(|(_, template)| template.is_object())
}

fn containers(template: &Value) -> impl Iterator<Item = &Value> {
    let lists = ["initContainers", "containers"].map(|list| template[list].as_array());
    lists.into_iter().flatten().flatten()
}

/// The one ConfigMap's data.
fn settings(objects: &Objects) -> BTreeMap<&str, &str> {
    let maps: Vec<_> = objects
        .values()
        .filter(|it| it["kind"] == "ConfigMap")
        .collect();
    assert_eq!(maps.len(), 1, "{maps:?}");
    let data = maps[0]["data"].as_object().unwrap();
    data.iter()
        .map(|(name, value)| (name.as_str(), value.as_str().unwrap()))
        .collect()
}

#[test]
fn helm_chart_renders_the_same_as_kustomize() {
    let overlays = fs::read_dir(deploy("overlays")).unwrap().count();
    assert_eq!(overlays + 1, INSTALLS.len(), "an overlay is missing here");
    for (directory, values) in INSTALLS {
        let (mut wanted, mut made) = (kustomized(directory), charted(values));
        // Helm makes the namespace that it installs into.
        wanted.remove(&format!("Namespace {NAMESPACE}")).unwrap();
        // Either has its own way to roll the DaemonSet when a setting changes: a name that follows
        // the content, and a checksum.
        let hashed = wanted.keys().find_map(|key| key.strip_prefix("ConfigMap "));
        let hashed = hashed.unwrap().to_owned();
        let settings = wanted.remove(&format!("ConfigMap {hashed}")).unwrap();
        wanted.insert("ConfigMap portreeve".into(), settings);
        let text = serde_json::to_string(&wanted)
            .unwrap()
            .replace(&hashed, "portreeve");
        wanted = serde_json::from_str(&text).unwrap();
        let metadata =
            &mut made.get_mut("DaemonSet portreeve").unwrap()["spec"]["template"]["metadata"];
        let checksum = metadata
            .as_object_mut()
            .unwrap()
            .remove("annotations")
            .unwrap();
        assert!(
            checksum["checksum/settings"].as_str().unwrap().len() == 64,
            "{checksum}"
        );

        let keys = |objects: &Objects| objects.keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&made), keys(&wanted), "{directory}");
        for (key, object) in &wanted {
            assert_eq!(&made[key], object, "{directory}: {key}");
        }
    }
}

#[test]
fn every_setting_is_a_variable_of_the_daemon() {
    let help = said(Command::new(PORTREEVE).args(["run", "--help"]));
    let known: BTreeSet<_> = help
        .split("[env: ")
        .skip(1)
        .filter_map(|rest| rest.split(['=', ']']).next())
        .collect();
    assert!(known.contains("PORTREEVE_FAIL"), "{known:?}");
    for (directory, _) in INSTALLS {
        let objects = kustomized(directory);
        for name in settings(&objects).keys() {
            assert!(
                *name == "RUST_LOG" || known.contains(name),
                "{directory}: {name}"
            );
        }
    }
}

#[test]
fn spans_name_the_pod_of_the_daemon() {
    let objects = kustomized("base");
    let (_, template) = templates(&objects).next().unwrap();
    let environment = template["containers"][0]["env"].as_array().unwrap();
    let named = |name: &str| {
        let at = environment.iter().position(|it| it["name"] == name);
        at.unwrap_or_else(|| panic!("no {name}"))
    };
    let last = named("OTEL_RESOURCE_ATTRIBUTES");
    let value = environment[last]["value"].as_str().unwrap();
    let attributes = value.split(',').map(|pair| {
        let (name, variable) = pair.split_once('=').unwrap();
        let variable = variable
            .strip_prefix("$(")
            .unwrap()
            .strip_suffix(')')
            .unwrap();
        // What comes later is not put in.
        assert!(named(variable) < last, "{variable}");
        let field = &environment[named(variable)]["valueFrom"]["fieldRef"]["fieldPath"];
        (name, field.as_str().unwrap())
    });
    assert_eq!(
        attributes.collect::<Vec<_>>(),
        [
            ("k8s.namespace.name", "metadata.namespace"),
            ("k8s.pod.name", "metadata.name"),
            ("k8s.pod.uid", "metadata.uid"),
        ]
    );
}

#[test]
fn probes_use_the_admin_port() {
    let help = said(Command::new(PORTREEVE).args(["run", "--help"]));
    let objects = kustomized("base");
    let (_, template) = templates(&objects).next().unwrap();
    for probe in ["readinessProbe", "livenessProbe"] {
        let get = &template["containers"][0][probe]["httpGet"];
        let asked = format!(
            "[default: {}:{}]",
            get["host"].as_str().unwrap(),
            get["port"]
        );
        assert!(
            help.contains(&asked),
            "{probe} asks at {asked}, and no flag has that default"
        );
    }
}

#[test]
fn daemonset_surges_and_startup_probe_checks_own_daemon() {
    for (directory, _) in INSTALLS {
        let objects = kustomized(directory);
        let daemons = &objects["DaemonSet portreeve"]["spec"];
        let container = &daemons["template"]["spec"]["containers"][0];
        let update = &daemons["updateStrategy"]["rollingUpdate"];
        let beside = [&update["maxSurge"], &update["maxUnavailable"]] == [1, 0];
        if *directory == "overlays/uninstall" {
            assert!(!beside && update["maxSurge"] == 0, "{directory}: {update}");
            continue;
        }
        assert!(beside, "{directory}: {update}");
        let probe = &container["startupProbe"]["exec"]["command"];
        assert_eq!(*probe, serde_json::json!(["portreeve", "ready"]));
        let environment = container["env"].as_array().unwrap().iter();
        let mut names = environment.map(|it| &it["name"]);
        assert!(names.any(|it| it == "POD_UID"), "{directory}");
        // Where both pods of a node find it, and no ordinary pod.
        let command = container["command"].as_array().unwrap();
        let [.., flag, place] = &command[..] else {
            panic!("{directory}: {command:?}");
        };
        assert_eq!(flag, "--handover");
        let (folder, _) = place.as_str().unwrap().rsplit_once('/').unwrap();
        let mounts = container["volumeMounts"].as_array().unwrap().iter();
        let mut at = mounts.filter(|it| it["mountPath"] == folder);
        let mut volumes = daemons["template"]["spec"]["volumes"]
            .as_array()
            .unwrap()
            .iter();
        let name = &at.next().unwrap()["name"];
        let volume = volumes.find(|it| it["name"] == *name).unwrap();
        assert_eq!(volume["hostPath"]["type"], "DirectoryOrCreate");
        // A port that is declared is reserved, and the new pod would find no node.
        assert!(container["ports"].is_null(), "{directory}");
    }
}

#[test]
fn containers_have_only_their_declared_privileges() {
    for (directory, _) in INSTALLS {
        let objects = kustomized(directory);
        for (key, template) in templates(&objects) {
            let of_pod = &template["securityContext"];
            assert_eq!(of_pod["seccompProfile"]["type"], "RuntimeDefault", "{key}");
            for container in containers(template) {
                let context = &container["securityContext"];
                let what = format!("{directory}: {key}: {}", container["name"]);
                assert!(context["privileged"].is_null(), "{what}");
                assert_eq!(context["allowPrivilegeEscalation"], false, "{what}");
                assert_eq!(context["readOnlyRootFilesystem"], true, "{what}");
                assert_eq!(context["capabilities"]["drop"][0], "ALL", "{what}");
                assert!(
                    container["resources"]["requests"]["cpu"].is_string(),
                    "{what}"
                );
                assert!(
                    container["resources"]["limits"]["memory"].is_string(),
                    "{what}"
                );
                let (_, tag) = container["image"]
                    .as_str()
                    .unwrap()
                    .rsplit_once(':')
                    .unwrap();
                assert!(
                    tag.starts_with(|c: char| c.is_ascii_digit()),
                    "{what}: {tag}"
                );
                let root = of_pod["runAsUser"] == 0;
                assert!(
                    root == (key == "DaemonSet portreeve"),
                    "{what}: uid 0 is for the daemon alone"
                );
            }
        }
    }
}

#[test]
fn image_and_chart_have_the_workspace_version() {
    let version = env!("CARGO_PKG_VERSION");
    let objects = kustomized("base");
    let (_, template) = templates(&objects).next().unwrap();
    for container in containers(template) {
        assert_eq!(container["image"], format!("portreeve:{version}"));
    }
    let chart = fs::read_to_string(deploy("helm/portreeve/Chart.yaml")).unwrap();
    let chart: Value = serde_saphyr::from_str(&chart).unwrap();
    assert_eq!(
        (&chart["version"], &chart["appVersion"]),
        (&version.into(), &version.into())
    );
}

#[test]
fn image_compiler_matches_the_workspace_rust_version() {
    let recipe = fs::read_to_string(deploy("image/Containerfile")).unwrap();
    let tag = recipe
        .split("/rust:")
        .nth(1)
        .and_then(|rest| rest.split('-').next());
    assert_eq!(tag, Some(env!("CARGO_PKG_RUST_VERSION")));
    // A member that is not copied is a build that fails.
    let workspace = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let members = workspace
        .split("members = [")
        .nth(1)
        .unwrap()
        .split(']')
        .next()
        .unwrap();
    for member in members.split(", ").map(|name| name.trim_matches('"')) {
        let copied = format!("COPY {member} {member}\n");
        assert!(recipe.contains(&copied), "{member} is not copied");
    }
}

#[test]
fn image_build_copies_every_included_file() {
    let recipe = fs::read_to_string(deploy("image/Containerfile")).unwrap();
    let copied: Vec<_> = recipe
        .lines()
        .filter_map(|line| line.strip_prefix("COPY ")?.split_once(' '))
        .filter(|(from, to)| from == to)
        .map(|(from, _)| root().join(from).canonicalize().unwrap())
        .collect();
    let mut folders: Vec<_> = copied.iter().map(|member| member.join("src")).collect();
    let mut included = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                folders.push(entry.path());
                continue;
            }
            let text = fs::read_to_string(entry.path()).unwrap();
            let named = text.split("include_str!(\"").skip(1);
            for file in named.filter_map(|rest| rest.split('"').next()) {
                let file = folder.join(file).canonicalize().unwrap();
                let there = copied.iter().any(|from| file.starts_with(from));
                assert!(there, "{} is not copied", file.display());
                included += 1;
            }
        }
    }
    assert!(included >= 5, "found only {included}");
}

#[test]
fn the_policy_samples_are_valid() {
    let mut found = 0;
    for entry in fs::read_dir(deploy("samples/recipes")).unwrap() {
        let path = entry.unwrap().path();
        let source = format!("dir:{}", path.display());
        let args = [
            "check",
            "--cluster",
            &source,
            "--from",
            "192.0.2.1",
            "--to",
            "192.0.2.2",
        ];
        said(Command::new(PORTREEVE).args(args).args(["--port", "80"]));
        found += 1;
    }
    assert!(found > 4, "found only {found}");
}
