//! Values of sysctls with which the redirect does not work, or works less well. Only reads.
use std::path::Path;

use kernel::names::UPSTREAM_PORTS;

use super::{Finding, Findings};

/// The sysctls under `net` whose values break the redirect; per-link ones only for `links`.
///
/// Determined by tests in network namespaces. `rp_filter`, strict or loose, does not break it.
pub(crate) fn breaking_sysctls(net: &Path, links: &[String]) -> Vec<Finding> {
    let mut findings = Findings::default();
    for link in links.iter().filter(|link| validates_by_mark(net, link)) {
        findings.fatal(
            format!("sysctl net.ipv4.conf.{link}.src_valid_mark is 1: the kernel drops diverted IPv4 packets as spoofed, whatever rp_filter is"),
            format!("`sysctl -w net/ipv4/conf/{link}/src_valid_mark=0` (wg-quick sets it for a default route through WireGuard: give that its route by hand)"),
        );
    }
    if is_on(net, "ipv4/tcp_fwmark_accept") {
        findings.fatal(
            "sysctl net.ipv4.tcp_fwmark_accept is 1: answers of accepted connections inherit the divert mark and never leave the node",
            "`sysctl -w net.ipv4.tcp_fwmark_accept=0`",
        );
    }
    findings.0
}

/// Whether the kernel validates the sources of packets on this link by a route lookup with their marks; diverted
/// packets arrive on every link but `lo`.
pub(crate) fn validates_by_mark(net: &Path, link: &str) -> bool {
    link != "lo" && is_on(net, &format!("ipv4/conf/{link}/src_valid_mark"))
}

/// Whether a sysctl under `net` exists and is not 0.
pub(super) fn is_on(net: &Path, name: &str) -> bool {
    std::fs::read_to_string(net.join(name)).is_ok_and(|value| value.trim() != "0")
}

/// Whether TCP timestamps (RFC 7323) are off in this network namespace. Only with them the kernel reuses a port in
/// TIME-WAIT for a new connection (linux net/ipv4/tcp_ipv4.c, `tcp_twsk_unique`), so the ports of the upstream legs can
/// run out. Reads one file.
#[must_use]
pub fn without_timestamps() -> Option<Finding> {
    timestamps_off(Path::new("/proc/sys/net"))
}

pub(super) fn timestamps_off(net: &Path) -> Option<Finding> {
    let there = net.join("ipv4/tcp_timestamps").exists();
    (there && !is_on(net, "ipv4/tcp_timestamps")).then(|| Finding {
        // The smaller range of source ports, and the kernel's TCP_TIMEWAIT_LEN.
        problem: format!(
            "sysctl net.ipv4.tcp_timestamps is 0: a pod that opens and closes more than {} connections a second to one server for a minute runs out of source ports, and further ones are dropped (refusals, cause no_port)",
            UPSTREAM_PORTS.len() / 2 / 60
        ),
        remedy: "`sysctl -w net.ipv4.tcp_timestamps=1`, the kernel's default".to_owned(),
        fatal: false,
    })
}

/// `all`, `default` and every interface, sorted.
pub(crate) fn interfaces(net: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(net.join("ipv4/conf")) else {
        return Vec::new();
    };
    let names = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}
