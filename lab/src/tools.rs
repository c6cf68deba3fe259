//! Runs `ip`, `bridge` and `nft` inside a namespace, one process for a whole script.
//!
//! Knows nothing of what the scripts say.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::netns::{Netns, NetnsError};
use crate::process::{find_program, search_path};

/// Why a script was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The tool is not installed.
    #[error("`{program}` is not installed; run `apt-get install {package}`")]
    Missing {
        /// The tool.
        program: &'static str,
        /// Debian's package of it.
        package: &'static str,
    },
    /// The tool could not be run.
    #[error("`{program}` could not be run; see the process limits")]
    Run {
        /// The tool.
        program: &'static str,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// The tool refused the script.
    #[error(
        "`{program}` refused `{line}`: {complaint}; correct it, or load the kernel module that it needs"
    )]
    Refused {
        /// The tool.
        program: &'static str,
        /// What it wrote on standard error.
        complaint: String,
        /// The line that it complained of, if it named one.
        line: String,
    },
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
}

/// The programs of a folder of `lab/tools` have not been built.
#[derive(Debug, thiserror::Error)]
#[error("the programs of lab/tools/{module} are not there ({complaint}); run `make tools`")]
pub struct NotBuilt {
    module: &'static str,
    complaint: String,
}

/// The folder of the programs that `lab/tools/build` made of a folder of `lab/tools`.
///
/// # Errors
/// If it has not made them yet.
pub fn built(module: &'static str) -> Result<PathBuf, NotBuilt> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/build");
    let not_built = |complaint| NotBuilt { module, complaint };
    let said = Command::new(script)
        .args(["--where", module])
        .output()
        .map_err(|error| not_built(error.to_string()))?;
    if !said.status.success() {
        let complaint = String::from_utf8_lossy(&said.stderr).trim().to_owned();
        return Err(not_built(complaint));
    }
    Ok(PathBuf::from(String::from_utf8_lossy(&said.stdout).trim()))
}

struct Tool {
    program: &'static str,
    package: &'static str,
    args: &'static [&'static str],
}

/// Carries out the lines of an `ip -batch` script; it stops at the first fault.
pub(crate) fn ip(netns: &Netns, script: &str) -> Result<(), ToolError> {
    run(
        netns,
        &Tool {
            program: "ip",
            package: "iproute2",
            args: &["-batch", "-"],
        },
        script,
    )
}

/// Carries out the lines of a `bridge -batch` script; it stops at the first fault.
pub(crate) fn bridge(netns: &Netns, script: &str) -> Result<(), ToolError> {
    run(
        netns,
        &Tool {
            program: "bridge",
            package: "iproute2",
            args: &["-batch", "-"],
        },
        script,
    )
}

/// Loads an nft script: all of it or nothing.
pub(crate) fn nft(netns: &Netns, script: &str) -> Result<(), ToolError> {
    run(
        netns,
        &Tool {
            program: "nft",
            package: "nftables",
            args: &["-f", "-"],
        },
        script,
    )
}

fn run(netns: &Netns, tool: &Tool, script: &str) -> Result<(), ToolError> {
    let Tool {
        program,
        package,
        args,
    } = *tool;
    let file = find_program(Path::new(program)).ok_or(ToolError::Missing { program, package })?;
    let mut command = Command::new(file);
    command
        .args(args)
        .env("PATH", search_path())
        .env("LC_ALL", "C");
    let output = netns
        .run(|| feed(command, script))?
        .map_err(|source| ToolError::Run { program, source })?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr).trim().to_string();
    let line = faulty_line(&complaint, script);
    Err(ToolError::Refused {
        program,
        complaint,
        line,
    })
}

/// The line of the script that a complaint names first: `/dev/stdin:5:8-13: Error` or
/// `Command failed -:5`.
fn faulty_line(complaint: &str, script: &str) -> String {
    let mut numbers = complaint.split(':').skip(1).filter_map(|text| {
        text.split(|c: char| !c.is_ascii_digit())
            .next()?
            .parse::<usize>()
            .ok()
    });
    let line = numbers.find_map(|number| script.lines().nth(number.checked_sub(1)?));
    line.unwrap_or_default().trim().to_string()
}

fn feed(mut command: Command, script: &str) -> io::Result<Output> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let written = child
        .stdin
        .take()
        .map_or(Ok(()), |mut stdin| stdin.write_all(script.as_bytes()));
    let output = child.wait_with_output()?;
    // A tool that refuses a script may stop reading it: its own complaint says more.
    match written {
        Err(error) if output.status.success() => Err(error),
        _ => Ok(output),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_in_tool_error_is_found() {
        let script = "one\n\ttwo\nthree\n";
        for (complaint, expected) in [
            (
                "/dev/stdin:2:8-13: Error: syntax error, unexpected reject",
                "two",
            ),
            (
                "Error: argument \"x\" is wrong\nCommand failed -:3",
                "three",
            ),
            (
                "Error: Could not process rule: No such file or directory",
                "",
            ),
        ] {
            assert_eq!(faulty_line(complaint, script), expected, "{complaint}");
        }
    }
}
