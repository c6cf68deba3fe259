//! Services as an nftables ruleset, in the manner of kube-proxy's nftables mode.
//!
//! Pure: values in, text out. The base chains are made once and never deleted: that would flush
//! packets that wait in a queue. An update flushes and fills them in one transaction.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::spec::Protocol;

/// kube-proxy's mark for connections to masquerade.
const MASQUERADE_MARK: &str = "0x4000";

/// One port of a Service with the pods behind it, of both families.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Forward {
    pub(super) service: String,
    pub(super) v4: Ipv4Addr,
    pub(super) v6: Ipv6Addr,
    pub(super) port: u16,
    pub(super) target: u16,
    pub(super) protocol: Protocol,
    pub(super) endpoints_v4: Vec<Ipv4Addr>,
    pub(super) endpoints_v6: Vec<Ipv6Addr>,
}

/// The whole ruleset, loadable over an earlier one.
pub(super) fn ruleset(forwards: &[Forward]) -> String {
    let mut out = String::new();
    let v4: Vec<_> = forwards
        .iter()
        .map(|f| {
            (
                f,
                IpAddr::V4(f.v4),
                f.endpoints_v4.iter().map(|a| IpAddr::V4(*a)).collect(),
            )
        })
        .collect();
    let v6: Vec<_> = forwards
        .iter()
        .map(|f| {
            (
                f,
                IpAddr::V6(f.v6),
                f.endpoints_v6.iter().map(|a| IpAddr::V6(*a)).collect(),
            )
        })
        .collect();
    table(&mut out, "ip", "ipv4_addr", &v4);
    table(&mut out, "ip6", "ipv6_addr", &v6);
    out
}

type Entry<'a> = (&'a Forward, IpAddr, Vec<IpAddr>);

fn table(out: &mut String, family: &str, address: &str, entries: &[Entry<'_>]) {
    let map = format!("type {address} . inet_proto . inet_service : verdict;");
    let base = format!(
        "table {family} kube-proxy {{\n\
         \tmap service-ips {{ {map} }}\n\tmap no-endpoints {{ {map} }}\n\
         \tchain services {{ }}\n\tchain refuse {{ }}\n\
         \tchain nat-prerouting {{ type nat hook prerouting priority dstnat; policy accept; }}\n\
         \tchain nat-output {{ type nat hook output priority -100; policy accept; }}\n\
         \tchain nat-postrouting {{ type nat hook postrouting priority srcnat; policy accept; }}\n\
         \tchain filter-forward {{ type filter hook forward priority -110; policy accept; }}\n\
         \tchain filter-output {{ type filter hook output priority -110; policy accept; }}\n}}\n"
    );
    out.push_str(&base);
    let _ = writeln!(
        out,
        "flush table {family} kube-proxy\n\
         flush map {family} kube-proxy service-ips\nflush map {family} kube-proxy no-endpoints"
    );
    let _ = writeln!(out, "table {family} kube-proxy {{");
    for (forward, _, endpoints) in entries {
        backends(out, family, forward, endpoints);
    }
    let key = format!("{family} daddr . meta l4proto . th dport");
    let _ = writeln!(
        out,
        "\tchain services {{\n\t\t{key} vmap @service-ips\n\t}}\n\
         \tchain nat-prerouting {{\n\t\tjump services\n\t}}\n\
         \tchain nat-output {{\n\t\tjump services\n\t}}\n\
         \tchain nat-postrouting {{\n\
         \t\tmeta mark & {MASQUERADE_MARK} == 0 return\n\
         \t\tmeta mark set meta mark xor {MASQUERADE_MARK}\n\
         \t\tmasquerade fully-random\n\t}}\n\
         \tchain refuse {{\n\t\treject\n\t}}\n\
         \tchain filter-forward {{\n\t\tct state new {key} vmap @no-endpoints\n\t}}\n\
         \tchain filter-output {{\n\t\tct state new {key} vmap @no-endpoints\n\t}}\n}}"
    );
    for (forward, address, endpoints) in entries {
        let key = format!(
            "{address} . {} . {}",
            forward.protocol.keyword(),
            forward.port
        );
        let (map, verdict) = if endpoints.is_empty() {
            ("no-endpoints", "goto refuse".into())
        } else {
            ("service-ips", format!("goto {}", chain(forward)))
        };
        let _ = writeln!(
            out,
            "add element {family} kube-proxy {map} {{ {key} : {verdict} }}"
        );
    }
}

/// The chain of one Service port, and one for each endpoint: chosen at random, a pod that reaches
/// itself is masqueraded, or it would receive packets from its own address.
fn backends(out: &mut String, family: &str, forward: &Forward, endpoints: &[IpAddr]) {
    let name = chain(forward);
    let protocol = forward.protocol.keyword();
    for (at, endpoint) in endpoints.iter().enumerate() {
        let target = match endpoint {
            IpAddr::V4(address) => format!("{address}:{}", forward.target),
            IpAddr::V6(address) => format!("[{address}]:{}", forward.target),
        };
        let _ = writeln!(
            out,
            "\tchain {name}-{at} {{\n\
             \t\t{family} saddr {endpoint} meta mark set meta mark or {MASQUERADE_MARK}\n\
             \t\tmeta l4proto {protocol} dnat to {target}\n\t}}"
        );
    }
    match endpoints.len() {
        0 => {}
        1 => {
            let _ = writeln!(out, "\tchain {name} {{\n\t\tgoto {name}-0\n\t}}");
        }
        many => {
            let choices: Vec<_> = (0..many)
                .map(|at| format!("{at} : goto {name}-{at}"))
                .collect();
            let choices = choices.join(", ");
            let _ = writeln!(
                out,
                "\tchain {name} {{\n\t\tnumgen random mod {many} vmap {{ {choices} }}\n\t}}"
            );
        }
    }
}

fn chain(forward: &Forward) -> String {
    let service = forward.service.replace(['/', '.'], "-");
    format!(
        "svc-{service}-{}-{}",
        forward.protocol.keyword(),
        forward.port
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forward(endpoints: u8) -> Forward {
        Forward {
            service: "x/web".into(),
            v4: Ipv4Addr::new(10, 96, 0, 1),
            v6: "fd00:10:96::1".parse().unwrap(),
            port: 80,
            target: 8080,
            protocol: Protocol::Tcp,
            endpoints_v4: (1..=endpoints)
                .map(|at| Ipv4Addr::new(10, 244, 0, at))
                .collect(),
            endpoints_v6: Vec::new(),
        }
    }

    #[test]
    fn endpoints_are_random_and_single_one_is_direct() {
        let two = ruleset(&[forward(2)]);
        let choice =
            "numgen random mod 2 vmap { 0 : goto svc-x-web-tcp-80-0, 1 : goto svc-x-web-tcp-80-1 }";
        assert!(two.contains(choice), "{two}");
        assert!(
            two.contains("meta l4proto tcp dnat to 10.244.0.2:8080"),
            "{two}"
        );
        assert!(!ruleset(&[forward(1)]).contains("numgen"));
    }

    #[test]
    fn a_service_without_endpoints_refuses() {
        let none = ruleset(&[forward(0)]);
        assert!(
            none.contains("no-endpoints { 10.96.0.1 . tcp . 80 : goto refuse }"),
            "{none}"
        );
    }

    #[test]
    fn an_update_never_deletes_a_base_chain() {
        let script = ruleset(&[forward(2)]);
        assert!(!script.contains("delete"), "{script}");
        assert!(!script.contains("destroy"), "{script}");
    }
}
