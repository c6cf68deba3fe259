//! Paged lists and a compacted etcd, which only a real server has.
use lab::wait_until;
use serde_json::{Value, json};
use testbed::runner::Test;

use crate::away::{is_kept_from, reaches};
use crate::daemons::{Daemons, PATIENCE};
use testbed::{ask, deny_ingress, in_force, metric};

pub(crate) const TESTS: &[Test] = &testbed::tests![paged_state_is_relisted_after_etcd_compaction];

/// A page has 500 objects.
const MANY: usize = 1100;
const POLICIES: &str = "/apis/networking.k8s.io/v1/namespaces/many/networkpolicies";
/// No streamed lists, and watches that are etcd's own: what it has compacted is gone for them too.
const PLAIN: &[&str] = &["--feature-gates=WatchList=false", "--watch-cache=false"];

fn paged_state_is_relisted_after_etcd_compaction() {
    let namespace =
        json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "many" } });
    let mut daemons = Daemons::prepared(&[namespace.clone(), deny_ingress("b")]);
    let many: Vec<Value> = (0..MANY).map(one_of_many).collect();
    daemons.control.create(&many).unwrap();
    daemons.control.stop_server();
    daemons.control.start_server_with(PLAIN).unwrap();
    daemons.bed.install(0, &[]);
    daemons.start(0);
    let node = daemons.bed.lab.node(0);
    let known = || {
        let policies = ask(&node, "/policies").unwrap().body;
        policies.matches("one-of-many-").count()
    };
    assert_eq!(known(), MANY);
    let pod = |name: &str| daemons.bed.lab.pod(name);
    let (a, b, d) = (pod("x/a"), pod("x/b"), pod("x/d"));
    is_kept_from(&a, &b);
    // Without a daemon too, from one list.
    let mut check = node.command(env!("CARGO_BIN_EXE_portreeve"));
    check.env("KUBECONFIG", &daemons.kubeconfig);
    check.args(["check", "--from", "x/a", "--to", "x/b", "--port", "80"]);
    let answer = check.output().unwrap();
    assert_eq!(answer.status.code(), Some(1), "{answer:?}");

    // The daemon hears nothing of the end of its connections before it is back on the network.
    daemons.control.leave().unwrap();
    daemons.control.stop_server();
    daemons.control.start_server_with(PLAIN).unwrap();
    daemons.control.delete(&many[7]).unwrap();
    let mark = daemons.publish(&[namespace, deny_ingress("d")]);
    daemons.control.compact().unwrap();
    daemons.control.join(&daemons.bed.lab).unwrap();
    let expired = "portreeve_watch_errors_total{reason=\"expired\"}";
    wait_until(PATIENCE, "410", || metric(&node, expired) > 0).unwrap();
    wait_until(PATIENCE, "the new state", || in_force(&node, &mark)).unwrap();
    daemons.says(0, 200, &["ready"]);
    assert_eq!(known(), MANY - 1);
    reaches(&a, &b);
    is_kept_from(&a, &d);

    daemons.control.request("DELETE", POLICIES, None).unwrap();
    daemons.control.stop_server();
    daemons.control.start_server().unwrap();
}

/// A policy that selects nothing.
fn one_of_many(number: usize) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": { "namespace": "many", "name": format!("one-of-many-{number}") },
        "spec": { "podSelector": { "matchLabels": { "no": "pod" } } },
    })
}
