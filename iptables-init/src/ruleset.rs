//! The redirect as a value, rendered to nft by a pure function.
//!
//! Chains are made once: deleting or re-creating a hooked base chain flushes every packet that
//! waits in any queue of the namespace. The daemon changes only the sets.
use std::fmt::{self, Write};

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
        let bit = |bit: u32| format!("meta mark and {bit:#x} == {bit:#x}");
        writeln!(out, "table inet {TABLE} {{")?;
        self.sets(out)?;
        writeln!(
            out,
            "
	# Upstream legs: their own half of a conntrack zone, then a mark on their conntrack entry.
	chain upstream_zone {{
		type filter hook output priority raw; policy accept;
		{upstream} ct original zone set {UPSTREAM_ZONE}
	}}
	chain upstream_mark {{
		type filter hook output priority mangle; policy accept;
		{upstream} ct mark set ct mark or {upstream_bit:#x}
	}}
	# With a nat hook on both, the kernel itself finds another port where two legs would collide.
	chain unique_input {{ type nat hook input priority 100; policy accept; }}
	chain unique_postrouting {{ type nat hook postrouting priority srcnat; policy accept; }}

	# Just after DNAT: behind a Service stands the pod by now, whoever did the translation.
	chain intercept {{
		type filter hook prerouting priority -99; policy accept;
		iifname \"lo\" return
		ct direction original ct mark and {client_bit:#x} == {client_bit:#x} goto client_leg
		ct direction reply ct mark and {upstream_bit:#x} == {upstream_bit:#x} goto divert
		ct direction reply return
		ct state new,invalid,untracked tcp flags & (fin|syn|rst|ack) != syn socket transparent 1 goto forgotten
		ip saddr @pods4 ip saddr != @egress_released4 goto take
		ip daddr @pods4 ip daddr != @ingress_released4 goto take
		ip6 saddr @pods6 ip6 saddr != @egress_released6 goto take
		ip6 daddr @pods6 ip6 daddr != @ingress_released6 goto take
	}}
	# A repeated SYN is the gate's business: without its listener it could reach a stranger's.
	chain client_leg {{
		tcp flags & (fin|syn|rst|ack) == syn goto hold
		goto divert
	}}
	chain divert {{
		meta mark set meta mark and {clear:#x} or {divert_bit:#x} accept
	}}
	# Conntrack gave up on a connection that our socket still has (half-closed for minutes).
	chain forgotten {{
		ct mark set ct mark or {client_bit:#x}
		goto divert
	}}
	chain take {{
		fib daddr type local return
		ip saddr . ip daddr @self4 return
		ip6 saddr . ip6 daddr @self6 return
		icmpv6 type {{ nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert, mld-listener-query, mld-listener-report, mld-listener-done, mld2-listener-report }} return
		tcp flags & (fin|syn|rst|ack) == syn goto hold
		meta mark set meta mark and {clear:#x} or {hold_bit:#x} accept
	}}
	# Without a listener `tproxy` ends its rule, and the packet comes to the next.
	chain hold {{
		meta l4proto tcp tproxy to :{port} ct mark set ct mark or {client_bit:#x} meta mark set meta mark and {clear:#x} or {held_bits:#x} accept
		counter name no_daemon {no_daemon}
	}}

	# After every nat and filter of the host, so that the gate sees what the socket will see.
	chain hold_input {{
		type filter hook input priority 101; policy accept;
		{hold} goto to_gate_or_drop
	}}
	chain hold_forward {{
		type filter hook forward priority 101; policy accept;
		{hold} goto to_gate_or_drop
	}}
	chain to_gate_or_drop {{
		jump {QUEUE_CHAIN}
		drop
	}}
	chain {QUEUE_CHAIN} {{{queue}}}

	# The gate's verdict comes back as a mark; a verdict resumes at the next chain of the hook.
	chain answer_input {{
		type filter hook input priority 102; policy accept;
		jump answer
	}}
	chain answer_forward {{
		type filter hook forward priority 102; policy accept;
		jump answer
	}}
	chain answer {{
		meta mark and {mask:#x} == {reset:#x} meta l4proto tcp reject with tcp reset
		meta mark and {mask:#x} == {host:#x} meta nfproto ipv4 reject with icmp host-unreachable
		meta mark and {mask:#x} == {host:#x} meta nfproto ipv6 reject with icmpv6 addr-unreachable
		meta mark and {mask:#x} == {net:#x} meta nfproto ipv4 reject with icmp net-unreachable
		meta mark and {mask:#x} == {net:#x} meta nfproto ipv6 reject with icmpv6 no-route
		meta mark and {mask:#x} == {prohibited:#x} reject with icmpx admin-prohibited
	}}
}}",
            upstream = bit(self.marks.upstream()),
            hold = bit(self.marks.hold()),
            upstream_bit = self.marks.upstream(),
            client_bit = self.marks.client(),
            divert_bit = self.marks.divert(),
            hold_bit = self.marks.hold(),
            held_bits = self.marks.hold() | self.marks.divert(),
            clear = !self.marks.mask(),
            mask = self.marks.mask(),
            port = self.proxy_port,
            no_daemon = match self.fail {
                Fail::Open => "accept",
                Fail::Closed => "drop",
            },
            queue = self.native_queue(),
            reset = self.marks.answer(Answer::Reset),
            host = self.marks.answer(Answer::HostUnreachable),
            net = self.marks.answer(Answer::NetUnreachable),
            prohibited = self.marks.answer(Answer::Prohibited),
        )
    }
}

impl Ruleset {
    fn sets(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (family, address) in [("4", "ipv4_addr"), ("6", "ipv6_addr")] {
            writeln!(
                out,
                "\tset pods{family} {{ type {address}; flags interval; auto-merge; }}"
            )?;
            writeln!(out, "\tset egress_released{family} {{ type {address}; }}")?;
            writeln!(out, "\tset ingress_released{family} {{ type {address}; }}")?;
            writeln!(out, "\tset self{family} {{ type {address} . {address}; }}")?;
        }
        writeln!(out, "\tcounter no_daemon {{ }}")
    }

    fn native_queue(&self) -> String {
        let mut text = String::new();
        if self.queue_rule == QueueRule::Native {
            let last = self.first_queue.saturating_add(self.queue_count - 1);
            let flags = if self.fail == Fail::Open {
                "fanout,bypass"
            } else {
                "fanout"
            };
            // Writing to a String cannot fail.
            let _ = write!(
                text,
                "\n\t\tqueue flags {flags} num {}-{last}\n\t",
                self.first_queue
            );
        }
        text
    }
}
