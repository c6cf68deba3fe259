//! Installs the redirect in this network namespace, uninstalls it, prints it.
//!
//! Order matters: routing first, then the table, then the rule that queues. At no time does a
//! packet pass that should be held: without the queue rule the table drops it.
use std::fmt::Write;
use std::io;
use std::thread;

use kernel::bridges::{self, BridgeError};
use kernel::command::{self, CommandError, Program};
use kernel::names::{BRIDGE, TABLE};
use kernel::sets::SetsError;

use crate::conntrack_acct;
use crate::contents::Contents;
pub use crate::nft_table::UnknownElement;
use crate::nft_table::{self, Loaded, Stamp};
use crate::probe::{ProbeError, probe_kernel};
use crate::queue_target::{self, QueueTarget};
use crate::routes::{self, Family};
use crate::ruleset::{Kernel, QUEUE_CHAIN, QueueRule, Ruleset};
use crate::settings::Settings;
use crate::watch;

/// Why the redirect could not be installed or uninstalled.
#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    /// Policies cannot be enforced on the bridge of `--bridge`.
    #[error(transparent)]
    Bridge(#[from] BridgeError),
    /// The last queue number would not fit into 16 bits.
    #[error("--queue {first} with {count} queues goes beyond 65535; take a lower --queue")]
    QueueRange {
        /// The first queue.
        first: u16,
        /// How many.
        count: u16,
    },
    /// The kernel cannot queue packets, or could not be asked.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// What is in the sets of the loaded table cannot be carried over.
    #[error(transparent)]
    UnknownElement(#[from] UnknownElement),
    /// The previous setting could not be recorded.
    #[error(transparent)]
    Sets(#[from] SetsError),
    /// Routes over `lo` need it.
    #[error(
        "`lo` is down in this network namespace, and intercepted packets need it; run `ip link set lo up`"
    )]
    LoopbackDown,
    /// `nft` or `ip` refused.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The tables cannot be read from the kernel.
    #[error(
        "cannot read nft tables {TABLE} from the kernel ({0}); run as root or with CAP_NET_ADMIN, or try again if other software is changing nft tables"
    )]
    Contents(#[source] io::Error),
    /// The kernel refused the rule that queues.
    #[error(
        "the kernel refused the NFQUEUE rule in chain {QUEUE_CHAIN} of nft table inet {TABLE}; packets for the queue are dropped: see `iptables-init check`, or remove the redirect with `iptables-init uninstall`"
    )]
    QueueTarget(#[source] io::Error),
}

/// What a call did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Something was changed.
    Changed,
    /// All was as it should be.
    Unchanged,
}

/// Installs everything; changes nothing and affects no packet if it is installed already.
///
/// Changed settings replace the old ones in one transaction, and the elements of
/// the sets stay.
///
/// # Errors
/// [`RedirectError`]; what was installed until then stays, and drops packets rather than passing them.
pub fn install(settings: &Settings) -> Result<Outcome, RedirectError> {
    validate(settings)?;
    let kernel = probe_kernel()?;
    if !settings.bridge.is_empty() && !kernel.bridges {
        return Err(BridgeError::NoFamily.into());
    }
    let ruleset = Ruleset::new(settings, kernel);
    let counting = conntrack_acct::is_on();
    let mut changed = false;
    if settings.tcp.has_proxy() {
        changed |= install_routes(settings)?;
    }
    changed |= load_table(&ruleset)?;
    if !settings.tcp.has_proxy() {
        changed |= uninstall_routes()?;
    }
    changed |= conntrack_acct::switch_on(counting)?;
    if !settings.bridge.is_empty() {
        changed |= bridges::switch_off()?;
    }
    Ok(if changed {
        Outcome::Changed
    } else {
        Outcome::Unchanged
    })
}

/// Removes what [`install`] created, with any settings, and nothing else.
///
/// # Errors
/// [`RedirectError`]; another run continues where it stopped.
pub fn uninstall() -> Result<Outcome, RedirectError> {
    let mut changed = false;
    let loaded = Loaded::read()?;
    if loaded.is_some() {
        // A running daemon must not repair what is uninstalled now. Without the chain there is no place for the mark.
        let _ = command::run(Program::Nft, &["-f", "-"], &nft_table::leaving_script());
    }
    let routes = uninstall_routes()?;
    changed |= routes;
    if loaded.is_some() && !routes {
        wait_for_daemon();
    }
    // Sysctls are restored while the tables still have the notes about them.
    if let Some(loaded) = loaded {
        bridges::switch_on_again(
            loaded.strings(BRIDGE, bridges::SWITCHED_OFF),
            loaded.strings(BRIDGE, bridges::KEPT_FROM_LEARNING),
        )?;
        conntrack_acct::switch_off_again(&loaded);
        command::run(Program::Nft, &["-f", "-"], &loaded.delete_script())?;
        changed = true;
    }
    Ok(if changed {
        Outcome::Changed
    } else {
        Outcome::Unchanged
    })
}

