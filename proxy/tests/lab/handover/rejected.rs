//! Handovers that do not come about, or only in part.
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::{Duration, Instant};

use lab::wait_until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use socket2::{Domain, SockAddr, Socket, Type};
use testbed::runner::Test;
use testbed::{DEADLINE, ask, connected, echoes, greeted};

use super::{asking, bed, end_of, flags, heard, relieve, terms_of};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    suspended_daemon_times_out_and_keeps_the_node,
    daemons_with_different_formats_hand_over_no_connections,
    forbidden_handover_is_rejected_and_disturbs_nothing,
];

/// How long a new daemon waits for the old one, including its start.
const PATIENCE: Duration = Duration::from_secs(6);

fn suspended_daemon_times_out_and_keeps_the_node() {
    let (mut bed, _) = bed();
    let [a, b] = ["x/a", "x/b"].map(|name| bed.lab.pod(name));
    let live = connected(&a, b.addr_v4(80));
    let old = Pid::from_raw(bed.daemon(0).child.id().try_into().unwrap());
    let flags = flags(&bed);
    let second = bed.run_command(0, &flags.each_ref().map(String::as_str));
    kill(old, Signal::SIGSTOP).unwrap();
    let began = Instant::now();
    let said = second.output().unwrap();
    let took = began.elapsed();
    kill(old, Signal::SIGCONT).unwrap();
    let log = String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).into_owned();
    assert_eq!(said.status.code(), Some(1), "{log}");
    for part in ["did not answer in time", "127.0.0.1:15020", "in use"] {
        assert!(log.contains(part), "{part:?} is not in {log}");
    }
    assert!(took < PATIENCE, "{took:?}");
    // The daemon that asked is gone when the answer comes.
    echoes(&live, "goes on");
    greeted(&a, b.addr_v6(80));
    let log = relieve(&mut bed).log();
    assert!(log.contains("handover complete"), "{log}");
    echoes(&live, "taken over after all");
}

fn daemons_with_different_formats_hand_over_no_connections() {
    let (mut bed, _) = bed();
    let [a, b] = ["x/a", "x/b"].map(|name| bed.lab.pod(name));
    let live = connected(&a, b.addr_v4(80));
    let node = bed.lab.node(0);
    let mut asked = terms_of(&node);
    asked["format"] = 999.into();
    let line = asking(&bed, &asked);
    assert_eq!(heard(&line)["format"], 4);
    assert_eq!(end_of(&live), ErrorKind::ConnectionReset);
    assert!(heard(&line).is_null(), "it leaves without a word");
    let daemon = bed.daemon(0);
    assert!(daemon.child.try_wait().unwrap().is_none(), "it rests");
    let said = || daemon.log().contains("another format");
    wait_until(DEADLINE, "the old daemon to say why", said).unwrap();
    assert!(ask(&node, "/livez").is_none(), "the admin port is free");

    // And the other way round.
    let place = bed.file("handover.sock");
    fs::remove_file(&place).unwrap();
    let listener = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
    listener.bind(&SockAddr::unix(&place).unwrap()).unwrap();
    listener.listen(8).unwrap();
    let other = thread::spawn(move || {
        // The first only looks whether somebody is there.
        let mut lines = std::iter::repeat_with(|| listener.accept().unwrap().0);
        let line = lines.find(|line| !heard(line).is_null()).unwrap();
        line.send(br#"{"format":999}"#).unwrap();
    });
    relieve(&mut bed);
    other.join().unwrap();
    let log = bed.daemon(0).log();
    assert!(log.contains("another format"), "{log}");
    greeted(&a, b.addr_v4(80));
}

fn forbidden_handover_is_rejected_and_disturbs_nothing() {
    let (mut bed, _) = bed();
    let [a, b] = ["x/a", "x/b"].map(|name| bed.lab.pod(name));
    let live = connected(&a, b.addr_v4(80));
    let elsewhere = terms_of(&bed.lab.node(1));
    let said = heard(&asking(&bed, &elsewhere));
    let reason = said["refused"].as_str().unwrap();
    assert!(reason.contains("another network namespace"), "{said}");
    assert!(heard(&asking(&bed, &json!("nonsense"))).is_null());
    let mode = fs::metadata(bed.file("handover.sock")).unwrap().mode();
    assert_eq!(mode & 0o777, 0o600);
    echoes(&live, "goes on");
    assert!(bed.daemon(0).child.try_wait().unwrap().is_none());
}
