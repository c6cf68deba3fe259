//! Probes this kernel's netfilter features: `nft -c` sends the rules and aborts
//! the transaction, so nothing changes.
//!
//! To take out a hook, or a rule that sets a zone, the kernel drops all packets that wait in any queue of the
//! network namespace (linux net/netfilter, `nf_queue_nf_hook_drop`), after a trial too. So chains have no hook
//! where possible, and rules that need one are not probed while packets of ours may wait.
use std::io;

use kernel::command::{self, CommandError, Program};
use kernel::names::{BRIDGE, BRIDGE_FAMILY, BRIDGE_OPTION, MODULE_PACKAGES};

use crate::queue_target;
use crate::ruleset::{Kernel, QueueRule};

/// Something that the redirect needs from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Feature {
    /// What it is, as users of nft call it.
    pub(crate) name: &'static str,
    /// The kernel options that bring it.
    pub(crate) options: &'static str,
    /// The modules that bring it.
    pub(crate) modules: &'static str,
    /// The family of the table that it is tried in, and the rule.
    family: &'static str,
    rule: &'static str,
    /// The chain's hook, for rules that are valid only with one.
    hook: Option<&'static str>,
    /// Probing it drops queued packets.
    pub(crate) disturbs: bool,
    /// Only the proxy needs it.
    pub(crate) of_proxy: bool,
}

/// All that is needed but a way to queue.
pub(crate) const FEATURES: [Feature; 9] = [
    Feature {
        name: "nf_tables with the family inet",
        options: "CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET",
        modules: "nf_tables",
        family: "inet",
        rule: "accept",
        hook: None,
        disturbs: false,
        of_proxy: false,
    },
    Feature {
        name: "nft tproxy",
        options: "CONFIG_NFT_TPROXY",
        modules: "nft_tproxy",
        family: "inet",
        rule: "meta l4proto tcp tproxy to :15001",
        hook: None,
        disturbs: false,
        of_proxy: true,
    },
    Feature {
        name: "nft socket",
        options: "CONFIG_NFT_SOCKET",
        modules: "nft_socket",
        family: "inet",
        rule: "socket transparent 1",
        hook: None,
        disturbs: false,
        of_proxy: true,
    },
    Feature {
        name: "nft fib",
        options: "CONFIG_NFT_FIB_INET, CONFIG_NFT_FIB_IPV4, CONFIG_NFT_FIB_IPV6",
        modules: "nft_fib_inet",
        family: "inet",
        rule: "fib daddr type local fib saddr . iif oif missing",
        hook: None,
        disturbs: false,
        of_proxy: false,
    },
    Feature {
        name: "nft matches on IPv4 options",
        options: "CONFIG_NF_TABLES of Linux 5.3 or later",
        modules: "nf_tables",
        family: "inet",
        rule: "ip option lsrr exists",
        hook: None,
        disturbs: false,
        of_proxy: false,
    },
    Feature {
        name: "connection tracking with marks in nft",
        options: "CONFIG_NFT_CT, CONFIG_NF_CONNTRACK_MARK",
        modules: "nf_conntrack nft_ct",
        family: "inet",
        rule: "ct mark set ct mark or 0x400",
        hook: None,
        disturbs: false,
        of_proxy: false,
    },
    Feature {
        name: "connection tracking with zones in nft",
        options: "CONFIG_NFT_CT, CONFIG_NF_CONNTRACK_ZONES",
        modules: "nf_conntrack nft_ct",
        family: "inet",
        rule: "ct original zone set 15001",
        hook: None,
        disturbs: true,
        of_proxy: true,
    },
    Feature {
        name: "nft nat",
        options: "CONFIG_NFT_NAT, CONFIG_NF_NAT",
        modules: "nft_chain_nat",
        family: "inet",
        rule: "accept",
        hook: Some("type nat hook postrouting priority srcnat;"),
        disturbs: true,
        of_proxy: false,
    },
    Feature {
        name: "nft reject",
        options: "CONFIG_NFT_REJECT_INET",
        modules: "nft_reject_inet",
        family: "inet",
        rule: "reject with icmpx admin-prohibited",
        hook: None,
        disturbs: false,
        of_proxy: false,
    },
];

/// What pods on a Linux bridge need on top.
pub(crate) const BRIDGES: Feature = Feature {
    name: BRIDGE_FAMILY,
    options: BRIDGE_OPTION,
    modules: "bridge nf_tables",
    family: BRIDGE,
    rule: "meta iifkind \"veth\" ether daddr set 02:00:00:00:00:01 meta pkttype set host",
    hook: None,
    disturbs: false,
    of_proxy: false,
};

/// Why no way to hand packets to user space was found.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Neither way is there.
    #[error(
        "this kernel can queue packets to user space neither by nft `queue` (CONFIG_NFT_QUEUE, module nft_queue: {native}) nor by the iptables target NFQUEUE (CONFIG_NFT_COMPAT and CONFIG_NETFILTER_XT_TARGET_NFQUEUE, modules nft_compat xt_NFQUEUE: {target}); load one of them with modprobe, or install the kernel's full set of modules ({MODULE_PACKAGES})"
    )]
    NoQueue {
        /// What `nft -c` said.
        native: String,
        /// What the kernel said.
        target: io::Error,
    },
    /// `nft` could not be asked.
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// Finds out what this kernel can do.
///
/// # Errors
/// As [`probe_queue_rule`]: a kernel without nft's family `bridge` is none.
pub fn probe_kernel() -> Result<Kernel, ProbeError> {
    let queue_rule = probe_queue_rule()?;
    let bridges = match BRIDGES.probe() {
        Ok(()) => true,
        Err(CommandError::Refused { .. }) => false,
        Err(error) => return Err(error.into()),
    };
    Ok(Kernel {
        queue_rule,
        bridges,
    })
}

/// Finds out which way to hand packets to user space this kernel has: nft's own `queue` if it can.
///
/// # Errors
/// [`ProbeError`] with kernel options, modules and packages if there is none.
pub fn probe_queue_rule() -> Result<QueueRule, ProbeError> {
    let native = match ask("inet", None, "queue flags fanout,bypass num 100-101") {
        Ok(()) => return Ok(QueueRule::Native),
        Err(CommandError::Refused { message, .. }) => message,
        Err(error) => return Err(error.into()),
    };
    match queue_target::probe() {
        Ok(()) => Ok(QueueRule::Target),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(CommandError::NotPermitted {
                program: Program::Nft,
            }
            .into())
        }
        Err(target) => Err(ProbeError::NoQueue { native, target }),
    }
}

impl Feature {
    /// Whether this kernel has it.
    ///
    /// # Errors
    /// [`CommandError::Refused`] with what nft said if not.
    pub(crate) fn probe(&self) -> Result<(), CommandError> {
        ask(self.family, self.hook, self.rule)
    }
}

fn ask(family: &str, hook: Option<&str>, rule: &str) -> Result<(), CommandError> {
    let hook = hook.unwrap_or_default();
    let script = format!(
        "table {family} portreeve_probe {{\n\tchain probe {{\n\t\t{hook}\n\t\t{rule}\n\t}}\n}}\n"
    );
    command::run(Program::Nft, &["-c", "-f", "-"], &script).map(drop)
}
