//! Which of the node's links pods hang on: those that the routing table names for pods' addresses.
//!
//! Whoever sends on such a link must have an address that is routed to it. Knows addresses only.
use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use crate::command::{self, CommandError, Program};

/// The links that routes within `pods` lead to, without those of the node itself: the ones with a
/// default route or with one of the addresses in `node`. Runs `ip` twice.
///
/// # Errors
/// [`CommandError`] if `ip` is missing or refuses.
pub fn of_pods(pods: &[IpNet], node: &[IpAddr]) -> Result<BTreeSet<String>, CommandError> {
    let mut routes = Vec::new();
    for family in ["-4", "-6"] {
        let listing = command::run(
            Program::Ip,
            &[family, "-json", "route", "show", "table", "all"],
            "",
        )?;
        routes.extend(parse(&listing).map_err(|source| CommandError::Run {
            program: Program::Ip,
            source: source.into(),
        })?);
    }
    Ok(choose(&routes, pods, node))
}

/// `ip` says nothing at all where a family is switched off.
fn parse(listing: &str) -> Result<Vec<Value>, serde_json::Error> {
    if listing.trim().is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_str(listing)
}

fn choose(routes: &[Value], pods: &[IpNet], node: &[IpAddr]) -> BTreeSet<String> {
    let of_node: BTreeSet<&str> = routes
        .iter()
        .filter(|route| leads_out(route) || holds(route, node))
        .flat_map(links)
        .collect();
    let to_pods = |route: &&Value| {
        let destination = destination(route);
        let within = |net: IpNet| pods.iter().any(|pods| pods.contains(&net));
        kind(route) == "unicast" && route["gateway"].is_null() && destination.is_some_and(within)
    };
    let all = routes.iter().filter(to_pods).flat_map(links);
    all.filter(|link| !of_node.contains(link))
        // Nothing that makes links for pods calls them so, and nft could not be told.
        .filter(|link| !link.contains('"'))
        .map(str::to_owned)
        .collect()
}

fn leads_out(route: &Value) -> bool {
    route["dst"] == "default" && kind(route) == "unicast"
}

/// Whether it says that one of these addresses is this host's.
fn holds(route: &Value, node: &[IpAddr]) -> bool {
    let address = route["dst"].as_str().and_then(|text| text.parse().ok());
    kind(route) == "local" && address.is_some_and(|address: IpAddr| node.contains(&address))
}

/// `ip` leaves the usual type away.
fn kind(route: &Value) -> &str {
    route["type"].as_str().unwrap_or("unicast")
}

/// A host has no prefix length in what `ip` says.
fn destination(route: &Value) -> Option<IpNet> {
    let text = route["dst"].as_str()?;
    text.parse()
        .ok()
        .or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// One, or those of a route with several ways.
fn links(route: &Value) -> impl Iterator<Item = &str> {
    let several = route["nexthops"].as_array().into_iter().flatten();
    several.chain([route]).filter_map(|way| way["dev"].as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is chosen for pods 10.244.0.0/24 and fd00:244::/64 on node 192.0.2.10.
    fn chosen(listing: &str) -> Vec<String> {
        let pods = ["10.244.0.0/24", "fd00:244::/64"].map(|net| net.parse().unwrap());
        let node = ["192.0.2.10".parse().unwrap()];
        let routes = parse(listing).unwrap();
        choose(&routes, &pods, &node).into_iter().collect()
    }

    #[test]
    fn links_of_pods_are_those_that_their_addresses_are_routed_to() {
        for (listing, expected, why) in [
            (
                r#"[{"dst":"10.244.0.5","dev":"cali1","scope":"link"}]"#,
                &["cali1"][..],
                "a link a pod",
            ),
            (
                r#"[{"dst":"fd00:244::5","dev":"cali1","metric":1024}]"#,
                &["cali1"],
                "IPv6",
            ),
            (
                r#"[{"dst":"10.244.0.0/24","dev":"cni0","prefsrc":"10.244.0.1"},
                    {"type":"local","dst":"10.244.0.1","dev":"cni0","table":"local"}]"#,
                &["cni0"],
                "a bridge, whose own address is a pod's gateway",
            ),
            (
                r#"[{"dst":"10.244.1.0/24","gateway":"192.0.2.11","dev":"eth0"},
                    {"type":"blackhole","dst":"10.244.0.0/24"},
                    {"dst":"192.0.2.0/24","dev":"eth0"}]"#,
                &[],
                "other nodes' pods, nobody, and the node's own network",
            ),
            (
                r#"[{"dst":"default","gateway":"10.244.0.1","dev":"eth0"},
                    {"dst":"10.244.0.0/24","dev":"eth0"},
                    {"dst":"10.244.0.7","dev":"eni7"}]"#,
                &["eni7"],
                "pods with addresses of the node's own network",
            ),
            (
                r#"[{"dst":"10.244.0.0/24","dev":"eth1"},
                    {"type":"local","dst":"192.0.2.10","dev":"eth1","table":"local"}]"#,
                &[],
                "the node's own link without a default route",
            ),
            (
                r#"[{"dst":"default","nexthops":[{"gateway":"10.244.0.1","dev":"eth0"},{"gateway":"10.244.0.2","dev":"eth1"}]},
                    {"dst":"10.244.0.0/25","dev":"eth1"}]"#,
                &[],
                "one of several ways out",
            ),
            ("", &[], "a family that is switched off"),
        ] {
            assert_eq!(chosen(listing), expected, "{why}");
        }
    }
}
