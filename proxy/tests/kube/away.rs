//! The API server is unreachable, denies access, is compacted or comes back: what stays applied, and what is logged.
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::process::Command;

use lab::{Host, PodSpec, wait_until};
use serde_json::{Value, json};
use testbed::runner::Test;

use crate::daemons::{Daemons, PATIENCE};
use testbed::account::NAMESPACE;
use testbed::{
    DEADLINE, SOON, allow_ingress, ask, connected, deny_ingress, echoes, greeted, metric, policy,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    last_state_stays_in_force_during_api_outage,
    restart_without_api_server_uses_the_snapshot,
    first_start_without_api_server_permits_nothing,
    deletions_during_api_server_restart_are_found,
    missing_permission_is_named_until_granted,
    replaced_credentials_and_ca_are_used_on_retry,
    watch_metrics_match_their_documentation,
    missing_node_object_is_named_until_created,
    policy_on_host_network_pod_gets_one_event,
];

#[track_caller]
pub(crate) fn reaches(from: &Host, to: &Host) {
    greeted(from, to.addr_v4(80));
}

#[track_caller]
pub(crate) fn is_kept_from(from: &Host, to: &Host) {
    let outcome = from.connect(to.addr_v4(80), SOON).unwrap();
    assert!(!outcome.is_connected(), "{outcome}");
}

fn last_state_stays_in_force_during_api_outage() {
    let mut daemons = Daemons::enforced(&[deny_ingress("b"), allow_ingress("c")]);
    let pod = |daemons: &Daemons, name: &str| daemons.bed.lab.pod(name);
    let (a, b, c, d) = (
        pod(&daemons, "x/a"),
        pod(&daemons, "x/b"),
        pod(&daemons, "x/c"),
        pod(&daemons, "x/d"),
    );
    let live = connected(&a, c.addr_v4(80));
    is_kept_from(&a, &b);
    daemons.control.stop_server();
    daemons.says(
        0,
        200,
        &["the API server is away since 20", "cannot be reached"],
    );
    let node = daemons.bed.lab.node(0);
    assert_eq!(metric(&node, "portreeve_ready"), 1);
    assert_eq!(metric(&node, "portreeve_watch_connected"), 0);
    echoes(&live, "goes on");
    is_kept_from(&a, &b);
    reaches(&a, &c);
    reaches(&a, &d);
    let e = daemons
        .bed
        .lab
        .add_pod(PodSpec::new("x", "e").node(0))
        .unwrap();
    is_kept_from(&e, &d);

    daemons.control.start_server().unwrap();
    daemons.apply(&[deny_ingress("c")]);
    daemons.says(0, 200, &["ready"]);
    reaches(&e, &d);
    reaches(&a, &b);
    is_kept_from(&a, &c);
    assert_eq!(metric(&node, "portreeve_watch_connected"), 4);
}

fn restart_without_api_server_uses_the_snapshot() {
    let mut daemons = Daemons::enforced(&[deny_ingress("b"), allow_ingress("d")]);
    let file = daemons.state(0);
    let kept = || fs::read_to_string(&file).is_ok_and(|text| text.contains("deny-ingress-b"));
    wait_until(PATIENCE, "the state to be kept", kept).unwrap();
    daemons.control.leave().unwrap();
    daemons.bed.kill(0);
    daemons.start(0);
    daemons.says(
        0,
        200,
        &["the API server is away", "one kept on disk, of 20"],
    );
    let lab = &daemons.bed.lab;
    let (a, b, d) = (lab.pod("x/a"), lab.pod("x/b"), lab.pod("x/d"));
    is_kept_from(&a, &b);
    reaches(&a, &d);
    assert_eq!(metric(&lab.node(0), "portreeve_state_from_snapshot"), 1);

    daemons.control.join(lab).unwrap();
    daemons.apply(&[deny_ingress("d")]);
    reaches(&a, &b);
    is_kept_from(&a, &d);
    assert_eq!(metric(&lab.node(0), "portreeve_state_from_snapshot"), 0);
}

