//! The one-shot init step: installs the redirect in the network namespace it is started in, or removes
//! it. All that is worth testing is in the library.
use std::process::ExitCode;

use clap::Parser;
use iptables_init::arguments::parse;
use iptables_init::inspect;
use iptables_init::probe::{ProbeError, probe_kernel};
use iptables_init::redirect::{self, Families, Outcome};
use iptables_init::ruleset::{Kernel, QueueRule};
use iptables_init::settings::Settings;

/// Installs Portreeve's redirect in this network namespace, or removes it.
#[derive(Parser)]
#[command(name = "iptables-init", version)]
struct Arguments {
    #[command(subcommand)]
    call: Call,
}

#[derive(clap::Subcommand)]
enum Call {
    /// Install the redirect; running it again changes nothing and affects no packet.
    Install(Settings),
    /// Remove what `install` created, and nothing else.
    Uninstall(Settings),
    /// Print what `install` would load; needs no privilege, touches nothing.
    Print(Settings),
    /// Check the installation and the kernel's features; one line per problem.
    Check(Settings),
}

fn main() -> ExitCode {
    match run(parse::<Arguments>().call) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("iptables-init: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(call: Call) -> anyhow::Result<ExitCode> {
    match call {
        Call::Install(settings) => {
            match redirect::install(&settings)? {
                Outcome::Changed => println!("installed"),
                Outcome::Unchanged => println!("already installed; nothing changed"),
            }
            // What is in place may still not work here, because of a sysctl for example.
            for finding in inspect(&settings) {
                eprintln!("{finding}");
            }
        }
        Call::Uninstall(_) => match redirect::uninstall()? {
            Outcome::Changed => println!("uninstalled"),
            Outcome::Unchanged => println!("was not installed; nothing changed"),
        },
        Call::Print(settings) => print(&settings)?,
        Call::Check(settings) => return Ok(check(&settings)),
    }
    Ok(ExitCode::SUCCESS)
}

fn print(settings: &Settings) -> anyhow::Result<()> {
    let kernel = match probe_kernel() {
        Ok(kernel) => kernel,
        // Only a privileged process can ask the kernel.
        Err(ProbeError::Command(_)) => Kernel {
            queue_rule: QueueRule::Native,
            bridges: true,
        },
        Err(error) => return Err(error.into()),
    };
    print!("{}", redirect::script(settings, kernel, Families::here()));
    Ok(())
}

fn check(settings: &Settings) -> ExitCode {
    let findings = inspect(settings);
    for finding in &findings {
        println!("{finding}");
    }
    if findings.iter().any(|finding| finding.fatal) {
        return ExitCode::FAILURE;
    }
    println!("all is in place");
    ExitCode::SUCCESS
}
