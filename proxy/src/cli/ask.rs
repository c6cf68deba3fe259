//! Queries of a cluster's state: `portreeve check`, `portreeve matrix` and the admin port's explain.
//!
//! The commands need no privilege: they read manifests, or list the objects of the API server once. Answers go to
//! standard output, everything else to standard error. Knows nothing of the daemon and the kernel.
mod check;
mod matrix;
mod resolve;
mod survey;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use controller::Severity;
use controller::kube::{self, ApiError};
use controller::manifest::{self, LoadError};
use policy::{Cluster, Protocol};
use tokio::runtime::{self, Runtime};

pub(crate) use check::{CheckArgs, Question, check, explain, tell};
pub(crate) use matrix::{MatrixArgs, matrix};
pub(crate) use survey::{Plan, Port, Scope, Survey};

use resolve::ResolveError;

/// Exit status when the question or the manifests are wrong.
const WRONG: u8 = 2;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error("--cluster {0:?} is neither kube nor dir:PATH; give one of them")]
    Source(String),
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error("cannot start a runtime for requests to the API server: {0}")]
    Runtime(io::Error),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    #[error("cannot read {}: {source}; give --queries a file of JSON lines, or - for standard input", path.display())]
    Queries { path: PathBuf, source: io::Error },
    #[error("cannot write the answer: {0}; see where standard output leads")]
    Output(#[from] io::Error),
}

/// The cluster that a command asks about.
#[derive(clap::Args, Debug)]
struct SourceArgs {
    /// Where the cluster's state comes from: `kube`, the API server as kubectl finds it, or `dir:PATH`, a manifest
    /// file or a directory of them
    #[arg(
        long,
        value_name = "SOURCE",
        env = "PORTREEVE_CLUSTER",
        default_value = "kube"
    )]
    cluster: String,
}

impl SourceArgs {
    /// Reads the cluster once; its diagnostics go to standard error.
    fn load(&self) -> Result<Cluster, AskError> {
        let source = self.cluster.as_str();
        let path = source.strip_prefix("dir:").filter(|path| !path.is_empty());
        let loaded = match (source, path) {
            ("kube", _) => runtime()
                .map_err(AskError::Runtime)?
                .block_on(kube::load())?,
            (_, Some(path)) => manifest::load(Path::new(path))?,
            (_, None) => return Err(AskError::Source(source.to_owned())),
        };
        for problem in &loaded.problems {
            let severity = match problem.severity {
                Severity::Error => "error",
                Severity::Warning => "warning",
            };
            eprintln!("portreeve: {severity}: {problem}");
        }
        Ok(loaded.cluster)
    }
}

fn runtime() -> io::Result<Runtime> {
    runtime::Builder::new_current_thread().enable_all().build()
}

/// Prints a failure to standard error, one diagnostic per line, and returns exit status 2.
fn finish(outcome: Result<ExitCode, AskError>) -> ExitCode {
    match outcome {
        Ok(code) => code,
        // The reader of our output has closed it, as `head` does: not a fault.
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

/// Colour only on a terminal and without `NO_COLOR` (<https://no-color.org>).
pub(crate) fn coloured(terminal: bool) -> bool {
    terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
