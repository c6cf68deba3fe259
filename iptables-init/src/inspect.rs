//! Checks whether the redirect is installed and whether this network namespace supports it.
//!
//! Changes nothing, not even sysctls.
mod sysctls;

use std::fmt;
use std::path::Path;

use kernel::bridges::{self, BridgeError};
use kernel::command::{CommandError, Program};
use kernel::names::{BRIDGE, MODULE_PACKAGES, TABLE};

use crate::contents::Contents;
use crate::lookup;
use crate::nft_table::{Loaded, Stamp};
use crate::probe::{FEATURES, Feature, ProbeError, probe_kernel};
use crate::queue_target;
use crate::redirect::{self, RedirectError};
use crate::routes::{self, Family, State};
use crate::ruleset::{Kernel, QUEUE_CHAIN, Ruleset};
use crate::settings::{Settings, Tcp};

pub use sysctls::without_timestamps;
pub(crate) use sysctls::{breaking_sysctls, interfaces, validates_by_mark};
use sysctls::{is_on, timestamps_off};

/// A problem or a hint, and its remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What is the matter.
    pub problem: String,
    /// What to do about it.
    pub remedy: String,
    /// Whether it breaks the redirect; else it is a hint.
    pub fatal: bool,
}

impl fmt::Display for Finding {
    /// One line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.fatal { "error" } else { "note" };
        write!(f, "{kind}: {}; {}", self.problem, self.remedy)
    }
}

/// Looks at programs, kernel, table, routing and sysctls of this network namespace.
///
/// If there is no fatal finding, packets of pods reach the gate. Runs `nft` and `ip` about a
/// dozen times; blocks for some tens of milliseconds.
#[must_use]
pub fn inspect(settings: &Settings) -> Vec<Finding> {
    let mut findings = Findings::default();
    if let Err(error) = redirect::validate(settings) {
        findings.error(error);
    }
    if let Some(in_use) = findings.nft_works()
        && findings.kernel_can(in_use, settings.tcp)
    {
        findings.table(settings);
    }
    if settings.tcp.has_proxy() {
        findings.routing(settings);
        findings.sysctls_of_proxy(Path::new("/proc/sys/net"));
    }
    findings.sysctls(Path::new("/proc/sys/net"));
    findings.sctp(Path::new("/proc/sys/net"));
    findings.0.extend(ipvs());
    findings.0
}

