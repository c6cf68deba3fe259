//! Conntrack's byte counters, which the records of kernel flows show.
//!
//! A network namespace counts for the flows that begin after it was switched on. If it cannot be
//! switched on, records have no bytes, and `inspect` reports it.
use kernel::command::{self, CommandError, Program};
use kernel::names::TABLE;
use kernel::sets::{self, SetsError};
use kernel::sysctl;

use crate::nft_table::Loaded;

/// Under /proc/sys/net.
pub(crate) const SYSCTL: &str = "netfilter/nf_conntrack_acct";
/// The set of our table that notes what `uninstall` is to switch off again.
const SWITCHED_ON: &str = "switched_on";
const NOTED: &str = "acct";

/// Whether conntrack counts. Loading or checking a rule with `ct packets` switches it on (linux
/// net/netfilter/nft_ct.c), so this is read before.
pub(crate) fn is_on() -> bool {
    sysctl::is_on(SYSCTL)
}

/// Switches conntrack's counting on, if the sysctl can be written, and notes in the table that it was off. Returns
/// whether anything changed.
///
/// # Errors
/// If it could not be noted; nothing is switched on then.
pub(crate) fn switch_on(was_on: bool) -> Result<bool, SetsError> {
    if was_on {
        return Ok(false);
    }
    note("add")?;
    if sysctl::write(SYSCTL, "1").is_err() {
        note("delete")?;
        return Ok(false);
    }
    Ok(true)
}

/// Switches counting on where the sysctl cannot be written, as in a container: by the check of a rule (see [`is_on`]).
///
/// # Errors
/// If `nft` is missing or refuses.
pub(crate) fn switch_on_again() -> Result<(), CommandError> {
    let rule =
        format!("table inet {TABLE}_counting {{ chain counting {{ ct original packets 0; }}; }}");
    command::run(Program::Nft, &["-c", "-f", "-"], &rule).map(drop)
}

/// What [`switch_on`] does, for `print`.
pub(crate) fn switch_on_script() -> String {
    format!(
        "# If it was off, that is noted in the table, for `uninstall`.\n[ ! -w /proc/sys/net/{SYSCTL} ] || echo 1 > /proc/sys/net/{SYSCTL}\n"
    )
}

/// Restores the setting after a check of rules.
pub(crate) fn leave_as(was_on: bool) {
    if !was_on && is_on() {
        let _ = sysctl::write(SYSCTL, "0");
    }
}

/// Undoes [`switch_on`], as `loaded` has it noted.
pub(crate) fn switch_off_again(loaded: &Loaded) {
    if loaded.strings("inet", SWITCHED_ON).any(|it| it == NOTED) {
        // Needless counting costs next to nothing; a failed uninstall would be worse.
        let _ = sysctl::write(SYSCTL, "0");
    }
}

fn note(verb: &str) -> Result<(), SetsError> {
    let set = format!("inet {TABLE} {SWITCHED_ON}");
    sets::load(&format!("{verb} element {set} {{ \"{NOTED}\" }}\n"))
}