fn first_start_without_api_server_permits_nothing() {
    let daemons = Daemons::prepared(&[]);
    daemons.bed.install(0, &[]);
    let state = daemons.state(0);
    fs::create_dir(state.parent().unwrap()).unwrap();
    fs::write(&state, "# portreeve {\"version\":1}\nnot ours").unwrap();
    daemons.control.leave().unwrap();
    // The kernel does not know this node's pods yet.
    let waiting = daemons.start_waiting_with(
        0,
        &["--pod-cidr", "10.244.0.0/24"],
        &["the first state is not in force", "the API server is away"],
    );
    let lab = &daemons.bed.lab;
    let (a, b) = (lab.pod("x/a"), lab.pod("x/b"));
    let log = || fs::read_to_string(&waiting.log).unwrap();
    wait_until(DEADLINE, "the reason", || log().contains("it is damaged")).unwrap();
    // No policy is known, and so no pod is known to be without one.
    is_kept_from(&a, &b);
    daemons.control.join(lab).unwrap();
    daemons.says(0, 200, &["ready"]);
    reaches(&a, &b);
}

fn deletions_during_api_server_restart_are_found() {
    let mut daemons = Daemons::enforced(&[deny_ingress("b"), allow_ingress("d")]);
    let node = daemons.bed.lab.node(0);
    let d = daemons.bed.lab.pod("x/d").ipv4();
    let address = format!("{d}");
    daemons.control.leave().unwrap();
    daemons.bed.lab.remove_pod("x/d").unwrap();
    daemons.publish(&[deny_ingress("b")]);
    // The server's memory starts again, after what the daemons have seen.
    daemons.control.stop_server();
    daemons.control.start_server().unwrap();
    daemons.control.join(&daemons.bed.lab).unwrap();
    daemons.apply(&[deny_ingress("d")]);
    let (a, b) = (daemons.bed.lab.pod("x/a"), daemons.bed.lab.pod("x/b"));
    reaches(&a, &b);
    let mut nft = node.command("nft");
    nft.args(["list", "table", "inet", "portreeve"]);
    let sets = String::from_utf8(nft.output().unwrap().stdout).unwrap();
    assert!(
        !sets.contains(&address),
        "{address} of a pod that is gone\n{sets}"
    );
    let expired = metric(&node, "portreeve_watch_errors_total{reason=\"expired\"}");
    let lists = metric(&node, "portreeve_watch_lists_total");
    assert!(
        expired > 0 && lists > 4,
        "{expired} times 410, {lists} lists"
    );
}

fn missing_permission_is_named_until_granted() {
    let mut daemons = Daemons::prepared(&[deny_ingress("b")]);
    daemons.bed.install(0, &[]);
    // `watch` is all that is needed where the server streams lists.
    let rights = |resources: &[&str]| {
        let role = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": "portreeve"},
            "rules": [
                {"apiGroups": [""], "resources": ["pods", "namespaces", "nodes"], "verbs": ["watch"]},
                {"apiGroups": ["networking.k8s.io"], "resources": resources, "verbs": ["watch"]},
            ]
        });
        role.to_string()
    };
    let apply = |daemons: &Daemons, role: &str| {
        daemons
            .control
            .kubectl(&["-n", NAMESPACE, "apply", "-f", "-"], role)
            .unwrap();
    };
    apply(&daemons, &rights(&["ingresses"]));
    {
        let words = [
            "not permitted to watch networkpolicies",
            "{apiGroups: [\"networking.k8s.io\"], resources: [\"networkpolicies\"], verbs: [\"watch\"]}",
        ];
        let _waiting = daemons.start_waiting(0, &words);
        apply(&daemons, &rights(&["networkpolicies"]));
        daemons.says(0, 200, &["ready"]);
    }
    daemons.start(0);
    let lab = &daemons.bed.lab;
    is_kept_from(&lab.pod("x/a"), &lab.pod("x/b"));
}

