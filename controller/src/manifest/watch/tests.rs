//! Changes on disk and the resulting batches. Each test waits for a batch, none for a time to pass.
use std::fs::{File, OpenOptions, create_dir, remove_dir_all, remove_file, rename, write};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use tempfile::{TempDir, tempdir};
use tokio::time::timeout;

use super::*;
use crate::{Event, Object};

const DEADLINE: Duration = Duration::from_secs(20);

fn pod(name: &str, label: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, labels: {{v: {label}}}}}}}\n"
    )
}

fn shown(batch: &Batch) -> Vec<String> {
    let events = batch.events.iter().map(|event| match event {
        Event::Upsert(Object::Pod(pod)) => format!("+{} {}", pod.key.name, pod.labels["v"]),
        Event::Upsert(other) => format!("+{}", other.key()),
        Event::Delete(key) => format!("-{key}"),
    });
    events.collect()
}

/// A source over a directory whose `a.yaml` has pods p and q.
fn watched() -> (TempDir, ManifestSource) {
    let dir = tempdir().unwrap();
    write(
        dir.path().join("a.yaml"),
        pod("p", "one") + &pod("q", "one"),
    )
    .unwrap();
    let (source, batch) = ManifestSource::open(dir.path()).unwrap();
    assert_eq!(shown(&batch), ["+p one", "+q one"]);
    (dir, source)
}

async fn next(source: &mut ManifestSource) -> Batch {
    timeout(DEADLINE, source.next())
        .await
        .expect("no batch within 20 s")
}

/// Waits for the next batch with events; problems may come before it.
async fn next_events(source: &mut ManifestSource) -> Vec<String> {
    loop {
        let batch = next(source).await;
        if !batch.events.is_empty() {
            return shown(&batch);
        }
    }
}