/// Whether Services are translated by IPVS in this network namespace. By it a Service's address is one of the
/// node's own, and is translated where packets for the node itself arrive (linux net/netfilter/ipvs, hook
/// `LOCAL_IN`): packets to it are never intercepted. Reads two files.
#[must_use]
pub fn ipvs() -> Option<Finding> {
    let links = Path::new("/proc/sys/net/ipv4/conf");
    // Where kube-proxy and kube-router put these addresses.
    let mut known = ["kube-ipvs0", "kube-dummy-if"].into_iter();
    let link = known.find(|link| links.join(link).exists())?;
    Some(Finding {
        problem: format!("Services are translated by IPVS (there is a link {link}): what pods send to them bypasses the redirect, so policies are not enforced on it"),
        remedy: "give kube-proxy the mode nftables or iptables, and remove the rules of the old one (`kube-proxy --cleanup`)".to_owned(),
        fatal: true,
    })
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn fatal(&mut self, problem: impl Into<String>, remedy: impl Into<String>) {
        self.0.push(Finding {
            problem: problem.into(),
            remedy: remedy.into(),
            fatal: true,
        });
    }

    fn note(&mut self, problem: impl Into<String>, remedy: impl Into<String>) {
        self.0.push(Finding {
            problem: problem.into(),
            remedy: remedy.into(),
            fatal: false,
        });
    }

    fn error(&mut self, error: impl fmt::Display) {
        let (problem, remedy) = split(error);
        self.fatal(problem, remedy);
    }

    /// Whether our tables exist, if `nft` works; else all further calls of it would fail too.
    fn nft_works(&mut self) -> Option<bool> {
        match Loaded::read() {
            Ok(loaded) => Some(loaded.is_some()),
            // The probes that follow report a listing that fails for another reason.
            Err(CommandError::Refused { .. }) => Some(false),
            Err(error) => {
                self.error(error);
                None
            }
        }
    }

    /// While the tables are `in_use` packets may wait, and must not be disturbed.
    fn kernel_can(&mut self, in_use: bool, tcp: Tcp) -> bool {
        let mut all = true;
        let needed = FEATURES.iter().filter(|it| tcp.has_proxy() || !it.of_proxy);
        for feature in needed.filter(|it| !(in_use && it.disturbs)) {
            match feature.probe() {
                Ok(()) => {}
                Err(CommandError::Refused { message, .. }) => {
                    all = false;
                    self.lacks(feature, &message);
                }
                Err(error) => {
                    all = false;
                    self.error(error);
                    break;
                }
            }
        }
        all
    }

    fn lacks(&mut self, feature: &Feature, message: &str) {
        // nft does not send to the kernel what it cannot parse itself.
        if !message.contains("Could not process rule") {
            return self.fatal(
                format!("`nft` does not know {}: {message}", feature.name),
                "install nftables 1.0.2 or later (apt-get install nftables)",
            );
        }
        self.fatal(
            format!("the kernel lacks {} ({}): {message}", feature.name, feature.options),
            format!(
                "load it with `modprobe -a {}`, or install the kernel's full set of modules ({MODULE_PACKAGES})",
                feature.modules
            ),
        );
    }

    fn table(&mut self, settings: &Settings) {
        let kernel = match probe_kernel() {
            Ok(kernel) => kernel,
            Err(error @ (ProbeError::NoQueue { .. } | ProbeError::Command(_))) => {
                return self.error(error);
            }
        };
        let ruleset = Ruleset::new(settings, kernel);
        let loaded = Loaded::read();
        self.bridges(
            settings,
            kernel,
            loaded.as_ref().ok().and_then(Option::as_ref),
        );
        match loaded {
            Err(error) => return self.error(error),
            Ok(None) => {
                let problem = format!("nft table inet {TABLE} is not there");
                self.fatal(problem, INSTALL);
                return self.dry_run(&ruleset);
            }
            Ok(Some(loaded)) if loaded.stamp != Some(Stamp::of(&ruleset)) => self.fatal(
                format!(
                    "nft table inet {TABLE} was installed with other flags or by another version"
                ),
                format!("{INSTALL} with the flags that are given here, or give its flags here"),
            ),
            Ok(Some(loaded)) => self.contents(&loaded, &ruleset),
        }
        if let Some(target) = redirect::queue_target(&ruleset) {
            match queue_target::is_loaded(target) {
                Ok(true) => {}
                Ok(false) => self.fatal(
                    format!("the rule `{target}` in chain {QUEUE_CHAIN} of nft table inet {TABLE} is not there"),
                    INSTALL,
                ),
                Err(error) => self.fatal(
                    format!("chain {QUEUE_CHAIN} of nft table inet {TABLE} cannot be read: {error}"),
                    "run as root or with CAP_NET_ADMIN",
                ),
            }
        }
    }

    /// Whether nft and the kernel accept all rules. Only if none of them is loaded: checking hooked chains drops the
    /// packets that wait in a queue.
    fn dry_run(&mut self, ruleset: &Ruleset) {
        let Err(error) = redirect::dry_run(ruleset) else {
            return;
        };
        match error {
            CommandError::Refused { message, .. } if message.contains("Could not process rule") => {
                self.fatal(
                    format!("the kernel refuses the rules of this version: {message}"),
                    format!("install the kernel's full set of modules ({MODULE_PACKAGES})"),
                );
            }
            CommandError::Refused { message, .. } => self.fatal(
                format!("nft refuses the rules of this version: {message}"),
                "install an nftables that loads them, such as 1.0.6 or 1.1.3, and report the version that does not (`nft --version`)",
            ),
            other => self.error(other),
        }
    }

    /// Whether the tables are as they were installed.
    fn contents(&mut self, loaded: &Loaded, ruleset: &Ruleset) {
        let what = match (loaded.tampered_chain(ruleset), Contents::read()) {
            (Some((family, chain)), _) => format!("chain {chain} of nft table {family} {TABLE}"),
            (None, Ok((_, now))) if loaded.noted == Some(now.digest()) => return,
            (None, Ok(_)) => format!("a rule, chain or set of nft tables {TABLE}"),
            (None, Err(error)) => return self.error(RedirectError::Contents(error)),
        };
        self.fatal(
            format!("{what} was changed after the installation"),
            format!("find the software that changes other software's tables, and {INSTALL}"),
        );
    }

    /// The requirements of pods on a Linux bridge, where there are any.
    fn bridges(&mut self, settings: &Settings, kernel: Kernel, loaded: Option<&Loaded>) {
        if !kernel.bridges {
            let (problem, remedy) = split(BridgeError::NoFamily);
            return if settings.bridge.is_empty() {
                self.note(problem, remedy);
            } else {
                self.fatal(problem, remedy);
            };
        }
        if settings.bridge.is_empty() && !loaded.is_some_and(has_ports) {
            return;
        }
        for sysctl in bridges::switched_on() {
            self.fatal(
                format!("sysctl {sysctl} is 1: intercepted packets lose their sockets on the bridge, so connections of isolated pods time out"),
                format!("run `iptables-init install --bridge NAME`, or `sysctl -w {sysctl}=0`"),
            );
        }
        let found = match bridges::find(&settings.bridge, &[]) {
            Ok(found) => found,
            Err(error) => return self.error(error),
        };
        for name in &settings.bridge {
            match found.iter().find(|bridge| bridge.name == *name) {
                Some(bridge) if bridge.looks_into_ip => self.fatal(
                    format!("bridge {name} itself looks into IP packets, whatever the sysctls say"),
                    format!("`ip link set {name} type bridge nf_call_iptables 0 nf_call_ip6tables 0`"),
                ),
                Some(_) => {}
                None => self.note(
                    format!("there is no bridge {name}"),
                    "nothing to do if it comes with the first pod, as flannel's does; else correct --bridge",
                ),
            }
        }
    }

    fn routing(&mut self, settings: &Settings) {
        if let Err(error) = Program::Ip.find() {
            return self.error(error);
        }
        for family in Family::ALL {
            if !family.enabled() {
                self.note(
                    format!("{} is disabled in this network namespace", family.name()),
                    "nothing to do: the node does not forward its packets",
                );
                continue;
            }
            match State::read(family) {
                Err(error) => self.error(error),
                Ok(state) => {
                    if !state.has_rule(settings.mark_mask) {
                        self.fatal(
                            format!(
                                "the {} `ip rule` for diverted packets is not there",
                                family.name()
                            ),
                            INSTALL,
                        );
                    }
                    if !state.route {
                        self.fatal(
                            format!("the {} route for diverted packets is not there (it goes when `lo` goes down)", family.name()),
                            INSTALL,
                        );
                    }
                    let whole = state.route && state.has_rule(settings.mark_mask);
                    // If the kernel cannot be asked, the redirect may still be fine.
                    if whole && !lookup::diverts(family, settings.mark_mask).unwrap_or(true) {
                        let (problem, remedy) = routes::shadowed(family);
                        self.fatal(problem, remedy);
                    }
                }
            }
        }
    }

    /// conntrack has timeouts for each protocol that it knows.
    fn sctp(&mut self, net: &Path) {
        let timeouts = net.join("netfilter/nf_conntrack_sctp_timeout_established");
        if net.join("netfilter/nf_conntrack_max").exists() && !timeouts.exists() {
            self.note(
                "connection tracking does not know SCTP (CONFIG_NF_CT_PROTO_SCTP): each packet gets a verdict in user space, and replies are recognised by addresses only",
                "use a kernel with it where pods speak SCTP",
            );
        }
    }

    fn sysctls_of_proxy(&mut self, net: &Path) {
        self.0.extend(breaking_sysctls(net, &interfaces(net)));
        let is_on = |name: &str| is_on(net, name);
        for name in ["ipv4", "ipv6"] {
            if is_on(&format!("{name}/fwmark_reflect")) {
                self.note(
                    format!("sysctl net.{name}.fwmark_reflect is 1: resets and ICMP errors for diverted packets are lost, so clients time out instead"),
                    format!("`sysctl -w net.{name}.fwmark_reflect=0`"),
                );
            }
        }
        self.0.extend(timestamps_off(net));
    }

    fn sysctls(&mut self, net: &Path) {
        let is_on = |name: &str| is_on(net, name);
        if !is_on("ipv4/ip_forward") {
            self.note(
                "sysctl net.ipv4.ip_forward is 0: packets that the proxy does not relay, such as those of non-isolated pods, are not forwarded",
                "`sysctl -w net.ipv4.ip_forward=1`, as every CNI plugin with routed pods does",
            );
        }
        if !is_on("netfilter/nf_conntrack_acct") {
            self.note(
                "sysctl net.netfilter.nf_conntrack_acct is 0: records of kernel flows (path: kernel) have no bytes",
                "`sysctl -w net.netfilter.nf_conntrack_acct=1`; it counts for flows that begin after it",
            );
        }
        if !is_on("netfilter/nf_conntrack_events") {
            self.note(
                "sysctl net.netfilter.nf_conntrack_events is 0: records of kernel flows come late and without the last bytes",
                "`sysctl -w net.netfilter.nf_conntrack_events=2`, the kernel's default",
            );
        }
    }
}

