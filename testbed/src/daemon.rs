//! A running daemon with its log, and calls of the init step.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use lab::{Child, Host, wait_until};

use crate::{DEADLINE, portreeve};

/// A daemon and its log.
pub struct Daemon {
    /// Its process.
    pub child: Child,
    pub(crate) log: PathBuf,
}

impl Daemon {
    /// How many descriptors the process has open.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id()))
            .unwrap()
            .count()
    }

    /// The most memory that the process has had, in bytes (`VmHWM`, proc_pid_status(5)).
    pub fn peak_memory(&self) -> usize {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmHWM:"))
            .unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<usize>()
            .unwrap()
            << 10
    }

    /// Waits until its log has this.
    pub fn says(&self, text: &str) {
        let said = wait_until(DEADLINE, text, || self.log().contains(text));
        said.unwrap_or_else(|error| panic!("{error}\n{}", self.log()));
    }

    /// Stops it as Kubernetes stops a pod; it must exit with success.
    pub fn terminate(&mut self) {
        self.child.terminate();
        let status = self.child.wait(DEADLINE).unwrap();
        assert!(status.success(), "{status}\n{}", self.log());
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }
}

/// Runs `iptables-init` on a node.
pub fn init(node: &Host, call: &str, flags: &[&str]) -> Output {
    init_with(node, call, flags, &[])
}

/// The same with environment variables.
pub(crate) fn init_with(
    node: &Host,
    call: &str,
    flags: &[&str],
    variables: &[(&str, String)],
) -> Output {
    let program = Path::new(portreeve()).with_file_name("iptables-init");
    assert!(
        program.is_file(),
        "{} is not built; run `cargo build --workspace` in the same profile",
        program.display()
    );
    let mut command = node.command(program);
    command.arg(call).args(flags);
    for (name, value) in variables {
        command.env(name, value);
    }
    command.output().unwrap()
}

pub(crate) fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    let from = lines.len().saturating_sub(20);
    format!("--- {}\n{}\n", log.display(), lines[from..].join("\n"))
}
