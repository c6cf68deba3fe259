//! Questions to a cluster's state: `portreeve check`, `portreeve matrix` and the admin port's explain.
//!
//! The commands are offline and without privilege: manifests in, answers on standard output, everything else on
//! standard error. Knows nothing of the daemon, the kernel or a running cluster.
mod check;
mod matrix;
mod resolve;
mod survey;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use controller::manifest::{self, LoadError};
use policy::{Cluster, Protocol};

pub(crate) use check::{CheckArgs, Question, check, explain, tell};
pub(crate) use matrix::{MatrixArgs, matrix};
pub(crate) use survey::{Plan, Port, Scope, Survey};

use resolve::ResolveError;

/// Exit status when the question or the manifests are wrong.
const WRONG: u8 = 2;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error(
        "the source {0:?} cannot be asked offline; give --cluster dir:PATH, a manifest file or a directory of them"
    )]
    NotOffline(String),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    #[error("cannot read {}: {source}; give --queries a file of JSON lines, or - for standard input", path.display())]
    Queries { path: PathBuf, source: io::Error },
    #[error("cannot write the answer: {0}; see where standard output leads")]
    Output(#[from] io::Error),
}

/// Loads the manifests of `--cluster`; their warnings go to standard error.
fn load(source: &str) -> Result<Cluster, AskError> {
    let path = source.strip_prefix("dir:").filter(|path| !path.is_empty());
    let path = path.ok_or_else(|| AskError::NotOffline(source.to_owned()))?;
    let loaded = manifest::load(Path::new(path))?;
    for warning in &loaded.warnings {
        eprintln!("portreeve: warning: {warning}");
    }
    Ok(loaded.cluster)
}

/// Turns a failure into exit status 2 and its text on standard error, a line per fault.
fn finish(outcome: Result<ExitCode, AskError>) -> ExitCode {
    match outcome {
        Ok(code) => code,
        // Whoever reads our output has enough of it; that is no fault.
        Err(AskError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::from(WRONG)
        }
        Err(error) => {
            for line in error.to_string().lines() {
                eprintln!("portreeve: {line}");
            }
            ExitCode::from(WRONG)
        }
    }
}

/// `TCP`, `UDP` or `SCTP`, in any case.
pub(crate) fn protocol(text: &str) -> Result<Protocol, policy::UnknownProtocol> {
    text.to_ascii_uppercase().parse()
}

/// Colour only where a person sees it and has not asked for none (<https://no-color.org>).
pub(crate) fn coloured(terminal: bool) -> bool {
    terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
