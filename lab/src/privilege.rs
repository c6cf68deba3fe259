//! Moves the program into namespaces of its own, with or without root.
//!
//! After [`enter`] the process can make network namespaces, links and rulesets, and none of that
//! is visible outside. Knows nothing of clusters.

use std::fs;
use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};

/// `CAP_NET_ADMIN`, `CAP_NET_RAW` and `CAP_SYS_ADMIN`, as bits of `CapEff` (capabilities(7)).
const NEEDED: u64 = 1 << 12 | 1 << 13 | 1 << 21;

/// How the namespaces were entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entered {
    /// The process had the capabilities already.
    Capable,
    /// Through a user namespace in which the caller is root.
    UserNamespace,
}

/// Why the program cannot have namespaces of its own.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// More than one thread runs; namespaces are entered by a thread, not by a process.
    #[error(
        "{threads} threads run already, and only a single-threaded program can move into its own namespaces; call lab::enter first in main, before any runtime or thread"
    )]
    Threads {
        /// How many threads there are.
        threads: usize,
    },
    /// `kernel.unprivileged_userns_clone` is 0 (Debian's kernels have it).
    #[error(
        "kernel.unprivileged_userns_clone is 0, so only root can make namespaces; run as root, or `sudo sysctl kernel.unprivileged_userns_clone=1`"
    )]
    UsernsClone(#[source] io::Error),
    /// `user.max_user_namespaces` is 0 or used up.
    #[error(
        "user.max_user_namespaces is {limit}, and no further user namespace may be made; run as root, or `sudo sysctl user.max_user_namespaces=15000`"
    )]
    MaxUserNamespaces {
        /// The limit as the kernel has it.
        limit: u64,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// AppArmor takes away the capabilities in a user namespace (Ubuntu 23.10 and later).
    #[error(
        "AppArmor (kernel.apparmor_restrict_unprivileged_userns = 1) gives user namespaces no capabilities; run as root, or `sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0`"
    )]
    AppArmor(#[source] io::Error),
    /// None of the known switches explains it: a container's seccomp profile, most often.
    #[error(
        "this process may not make namespaces, most often because of a container's seccomp profile; run as root with CAP_NET_ADMIN, CAP_NET_RAW and CAP_SYS_ADMIN (docker run --privileged)"
    )]
    Forbidden(#[source] io::Error),
}

/// Moves the calling program into a network and a mount namespace of its own, with an empty `/run`.
///
/// With `CAP_NET_ADMIN`, `CAP_NET_RAW` and `CAP_SYS_ADMIN` that is all; without, a user namespace
/// comes first, in which the caller is root. Threads and children made later are in there too.
///
/// # Errors
/// [`PrivilegeError`], naming the cause and the remedy. After an error other than
/// [`PrivilegeError::Threads`] the process may be half moved: it can only report and exit.
pub fn enter() -> Result<Entered, PrivilegeError> {
    let threads = fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads != 1 {
        return Err(PrivilegeError::Threads { threads });
    }
    let entered = if capable() {
        Entered::Capable
    } else {
        Entered::UserNamespace
    };
    let moved = match entered {
        Entered::Capable => {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).map_err(io::Error::from)
        }
        Entered::UserNamespace => enter_user_namespace(),
    };
    moved.and_then(|()| hide_run()).map_err(diagnose)?;
    Ok(entered)
}

/// Stops mount propagation to the machine, then mounts an empty `/run`.
///
/// Tools keep locks and state there (`/run/xtables.lock`).
pub(crate) fn hide_run() -> io::Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(
        Some("tmpfs"),
        "/run",
        Some("tmpfs"),
        flags,
        Some("mode=755"),
    )?;
    Ok(())
}

fn enter_user_namespace() -> io::Result<()> {
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
    // A group map may be written without privilege only once setgroups is given up
    // (user_namespaces(7)).
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1\n"))?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1\n"))
}

fn capable() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok())
        .is_some_and(|bits| bits & NEEDED == NEEDED)
}

fn diagnose(source: io::Error) -> PrivilegeError {
    let limit = switch("/proc/sys/user/max_user_namespaces");
    let exhausted = source.raw_os_error() == Some(Errno::ENOSPC as i32);
    match limit {
        Some(limit) if limit == 0 || exhausted => {
            return PrivilegeError::MaxUserNamespaces { limit, source };
        }
        _ => {}
    }
    if switch("/proc/sys/kernel/unprivileged_userns_clone") == Some(0) {
        return PrivilegeError::UsernsClone(source);
    }
    if switch("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == Some(1) {
        return PrivilegeError::AppArmor(source);
    }
    PrivilegeError::Forbidden(source)
}

fn switch(path: impl AsRef<Path>) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entering_with_threads_running_names_the_remedy() {
        let error = std::thread::scope(|scope| scope.spawn(enter).join().unwrap()).unwrap_err();
        assert!(
            error.to_string().contains("call lab::enter first in main"),
            "{error}"
        );
    }
}