#[tokio::test]
async fn every_kind_of_file_change_applies_promptly() {
    let (dir, mut source) = watched();
    let at = |name: &str| dir.path().join(name);
    let (p, q) = (|v: &str| pod("p", v), pod("q", "one"));

    type Change<'a> = (&'a str, Box<dyn Fn() + 'a>, &'a [&'a str]);
    let changes: [Change<'_>; 8] = [
        (
            "written in place",
            Box::new(|| write(at("a.yaml"), p("two") + &q).unwrap()),
            &["+p two"],
        ),
        (
            "renamed over",
            Box::new(|| {
                write(at(".a.yaml.tmp"), p("three") + &q).unwrap();
                rename(at(".a.yaml.tmp"), at("a.yaml")).unwrap();
            }),
            &["+p three"],
        ),
        (
            "renamed away and written again, as vim does",
            Box::new(|| {
                rename(at("a.yaml"), at("a.yaml~")).unwrap();
                write(at("a.yaml"), p("four") + &q).unwrap();
                remove_file(at("a.yaml~")).unwrap();
            }),
            &["+p four"],
        ),
        (
            "a new file",
            Box::new(|| write(at("b.yaml"), pod("r", "one")).unwrap()),
            &["+r one"],
        ),
        (
            "a new link to a file elsewhere",
            Box::new(|| {
                create_dir(at(".else")).unwrap();
                write(at(".else/c"), pod("s", "one")).unwrap();
                symlink(".else/c", at("c.yaml")).unwrap();
            }),
            &["+s one"],
        ),
        (
            "written behind a link",
            Box::new(|| write(at(".else/c"), pod("s", "two")).unwrap()),
            &["+s two"],
        ),
        (
            "a file deleted",
            Box::new(|| remove_file(at("b.yaml")).unwrap()),
            &["-Pod default/r"],
        ),
        (
            "a file renamed to no manifest",
            Box::new(|| rename(at("a.yaml"), at("a.old")).unwrap()),
            &["-Pod default/p", "-Pod default/q"],
        ),
    ];
    for (how, change, expected) in changes {
        let start = Instant::now();
        change();
        assert_eq!(shown(&next(&mut source).await), expected, "{how}");
        let took = start.elapsed();
        assert!(took < Duration::from_secs(1), "{how} took {took:?}");
    }
}

#[tokio::test]
async fn configmap_volume_update_is_followed() {
    let dir = tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    create_dir(at("..1")).unwrap();
    write(at("..1/a.yaml"), pod("p", "one")).unwrap();
    symlink("..1", at("..data")).unwrap();
    symlink("..data/a.yaml", at("a.yaml")).unwrap();
    for root in [dir.path().to_owned(), at("a.yaml")] {
        let (mut source, first) = ManifestSource::open(&root).unwrap();
        let [event] = &shown(&first)[..] else {
            panic!("{first:?}")
        };
        let (old, new) = if event == "+p one" {
            ("..1", "..2")
        } else {
            ("..2", "..3")
        };

        create_dir(at(new)).unwrap();
        write(at(new).join("a.yaml"), pod("p", &format!("in{new}"))).unwrap();
        symlink(new, at("..data_tmp")).unwrap();
        rename(at("..data_tmp"), at("..data")).unwrap();
        remove_dir_all(at(old)).unwrap();
        assert_eq!(
            next_events(&mut source).await,
            [format!("+p in{new}")],
            "{}",
            root.display()
        );
    }
}

#[tokio::test]
async fn file_being_written_keeps_state_until_closed() {
    for replace in [false, true] {
        let (dir, mut source) = watched();
        let path = dir.path().join("a.yaml");
        if replace {
            remove_file(&path).unwrap();
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        // It is reported, and nothing else happens, though it is empty and then complete YAML.
        let batch = next(&mut source).await;
        assert_eq!(
            (shown(&batch).len(), batch.problems.len()),
            (0, 1),
            "{:?}",
            batch.problems
        );
        assert!(
            batch.problems[0].problem.contains("still open for writing"),
            "{:?}",
            batch.problems
        );
        file.write_all(pod("p", "two").as_bytes()).unwrap();
        file.flush().unwrap();
        // Another file shows that the source has looked meanwhile.
        write(dir.path().join("b.yaml"), pod("r", "one")).unwrap();
        assert_eq!(next_events(&mut source).await, ["+r one"]);

        file.write_all(pod("q", "two").as_bytes()).unwrap();
        drop(file);
        let batch = next(&mut source).await;
        assert_eq!(shown(&batch), ["+p two", "+q two"]);
        assert_eq!(*batch.problems, []);
    }
}

#[tokio::test]
async fn unreadable_file_keeps_last_good_state_with_report() {
    let (dir, mut source) = watched();
    let path = dir.path().join("a.yaml");
    type Break<'a> = (&'a str, Box<dyn Fn() + 'a>, &'a str);
    let breaks: [Break<'_>; 4] = [
        (
            "half a file",
            Box::new(|| write(&path, "apiVersion: v1\nkind: [").unwrap()),
            "not YAML",
        ),
        (
            "not text",
            Box::new(|| write(&path, [0xff, 0xfe]).unwrap()),
            "not text",
        ),
        (
            "too large",
            Box::new(|| File::create(&path).unwrap().set_len(1 << 40).unwrap()),
            "MiB is more than",
        ),
        (
            "a link to nowhere",
            Box::new(|| {
                symlink("nowhere", dir.path().join(".link")).unwrap();
                rename(dir.path().join(".link"), &path).unwrap();
            }),
            "cannot be read",
        ),
    ];
    for (how, make, expected) in breaks {
        make();
        let batch = next(&mut source).await;
        assert_eq!(shown(&batch).len(), 0, "{how}");
        assert!(
            batch.problems[0].problem.contains(expected),
            "{how}: {:?}",
            batch.problems
        );
    }
    write(dir.path().join(".new"), pod("p", "one") + &pod("q", "two")).unwrap();
    rename(dir.path().join(".new"), &path).unwrap();
    let batch = next(&mut source).await;
    assert_eq!(
        (shown(&batch), batch.problems.len()),
        (vec!["+q two".to_owned()], 0)
    );
}

#[tokio::test]
async fn removed_directory_deletes_nothing_and_is_followed_again() {
    let dir = tempdir().unwrap();
    let root = dir.path().join("state");
    create_dir(&root).unwrap();
    write(root.join("a.yaml"), pod("p", "one")).unwrap();
    let (mut source, _) = ManifestSource::open(&root).unwrap();

    rename(&root, dir.path().join("away")).unwrap();
    let batch = next(&mut source).await;
    assert_eq!(shown(&batch).len(), 0);
    assert!(
        batch.problems[0].remedy.contains("last good state"),
        "{:?}",
        batch.problems
    );

    create_dir(dir.path().join("next")).unwrap();
    write(dir.path().join("next/a.yaml"), pod("p", "two")).unwrap();
    rename(dir.path().join("next"), &root).unwrap();
    assert_eq!(next_events(&mut source).await, ["+p two"]);
    write(root.join("a.yaml"), pod("p", "three")).unwrap();
    assert_eq!(next_events(&mut source).await, ["+p three"]);
}

#[tokio::test]
async fn constant_writes_to_one_file_delay_no_other() {
    let (dir, mut source) = watched();
    let busy = dir.path().join("busy.yaml");
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writer = thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            for round in 0_u64.. {
                write(&busy, pod("busy", &format!("v{round}"))).unwrap();
                if stop.load(std::sync::atomic::Ordering::Relaxed) {
                    return round;
                }
            }
            0
        }
    });
    let start = Instant::now();
    write(dir.path().join("b.yaml"), pod("r", "one")).unwrap();
    while !next_events(&mut source)
        .await
        .contains(&"+r one".to_owned())
    {}
    let took = start.elapsed();
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let last = format!("+busy v{}", writer.join().unwrap());
    assert!(took < Duration::from_secs(1), "took {took:?}");
    while !next_events(&mut source).await.contains(&last) {}
}

#[tokio::test]
async fn a_burst_becomes_few_batches() {
    let (dir, mut source) = watched();
    for index in 0..200 {
        write(
            dir.path().join(format!("f{index}.yaml")),
            pod(&format!("f{index}"), "one"),
        )
        .unwrap();
    }
    let (mut batches, mut events) = (0, 0);
    while events < 200 {
        events += next_events(&mut source).await.len();
        batches += 1;
    }
    assert!(batches <= 20, "{batches} batches");
}

