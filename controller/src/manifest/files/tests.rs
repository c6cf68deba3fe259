//! Which files count, and what is refused without being read.
use std::fs::{create_dir, write};
use std::os::unix::fs::symlink;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tempfile::tempdir;

use super::*;

#[test]
fn only_top_level_manifests_are_listed_by_name() {
    let dir = tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in [
        "b.yaml",
        "a.yml",
        "c.json",
        "D.YAML",
        ".hidden.yaml",
        "x.yaml~",
        "readme.md",
        "noextension",
        "kustomization.yaml",
    ] {
        write(at(name), "").unwrap();
    }
    create_dir(at("sub")).unwrap();
    create_dir(at("..data_1")).unwrap();
    write(at("..data_1/e.yaml"), "").unwrap();
    symlink("..data_1", at("..data")).unwrap();
    symlink("..data/e.yaml", at("e.yaml")).unwrap();
    symlink("nowhere", at("f.yaml")).unwrap();

    let listing = list(dir.path()).unwrap();
    let seen: Vec<_> = listing
        .files
        .iter()
        .map(|(name, found)| {
            let name = Path::new(name).file_name().unwrap().to_str().unwrap();
            (name, found.stamp.is_some(), found.link)
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("D.YAML", true, false),
            ("a.yml", true, false),
            ("b.yaml", true, false),
            ("c.json", true, false),
            ("e.yaml", true, true),
            ("f.yaml", false, true)
        ]
    );
    let [warning] = &listing.warnings[..] else {
        panic!("{:?}", listing.warnings)
    };
    assert_eq!(warning.file, Some(at("sub")));
}

#[test]
fn empty_directory_warns_and_missing_path_fails() {
    let dir = tempdir().unwrap();
    write(dir.path().join("ELF"), [0x7f, b'E', b'L', b'F']).unwrap();
    let [warning] = &list(dir.path()).unwrap().warnings[..] else {
        panic!()
    };
    assert!(warning.problem.starts_with("no manifests"), "{warning}");

    let missing = list(&dir.path().join("missing")).unwrap_err();
    assert!(
        missing
            .to_string()
            .contains("missing: cannot be listed: No such file"),
        "{missing}"
    );
}

#[test]
fn file_over_the_limit_is_rejected_unread() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("big.yaml");
    // Sparse: were it read, the test would need 100 GiB.
    File::create(&path).unwrap().set_len(100 << 30).unwrap();
    let problem = read(&path).unwrap_err();
    assert_eq!(
        problem.problem,
        "102400 MiB is more than the 64 MiB that are read of one file"
    );
}

#[test]
fn fifo_is_rejected_without_blocking() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("fifo.yaml");
    mkfifo(&path, Mode::S_IRWXU).unwrap();
    assert!(
        read(&path)
            .unwrap_err()
            .problem
            .starts_with("neither a plain file")
    );
    assert!(
        list(&path)
            .unwrap_err()
            .problem
            .starts_with("neither a plain file")
    );
    assert!(read(dir.path()).is_err());
}
