//! Programs inside a namespace that cannot outlive the lab.
//!
//! A child gets a parent-death signal by `setpriv --pdeathsig` (util-linux). The kernel ties that
//! signal to the *thread* that started the child, so every namespace has one long-lived thread that
//! starts its programs. Knows nothing of what the programs do.

use std::env;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{self, ExitStatus, Output, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::netns::Netns;
use crate::privilege::hide_run;
use crate::wait::{WaitTimedOut, wait_for};

/// A parent that dies before the signal is set sends none; the shell then has another parent.
const UNLESS_ORPHANED: &str = r#"test "$PPID" = "$0" && exec "$@""#;

/// What went wrong with a program.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// There is no such program.
    #[error("there is no program {program}; install it, build it, or give its whole path")]
    Missing {
        /// As it was asked for.
        program: PathBuf,
    },
    /// The kernel did not start it.
    #[error("{program} could not be started; see its permissions and the process limits")]
    Spawn {
        /// As it was asked for.
        program: PathBuf,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// The thread that starts programs could not be set up.
    #[error("no thread could be set up to start programs in a namespace; call lab::enter first")]
    Keeper(#[source] io::Error),
    /// Waiting for the program failed.
    #[error("cannot wait for the end of {program}; do not reap the lab's children elsewhere")]
    Wait {
        /// As it was asked for.
        program: PathBuf,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// The program was still running at the deadline.
    #[error("{program} did not end")]
    StillRunning {
        /// As it was asked for.
        program: PathBuf,
        /// How long it was given.
        #[source]
        source: WaitTimedOut,
    },
}

/// A program to be started inside a namespace, in the manner of [`process::Command`].
///
/// It sees a `/run` of its namespace's own (shared by all programs of that namespace, empty at
/// first), and `/sys` shows the namespace's interfaces or, where the kernel forbids that, none.
/// Standard input is empty unless it is set.
#[derive(Debug)]
pub struct Command {
    netns: Netns,
    program: PathBuf,
    inner: process::Command,
}

impl Command {
    pub(crate) fn new(netns: Netns, program: PathBuf) -> Self {
        let mut inner = process::Command::new("setpriv");
        inner.args(["--pdeathsig", "KILL", "--", "sh", "-c", UNLESS_ORPHANED]);
        inner.arg(process::id().to_string());
        inner.arg(find_program(&program).as_deref().unwrap_or(&program));
        inner.env("PATH", search_path()).stdin(Stdio::null());
        Self {
            netns,
            program,
            inner,
        }
    }

    /// Adds an argument.
    pub fn arg(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        self.inner.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args(&mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> &mut Self {
        self.inner.args(args);
        self
    }

    /// Sets an environment variable.
    pub fn env(&mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> &mut Self {
        self.inner.env(key, value);
        self
    }

    /// Removes an environment variable.
    pub fn env_remove(&mut self, key: impl AsRef<OsStr>) -> &mut Self {
        self.inner.env_remove(key);
        self
    }

    /// Sets the working directory.
    pub fn current_dir(&mut self, dir: impl AsRef<Path>) -> &mut Self {
        self.inner.current_dir(dir);
        self
    }

    /// Where standard input comes from.
    pub fn stdin(&mut self, stdin: impl Into<Stdio>) -> &mut Self {
        self.inner.stdin(stdin);
        self
    }

    /// Where standard output goes.
    pub fn stdout(&mut self, stdout: impl Into<Stdio>) -> &mut Self {
        self.inner.stdout(stdout);
        self
    }

    /// Where standard error goes.
    pub fn stderr(&mut self, stderr: impl Into<Stdio>) -> &mut Self {
        self.inner.stderr(stderr);
        self
    }

    /// Starts the program. It is killed when the [`Child`] is dropped, or when this process dies.
    ///
    /// # Errors
    /// [`ProcessError::Missing`] if there is no such program, [`ProcessError::Spawn`] otherwise.
    pub fn spawn(self) -> Result<Child, ProcessError> {
        let Self {
            netns,
            program,
            inner,
        } = self;
        for needed in [Path::new("setpriv"), &program] {
            if find_program(needed).is_none() {
                return Err(ProcessError::Missing {
                    program: needed.into(),
                });
            }
        }
        let inner = netns.spawn(inner).map_err(|error| match error {
            ProcessError::Spawn { source, .. } => ProcessError::Spawn {
                program: program.clone(),
                source,
            },
            other => other,
        })?;
        Ok(Child {
            inner: Some(inner),
            program,
            _netns: netns,
        })
    }

    /// Starts the program, waits for its end and hands back what it wrote.
    ///
    /// # Errors
    /// As [`Command::spawn`], or [`ProcessError::Wait`].
    pub fn output(mut self) -> Result<Output, ProcessError> {
        self.inner.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.spawn()?;
        let program = child.program.clone();
        match child.inner.take() {
            Some(inner) => inner.wait_with_output(),
            None => Err(io::ErrorKind::NotFound.into()),
        }
        .map_err(|source| ProcessError::Wait { program, source })
    }
}

/// A running program. Dropping it kills and reaps it.
#[derive(Debug)]
pub struct Child {
    // None only after `output` has taken it.
    inner: Option<process::Child>,
    program: PathBuf,
    // The thread that started the child must live as long as the child.
    _netns: Netns,
}

impl Child {
    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.inner.as_ref().map_or(0, process::Child::id)
    }

    /// The program's standard output, if it was piped; at most once.
    pub fn take_stdout(&mut self) -> Option<process::ChildStdout> {
        self.inner.as_mut()?.stdout.take()
    }

    /// The program's standard error, if it was piped; at most once.
    pub fn take_stderr(&mut self) -> Option<process::ChildStderr> {
        self.inner.as_mut()?.stderr.take()
    }

    /// The program's standard input, if it was piped; at most once.
    pub fn take_stdin(&mut self) -> Option<process::ChildStdin> {
        self.inner.as_mut()?.stdin.take()
    }

    /// Sends SIGTERM; nothing happens if the program has ended.
    pub fn terminate(&mut self) {
        self.signal(Signal::SIGTERM);
    }

    /// Sends SIGKILL; nothing happens if the program has ended.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
    }

    fn signal(&mut self, signal: Signal) {
        // Only a child that is not reaped yet: its id cannot have gone to another process.
        if let Ok(None) = self.try_wait()
            && let Ok(id) = i32::try_from(self.id())
        {
            let _ = kill(Pid::from_raw(id), signal);
        }
    }

    /// How the program ended, or `None` while it runs.
    ///
    /// # Errors
    /// [`ProcessError::Wait`] if the kernel does not know the child.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>, ProcessError> {
        match &mut self.inner {
            Some(inner) => inner.try_wait().map_err(|source| ProcessError::Wait {
                program: self.program.clone(),
                source,
            }),
            None => Ok(Some(ExitStatus::from_raw(0))),
        }
    }

    /// Waits for the program's end for at most `limit`.
    ///
    /// # Errors
    /// [`ProcessError::StillRunning`] at the deadline; the program runs on.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus, ProcessError> {
        let program = self.program.clone();
        wait_for(limit, format!("{} to end", program.display()), || {
            self.try_wait().transpose()
        })
        .map_err(|source| ProcessError::StillRunning { program, source })?
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Some(mut inner) = self.inner.take() {
            let _ = inner.kill();
            let _ = inner.wait();
        }
    }
}

type Job = (process::Command, Sender<io::Result<process::Child>>);

/// The thread that starts a namespace's programs; they die when it ends.
#[derive(Debug)]
pub(crate) struct Keeper {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Starts the thread and moves it into `netns`, with mounts of its own.
    pub(crate) fn start(netns: File) -> Result<Self, ProcessError> {
        let (jobs, inbox) = mpsc::channel();
        let (ready, is_ready) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("lab-keeper".into())
            .spawn(move || {
                let moved = move_into(&netns);
                let failed = moved.is_err();
                let _ = ready.send(moved);
                if !failed {
                    keep(&inbox);
                }
            })
            .map_err(ProcessError::Keeper)?;
        let keeper = Self {
            jobs: Some(jobs),
            thread: Some(thread),
        };
        match is_ready.recv() {
            Ok(Ok(())) => Ok(keeper),
            Ok(Err(source)) => Err(ProcessError::Keeper(source)),
            Err(_) => Err(ProcessError::Keeper(io::ErrorKind::BrokenPipe.into())),
        }
    }

    pub(crate) fn spawn(&self, command: process::Command) -> Result<process::Child, ProcessError> {
        let (reply, answer) = mpsc::channel();
        let gone = || ProcessError::Keeper(io::ErrorKind::BrokenPipe.into());
        let jobs = self.jobs.as_ref().ok_or_else(gone)?;
        jobs.send((command, reply)).map_err(|_| gone())?;
        let started = answer.recv().map_err(|_| gone())?;
        started.map_err(|source| ProcessError::Spawn {
            program: "setpriv".into(),
            source,
        })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn move_into(netns: &File) -> io::Result<()> {
    setns(netns, CloneFlags::CLONE_NEWNET)?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    hide_run()?;
    // A sysfs shows the interfaces of the namespace that mounts it. Where a container forbids the
    // mount, better none than the machine's.
    let none = None::<&str>;
    mount(
        Some("sysfs"),
        "/sys",
        Some("sysfs"),
        MsFlags::MS_RDONLY,
        none,
    )
    .or_else(|_| {
        mount(
            Some("tmpfs"),
            "/sys/class/net",
            Some("tmpfs"),
            MsFlags::MS_RDONLY,
            none,
        )
    })
    .map_err(io::Error::from)
}

fn keep(inbox: &Receiver<Job>) {
    while let Ok((mut command, reply)) = inbox.recv() {
        let _ = reply.send(command.spawn());
    }
}

/// Where `program` is, looked for as a shell does and in the system administrator's directories,
/// which an ordinary user's `PATH` lacks on Debian.
pub(crate) fn find_program(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.is_file().then(|| program.to_path_buf());
    }
    let path = search_path();
    env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// `PATH` with the system administrator's directories at its end.
pub(crate) fn search_path() -> String {
    let path = env::var("PATH").unwrap_or_default();
    format!("{path}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")
}
