//! The redirect as a value, rendered to nft by a pure function.
//!
//! Chains are made once: deleting or re-creating a hooked base chain flushes every packet that
//! waits in any queue of the namespace. The daemon changes only the sets. The rules themselves stand
//! in `ruleset.nft`.
use std::fmt;

use crate::marks::{Answer, Marks};
use crate::settings::{Fail, Settings};

/// Name of our table, of family `inet`.
pub const TABLE: &str = "portreeve";

/// The chain that holds nothing but the rule that hands packets to the queue.
pub const QUEUE_CHAIN: &str = "to_gate";

/// Conntrack zone of the original direction of upstream connections. Without one of their own, an
/// upstream leg from the client's address could meet the client's own connection in one entry.
const UPSTREAM_ZONE: u16 = 15001;

/// How this kernel can hand packets to user space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueRule {
    /// The nft statement `queue` (`CONFIG_NFT_QUEUE`).
    Native,
    /// The iptables target `NFQUEUE`, loaded into our chain by netlink (`CONFIG_NFT_COMPAT`).
    Target,
}

/// All of our nft table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    proxy_port: u16,
    first_queue: u16,
    queue_count: u16,
    marks: Marks,
    fail: Fail,
    queue_rule: QueueRule,
}

impl Ruleset {
    /// The table that `settings` ask for on a kernel that can do `queue_rule`.
    #[must_use]
    pub fn new(settings: &Settings, queue_rule: QueueRule) -> Self {
        Self {
            proxy_port: settings.proxy_port,
            first_queue: settings.queue,
            queue_count: settings.queue_count(),
            marks: settings.mark_mask,
            fail: settings.fail,
            queue_rule,
        }
    }

    /// The way this table hands packets to user space.
    #[must_use]
    pub fn queue_rule(&self) -> QueueRule {
        self.queue_rule
    }

    /// First queue, how many, and whether a packet passes when nobody listens.
    #[must_use]
    pub fn queue(&self) -> (u16, u16, bool) {
        (self.first_queue, self.queue_count, self.fail == Fail::Open)
    }
}

impl fmt::Display for Ruleset {
    /// Writes the table as `nft -f` reads it.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = include_str!("ruleset.nft");
        while let Some((before, after)) = rest.split_once('$') {
            let end = after.find(|c: char| c != '_' && !c.is_ascii_lowercase());
            let (name, behind) = after.split_at(end.unwrap_or(after.len()));
            out.write_str(before)?;
            self.value(name, out)?;
            rest = behind;
        }
        out.write_str(rest)
    }
}

impl Ruleset {
    /// Writes what `$name` stands for in `ruleset.nft`.
    fn value(&self, name: &str, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let marks = self.marks;
        let mark = match name {
            "divert" => marks.divert(),
            "hold" => marks.hold(),
            "held" => marks.hold() | marks.divert(),
            "upstream" => marks.upstream(),
            "client" => marks.client(),
            "ours" => marks.mask(),
            "others" => !marks.mask(),
            "reset" => marks.answer(Answer::Reset),
            "host_unreachable" => marks.answer(Answer::HostUnreachable),
            "net_unreachable" => marks.answer(Answer::NetUnreachable),
            "carry" => marks.answer(Answer::Carry),
            "carried" => marks.carried(),
            "prohibited" => marks.answer(Answer::Prohibited),
            "proxy_port" => return write!(out, "{}", self.proxy_port),
            "upstream_zone" => return write!(out, "{UPSTREAM_ZONE}"),
            "no_daemon" => return out.write_str(self.no_daemon()),
            "queue" => return out.write_str(&self.queue_statement()),
            // Not nft's language, so that nothing half filled in can be loaded.
            unknown => return write!(out, "<no value for {unknown}>"),
        };
        write!(out, "{mark:#x}")
    }

    /// What becomes of a SYN without a listener.
    fn no_daemon(&self) -> &'static str {
        match self.fail {
            Fail::Open => "accept",
            Fail::Closed => "drop",
        }
    }

    fn queue_statement(&self) -> String {
        let (first, count, bypass) = self.queue();
        let last = first.saturating_add(count - 1);
        match (self.queue_rule, count, bypass) {
            (QueueRule::Target, ..) => "# The NFQUEUE target, which nft cannot write.".to_owned(),
            // nft takes neither a range of one nor a fan-out over it.
            (QueueRule::Native, 1, true) => format!("queue flags bypass num {first}"),
            (QueueRule::Native, 1, false) => format!("queue num {first}"),
            (QueueRule::Native, _, true) => {
                format!("queue flags fanout,bypass num {first}-{last}")
            }
            (QueueRule::Native, _, false) => format!("queue flags fanout num {first}-{last}"),
        }
    }
}
