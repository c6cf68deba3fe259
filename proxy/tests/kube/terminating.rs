//! A pod that `kubectl delete` ends, with the grace period that the API server gives it. The lab is its
//! kubelet: the pod runs on until the lab says that it is gone.
use lab::wait_until;
use serde_json::{Value, json};
use testbed::runner::Test;

use crate::daemons::Daemons;
use testbed::terminating::{self, Live};
use testbed::{DEADLINE, ask, policy};

pub(crate) const TESTS: &[Test] = &testbed::tests![deleted_pod_keeps_access_until_kubelet_ends_it];

/// Allows a one more port, but only by a label that it is given after its deletion.
fn labelled() -> Value {
    let spec = json!({
        "podSelector": { "matchLabels": { "labelled": "yes" } },
        "policyTypes": ["Egress"],
        "egress": [{ "ports": [{ "port": 9 }] }],
    });
    policy("labelled", &spec)
}

fn deleted_pod_keeps_access_until_kubelet_ends_it() {
    let policies = [&terminating::policies()[..], &[labelled()]].concat();
    let daemons = Daemons::enforced_on(terminating::bed(), &policies);
    daemons.apply(&policies);
    let (bed, control) = (&daemons.bed, &daemons.control);
    let kubectl = |args: &[&str]| control.kubectl(&[&["-n", "x"], args].concat(), "").unwrap();
    let live = Live::open(bed);
    kubectl(&["delete", "pod", "a", "--grace-period=600", "--wait=false"]);
    let deleted = kubectl(&[
        "get",
        "pod",
        "a",
        "-o",
        "jsonpath={.metadata.deletionTimestamp}",
    ]);
    assert!(!deleted.is_empty(), "it is terminating");
    // A daemon that has this change of the pod has the one before.
    kubectl(&["label", "pod", "a", "labelled=yes"]);
    for node in bed.lab.nodes() {
        let knows = || {
            let question = "/explain?from=x/a&to=x/b&port=9&protocol=TCP";
            ask(&node, question)
                .is_some_and(|it| it.status == 200 && it.json()["verdict"] == "allow")
        };
        wait_until(DEADLINE, format!("the label on {}", node.name()), knows).unwrap();
    }
    live.goes_on();
    terminating::new_connections_have_their_rights(bed, "terminating");
    live.goes_on();
    kubectl(&["delete", "pod", "a", "--grace-period=0", "--force"]);
    live.gets_cut();
    terminating::it_is_gone(bed);
}
