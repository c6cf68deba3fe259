//! Damage that must be detected in a saved state.
use serde_json::json;
use tempfile::TempDir;

use super::*;

fn snapshot(folder: &TempDir) -> Snapshot {
    Snapshot {
        folder: folder.path().join("state"),
        node: "n1".to_owned(),
        cluster: ClusterIdentity {
            server: "https://10.96.0.1/".to_owned(),
            authorities: vec!["a".to_owned()],
        },
        max_age: Duration::from_secs(3600),
    }
}

fn objects() -> Vec<Value> {
    let pod = |name: &str| json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}});
    vec![pod("a"), pod("b")]
}

fn kept(folder: &TempDir, now: SystemTime) -> Snapshot {
    let snapshot = snapshot(folder);
    snapshot
        .write(&body(objects().into_iter().map(|it| it.to_string())), now)
        .expect("written");
    snapshot
}

#[test]
fn snapshot_is_read_back_with_its_time() {
    let folder = TempDir::new().expect("a folder");
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let snapshot = kept(&folder, now);
    let (items, written) = snapshot.read(now + Duration::from_secs(60)).expect("good");
    assert_eq!((items, written), (objects(), now));
    let loaded = crate::manifest::load(&snapshot.path()).expect("manifests, too");
    assert_eq!(loaded.cluster.pods().count(), 2);
}

#[test]
fn snapshot_has_mode_0600_and_no_leftover_files() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = TempDir::new().expect("a folder");
    let snapshot = kept(&folder, SystemTime::now());
    let mode = fs::metadata(snapshot.path())
        .expect("there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(fs::read_dir(&snapshot.folder).expect("there").count(), 1);
}

#[test]
fn any_damage_is_noticed() {
    let folder = TempDir::new().expect("a folder");
    let now = SystemTime::now();
    let snapshot = kept(&folder, now);
    let good = fs::read(snapshot.path()).expect("there");
    for cut in [0, 1, 20, good.len() / 2, good.len() - 1] {
        fs::write(snapshot.path(), &good[..cut]).expect("written");
        assert!(
            matches!(snapshot.read(now), Err(Unusable::Damaged(_))),
            "{cut} bytes"
        );
    }
    for (at, byte) in good.iter().enumerate() {
        let mut bad = good.clone();
        bad[at] = byte ^ 1;
        fs::write(snapshot.path(), &bad).expect("written");
        if let Ok((items, _)) = snapshot.read(now) {
            // Only the time may have changed without harm.
            assert_eq!(items, objects(), "byte {at}");
        }
    }
    fs::write(snapshot.path(), &good).expect("written");
    assert!(snapshot.read(now).is_ok());
}

#[test]
fn foreign_or_stale_snapshot_is_rejected_with_reason() {
    let folder = TempDir::new().expect("a folder");
    let now = SystemTime::now();
    let good = kept(&folder, now);
    let with = |change: &dyn Fn(&mut Snapshot)| {
        let mut other = good.clone();
        change(&mut other);
        other
            .read(now + Duration::from_secs(60))
            .expect_err("refused")
            .to_string()
    };
    let reason = with(&|other| other.node = "n2".to_owned());
    assert!(reason.contains("belongs to node n1"), "{reason}");
    let reason = with(&|other| other.cluster.authorities = vec!["b".to_owned()]);
    assert!(reason.contains("another cluster"), "{reason}");
    let reason = with(&|other| other.max_age = Duration::from_secs(59));
    assert!(
        reason.contains("1m old") && reason.contains("--state-max-age"),
        "{reason}"
    );
    let reason = with(&|other| other.folder = folder.path().join("elsewhere"));
    assert!(reason.contains("there is none"), "{reason}");
    let text = fs::read_to_string(good.path()).expect("there");
    fs::write(
        good.path(),
        text.replacen("\"version\":1", "\"version\":2", 1),
    )
    .expect("written");
    let reason = with(&|_| {});
    assert!(reason.contains("version 2"), "{reason}");
}

#[test]
fn shared_ca_identifies_the_same_cluster() {
    let of = |authorities: &[&str]| ClusterIdentity {
        server: "https://a/".to_owned(),
        authorities: authorities.iter().map(ToString::to_string).collect(),
    };
    assert!(of(&["old", "new"]).is_same(&of(&["old"])), "a rotation");
    assert!(
        !of(&["old"]).is_same(&of(&["other"])),
        "the same address does not make the same cluster"
    );
    assert!(of(&[]).is_same(&of(&[])));
    let elsewhere = ClusterIdentity {
        server: "https://b/".to_owned(),
        ..of(&[])
    };
    assert!(!of(&[]).is_same(&elsewhere));
}

#[test]
fn other_json_in_the_file_is_damaged() {
    let folder = TempDir::new().expect("a folder");
    let snapshot = snapshot(&folder);
    let now = SystemTime::now();
    for body in [
        "\"a\"",
        "1",
        "-1.5e300",
        "null",
        "true",
        "[]",
        "[1]",
        "{}",
        "{\"items\":null}",
        "{\"items\":{}}",
        "{\"items\":\"\"}",
        "[[[[]]]]",
        "{\"a\":1,\"a\":2}",
    ] {
        snapshot.write(body.as_bytes(), now).expect("written");
        let read = snapshot.read(now);
        assert!(
            matches!(read, Err(Unusable::Damaged(_))),
            "{body}: {read:?}"
        );
    }
    snapshot.write(b"", now).expect("written");
    assert!(snapshot.read(now).is_err());
    let odd = "{\"items\":[1,null,\"a\",[],{},{\"kind\":1},{\"kind\":\"Pod\",\"metadata\":3},{\"kind\":\"Node\",\"metadata\":{\"name\":[]}}]}";
    snapshot.write(odd.as_bytes(), now).expect("written");
    let (items, _) = snapshot.read(now).expect("a list");
    let mut state = super::super::state::State::new("n1");
    assert_eq!(state.restore(items).events, [], "nothing in it has a name");
}
