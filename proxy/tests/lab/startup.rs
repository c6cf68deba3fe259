//! Causes that keep a daemon from starting: each is reported with its remedy, and the exit code shows
//! whether the arguments or the node were wrong.
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use lab::{Command, wait_until};
use serde_json::json;
use testbed::runner::Test;

use crate::PORTREEVE;
use testbed::{
    DEADLINE, TestCluster, allow_all, ask, connected, deny_ingress, echoes, init, policy, small,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    daemon_reports_missing_install,
    daemon_reports_flags_that_differ_from_install,
    daemon_reports_missing_privilege,
    second_daemon_fails_to_start_and_disturbs_nothing,
    a_port_in_use_is_named,
    wrong_flags_and_manifests_are_usage_errors,
    daemon_ignores_empty_environment_variables,
    a_node_without_pod_addresses_is_named,
    unusable_source_fails_the_start,
    unopenable_trace_file_is_named,
    ipvs_started_beside_the_daemon_is_reported,
];

/// Expects a failure with this exit code and all of these texts.
fn refused(command: Command, code: i32, parts: &[&str]) {
    let output: Output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{said}");
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
}

fn daemon_reports_missing_install() {
    let bed = TestCluster::bare(small());
    refused(
        bed.run_command(0, &[]),
        1,
        &["inet portreeve", "iptables-init install"],
    );
}

fn daemon_reports_flags_that_differ_from_install() {
    let bed = TestCluster::bare(small());
    bed.install(0, &["--proxy-port", "7000"]);
    refused(
        bed.run_command(0, &[]),
        1,
        &["other flags", "iptables-init install"],
    );
}

fn daemon_reports_missing_privilege() {
    let bed = TestCluster::bare(small());
    bed.install(0, &[]);
    let node = bed.lab.node(0);
    let mut command = node.command("setpriv");
    command.args([
        "--bounding-set=-all",
        "--inh-caps=-all",
        "--",
        PORTREEVE,
        "run",
        "--node",
        node.name(),
    ]);
    command.args(["--cluster", &format!("dir:{}", bed.manifests().display())]);
    refused(command, 1, &["CAP_NET_ADMIN"]);
}

fn second_daemon_fails_to_start_and_disturbs_nothing() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b"));
    let live = connected(&a, b.addr_v4(80));
    let second = bed.run_command(0, &["--admin", "127.0.0.1:15021"]);
    refused(second, 1, &["NFQUEUE 100", "another daemon", "--queue"]);
    echoes(&live, "undisturbed");
    connected(&a, b.addr_v6(80));
    refused(bed.run_command(1, &[]), 1, &["127.0.0.1:15020", "in use"]);
}

fn a_port_in_use_is_named() {
    let bed = TestCluster::bare(small());
    bed.install(0, &[]);
    let node = bed.lab.node(0);
    let occupy = |port: u16| {
        node.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap())
            .unwrap()
    };
    {
        let _admin = occupy(15020);
        refused(
            bed.run_command(0, &[]),
            1,
            &["127.0.0.1:15020", "in use", "--admin"],
        );
    }
    let _proxy = occupy(15001);
    refused(
        bed.run_command(0, &[]),
        1,
        &["15001", "in use", "--proxy-port"],
    );
}

fn wrong_flags_and_manifests_are_usage_errors() {
    let bed = TestCluster::bare(small());
    bed.install(0, &[]);
    let cluster = |path: &Path| format!("dir:{}", path.display());
    refused(bed.run_command(0, &["--frobnicate"]), 2, &["--frobnicate"]);
    refused(
        bed.run_command(0, &["--deny", "perhaps"]),
        2,
        &["--deny", "drop", "reject"],
    );
    for (flag, value, remedy) in [
        ("--hold", "soon", "--hold"),
        ("--pod-cidr", "10.0.0.0/40", "10.244.0.0/24"),
        ("--cluster-cidr", "pods", "10.244.0.0/24"),
        ("--admin", "localhost:1", "127.0.0.1:15020"),
        ("--otlp-endpoint", "jaeger:4317", "https://HOST:PORT"),
        ("--otlp-endpoint", "http://j:4317:x", "cannot be read"),
    ] {
        refused(
            bed.run_command(0, &[flag, value]),
            2,
            &[flag, value, remedy],
        );
    }
    refused(
        bed.run_command(0, &["--cluster", &cluster(&bed.file("nowhere"))]),
        2,
        &["nowhere"],
    );

    let mut wrong = policy(
        "wrong",
        &json!({ "podSelector": {}, "policyTypes": ["Ingress"] }),
    );
    for (ingress, parts) in [
        (
            json!([{ "from": [{ "ipBlock": { "cidr": "10.0.0.0/40" } }] }]),
            ["ingress[0].from[0].ipBlock.cidr", "10.0.0.0/40"],
        ),
        (
            json!([{ "from": [{ "ipBlock": { "cidr": "10.0.0.0/8", "except": ["11.0.0.0/8"] } }] }]),
            ["except", "11.0.0.0/8"],
        ),
        (
            json!([{ "ports": [{ "port": 80, "endPort": 79 }] }]),
            ["endPort", "79"],
        ),
        (
            json!([{ "ports": [{ "port": "http", "endPort": 80 }] }]),
            ["endPort", "ports[0]"],
        ),
        (
            json!([{ "ports": [{ "port": 80, "protocol": "ICMP" }] }]),
            ["protocol", "ICMP"],
        ),
    ] {
        wrong["spec"]["ingress"] = ingress;
        bed.write("wrong.json", &wrong);
        refused(
            bed.run_command(0, &[]),
            2,
            &[&["wrong.json", "x/wrong"][..], &parts[..]].concat(),
        );
    }
    fs::write(
        bed.manifests().join("wrong.json"),
        b"\x7fELF\x01\x02\0\xff\xfe",
    )
    .unwrap();
    refused(bed.run_command(0, &[]), 2, &["wrong.json"]);
}