/// An error of this crate reads "problem; remedy".
fn split(error: impl fmt::Display) -> (String, String) {
    let text = error.to_string();
    let (problem, remedy) = text
        .split_once("; ")
        .unwrap_or((&text, "see `iptables-init print`"));
    (problem.to_owned(), remedy.to_owned())
}

const INSTALL: &str = "run `iptables-init install`";

/// Whether `loaded` knows ports of bridges.
fn has_ports(loaded: &Loaded) -> bool {
    loaded.strings(BRIDGE, bridges::PORTS).next().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_one_line_with_its_remedy() {
        let finding = Finding {
            problem: "x is off".into(),
            remedy: "switch it on".into(),
            fatal: true,
        };
        assert_eq!(finding.to_string(), "error: x is off; switch it on");
        assert_eq!(
            Finding {
                fatal: false,
                ..finding
            }
            .to_string(),
            "note: x is off; switch it on"
        );
    }

    #[test]
    fn kernel_without_sctp_conntrack_is_noted() {
        let net = std::env::temp_dir().join(format!("portreeve-inspect-{}", std::process::id()));
        let netfilter = net.join("netfilter");
        std::fs::create_dir_all(&netfilter).unwrap();
        let noted = || {
            let mut findings = Findings::default();
            findings.sctp(&net);
            findings.0.len()
        };
        assert_eq!(noted(), 0, "conntrack is not loaded: nothing is known");
        std::fs::write(netfilter.join("nf_conntrack_max"), "1").unwrap();
        assert_eq!(noted(), 1);
        let timeouts = netfilter.join("nf_conntrack_sctp_timeout_established");
        std::fs::write(timeouts, "1").unwrap();
        assert_eq!(noted(), 0);
        std::fs::remove_dir_all(&net).unwrap();
    }

    #[test]
    fn every_error_text_splits_into_problem_and_remedy() {
        let mut findings = Findings::default();
        findings.error(CommandError::Missing {
            program: Program::Nft,
        });
        findings.error(CommandError::NotPermitted {
            program: Program::Ip,
        });
        findings.error(BridgeError::NoFamily);
        findings.error(RedirectError::QueueRange {
            first: 65535,
            count: 2,
        });
        let remedies: Vec<_> = findings
            .0
            .iter()
            .map(|finding| finding.remedy.as_str())
            .collect();
        insta::assert_snapshot!(remedies.join("\n"), @r"
        install the package `nftables` (apt-get install nftables)
        run as root or with CAP_NET_ADMIN
        install the kernel's full set of modules (Ubuntu: linux-modules-extra-$(uname -r); Debian: linux-image-amd64 instead of the cloud kernel)
        take a lower --queue
        ");
    }
}
