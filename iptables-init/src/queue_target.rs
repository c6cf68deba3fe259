//! The one rule that `nft` cannot write: the iptables target `NFQUEUE` inside an nft chain.
//!
//! Kernels without `CONFIG_NFT_QUEUE` still have xt_NFQUEUE, and nf_tables can hold it as a
//! `target` expression (`CONFIG_NFT_COMPAT`); iptables-nft builds its rules the same way. Message
//! layout: linux/netfilter/nf_tables.h, nf_tables_compat.h, nfnetlink.h, xt_NFQUEUE.h.
use std::io;

use kernel::names::TABLE;
use kernel::netlink;
use kernel::nf_tables::{Batch, INET, dump};

use crate::ruleset::QUEUE_CHAIN;

const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_GETRULE: u16 = 7;
const NFT_MSG_DELRULE: u16 = 8;
const NFQ_FLAG_BYPASS: u16 = 1;
const NFQ_FLAG_CPU_FANOUT: u16 = 2;

/// Where the rule sends packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QueueTarget {
    pub(crate) first: u16,
    pub(crate) count: u16,
    /// Packets pass when nobody listens on the queue.
    pub(crate) bypass: bool,
}

/// Makes the rule the only one of our queue chain, in one transaction.
///
/// # Errors
/// What the kernel answered: `ENOENT` without the table or without xt_NFQUEUE, `EPERM`, ...
pub(crate) fn load(target: QueueTarget) -> io::Result<()> {
    let mut batch = Batch::default();
    batch.begin();
    batch.message(NFT_MSG_DELRULE, 0, |m| {
        m.string(1, TABLE);
        m.string(2, QUEUE_CHAIN);
    });
    add_rule(&mut batch, TABLE, target);
    batch.end();
    batch.send()
}

/// Whether the rule is the only one of our queue chain.
///
/// # Errors
/// What the kernel answered, but for a missing table or chain: then it is not there.
pub(crate) fn is_loaded(target: QueueTarget) -> io::Result<bool> {
    let rules = dump(NFT_MSG_GETRULE, INET, |m| {
        m.string(1, TABLE);
        m.string(2, QUEUE_CHAIN);
    });
    let rules = match rules {
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => return Ok(false),
        rules => rules?,
    };
    Ok(rules.len() == 1 && target_info(&rules[0]) == Some(&target.info()[..]))
}

/// Asks the kernel whether it could hold the rule; changes nothing, since the batch has no end.
///
/// # Errors
/// What the kernel answered.
pub(crate) fn probe() -> io::Result<()> {
    let mut batch = Batch::default();
    let table = "portreeve_probe";
    batch.begin();
    batch.message(NFT_MSG_NEWTABLE, netlink::CREATE, |m| m.string(1, table));
    batch.message(NFT_MSG_NEWCHAIN, netlink::CREATE, |m| {
        m.string(1, table);
        m.string(3, QUEUE_CHAIN);
    });
    add_rule(
        &mut batch,
        table,
        QueueTarget {
            first: 0,
            count: 1,
            bypass: false,
        },
    );
    batch.send()
}

impl std::fmt::Display for QueueTarget {
    /// As iptables writes it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let last = self.first.saturating_add(self.count - 1);
        write!(
            f,
            "-j NFQUEUE --queue-balance {}:{last} --queue-cpu-fanout",
            self.first
        )?;
        if self.bypass {
            f.write_str(" --queue-bypass")
        } else {
            Ok(())
        }
    }
}

impl QueueTarget {
    /// `struct xt_NFQ_info_v3 { u16 queuenum, queues_total, flags; }`, aligned to 8.
    fn info(self) -> [u8; 8] {
        let flags = NFQ_FLAG_CPU_FANOUT | if self.bypass { NFQ_FLAG_BYPASS } else { 0 };
        let mut info = [0; 8];
        info[0..2].copy_from_slice(&self.first.to_ne_bytes());
        info[2..4].copy_from_slice(&self.count.to_ne_bytes());
        info[4..6].copy_from_slice(&flags.to_ne_bytes());
        info
    }
}

/// Adds the rule to our queue chain of `table`.
fn add_rule(batch: &mut Batch, table: &str, target: QueueTarget) {
    let info = target.info();
    batch.message(NFT_MSG_NEWRULE, netlink::CREATE | netlink::APPEND, |m| {
        m.string(1, table);
        m.string(2, QUEUE_CHAIN);
        m.nested(4, |expressions| {
            expressions.nested(1, |expression| {
                expression.string(1, "target");
                expression.nested(2, |data| {
                    data.string(1, "NFQUEUE");
                    data.bytes(2, &3u32.to_be_bytes());
                    data.bytes(3, &info);
                });
            });
        });
    });
}

/// The parameters of the NFQUEUE target in a rule that is nothing but it.
fn target_info(rule: &[u8]) -> Option<&[u8]> {
    let value = |bytes, kind| netlink::find(bytes, kind).map(|attribute| attribute.value);
    let mut expressions = netlink::attributes(value(rule, 4)?);
    let expression = expressions.next()?.value;
    let data = value(expression, 2)?;
    let is_target = value(expression, 1)? == b"target\0" && value(data, 1)? == b"NFQUEUE\0";
    (is_target && expressions.next().is_none()).then_some(value(data, 3)?)
}