/// A follower of a directory with pod p in `a.yaml` and a policy in `b.yaml`, and the time as it
/// has it so many milliseconds later.
fn followed() -> (TempDir, Follower, impl Fn(u64) -> Instant) {
    let dir = tempdir().unwrap();
    let policy = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: gate}, spec: {podSelector: {}}}";
    write(dir.path().join("a.yaml"), pod("p", "one")).unwrap();
    write(dir.path().join("b.yaml"), policy).unwrap();
    let mut follower = Follower::new(dir.path()).unwrap();
    assert_eq!(follower.first().unwrap().events.len(), 2);
    let begun = Instant::now();
    let at = move |milliseconds| begun + Duration::from_millis(milliseconds);
    (dir, follower, at)
}

#[test]
fn deletions_are_delayed_longer_when_access_could_widen() {
    let (dir, mut follower, at) = followed();
    remove_file(dir.path().join("a.yaml")).unwrap();
    remove_file(dir.path().join("b.yaml")).unwrap();
    let mut changes = |milliseconds| {
        let batch = follower.changes(at(milliseconds));
        batch.map_or_else(Vec::new, |batch| shown(&batch))
    };
    assert_eq!((changes(0), changes(49)), (vec![], vec![]));
    assert_eq!(changes(50), ["-Pod default/p"]);
    assert_eq!(changes(249), [""; 0]);
    assert_eq!(changes(250), ["-NetworkPolicy default/gate"]);
}

#[test]
fn file_replaced_in_two_steps_deletes_nothing() {
    let (dir, mut follower, at) = followed();
    let path = dir.path().join("a.yaml");
    for (round, label) in [(0, "two"), (1, "three")] {
        let from = round * 1000;
        remove_file(&path).unwrap();
        assert!(follower.changes(at(from)).is_none());
        assert!(follower.changes(at(from + 49)).is_none());
        let mut file = File::create(&path).unwrap();
        assert!(follower.changes(at(from + 60)).is_none(), "it is empty");
        file.write_all(pod("p", label).as_bytes()).unwrap();
        assert!(follower.changes(at(from + 90)).is_none(), "and open");
        drop(file);
        let batch = follower.changes(at(from + 100)).unwrap();
        assert_eq!(shown(&batch), [format!("+p {label}")]);
    }
}

#[test]
fn change_is_found_after_inotify_overflow() {
    let (dir, mut follower, at) = followed();
    // Each creates, and deletes again: no two events in a row are equal, which would be one.
    let queue = std::fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    for _ in 0..queue.trim().parse::<u64>().unwrap() / 2 + 1 {
        File::create(dir.path().join(".busy")).unwrap();
        remove_file(dir.path().join(".busy")).unwrap();
    }
    write(dir.path().join("a.yaml"), pod("p", "two")).unwrap();
    assert!(follower.changes(at(0)).is_none(), "it may be written still");
    let batch = follower.changes(at(100)).unwrap();
    assert_eq!(shown(&batch), ["+p two"]);
}

#[test]
fn replaced_directory_does_not_wait_for_old_writers() {
    let dir = tempdir().unwrap();
    let [root, next] = ["state", "next"].map(|name| dir.path().join(name));
    for (directory, label) in [(&root, "one"), (&next, "two")] {
        create_dir(directory).unwrap();
        write(directory.join("a.yaml"), pod("p", label)).unwrap();
    }
    let mut follower = Follower::new(&root).unwrap();
    assert_eq!(shown(&follower.first().unwrap()), ["+p one"]);
    let begun = Instant::now();
    let at = |milliseconds| begun + Duration::from_millis(milliseconds);
    let _writer = File::create(root.join("a.yaml")).unwrap();
    assert!(follower.changes(at(0)).is_none(), "it is open");
    rename(&root, dir.path().join("away")).unwrap();
    rename(&next, &root).unwrap();
    assert!(
        follower.changes(at(10)).is_none(),
        "it may be written still"
    );
    assert_eq!(shown(&follower.changes(at(110)).unwrap()), ["+p two"]);
}

#[test]
fn writes_of_equal_time_and_length_are_read() {
    let (dir, mut follower, at) = followed();
    let path = dir.path().join("a.yaml");
    for (round, label) in (0..100).zip(["six", "two"].into_iter().cycle()) {
        write(&path, pod("p", label)).unwrap();
        let batch = follower.changes(at(round)).unwrap();
        assert_eq!(shown(&batch), [format!("+p {label}")], "round {round}");
    }
}

#[test]
fn start_rejects_faults_but_accepts_empty_directory() {
    let dir = tempdir().unwrap();
    let (_, batch) = ManifestSource::open(dir.path()).unwrap();
    assert_eq!((batch.events.len(), batch.problems.len()), (0, 1));
    assert!(ManifestSource::open(&dir.path().join("missing")).is_err());
    write(dir.path().join("a.yaml"), "kind: [").unwrap();
    let error = ManifestSource::open(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("a.yaml, document 1: not YAML at line 1"),
        "{error}"
    );
}
