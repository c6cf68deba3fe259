//! The cgroups of a node, in every hierarchy that the machine has; removed on drop.
//!
//! Must be used by a process of the machine's mount namespace, whose `/sys/fs/cgroup` is the
//! machine's. Knows nothing of what runs in them.

use std::fs::{self, DirBuilder};
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::time::Duration;

use crate::kubernetes::KubernetesError;
use crate::wait::wait_until;

const MOUNTED: &str = "/sys/fs/cgroup";
const PREFIX: &str = "portreeve-lab-";
/// How long the kernel may take to end killed processes.
const EMPTY: Duration = Duration::from_secs(10);
/// A cgroup that has had no process for this time was left by a killed lab.
const LEFT: Duration = Duration::from_secs(60);

/// A cgroup in each hierarchy. Dropping it removes them, with those below, once their processes
/// have ended.
#[derive(Debug)]
pub(super) struct Cgroups(Vec<PathBuf>);

impl Cgroups {
    /// Makes them.
    ///
    /// # Errors
    /// [`KubernetesError::Cgroups`] without the right to.
    pub(super) fn new() -> Result<Self, KubernetesError> {
        let mut made = Self(Vec::new());
        for parent in parents() {
            remove_left(&parent);
            let own = make(&parent).map_err(|source| KubernetesError::Cgroups {
                path: parent.clone(),
                source,
            })?;
            made.0.push(own.clone());
            // One of version 1 has no processors and no memory at first (cpuset(7)).
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if own.join(file).is_file() && parent.join("tasks").is_file() {
                    write(&own.join(file), &read(&parent.join(file))?)?;
                }
            }
        }
        if made.0.is_empty() {
            return Err(KubernetesError::Cgroups {
                path: MOUNTED.into(),
                source: io::ErrorKind::NotFound.into(),
            });
        }
        Ok(made)
    }

    /// Moves a process into them.
    ///
    /// # Errors
    /// [`KubernetesError::Cgroups`].
    pub(super) fn take(&self, process: u32) -> Result<(), KubernetesError> {
        let of = |own: &PathBuf| write(&own.join("cgroup.procs"), &process.to_string());
        self.0.iter().try_for_each(of)
    }

    /// The processes in a cgroup of this name, however deep, and in those below it.
    pub(super) fn processes(&self, name: &str) -> Vec<u32> {
        let Some(hierarchy) = self.0.first() else {
            return Vec::new();
        };
        let all = below(hierarchy);
        let named = |path: &&PathBuf| path.components().any(|part| part.as_os_str() == name);
        let files = all.iter().filter(named).map(|it| it.join("cgroup.procs"));
        let texts = files.filter_map(|file| fs::read_to_string(file).ok());
        texts
            .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
            .filter_map(|line| line.parse().ok())
            .collect()
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for own in &self.0 {
            let gone = || remove(own) || !own.exists();
            if let Err(error) = wait_until(EMPTY, format!("{} to go", own.display()), gone) {
                eprintln!("{error}");
            }
        }
    }
}

/// Where cgroups can be created: in this process's cgroup of each version 1 hierarchy, or
/// at the root of the version 2 hierarchy, as processes must be in leaves there.
fn parents() -> Vec<PathBuf> {
    let mounted = Path::new(MOUNTED);
    if mounted.join("cgroup.controllers").is_file() {
        return vec![mounted.into()];
    }
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    own.lines()
        .filter_map(|line| {
            // number:controllers:path
            let mut parts = line.splitn(3, ':').skip(1);
            let (controllers, path) = (parts.next()?, parts.next()?);
            let name = controllers.strip_prefix("name=").unwrap_or(controllers);
            if name.is_empty() {
                return None;
            }
            let hierarchy = mounted.join(name);
            let own = hierarchy.join(path.trim_start_matches('/'));
            // A container may see another root than the path begins at.
            Some(if own.is_dir() { own } else { hierarchy })
        })
        .collect()
}

fn make(parent: &Path) -> io::Result<PathBuf> {
    for number in 0.. {
        let own = parent.join(format!("{PREFIX}{}-{number}", process::id()));
        match DirBuilder::new().create(&own) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made.map(|()| own),
        }
    }
    unreachable!("numbers do not end")
}

/// Removes the cgroups that a killed lab has left: they have no processes.
fn remove_left(parent: &Path) {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    for entry in entries {
        let ours = entry.file_name().to_string_lossy().starts_with(PREFIX);
        let made = entry.metadata().and_then(|it| it.modified());
        let old = made.is_ok_and(|made| made.elapsed().is_ok_and(|age| age > LEFT));
        if ours && old {
            remove(&entry.path());
        }
    }
}

/// Removes a cgroup and those below it; those with processes stay.
fn remove(cgroup: &Path) -> bool {
    let all = below(cgroup);
    // The deepest first.
    all.iter().rev().all(|it| fs::remove_dir(it).is_ok())
}

/// A directory and those below it, each after the one that it is in.
fn below(top: &Path) -> Vec<PathBuf> {
    let mut all = vec![top.to_owned()];
    let mut next = 0;
    while let Some(directory) = all.get(next) {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let directories = entries.filter(|it| it.file_type().is_ok_and(|it| it.is_dir()));
        let found: Vec<_> = directories.map(|it| it.path()).collect();
        all.extend(found);
        next += 1;
    }
    all
}

fn read(path: &Path) -> Result<String, KubernetesError> {
    fs::read_to_string(path).map_err(|source| error(path, source))
}

fn write(path: &Path, text: &str) -> Result<(), KubernetesError> {
    fs::write(path, text).map_err(|source| error(path, source))
}

fn error(path: &Path, source: io::Error) -> KubernetesError {
    KubernetesError::Cgroups {
        path: path.into(),
        source,
    }
}
