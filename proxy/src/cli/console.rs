//! Commands that ask a running daemon: `portreeve explain`, `portreeve connections`, `portreeve
//! observe`, `portreeve ready`.
//!
//! They need no privilege, only the daemon's admin port. Knows nothing of policies: the daemon's
//! answers are printed.
mod client;
mod connections;
mod explain;
mod format;
mod observe;
mod ready;

use std::io;
use std::net::SocketAddr;
use std::process::ExitCode;

use clap::{Args, ValueEnum};

pub(crate) use connections::{ConnectionsArgs, connections};
pub(crate) use explain::{ExplainArgs, explain};
pub(crate) use observe::{ObserveArgs, observe};
pub(crate) use ready::{ReadyArgs, ready};

use client::ClientError;

/// Exit status when the query is invalid or no daemon answers.
const WRONG: u8 = 2;

/// The daemon to query.
#[derive(Args, Clone, Copy, Debug)]
struct Daemon {
    /// The daemon's admin port
    #[arg(
        long,
        value_name = "ADDR",
        default_value = "127.0.0.1:15020",
        env = "PORTREEVE_ADMIN"
    )]
    admin: SocketAddr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
enum ConsoleError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(
        "unexpected answer of the daemon ({0}); use the `portreeve` binary of the daemon's version"
    )]
    Answer(#[from] serde_json::Error),
    #[error("cannot write the answer: {0}; see where standard output leads")]
    Output(#[from] io::Error),
}

/// Runs a command to its end on this thread; a failure is exit status 2 and its text on standard
/// error.
fn run(work: impl Future<Output = Result<ExitCode, ConsoleError>>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(work),
        Err(error) => Err(error.into()),
    };
    match outcome {
        Ok(code) => code,
        // The reader of our output has closed it, as `head` does: not a fault.
        Err(ConsoleError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("portreeve: {error}");
            ExitCode::from(WRONG)
        }
    }
}
