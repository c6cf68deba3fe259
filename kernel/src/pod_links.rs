//! Finds the node's interfaces for pods: those to which the routing table routes pods' addresses.
//!
//! A packet from such a link must have a source address that is routed to it. Knows addresses only.
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use nix::net::if_::if_nametoindex;
use serde_json::Value;

use crate::command::{self, CommandError, Program};

use crate::sets;

/// The routes to pods' addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Links {
    /// The links that routes to pods lead to, without those of the node itself: the ones with a
    /// default route or with one of its addresses.
    pub pods: BTreeSet<String>,
    /// Addresses of this host within the pods' networks: its pods' gateways.
    pub gateways: BTreeSet<IpAddr>,
    /// Pod addresses that have a host route in the main table to one of these links and to no other,
    /// with the link's index, which is never reused, unlike its name.
    pub link_sources: BTreeSet<(u32, IpAddr)>,
    /// All addresses of this host.
    pub own: BTreeSet<IpAddr>,
    /// The single pod addresses that have a route to a pod's link.
    pub reached: BTreeSet<IpAddr>,
    /// Other addresses with a host route to a veth that is not the node's: so are pods' addresses that lie in no pod
    /// CIDR.
    pub others: BTreeSet<IpAddr>,
}

/// Reads the routing table for pods within `pods` on a node with the addresses `node`. Runs `ip`
/// twice, and once more if there are routes to single addresses besides.
///
/// # Errors
/// [`CommandError`] if `ip` is missing or refuses.
pub fn of_pods(pods: &[IpNet], node: &[IpAddr]) -> Result<Links, CommandError> {
    let mut routes = Vec::new();
    for family in ["-4", "-6"] {
        routes.extend(ask(&[family, "-json", "route", "show", "table", "all"])?);
    }
    // A link that has gone meanwhile has no index.
    let mut found = choose(&routes, pods, node, |link| if_nametoindex(link).ok());
    if !found.others.is_empty() {
        let veths = ask(&["-json", "link", "show", "type", "veth"])?;
        let veths: BTreeSet<&str> = veths
            .iter()
            .filter_map(|it| it["ifname"].as_str())
            .collect();
        let to_veth = |route: &&Value| links(route).all(|link| veths.contains(link));
        let addresses: BTreeSet<IpAddr> = routes.iter().filter(to_veth).filter_map(host).collect();
        found.others.retain(|address| addresses.contains(address));
    }
    Ok(found)
}

/// The link's index of each address in the kernel's set, as the previous daemon left it. The link may be gone.
///
/// # Errors
/// [`CommandError`] if `nft` is missing, or the table is.
pub fn sources_before() -> Result<BTreeMap<IpAddr, u32>, CommandError> {
    let pairs = sets::pairs("inet", sets::LINK_SOURCES)?.into_iter();
    // nft writes an index as the link's name, if the link exists.
    let index = |link: &str| if_nametoindex(link).ok().or_else(|| link.parse().ok());
    let known = pairs.filter_map(|[link, address]| Some((address.parse().ok()?, index(&link)?)));
    Ok(known.collect())
}

fn ask(question: &[&str]) -> Result<Vec<Value>, CommandError> {
    let listing = command::run(Program::Ip, question, "")?;
    parse(&listing).map_err(|source| CommandError::Run {
        program: Program::Ip,
        source: source.into(),
    })
}

/// `ip` prints nothing if the family is disabled.
fn parse(listing: &str) -> Result<Vec<Value>, serde_json::Error> {
    if listing.trim().is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_str(listing)
}

fn choose(
    routes: &[Value],
    pods: &[IpNet],
    node: &[IpAddr],
    index: impl Fn(&str) -> Option<u32>,
) -> Links {
    let of_node: BTreeSet<&str> = routes
        .iter()
        .filter(|route| leads_out(route) || holds(route, node))
        .flat_map(links)
        .collect();
    let within = |net: IpNet| pods.iter().any(|pods| pods.contains(&net));
    let on_link = |route: &Value| kind(route) == "unicast" && route["gateway"].is_null();
    let nearest = nearest(routes, pods);
    let to_pods = |route: &&Value| {
        on_link(route)
            && (destination(route).is_some_and(within)
                || nearest.values().any(|way| std::ptr::eq(*way, *route)))
    };
    let links = routes
        .iter()
        .filter(to_pods)
        .flat_map(links)
        .filter(|link| !of_node.contains(link))
        // No CNI plugin uses such names for pods' links, and nft cannot parse them.
        .filter(|link| !link.contains('"'));
    let links: BTreeSet<_> = links.map(str::to_owned).collect();
    let own = routes.iter().filter(|route| kind(route) == "local");
    let own: BTreeSet<_> = own.filter_map(host).collect();
    let gateways: BTreeSet<_> = own
        .iter()
        .copied()
        .filter(|address| within((*address).into()))
        .collect();
    let to_link = |way: &Value| on_link(way) && self::links(way).all(|link| links.contains(link));
    let reached = nearest.iter().filter(|(_, way)| to_link(way));
    let reached = reached.map(|(address, _)| *address).collect();
    let free = |way: &Value| self::links(way).all(|link| !of_node.contains(link));
    let others = routes.iter().filter(|way| on_link(way) && free(way));
    let others = others.filter_map(host).filter(|it| !within((*it).into()));
    let others = others.filter(|address| !own.contains(address)).collect();
    let link_sources = link_sources(routes.iter().filter(to_pods))
        .filter(|(link, address)| links.contains(*link) && !gateways.contains(address))
        .filter_map(|(link, address)| Some((index(link)?, address)));
    Links {
        link_sources: link_sources.collect(),
        gateways,
        own,
        reached,
        others,
        pods: links,
    }
}

