//! Which of the node's links pods hang on: those that the routing table names for pods' addresses.
//!
//! Whoever sends on such a link must have an address that is routed to it. Knows addresses only.
use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use crate::command::{self, CommandError, Program};

/// What the routing table says of pods' addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Links {
    /// The links that routes to pods lead to, without those of the node itself: the ones with a
    /// default route or with one of its addresses.
    pub pods: BTreeSet<String>,
    /// Addresses among the pods' that are this host's own: what its pods have as their gateway.
    pub gateways: BTreeSet<IpAddr>,
}

/// Reads the routing table for pods within `pods` on a node with the addresses `node`. Runs `ip`
/// twice.
///
/// # Errors
/// [`CommandError`] if `ip` is missing or refuses.
pub fn of_pods(pods: &[IpNet], node: &[IpAddr]) -> Result<Links, CommandError> {
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

fn choose(routes: &[Value], pods: &[IpNet], node: &[IpAddr]) -> Links {
    let of_node: BTreeSet<&str> = routes
        .iter()
        .filter(|route| leads_out(route) || holds(route, node))
        .flat_map(links)
        .collect();
    let within = |net: IpNet| pods.iter().any(|pods| pods.contains(&net));
    let to_pods = |route: &&Value| {
        kind(route) == "unicast"
            && route["gateway"].is_null()
            && destination(route).is_some_and(within)
    };
    let links = routes
        .iter()
        .filter(to_pods)
        .flat_map(links)
        .filter(|link| !of_node.contains(link))
        // Nothing that makes links for pods calls them so, and nft could not be told.
        .filter(|link| !link.contains('"'));
    let own = routes.iter().filter(|route| kind(route) == "local");
    let gateways = own
        .filter_map(destination)
        .filter(|net| within(*net) && net.prefix_len() == net.max_prefix_len());
    Links {
        pods: links.map(str::to_owned).collect(),
        gateways: gateways.map(|net| net.addr()).collect(),
    }
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
        choose(&routes, &pods, &node).pods.into_iter().collect()
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

    #[test]
    fn the_hosts_own_addresses_among_the_pods_are_their_gateways() {
        let listing = r#"[{"type":"local","dst":"10.244.0.1","dev":"cni0","table":"local"},
            {"type":"local","dst":"fd00:244::1","dev":"cni0","table":"local"},
            {"type":"broadcast","dst":"10.244.0.255","dev":"cni0","table":"local"},
            {"type":"local","dst":"192.0.2.10","dev":"eth0","table":"local"},
            {"type":"local","dst":"default","dev":"lo","table":"15001"}]"#;
        let pods = ["10.244.0.0/24", "fd00:244::/64"].map(|net| net.parse().unwrap());
        let links = choose(&parse(listing).unwrap(), &pods, &[]);
        let expected = ["10.244.0.1", "fd00:244::1"].map(|ip| ip.parse().unwrap());
        assert_eq!(links.gateways, expected.into());
    }
}
