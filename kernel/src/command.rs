//! Runs `nft` and `ip`, and turns their failures into errors with a remedy.
//!
//! Knows how to call the two programs, not their input.
use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// A program of the distribution that this crate drives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// nftables' command line.
    Nft,
    /// iproute2's command line.
    Ip,
}

/// Why a program failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// Not in `PATH`, nor where distributions put it.
    #[error("`{program}` is not installed; install the package `{}` (apt-get install {})", program.package(), program.package())]
    Missing {
        /// What was looked for.
        program: Program,
    },
    /// The kernel answered `EPERM`.
    #[error(
        "`{program}` is not permitted to change this network namespace; run as root or with CAP_NET_ADMIN"
    )]
    NotPermitted {
        /// What was run.
        program: Program,
    },
    /// It ran and refused.
    #[error("`{program} {arguments}` failed: {message}")]
    Refused {
        /// What was run.
        program: Program,
        /// Its arguments.
        arguments: String,
        /// Its first error.
        message: String,
    },
    /// It could not be run at all.
    #[error("cannot run `{program}`; check that it is an executable for this architecture")]
    Run {
        /// What was run.
        program: Program,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl CommandError {
    /// Whether the caller lacks `CAP_NET_ADMIN`.
    #[must_use]
    pub fn is_not_permitted(&self) -> bool {
        matches!(self, Self::NotPermitted { .. })
    }
}

impl Program {
    fn package(self) -> &'static str {
        match self {
            Self::Nft => "nftables",
            Self::Ip => "iproute2",
        }
    }

    /// Where it is: in `PATH`, or in the directories that an ordinary user's `PATH` lacks.
    pub fn find(self) -> Result<PathBuf, CommandError> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let usual = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
        std::env::split_paths(&path)
            .chain(usual)
            .map(|directory| directory.join(self.as_str()))
            .find(|file| {
                file.metadata()
                    .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
            })
            .ok_or(CommandError::Missing { program: self })
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Ip => "ip",
        }
    }
}

impl std::fmt::Display for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Runs `program` with `arguments` and `input` on its standard input; returns its standard output.
///
/// # Errors
/// [`CommandError`]; for `nft -f -` nothing was applied then.
pub fn run<A: AsRef<OsStr>>(
    program: Program,
    arguments: &[A],
    input: &str,
) -> Result<String, CommandError> {
    let cannot_run = |source| CommandError::Run { program, source };
    let mut child = Command::new(program.find()?)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(cannot_run)?;
    if let Some(mut stdin) = child.stdin.take() {
        match stdin.write_all(input.as_bytes()) {
            // It stopped reading before the end of its input; its exit status shows why.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            result => result.map_err(cannot_run)?,
        }
    }
    let output = child.wait_with_output().map_err(cannot_run)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    if stderr.contains("Operation not permitted") {
        return Err(CommandError::NotPermitted { program });
    }
    let shown: Vec<_> = arguments
        .iter()
        .map(|a| a.as_ref().to_string_lossy())
        .collect();
    Err(CommandError::Refused {
        program,
        arguments: shown.join(" "),
        message: complaint(&stderr),
    })
}

/// The first meaningful line of `stderr`, without the position in a script that no one sees.
fn complaint(stderr: &str) -> String {
    let error = stderr
        .lines()
        .find_map(|line| Some(line.split_once("Error: ")?.1));
    error
        .or_else(|| stderr.lines().next())
        .unwrap_or("it said nothing")
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_error_is_shown_without_its_position() {
        for (stderr, expected) in [
            (
                "/dev/stdin:4:21-21: Error: Could not process rule: Device or resource busy\ndelete\n  ^",
                "Could not process rule: Device or resource busy",
            ),
            (
                "# Warning: do not touch!\n/dev/stdin:1:1-2: Error: syntax error\n",
                "syntax error",
            ),
            (
                "RTNETLINK answers: Network is down\n",
                "RTNETLINK answers: Network is down",
            ),
            ("", "it said nothing"),
        ] {
            assert_eq!(complaint(stderr), expected, "{stderr:?}");
        }
    }
}