fn daemon_ignores_empty_environment_variables() {
    let mut bed = TestCluster::bare(small());
    bed.install(0, &[]);
    let mut help = bed.lab.node(0).command(PORTREEVE);
    help.args(["run", "--help"]);
    let help = String::from_utf8(help.output().unwrap().stdout).unwrap();
    let mut command = bed.run_command(0, &[]);
    let names = help.split("[env: ").skip(1);
    let names: Vec<_> = names.filter_map(|rest| rest.split('=').next()).collect();
    assert!(names.len() > 20, "{names:?}");
    for name in names.into_iter().chain(["NODE_NAME"]) {
        command.env(name, "");
    }
    bed.start_command(0, command);
}

fn a_node_without_pod_addresses_is_named() {
    let bed = TestCluster::bare(small());
    bed.install(0, &[]);
    let node = bed.lab.node(0);
    let mut command = node.command(PORTREEVE);
    command.args([
        "run",
        "--node",
        "stranger",
        "--cluster",
        &format!("dir:{}", bed.manifests().display()),
    ]);
    refused(command, 1, &["stranger", "--node", "--pod-cidr"]);
}

fn unusable_source_fails_the_start() {
    let bed = TestCluster::bare(small());
    bed.install(0, &[]);
    let absent = bed.file("no-kubeconfig");
    let broken = bed.file("kubeconfig");
    fs::write(&broken, "clusters: [").unwrap();
    for (source, kubeconfig, words) in [
        (
            "kube",
            &absent,
            ["no usable client configuration", "no-kubeconfig"],
        ),
        (
            "kube",
            &broken,
            ["no usable client configuration", "kubeconfig"],
        ),
        (
            "file:x",
            &absent,
            ["\"file:x\" is not known", "--cluster dir:PATH"],
        ),
    ] {
        let mut command = bed.run_command(0, &["--cluster", source]);
        command.env("KUBECONFIG", kubeconfig);
        refused(command, 2, &words);
    }
}

fn unopenable_trace_file_is_named() {
    let bed = TestCluster::bare(small());
    bed.write_policies(&[deny_ingress("b")]);
    bed.install(0, &[]);
    let path = bed.file("no/such/directory");
    refused(
        bed.run_command(0, &["--trace-file", path.to_str().unwrap()]),
        1,
        &["no/such/directory", "must exist"],
    );
    // Nothing of it is left: the real one starts.
    assert!(init(&bed.lab.node(0), "check", &[]).status.success());
}

/// The kernel here has no IPVS: what kube-proxy makes for it is a link, of whatever kind.
fn ipvs_started_beside_the_daemon_is_reported() {
    let bed = TestCluster::enforced(&[], &[allow_all()]);
    let node = bed.lab.node(0);
    let readyz = || ask(&node, "/readyz").unwrap();
    for link in ["kube-ipvs0", "kube-dummy-if"] {
        assert_eq!(readyz().status, 200, "{}", readyz().body);
        node.ip(&format!("link add {link} type bridge\n")).unwrap();
        let since = Instant::now();
        wait_until(DEADLINE, "the node not to be ready", || {
            readyz().status == 503
        })
        .unwrap();
        assert!(since.elapsed() < Duration::from_secs(5));
        let answer = readyz().body;
        assert!(
            answer.contains(link) && answer.contains("kube-proxy --cleanup"),
            "{answer}"
        );
        node.ip(&format!("link del {link}\n")).unwrap();
        wait_until(DEADLINE, "the node to be ready", || readyz().status == 200).unwrap();
    }
}
