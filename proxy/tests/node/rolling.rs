//! The DaemonSet is rolled to another template while streams flow: none ends or loses a byte, and nothing denied gets
//! through.
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use lab::{Host, wait_until};
use serde_json::{Value, json};
use testbed::runner::Test;
use testbed::streams::{StopOnDrop, dial_denied, receive_all, send_until};

use crate::enforcement::policed;
use crate::room::{NAMESPACE, PATIENCE, Room, room};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    streams_survive_a_daemonset_rollout_unchanged,
    failed_and_undone_rollout_ends_no_stream,
];

const PORT: u16 = 9000;

fn streams_survive_a_daemonset_rollout_unchanged() {
    let room = room();
    let (web, friend, stranger) = policed(&room, "rolled");
    let streams = Streams::new(&friend, &web);
    let old = room.daemon();
    // To other rules and back, which the init step puts in place while the old daemon enforces.
    let open = json!({ "name": "PORTREEVE_FAIL", "value": "open" });
    let [first, daemon] = ["/initContainers/0/env", "/containers/0/env/-"];
    streams.go_on_while(&stranger, &web, || {
        change(
            &room,
            &[("add", first, json!([open])), ("add", daemon, open)],
        );
        room.rolled_out();
        took_over(&room, &old);
        let open = room.daemon();
        undo(&room);
        took_over(&room, &open);
    });
}

fn failed_and_undone_rollout_ends_no_stream() {
    let room = room();
    let (web, friend, stranger) = policed(&room, "undone");
    let streams = Streams::new(&friend, &web);
    let old = room.daemon();
    streams.go_on_while(&stranger, &web, || {
        let command = json!(["portreeve", "run", "--no-such-flag"]);
        change(&room, &[("replace", "/containers/0/command", command)]);
        wait_until(PATIENCE, "the new pod to fail", || {
            room.pods(NAMESPACE).iter().any(|pod| restarts(pod) > 0)
        })
        .unwrap_or_else(|error| panic!("{error}\n{}", room.diagnostics()));
        undo(&room);
        assert_eq!(uid(&room.daemon()), uid(&old));
    });
}

/// The daemon of the one pod that is left took connections over from `old`, and neither was started twice.
fn took_over(room: &Room, old: &Value) {
    alone(room);
    let new = room.daemon();
    assert_ne!(uid(&new), uid(old));
    assert_eq!(restarts(&new), 0, "{new}");
    let name = new["metadata"]["name"].as_str().unwrap();
    let log = room.kubectl(&["-n", NAMESPACE, "logs", name, "-c", "portreeve"]);
    let line = log.lines().find(|line| line.contains("took over"));
    let line = line.unwrap_or_else(|| panic!("{log}"));
    println!("{line}");
    assert!(!line.contains("connections=0"), "{log}");
}

/// Changes the pod template of the DaemonSet.
fn change(room: &Room, changes: &[(&str, &str, Value)]) {
    let patch = |(op, path, value): &(&str, &str, Value)| json!({ "op": op, "path": format!("/spec/template/spec{path}"), "value": value });
    let patch: Value = changes.iter().map(patch).collect();
    let patch = patch.to_string();
    let what = ["-n", NAMESPACE, "patch", "daemonset/portreeve"];
    room.kubectl(&[&what[..], &["--type=json", "-p", &patch]].concat());
}

/// Goes back to the template before, and waits until that is so.
fn undo(room: &Room) {
    room.kubectl(&["-n", NAMESPACE, "rollout", "undo", "daemonset/portreeve"]);
    room.rolled_out();
    alone(room);
}

/// Waits until the DaemonSet has one pod.
fn alone(room: &Room) {
    let one = || room.pods(NAMESPACE).len() == 1;
    let waited = wait_until(PATIENCE, "one of the pods to go", one);
    waited.unwrap_or_else(|error| panic!("{error}\n{}", room.diagnostics()));
}

fn uid(pod: &Value) -> &Value {
    &pod["metadata"]["uid"]
}

fn restarts(pod: &Value) -> u64 {
    pod["status"]["containerStatuses"][0]["restartCount"]
        .as_u64()
        .unwrap_or(0)
}

/// Relayed streams, each by its two ends.
struct Streams {
    talking: Vec<[TcpStream; 2]>,
    bulk: Vec<[TcpStream; 2]>,
}

impl Streams {
    /// Some of each kind in each family.
    fn new(from: &Host, to: &Host) -> Self {
        let many = || {
            let addresses = to.addrs(PORT).into_iter().cycle();
            addresses.take(4).map(|at| stream(from, to, at)).collect()
        };
        Self {
            talking: many(),
            bulk: many(),
        }
    }

    /// Uses them all the time while `act` runs, and lets `stranger` try what is denied.
    fn go_on_while(&self, stranger: &Host, web: &Host, act: impl FnOnce()) {
        let stop = &AtomicBool::new(false);
        thread::scope(|scope| {
            let talking = self
                .talking
                .iter()
                .map(|ends| scope.spawn(|| talk(ends, stop)));
            let talking: Vec<_> = talking.collect();
            let pouring = self.bulk.iter().map(|[client, server]| {
                let sent = [client, server].map(|end| {
                    scope.spawn(|| send_until(end, stop, 64 << 10, Duration::from_millis(50)))
                });
                let seen = [server, client].map(|end| scope.spawn(|| receive_all(end)));
                (sent, seen)
            });
            let pouring: Vec<_> = pouring.collect();
            let denied = scope.spawn(|| {
                dial_denied(stranger, web.addr_v4(PORT), Duration::from_millis(50), stop)
            });
            {
                let _stopped = StopOnDrop(stop);
                act();
            }
            let words: Vec<_> = talking.into_iter().map(|it| it.join().unwrap()).collect();
            assert!(words.iter().all(|words| *words > 10), "{words:?}");
            for (sent, seen) in pouring {
                let sent = sent.map(|it| it.join().unwrap());
                assert_eq!(seen.map(|it| it.join().unwrap()), sent);
            }
            assert!(denied.join().unwrap() > 0);
        });
    }
}

/// Both ends of a new connection.
fn stream(from: &Host, to: &Host, at: SocketAddr) -> [TcpStream; 2] {
    let listener = to.run(|| TcpListener::bind(at)).unwrap().unwrap();
    let client = from.connect(at, PATIENCE).unwrap().into_stream().unwrap();
    let server = listener.accept().unwrap().0;
    for end in [&client, &server] {
        end.set_read_timeout(Some(PATIENCE)).unwrap();
        end.set_write_timeout(Some(PATIENCE)).unwrap();
    }
    [client, server]
}

/// A number there and the next one back, until asked to stop. Returns how many.
fn talk([client, server]: &[TcpStream; 2], stop: &AtomicBool) -> u64 {
    let mut number = 0u64;
    while !stop.load(Ordering::Relaxed) {
        for (mut from, mut to) in [(client, server), (server, client)] {
            number += 1;
            from.write_all(&number.to_be_bytes()).unwrap();
            let mut heard = [0; 8];
            to.read_exact(&mut heard).unwrap();
            assert_eq!(u64::from_be_bytes(heard), number);
        }
        thread::sleep(Duration::from_millis(2));
    }
    number
}
