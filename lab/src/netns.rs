//! Network namespaces that are held by a descriptor only.
//!
//! A thread that enters one ends afterwards, so no thread is ever in the wrong namespace.
//! Knows nothing of addresses or links.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::panic;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

use crate::process::{Command, Keeper, ProcessError};

/// What went wrong with a namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// The kernel did not create one.
    #[error(
        "no network namespace could be made; call lab::enter first, and see user.max_net_namespaces"
    )]
    Create(#[source] io::Error),
    /// A thread could not enter.
    #[error("a network namespace could not be entered; call lab::enter first in main")]
    Enter(#[source] io::Error),
    /// A kernel parameter could not be set.
    #[error(
        "net sysctl {name} could not be set to {value:?}; the kernel must have it (IPv6 disabled?) and /proc/sys/net must be writable"
    )]
    Sysctl {
        /// Path below `/proc/sys/net`.
        name: String,
        /// The value that was refused.
        value: String,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
}

/// A network namespace; clones refer to the same one.
///
/// It has no name. The kernel takes it apart when the last clone, and the last socket and process
/// in it, are gone.
#[derive(Debug, Clone)]
pub struct Netns(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    handle: File,
    inode: u64,
    // Dropped with the namespace, which ends the thread and thereby what it started.
    keeper: Mutex<Option<Keeper>>,
}

impl Netns {
    /// Makes a new namespace. It has nothing but a loopback interface that is down.
    ///
    /// # Errors
    /// [`NetnsError::Create`] without privilege, or beyond `user.max_net_namespaces`.
    pub fn new() -> Result<Self, NetnsError> {
        let made = on_throwaway_thread(|| -> io::Result<_> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Self::held("/proc/thread-self/ns/net")
        });
        made.and_then(|held| held).map_err(NetnsError::Create)
    }

    /// The namespace that a process is in.
    ///
    /// # Errors
    /// [`NetnsError::Enter`] if there is no such process, or without the right to look at it.
    pub fn of_process(id: u32) -> Result<Self, NetnsError> {
        Self::held(&format!("/proc/{id}/ns/net")).map_err(NetnsError::Enter)
    }

    fn held(path: &str) -> io::Result<Self> {
        let handle = File::open(path)?;
        let inode = handle.metadata()?.ino();
        Ok(Self(Arc::new(Inner {
            handle,
            inode,
            keeper: Mutex::new(None),
        })))
    }

    /// Runs `work` on a throw-away thread inside the namespace and hands back its result.
    ///
    /// Sockets that `work` opens stay in the namespace and can be used from anywhere.
    ///
    /// # Errors
    /// [`NetnsError::Enter`]; `work` has not run then.
    ///
    /// # Panics
    /// With the panic of `work`.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        on_throwaway_thread(|| {
            setns(&self.0.handle, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        })
        .and_then(|result| result)
        .map_err(NetnsError::Enter)
    }

    /// A program to be started inside the namespace, see [`Command`].
    #[must_use]
    pub fn command(&self, program: impl Into<PathBuf>) -> Command {
        Command::new(self.clone(), program.into())
    }

    /// The namespace's number, as `lsns` and `/proc/PID/ns/net` show it.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.0.inode
    }

    /// A path that names the namespace to other processes for as long as this value lives.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        let (process, handle) = (std::process::id(), self.0.handle.as_raw_fd());
        PathBuf::from(format!("/proc/{process}/fd/{handle}"))
    }

    /// Sets kernel parameters of the namespace: pairs of a path below `/proc/sys/net` and a value.
    ///
    /// # Errors
    /// [`NetnsError::Sysctl`] for the first one that is refused; those before it are set.
    pub fn set_sysctls(&self, settings: &[(&str, &str)]) -> Result<(), NetnsError> {
        self.run(|| {
            for (name, value) in settings {
                // One write: the kernel takes a parameter as a whole.
                fs::write(format!("/proc/sys/net/{name}"), value).map_err(|source| {
                    NetnsError::Sysctl {
                        name: (*name).into(),
                        value: (*value).into(),
                        source,
                    }
                })?;
            }
            Ok(())
        })?
    }

    /// Starts `command` on the namespace's long-lived thread, which it then depends on.
    pub(crate) fn spawn(
        &self,
        command: std::process::Command,
    ) -> Result<std::process::Child, ProcessError> {
        let mut keeper = self.0.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *keeper {
            Some(keeper) => keeper.spawn(command),
            empty => {
                let handle = self.0.handle.try_clone().map_err(ProcessError::Keeper)?;
                empty.insert(Keeper::start(handle)?).spawn(command)
            }
        }
    }
}

fn on_throwaway_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("lab-netns".into())
            .spawn_scoped(scope, work)?;
        Ok(thread
            .join()
            .unwrap_or_else(|cause| panic::resume_unwind(cause)))
    })
}