/// What [`install`] loads on a node without a redirect, as a shell script.
#[must_use]
pub fn script(settings: &Settings, kernel: Kernel, families: Families) -> String {
    let ruleset = Ruleset::new(settings, kernel);
    let mut script = String::from("#!/bin/sh -e\n");
    let families = match families {
        _ if !settings.tcp.has_proxy() => &[],
        Families::Both => &Family::ALL[..],
        Families::OnlyV4 => &Family::ALL[..1],
    };
    // Writing to a String cannot fail.
    for family in families {
        for arguments in [
            routes::add_rule(*family, settings.mark_mask),
            routes::add_route(*family),
        ] {
            let _ = writeln!(script, "ip {}", arguments.join(" "));
        }
    }
    let _ = writeln!(
        script,
        "nft -f - <<'END'\n{}END",
        nft_table::create_script(&ruleset)
    );
    if let Some(target) = queue_target(&ruleset) {
        let _ = writeln!(
            script,
            "# Then, by netlink since nft cannot write it, into chain {QUEUE_CHAIN}:\n# {target}"
        );
    }
    script += &conntrack_acct::switch_on_script();
    if !settings.bridge.is_empty() {
        script += &bridges::switch_off_script();
    }
    script
}

/// Which IP families the redirect is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Families {
    /// IPv4 and IPv6.
    Both,
    /// IPv6 is switched off in this network namespace.
    OnlyV4,
}

impl Families {
    /// The families that are enabled in this network namespace.
    #[must_use]
    pub fn here() -> Self {
        if Family::V6.enabled() {
            Self::Both
        } else {
            Self::OnlyV4
        }
    }
}

/// The netlink rule that belongs to `ruleset`; `None` where nft writes all.
pub(crate) fn queue_target(ruleset: &Ruleset) -> Option<QueueTarget> {
    let (first, count, bypass) = ruleset.queue();
    (ruleset.queue_rule() == QueueRule::Target).then_some(QueueTarget {
        first,
        count,
        bypass,
    })
}

/// Checks that `settings` can be installed.
pub(crate) fn validate(settings: &Settings) -> Result<(), RedirectError> {
    let (first, count) = (settings.queue, settings.queue_count());
    if first.checked_add(count - 1).is_none() {
        return Err(RedirectError::QueueRange { first, count });
    }
    Ok(())
}

/// Installs the rules and routes. Returns whether anything changed.
pub(crate) fn install_routes(settings: &Settings) -> Result<bool, RedirectError> {
    let mut changed = false;
    for family in routes::enabled_families() {
        changed |= routes::install(family, settings.mark_mask).map_err(of_routes)?;
    }
    Ok(changed)
}

/// Waits until a running daemon has seen the mark of [`uninstall`], where no missing route shows it: the daemon must
/// not repair the tables. Without a daemon nobody has bound the queues.
fn wait_for_daemon() {
    let queues = std::fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue");
    if queues.is_ok_and(|queues| !queues.is_empty()) {
        thread::sleep(watch::SEEN_WITHIN);
    }
}

/// Removes the rules and routes. Returns whether there were any.
fn uninstall_routes() -> Result<bool, RedirectError> {
    let mut changed = false;
    for family in Family::ALL {
        changed |= routes::uninstall(family)?;
    }
    Ok(changed)
}

/// Explains why `ip` rejected our routes.
fn of_routes(error: CommandError) -> RedirectError {
    match error {
        CommandError::Refused { message, .. } if message.contains("device is not up") => {
            RedirectError::LoopbackDown
        }
        other => other.into(),
    }
}

/// Lets nft and the kernel check everything that [`install`] loads, without loading it. Drops the packets that wait in
/// any queue of the network namespace.
///
/// # Errors
/// [`CommandError::Refused`] with what nft said.
pub(crate) fn dry_run(ruleset: &Ruleset) -> Result<(), CommandError> {
    let script = nft_table::create_script(ruleset);
    let counting = conntrack_acct::is_on();
    let tried = command::run(Program::Nft, &["-c", "-f", "-"], &script).map(drop);
    conntrack_acct::leave_as(counting);
    tried
}

/// Loads the tables if they differ from `ruleset`, and then stores the digest of what the kernel has.
fn load_table(ruleset: &Ruleset) -> Result<bool, RedirectError> {
    let script = match Loaded::read()? {
        None => nft_table::create_script(ruleset),
        Some(loaded) => {
            let now = Contents::read()
                .map_err(RedirectError::Contents)?
                .1
                .digest();
            if loaded.stamp == Some(Stamp::of(ruleset))
                && loaded.noted == Some(now)
                && loaded.tampered_chain(ruleset).is_none()
            {
                return Ok(false);
            }
            nft_table::replace_script(&loaded, ruleset, now)?
        }
    };
    command::run(Program::Nft, &["-f", "-"], &script)?;
    if let Some(target) = queue_target(ruleset)
        && !queue_target::is_loaded(target).map_err(RedirectError::QueueTarget)?
    {
        queue_target::load(target).map_err(RedirectError::QueueTarget)?;
    }
    let now = Contents::read()
        .map_err(RedirectError::Contents)?
        .1
        .digest();
    let note = nft_table::note_script(ruleset, now);
    command::run(Program::Nft, &["-f", "-"], &note)?;
    Ok(true)
}