/// The most specific route to each single address among `pods`.
fn nearest<'a>(routes: &'a [Value], pods: &[IpNet]) -> BTreeMap<IpAddr, &'a Value> {
    let single = pods
        .iter()
        .filter(|net| net.prefix_len() == net.max_prefix_len());
    let single: Vec<IpAddr> = single.map(IpNet::addr).collect();
    if single.is_empty() {
        return BTreeMap::new();
    }
    let ways = routes
        .iter()
        .filter(|route| route["type"].is_null() || kind(route) == "unicast");
    let ways: Vec<(IpNet, &Value)> = ways.filter_map(|it| Some((destination(it)?, it))).collect();
    let way = |address: IpAddr| {
        let holding = ways.iter().filter(|(net, _)| net.contains(&address));
        let (_, way) = holding.max_by_key(|(net, _)| net.prefix_len())?;
        Some((address, *way))
    };
    single.into_iter().filter_map(way).collect()
}

/// The addresses that have a route of their own, with the one link that it leads to.
fn link_sources<'a>(
    routes: impl Iterator<Item = &'a Value>,
) -> impl Iterator<Item = (&'a str, IpAddr)> {
    let mut ways: BTreeMap<IpAddr, Vec<(&Value, &str)>> = BTreeMap::new();
    for route in routes {
        if let Some(address) = host(route) {
            let ways = ways.entry(address).or_default();
            ways.extend(links(route).map(|link| (route, link)));
        }
    }
    ways.into_iter()
        .filter_map(|(address, ways)| match ways[..] {
            // `ip` names every table but the main one.
            [(route, link)] if route["table"].is_null() => Some((link, address)),
            _ => None,
        })
}

fn leads_out(route: &Value) -> bool {
    route["dst"] == "default" && kind(route) == "unicast"
}

/// Whether it is a local route for one of these addresses.
fn holds(route: &Value, node: &[IpAddr]) -> bool {
    let address = route["dst"].as_str().and_then(|text| text.parse().ok());
    kind(route) == "local" && address.is_some_and(|address: IpAddr| node.contains(&address))
}

/// `ip` omits the default type.
fn kind(route: &Value) -> &str {
    route["type"].as_str().unwrap_or("unicast")
}

