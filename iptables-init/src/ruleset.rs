//! The redirect as a value, rendered to nft by a pure function.
//!
//! Chains are made once: deleting or re-creating a hooked base chain flushes every packet that
//! waits in any queue of the namespace. The daemon changes only the sets. The rules themselves stand
//! in `ruleset.nft`, and in `bridges.nft` those below IP.
use std::fmt;

use kernel::marks::{Marks, Reply};
use kernel::names::UPSTREAM_PORTS;

use crate::settings::{Fail, Settings, Tcp};

/// The chain that holds nothing but the rule that hands packets to the queue.
pub const QUEUE_CHAIN: &str = "to_queue";

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

/// The features of this kernel that not all kernels have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its way to hand packets to user space.
    pub queue_rule: QueueRule,
    /// Whether it has nft's family `bridge` (`CONFIG_NF_TABLES_BRIDGE`).
    pub bridges: bool,
}

/// All of our nft tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    proxy_port: u16,
    first_queue: u16,
    queue_count: u16,
    marks: Marks,
    fail: Fail,
    tcp: Tcp,
    kernel: Kernel,
}

impl Ruleset {
    /// The tables that `settings` ask for on such a kernel.
    #[must_use]
    pub fn new(settings: &Settings, kernel: Kernel) -> Self {
        Self {
            proxy_port: settings.proxy_port,
            first_queue: settings.queue,
            queue_count: settings.queue_count(),
            marks: settings.mark_mask,
            fail: settings.fail,
            tcp: settings.tcp,
            kernel,
        }
    }

    /// The way this table hands packets to user space.
    #[must_use]
    pub fn queue_rule(&self) -> QueueRule {
        self.kernel.queue_rule
    }

    /// The settings that a daemon must have in common with its rules, as text. What happens while no daemon runs, and
    /// which connections go to the proxy, are not among them: an upgrade can change them under the old daemon.
    pub(crate) fn settings(&self) -> String {
        let Self {
            proxy_port,
            first_queue,
            queue_count,
            marks,
            fail: _,
            tcp,
            kernel: _,
        } = self;
        let proxy = if tcp.has_proxy() { "" } else { " no proxy" };
        format!("{proxy_port} {first_queue} {queue_count} {marks}{proxy}")
    }

    /// First queue, how many, and whether a packet passes when nobody listens.
    #[must_use]
    pub fn queue(&self) -> (u16, u16, bool) {
        (self.first_queue, self.queue_count, self.fail == Fail::Open)
    }
}

impl fmt::Display for Ruleset {
    /// Writes the tables as `nft -f` reads them.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fill_in(include_str!("ruleset.nft"), out)?;
        if self.kernel.bridges {
            self.fill_in(include_str!("bridges.nft"), out)?;
        }
        Ok(())
    }
}

impl Ruleset {
    /// Writes `template` without the lines of other settings.
    fn fill_in(&self, template: &str, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut left_out = false;
        for line in template.split_inclusive('\n') {
            match line.trim_start().strip_prefix('#').map(str::trim_end) {
                Some("end") => left_out = false,
                Some(mark) if mark.starts_with("if ") => {
                    left_out = !self.is_for(mark.trim_start_matches("if "));
                }
                _ if left_out => {}
                _ => self.fill_in_line(line, out)?,
            }
        }
        Ok(())
    }

    /// Whether a condition of the templates holds.
    fn is_for(&self, condition: &str) -> bool {
        condition == self.tcp.name() || condition == "proxy" && self.tcp.has_proxy()
    }

    fn fill_in_line(&self, mut rest: &str, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        while let Some((before, after)) = rest.split_once('$') {
            let end = after.find(|c: char| c != '_' && !c.is_ascii_lowercase());
            let (name, behind) = after.split_at(end.unwrap_or(after.len()));
            out.write_str(before)?;
            self.value(name, out)?;
            rest = behind;
        }
        out.write_str(rest)
    }

    /// Writes what `$name` stands for.
    fn value(&self, name: &str, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let marks = self.marks;
        let mark = match name {
            "divert" => marks.divert(),
            "hold" => marks.hold(),
            "held" => marks.hold() | marks.divert(),
            "awaits_verdict" => marks.hold() | marks.reply(Reply::Reset),
            "held_answer" => marks.hold() | marks.answering(),
            "upstream" => marks.upstream(),
            "client" => marks.client(),
            "ours" => marks.mask(),
            "others" => !marks.mask(),
            "reset" => marks.reply(Reply::Reset),
            "host_unreachable" => marks.reply(Reply::HostUnreachable),
            "net_unreachable" => marks.reply(Reply::NetUnreachable),
            "accept_flow" => marks.reply(Reply::AcceptFlow),
            "accepted" => marks.accepted(),
            "severed" => marks.severed(),
            "not_severed" => !marks.severed(),
            "prohibited" => marks.reply(Reply::Prohibited),
            "proxy_port" => return write!(out, "{}", self.proxy_port),
            "upstream_zone" => return write!(out, "{UPSTREAM_ZONE}"),
            "first_port" => return write!(out, "{}", UPSTREAM_PORTS.start()),
            "last_port" => return write!(out, "{}", UPSTREAM_PORTS.end()),
            "no_daemon" => return out.write_str(self.no_daemon()),
            "queue" => return out.write_str(&self.queue_statement()),
            // Not nft's language, so that nothing half filled in can be loaded.
            unknown => return write!(out, "<no value for {unknown}>"),
        };
        write!(out, "{mark:#x}")
    }

    /// The verdict on a SYN without a listener.
    fn no_daemon(&self) -> &'static str {
        match self.fail {
            Fail::Open => "accept",
            Fail::Closed => "drop",
        }
    }

    fn queue_statement(&self) -> String {
        let (first, count, bypass) = self.queue();
        let last = first.saturating_add(count - 1);
        match (self.kernel.queue_rule, count, bypass) {
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use kernel::counters::NAMES;

    #[test]
    fn every_counter_of_the_rules_is_known() {
        let rules = [include_str!("ruleset.nft"), include_str!("bridges.nft")].concat();
        let declared = rules.lines().filter_map(|line| {
            let (name, _) = line.trim().strip_prefix("counter ")?.split_once(" {")?;
            Some(name)
        });
        // The two tables may have one of the same name, which counts as one.
        assert_eq!(declared.collect::<BTreeSet<_>>(), NAMES.into());
    }
}