fn replaced_credentials_and_ca_are_used_on_retry() {
    let daemons = Daemons::prepared(&[]);
    daemons.bed.install(0, &[]);
    let good = fs::read_to_string(&daemons.kubeconfig).unwrap();
    let (before, rest) = good.split_once("token: \"").unwrap();
    let (_, after) = rest.split_once('"').unwrap();
    let expired = format!("{before}token: \"not a token\"{after}");
    let foreign = good.replace("certificate-authority:", "extensions: [] #");
    fs::write(&daemons.kubeconfig, foreign).unwrap();
    let words = ["no TLS with the API server", "check that the CA"];
    let _waiting = daemons.start_waiting(0, &words);
    fs::write(&daemons.kubeconfig, expired).unwrap();
    daemons.says(0, 503, &["does not accept our credentials (401"]);
    fs::write(&daemons.kubeconfig, good).unwrap();
    daemons.says(0, 200, &["ready"]);
}

fn watch_metrics_match_their_documentation() {
    let daemons = Daemons::enforced(&[]);
    let text = ask(&daemons.bed.lab.node(0), "/metrics").unwrap().body;
    let exposed: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .filter(|name| name.starts_with("portreeve_watch_"))
        .collect();
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
    let page = fs::read_to_string(page).unwrap();
    let documented: BTreeSet<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .filter(|name| name.starts_with("portreeve_watch_"))
        .collect();
    assert_eq!(exposed, documented);
    let kept = daemons.bed.file("metrics");
    fs::write(&kept, &text).unwrap();
    let promtool = concat!(env!("CARGO_MANIFEST_DIR"), "/../lab/tools/promtool");
    let mut promtool = Command::new(promtool);
    promtool.args(["check", "metrics"]);
    let said = promtool.stdin(File::open(kept).unwrap()).output().unwrap();
    assert!(said.status.success() && said.stderr.is_empty(), "{said:?}");
}

fn missing_node_object_is_named_until_created() {
    let daemons = Daemons::prepared(&[]);
    daemons.bed.install(0, &[]);
    let path = "/api/v1/nodes/node-0";
    let mut node = daemons.control.request("GET", path, None).unwrap();
    daemons.control.request("DELETE", path, None).unwrap();
    let words = ["no Node object of that name", "--node", "--pod-cidr"];
    let _waiting = daemons.start_waiting(0, &words);
    node["metadata"] = json!({"name": "node-0"});
    daemons
        .control
        .request("POST", "/api/v1/nodes", Some(&node))
        .unwrap();
    daemons.says(0, 200, &["ready"]);
}

fn policy_on_host_network_pod_gets_one_event() {
    let on_host = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": "x", "name": "host", "labels": {"on": "host"}},
        "spec": {
            "nodeName": "node-0", "hostNetwork": true,
            "containers": [{"name": "c", "image": "none"}]
        },
        "status": {"phase": "Running"}
    });
    let selecting = policy(
        "host",
        &json!({"podSelector": {"matchLabels": {"on": "host"}}}),
    );
    let daemons = Daemons::enforced(&[on_host, selecting]);
    let events = || {
        let path = "/apis/events.k8s.io/v1/namespaces/x/events";
        let list = daemons.control.request("GET", path, None).unwrap();
        let events: Vec<Value> = list["items"].as_array().unwrap().clone();
        events
            .into_iter()
            .filter(|it| it["reportingController"] == "portreeve")
            .collect::<Vec<_>>()
    };
    wait_until(DEADLINE, "an Event", || !events().is_empty()).unwrap();
    // Both daemons have it in force, and tell before they say that they have the next.
    daemons.apply(&[deny_ingress("b")]);
    let events = events();
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(events[0]["regarding"]["name"], "host");
    assert_eq!(events[0]["reason"], "NotInFullEffect");
    assert!(
        events[0]["note"].as_str().unwrap().contains("hostNetwork"),
        "{events:?}"
    );
}
