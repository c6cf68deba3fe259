//! The command line of both programs: flags, and environment variables where no flag is given.
//!
//! Knows no single flag.
use std::env;
use std::ffi::OsStr;

use clap::builder::{OsStr as Name, Resettable};
use clap::{Command, Parser};

/// Parses this process's arguments; on an error or a request for help, prints it and ends the process.
///
/// An empty variable counts as unset, since a ConfigMap can empty a variable but not unset it.
#[must_use]
pub fn parse<P: Parser>() -> P {
    let mut command = without_empty_variables(P::command());
    let matches = command.get_matches_mut();
    P::from_arg_matches(&matches).unwrap_or_else(|error| error.format(&mut command).exit())
}

fn without_empty_variables(command: Command) -> Command {
    let is_empty = |name: &OsStr| env::var_os(name).is_some_and(|value| value.is_empty());
    let command = command.mut_args(|argument| match argument.get_env() {
        Some(name) if is_empty(name) => argument.env(Resettable::<Name>::Reset),
        _ => argument,
    });
    command.mut_subcommands(without_empty_variables)
}
