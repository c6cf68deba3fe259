//! The memory that this process may use (cgroups(7)).
use std::fs;
use std::path::{Path, PathBuf};

/// What version 1 writes for "no limit" is beyond this.
const NO_LIMIT: usize = 1 << 50;

/// The memory limit of this process's cgroup in bytes; `None` if it has none.
pub(crate) fn limit() -> Option<usize> {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    lowest(Path::new("/sys/fs/cgroup"), &own)
}

/// The lowest limit of the cgroups that `/proc/self/cgroup` names, and of those at the root: a container sees its own
/// there.
fn lowest(root: &Path, own: &str) -> Option<usize> {
    let named = own.lines().filter_map(|line| {
        let (_, line) = line.split_once(':')?;
        let (controllers, path) = line.split_once(':')?;
        let path = path.trim_start_matches('/');
        match controllers {
            "" => Some(v2(root, path)),
            _ if controllers.split(',').any(|it| it == "memory") => Some(v1(root, path)),
            _ => None,
        }
    });
    let files = named.chain([v2(root, ""), v1(root, "")]);
    let limits = files.filter_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok());
    limits.filter(|limit| *limit < NO_LIMIT).min()
}

fn v2(root: &Path, cgroup: &str) -> PathBuf {
    root.join(cgroup).join("memory.max")
}

fn v1(root: &Path, cgroup: &str) -> PathBuf {
    let controller = root.join("memory").join(cgroup);
    controller.join("memory.limit_in_bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_limit_of_either_version_counts() {
        for (files, own, expected, why) in [
            (&[][..], "0::/", None, "no controller"),
            (
                &[("memory.max", "536870912\n")],
                "0::/",
                Some(512 << 20),
                "a container",
            ),
            (&[("memory.max", "max\n")], "0::/", None, "without a limit"),
            (
                &[("a/b/memory.max", "1048576\n")],
                "0::/a/b\n",
                Some(1 << 20),
                "a service",
            ),
            (
                &[
                    ("memory/memory.limit_in_bytes", "9223372036854771712\n"),
                    ("memory/x/memory.limit_in_bytes", "2097152\n"),
                ],
                "5:cpu:/y\n4:memory:/x\n",
                Some(2 << 20),
                "version 1",
            ),
        ] {
            let root = tempfile::tempdir().unwrap();
            for (name, text) in files {
                let file = root.path().join(name);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, text).unwrap();
            }
            assert_eq!(lowest(root.path(), own), expected, "{why}");
        }
    }
}
