//! `portreeve ready`: whether the daemon of this pod enforces, for a pod's probes.
//!
//! All daemons of a node share its network, so during a handover the admin port alone does not show which daemon
//! answers.
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::client::{ClientError, ask};
use super::{ConsoleError, Daemon, run};

/// A later answer would miss the probe's timeout anyway.
const WITHIN: Duration = Duration::from_secs(2);

/// Check, for probes, whether the daemon of this pod enforces the newest state. Exit status 0: it does. 1: it does not, or
/// another pod's daemon enforces. 2: no daemon answers.
#[derive(Args, Debug)]
pub(crate) struct ReadyArgs {
    /// The pod whose daemon to check [default: any daemon]. A daemon without
    /// `--handover` answers for all
    #[arg(long, value_name = "UID", env = "POD_UID")]
    pod: Option<String>,
    #[command(flatten)]
    daemon: Daemon,
}

/// Runs `portreeve ready`.
pub(crate) fn ready(args: &ReadyArgs) -> ExitCode {
    run(answer(args))
}

async fn answer(args: &ReadyArgs) -> Result<ExitCode, ConsoleError> {
    let admin = args.daemon.admin;
    let parameters = [("pod", args.pod.as_deref())];
    let said = async { ask(admin, "/readyz", &parameters).await?.text().await };
    let said = tokio::time::timeout(WITHIN, said).await;
    match said.unwrap_or(Err(ClientError::Silent { admin })) {
        Ok(text) if text.starts_with("ready\n") => Ok(ExitCode::SUCCESS),
        Ok(_) => Err(ClientError::Foreign { admin }.into()),
        Err(ClientError::Refused(why)) => {
            eprintln!("portreeve: {why}");
            Ok(ExitCode::FAILURE)
        }
        Err(error) => Err(error.into()),
    }
}