/// `ip` prints a host address without prefix length.
fn destination(route: &Value) -> Option<IpNet> {
    let text = route["dst"].as_str()?;
    text.parse()
        .ok()
        .or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// The one address that a route is for.
fn host(route: &Value) -> Option<IpAddr> {
    let net = destination(route)?;
    (net.prefix_len() == net.max_prefix_len()).then(|| net.addr())
}

/// Its link, or the links of a multipath route.
fn links(route: &Value) -> impl Iterator<Item = &str> {
    let several = route["nexthops"].as_array().into_iter().flatten();
    several.chain([route]).filter_map(|way| way["dev"].as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is chosen for pods 10.244.0.0/24 and fd00:244::/64 on node 192.0.2.10, where a link's index
    /// is the length of its name and `gone` has none.
    fn choice(listing: &str) -> Links {
        let pods = ["10.244.0.0/24", "fd00:244::/64"].map(|net| net.parse().unwrap());
        let node = ["192.0.2.10".parse().unwrap()];
        let index = |link: &str| (link != "gone").then(|| u32::try_from(link.len()).unwrap());
        choose(&parse(listing).unwrap(), &pods, &node, index)
    }

    fn chosen(listing: &str) -> Vec<String> {
        choice(listing).pods.into_iter().collect()
    }

    #[test]
    fn address_is_pinned_to_its_only_host_route() {
        for (listing, expected, why) in [
            (
                r#"[{"dst":"10.244.0.5","dev":"cali1"},{"dst":"fd00:244::5","dev":"cali12"}]"#,
                &[(5, "10.244.0.5"), (6, "fd00:244::5")][..],
                "one each",
            ),
            (
                r#"[{"dst":"10.244.0.0/24","dev":"cni0"}]"#,
                &[],
                "the network of a bridge",
            ),
            (
                r#"[{"dst":"10.244.0.5","dev":"cali1"},{"dst":"10.244.0.5","dev":"cali12","metric":9}]"#,
                &[],
                "two ways",
            ),
            (
                r#"[{"dst":"10.244.0.5","nexthops":[{"dev":"cali1"},{"dev":"cali12"}]}]"#,
                &[],
                "two ways at once",
            ),
            (
                r#"[{"dst":"10.244.0.5","dev":"cali1"},{"dst":"10.244.0.5","dev":"cali12","table":"7"}]"#,
                &[],
                "another table has another way",
            ),
            (
                r#"[{"dst":"10.244.0.5","dev":"cali1","table":"7"}]"#,
                &[],
                "a table that may not be asked",
            ),
            (
                r#"[{"dst":"10.244.0.5","dev":"gone"}]"#,
                &[],
                "a link that is no more",
            ),
            (
                r#"[{"dst":"10.244.0.5","dev":"eth0"},{"dst":"default","gateway":"192.0.2.1","dev":"eth0"}]"#,
                &[],
                "the node's own link",
            ),
            (
                r#"[{"dst":"10.244.0.5","dev":"cali1"},{"type":"local","dst":"10.244.0.5","dev":"lo","table":"local"}]"#,
                &[],
                "the host's own address",
            ),
            (
                r#"[{"dst":"192.0.2.77","dev":"cali1"},{"dst":"10.244.0.0/25","dev":"cali1"}]"#,
                &[],
                "no pod's address",
            ),
        ] {
            let link_sources = choice(listing).link_sources;
            let expected = expected
                .iter()
                .map(|(index, ip)| (*index, ip.parse().unwrap()));
            assert_eq!(link_sources, expected.collect(), "{why}");
        }
    }

    #[test]
    fn pod_links_are_where_pod_addresses_are_routed() {
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
    fn single_addresses_are_reached_by_their_nearest_route() {
        let pods = [
            "10.244.0.0/24",
            "192.168.77.5/32",
            "10.9.0.5/32",
            "192.0.2.10/32",
        ];
        let pods = pods.map(|net| net.parse().unwrap());
        let node = ["192.0.2.10".parse().unwrap()];
        for (listing, links, reached, why) in [
            (
                r#"[{"dst":"192.168.77.5","dev":"cali1"},{"dst":"192.168.0.0/16","gateway":"10.0.0.1","dev":"eth0"}]"#,
                &["cali1"][..],
                &["192.168.77.5"][..],
                "a link of its own",
            ),
            (
                r#"[{"dst":"10.9.0.0/24","dev":"cbr0"},{"dst":"10.0.0.0/8","dev":"tun0"}]"#,
                &["cbr0"],
                &["10.9.0.5"],
                "a bridge, and a wider network elsewhere",
            ),
            (
                r#"[{"dst":"192.168.77.5","gateway":"10.0.0.1","dev":"tun0"}]"#,
                &[],
                &[],
                "behind a router",
            ),
            (
                r#"[{"type":"blackhole","dst":"192.168.77.0/24"},{"dst":"default","dev":"eth0"},{"dst":"10.9.0.0/24","dev":"eth0"}]"#,
                &[],
                &[],
                "nowhere, and behind the node's own link",
            ),
        ] {
            let found = choose(&parse(listing).unwrap(), &pods, &node, |_| Some(1));
            let reached = reached.iter().map(|it| it.parse().unwrap()).collect();
            assert_eq!(found.pods.iter().collect::<Vec<_>>(), links, "{why}");
            assert_eq!(found.reached, reached, "{why}");
        }
    }

    #[test]
    fn host_routes_outside_pod_networks_are_found() {
        let listing = r#"[{"dst":"192.168.77.5","dev":"cali1"},{"dst":"10.244.0.7","dev":"cali2"},
            {"dst":"192.168.77.6","gateway":"192.0.2.1","dev":"eth1"},{"dst":"192.168.78.0/24","dev":"cali3"},
            {"dst":"192.168.77.7","dev":"eth0"},{"dst":"default","dev":"eth0"},
            {"type":"local","dst":"192.168.77.8","dev":"cali4","table":"local"},{"dst":"192.168.77.8","dev":"cali4"}]"#;
        let found = choice(listing);
        assert_eq!(found.others, ["192.168.77.5".parse().unwrap()].into());
        assert_eq!(found.own, ["192.168.77.8".parse().unwrap()].into());
    }

    #[test]
    fn host_addresses_in_pod_networks_are_gateways() {
        let listing = r#"[{"type":"local","dst":"10.244.0.1","dev":"cni0","table":"local"},
            {"type":"local","dst":"fd00:244::1","dev":"cni0","table":"local"},
            {"type":"broadcast","dst":"10.244.0.255","dev":"cni0","table":"local"},
            {"type":"local","dst":"192.0.2.10","dev":"eth0","table":"local"},
            {"type":"local","dst":"default","dev":"lo","table":"15001"}]"#;
        let links = choice(listing);
        let expected = ["10.244.0.1", "fd00:244::1"].map(|ip| ip.parse().unwrap());
        assert_eq!(links.gateways, expected.into());
    }
}
