//! The file of records on a disk that gets full and has free space again.
use std::fs;
use std::io::Write;
use std::path::Path;

use lab::{Cluster, PodSpec, wait_until};
use serde_json::Value;
use testbed::runner::Test;

use crate::PORTREEVE;
use testbed::{DEADLINE, SOON, TestCluster, ask, deny_ingress};

pub(crate) const TESTS: &[Test] = &testbed::tests![records_resume_after_a_full_disk];

fn records_resume_after_a_full_disk() {
    let pod = |name: &str| PodSpec::new("x", name).label("pod", name).port("http", 80);
    let mut bed = TestCluster::bare(Cluster::builder().nodes(1).pods(["a", "b"].map(pod)));
    bed.write_policies(&[deny_ingress("b")]);
    bed.install(0, &[]);
    let disk = bed.file("disk");
    fs::create_dir(&disk).unwrap();
    let node = bed.lab.node(0);
    let mut command = node.command("unshare");
    let script = format!(
        "mount -t tmpfs -o size=64k tmpfs {0}; exec {PORTREEVE} run --node {1} --cluster dir:{2} --trace-file {0}/records",
        disk.display(),
        node.name(),
        bed.manifests().display(),
    );
    command.args(["--mount", "sh", "-ec", &script]);
    bed.start_command(0, command);
    let root = format!("/proc/{}/root", bed.daemon(0).child.id());
    let disk = Path::new(&root).join(disk.strip_prefix("/").unwrap());
    let [a, b] = ["x/a", "x/b"].map(|name| bed.lab.pod(name));
    let deny_some = || {
        let targets = vec![b.addr_v4(80); 20];
        for outcome in a.connect_all(&targets, SOON / 3).unwrap() {
            assert!(!outcome.is_connected());
        }
    };
    let records = || -> Vec<Value> {
        let text = fs::read_to_string(disk.join("records")).unwrap();
        assert!(
            text.is_empty() || text.ends_with('\n'),
            "a torn line:\n{text}"
        );
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    deny_some();
    wait_until(DEADLINE, "records", || records().len() >= 20).unwrap();

    let mut filler = fs::File::create(disk.join("filler")).unwrap();
    while filler.write(&[0; 4096]).is_ok() {}
    deny_some();
    let readyz = || ask(&node, "/readyz").unwrap();
    wait_until(DEADLINE, "a note", || {
        readyz().body.contains("records cannot be written")
    })
    .unwrap();
    assert_eq!(readyz().status, 200, "records are no policy");
    assert!(records().len() < 40);

    drop(filler);
    fs::remove_file(disk.join("filler")).unwrap();
    wait_until(DEADLINE, "what waited", || records().len() >= 40).unwrap();
    wait_until(DEADLINE, "no note", || readyz().body == "ready\n").unwrap();
    deny_some();
    wait_until(DEADLINE, "new records", || records().len() >= 60).unwrap();
}
