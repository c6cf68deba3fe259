//! The settings that the init step and the daemon share, with their flags.
use kernel::marks::Marks;

/// What happens to pods' new connections while no daemon runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Fail {
    /// They pass without a verdict.
    Open,
    /// They are dropped, except those of non-isolated pods.
    #[default]
    Closed,
}

/// Which allowed TCP connections go through the proxy. The kernel forwards the others after the verdict on their SYN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Tcp {
    /// Those between two pods of the cluster.
    #[default]
    Auto,
    /// All.
    Spliced,
    /// None.
    Kernel,
}

impl Tcp {
    /// Whether any connection goes through the proxy.
    #[must_use]
    pub fn has_proxy(self) -> bool {
        self != Self::Kernel
    }

    /// The value of the flag.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Spliced => "spliced",
            Self::Kernel => "kernel",
        }
    }
}

/// Flags that must be the same for `iptables-init` and `portreeve run`.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct Settings {
    /// Port of the transparent listener.
    #[arg(long, value_name = "PORT", default_value_t = 15001, env = "PORTREEVE_PROXY_PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub proxy_port: u16,
    /// Number of the first NFQUEUE that holds packets.
    #[arg(
        long,
        value_name = "NUMBER",
        default_value_t = 100,
        env = "PORTREEVE_QUEUE"
    )]
    pub queue: u16,
    /// How many NFQUEUEs [default: one per core].
    #[arg(long, value_name = "COUNT", env = "PORTREEVE_QUEUES", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub queues: Option<u16>,
    /// Bits of the packet mark to use; at least 4, which no other software uses.
    #[arg(long, value_name = "MASK", default_value_t = Marks::default(), env = "PORTREEVE_MARK_MASK")]
    pub mark_mask: Marks,
    /// A bridge that pods are attached to (repeatable) [default: those with an address among the pods'].
    #[arg(
        long,
        value_name = "NAME",
        env = "PORTREEVE_BRIDGE",
        value_delimiter = ',',
        value_parser = link_name
    )]
    pub bridge: Vec<String>,
    /// Which allowed TCP connections go through the proxy.
    #[arg(long, value_enum, default_value_t = Tcp::Auto, env = "PORTREEVE_TCP")]
    pub tcp: Tcp,
    /// What happens to pods' new connections while no daemon runs.
    #[arg(long, value_enum, default_value_t = Fail::Closed, env = "PORTREEVE_FAIL")]
    pub fail: Fail,
}

impl Settings {
    /// The number of queues: as configured, else one per online core.
    ///
    /// Read from sysfs and not from this process's own limits: the init step and the daemon, in
    /// containers with limits of their own, must come to the same number.
    #[must_use]
    pub fn queue_count(&self) -> u16 {
        self.queues.unwrap_or_else(|| {
            let online = std::fs::read_to_string("/sys/devices/system/cpu/online").ok();
            let cores = online
                .and_then(|list| count_of_list(&list))
                .unwrap_or_else(|| {
                    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
                });
            u16::try_from(cores)
                .unwrap_or(MOST_QUEUES)
                .clamp(1, MOST_QUEUES)
        })
    }
}

const MOST_QUEUES: u16 = 256;

/// A name that a link can have (linux net/core/dev.c, `dev_valid_name`).
fn link_name(text: &str) -> Result<String, String> {
    let odd = |c: char| c == '/' || c == ':' || c.is_ascii_whitespace();
    if (1..16).contains(&text.len()) && !matches!(text, "." | "..") && !text.contains(odd) {
        return Ok(text.to_owned());
    }
    Err("not a valid interface name; see `ip link show type bridge`".to_owned())
}

/// How many numbers a kernel list like `0-3,6` names.
fn count_of_list(list: &str) -> Option<usize> {
    list.trim().split(',').try_fold(0, |sum: usize, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        Some(sum + last.checked_sub(first)? + 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_list_of_cores_is_counted() {
        for (list, expected) in [
            ("0\n", Some(1)),
            ("0-1\n", Some(2)),
            ("0-3,6,8-9\n", Some(7)),
            ("3-0", None),
            ("", None),
        ] {
            assert_eq!(count_of_list(list), expected, "{list:?}");
        }
    }
}
