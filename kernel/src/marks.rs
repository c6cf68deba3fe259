//! Which packet-mark and conntrack-mark bits are ours, and what each means.
//!
//! Four bits of `--mark-mask` carry everything. All rules test and set under the mask, so the bits
//! of kube-proxy (0x4000, 0x8000), of a CNI or of the operator survive.
use std::fmt;
use std::str::FromStr;

/// The default of `--mark-mask`: bits 10 to 13, which kube-proxy, Calico, AWS VPC CNI, Weave Net,
/// kube-router and Tailscale leave alone.
pub const DEFAULT_MARK_MASK: u32 = 0x3c00;

/// The bits of `--mark-mask`, lowest first, by role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    mask: u32,
    bits: [u32; 4],
}

/// The gate's verdict on a held packet, other than "drop"; set as the packet's mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Let the packet go on to its socket.
    Accept,
    /// TCP reset, as a closed port gives.
    Reset,
    /// ICMP host unreachable, as the last router gives.
    HostUnreachable,
    /// ICMP network unreachable.
    NetUnreachable,
    /// ICMP communication administratively prohibited.
    Prohibited,
    /// Accept the packet, and the rest of its flow without further verdicts.
    AcceptFlow,
}

/// An invalid `--mark-mask`.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MarkMaskError {
    /// Not a number.
    #[error("mark mask `{0}` is not a number; give it like 0x3c00")]
    NotANumber(String),
    /// Fewer than the bits that are needed.
    #[error(
        "mark mask {0:#x} has fewer than 4 bits; name at least 4 that nothing else on the node uses, like 0x3c00"
    )]
    TooFewBits(u32),
}

impl Marks {
    /// Takes the four lowest bits of `mask`.
    ///
    /// # Errors
    /// [`MarkMaskError::TooFewBits`] if there are not four.
    pub fn new(mask: u32) -> Result<Self, MarkMaskError> {
        let mut rest = mask;
        let mut bits = [0; 4];
        for bit in &mut bits {
            *bit = rest & rest.wrapping_neg();
            if *bit == 0 {
                return Err(MarkMaskError::TooFewBits(mask));
            }
            rest &= !*bit;
        }
        Ok(Self {
            mask: bits.iter().sum(),
            bits,
        })
    }

    /// All of our bits together.
    #[must_use]
    pub fn mask(self) -> u32 {
        self.mask
    }

    /// Packet: route to this host instead of forwarding.
    #[must_use]
    pub fn divert(self) -> u32 {
        self.bits[0]
    }

    /// Packet: hold in the queue until the gate's verdict.
    #[must_use]
    pub fn hold(self) -> u32 {
        self.bits[1]
    }

    /// Packet and `SO_MARK`: sent by the proxy on behalf of a client. Conntrack: such a connection.
    #[must_use]
    pub fn upstream(self) -> u32 {
        self.bits[2]
    }

    /// Packet in the queue: it is a reply; the verdict is for its flow.
    #[must_use]
    pub fn answering(self) -> u32 {
        self.bits[2]
    }

    /// Packet: the gate wants it answered, not delivered.
    fn answered(self) -> u32 {
        self.bits[3]
    }

    /// Conntrack: a client's connection that ends at the proxy.
    #[must_use]
    pub fn client(self) -> u32 {
        self.bits[0]
    }

    /// Conntrack: a kernel flow, which was allowed at its first packet.
    #[must_use]
    pub fn accepted(self) -> u32 {
        self.bits[1]
    }

    /// Conntrack: a severed flow. TCP resets still pass; each packet of other protocols needs a new
    /// verdict.
    #[must_use]
    pub fn severed(self) -> u32 {
        self.bits[3]
    }

    /// The packet mark that carries `reply` from the gate to the chain that acts on it.
    #[must_use]
    pub fn reply(self, reply: Reply) -> u32 {
        match reply {
            Reply::Accept => self.divert(),
            Reply::Reset => self.answered(),
            Reply::HostUnreachable => self.answered() | self.divert(),
            Reply::NetUnreachable => self.answered() | self.hold(),
            Reply::Prohibited => self.answered() | self.upstream(),
            Reply::AcceptFlow => self.answered() | self.divert() | self.hold(),
        }
    }
}

impl Default for Marks {
    fn default() -> Self {
        Self {
            mask: DEFAULT_MARK_MASK,
            bits: [0x400, 0x800, 0x1000, 0x2000],
        }
    }
}

impl fmt::Display for Marks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.mask)
    }
}

impl FromStr for Marks {
    type Err = MarkMaskError;

    fn from_str(text: &str) -> Result<Self, MarkMaskError> {
        let parsed = match text.strip_prefix("0x") {
            Some(hex) => u32::from_str_radix(hex, 16),
            None => text.parse(),
        };
        Self::new(parsed.map_err(|_| MarkMaskError::NotANumber(text.to_owned()))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_mask_gives_the_default_marks() {
        assert_eq!(Marks::new(DEFAULT_MARK_MASK), Ok(Marks::default()));
    }

    #[test]
    fn mask_needs_four_bits_and_may_have_gaps() {
        for (text, expected, why) in [
            ("0x3c00", Ok(0x3c00), "the default"),
            ("15", Ok(0xf), "decimal"),
            ("0xf0f0", Ok(0xf0), "only the four lowest are taken"),
            ("0x80000111", Ok(0x8000_0111), "bits need not be neighbours"),
            ("0x7", Err(MarkMaskError::TooFewBits(7)), "three bits"),
            ("0", Err(MarkMaskError::TooFewBits(0)), "none"),
            (
                "red",
                Err(MarkMaskError::NotANumber("red".into())),
                "no number",
            ),
        ] {
            assert_eq!(
                text.parse::<Marks>().map(Marks::mask),
                expected,
                "{text}: {why}"
            );
        }
    }

    #[test]
    fn every_reply_has_its_own_mark_within_mask() {
        use Reply::*;
        let marks = Marks::default();
        let all = [
            Accept,
            Reset,
            HostUnreachable,
            NetUnreachable,
            Prohibited,
            AcceptFlow,
        ]
        .map(|a| marks.reply(a));
        for (i, mark) in all.iter().enumerate() {
            assert_eq!(mark & !marks.mask(), 0);
            assert!(!all[..i].contains(mark), "{mark:#x} twice");
        }
    }
}
