//! The table's sets: the addresses of this node's pods, and which of these are non-isolated.
//!
//! Scripts are pure text; [`load`] is the one way in which the daemon changes the kernel. Knows
//! neither pods nor policies, only addresses.
use std::collections::BTreeSet;
use std::fmt::{Display, Write};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde_json::Value;

use crate::command::{self, CommandError, Program};
use crate::names::{BRIDGE, TABLE};

use crate::elements::noting;
use crate::pod_links::Links;

/// Elements in one `add element`, so that no line of a script grows without bound.
const CHUNK: usize = 512;

/// The elements that the table's sets should have, for both families.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sets {
    /// Which addresses are this node's pods; bits beyond the prefix do not count.
    pub pods: BTreeSet<IpNet>,
    /// Which addresses are pods of any node; may lag behind, since no packet is accepted by it.
    pub cluster: Arc<[IpNet]>,
    /// Pods that are known and not isolated for egress.
    pub egress_non_isolated: BTreeSet<IpAddr>,
    /// Pods that are known and not isolated for ingress.
    pub ingress_non_isolated: BTreeSet<IpAddr>,
    /// Pods that may talk to themselves: all that are known.
    pub selves: BTreeSet<IpAddr>,
    /// Whether what a pod sends to its own node is judged (`--own-node judge`).
    pub own_node_judged: bool,
    /// The wanted state of the table for bridges; `None` where the kernel has no such table.
    pub bridged: Option<Groups>,
}

/// Broadcasts and multicasts between pods on one bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Groups {
    /// Pass as on any bridge.
    Pass,
    /// Are dropped: their receivers are unknown, so there can be no verdict.
    Stay,
}

/// One nft transaction that makes `links` the only pod interfaces.
#[must_use]
pub fn pod_links_script(links: &Links) -> String {
    let quoted = links.pods.iter().map(|link| format!("\"{link}\""));
    let mut script = String::new();
    replace(
        &mut script,
        &format!("inet {TABLE} {POD_LINKS}"),
        &quoted.collect(),
    );
    for (family, is_ours) in FAMILIES {
        let link_sources = links
            .link_sources
            .iter()
            .filter(|(_, address)| is_ours(address));
        let link_sources = link_sources.map(|(index, address)| format!("{index} . {address}"));
        replace(
            &mut script,
            &format!("inet {TABLE} {LINK_SOURCES}{family}"),
            &link_sources.collect(),
        );
    }
    script
}

/// Why the sets could not be changed; they are as before.
#[derive(Debug, thiserror::Error)]
pub enum SetsError {
    /// There is no redirect in this network namespace, or another one.
    #[error(
        "the sets of nft table {TABLE} are not there; run `iptables-init install` first ({message})"
    )]
    NotInstalled {
        /// What nft said.
        message: String,
    },
    /// nft rejected the script.
    #[error(transparent)]
    Command(#[from] CommandError),
}

impl Sets {
    /// One nft transaction that gives the sets exactly these elements.
    #[must_use]
    pub fn replace_script(&self) -> String {
        let mut script = String::new();
        for (name, elements) in self.by_name() {
            replace(&mut script, &name, &elements);
        }
        script
    }

    /// One nft transaction that makes the sets of `from` these; `None` if they are equal.
    #[must_use]
    pub fn change_script(&self, from: &Self) -> Option<String> {
        let mut script = String::new();
        for ((name, new), (_, old)) in self.by_name().into_iter().zip(from.by_name()) {
            if new == old {
                continue;
            }
            if name.contains(CLUSTER) {
                // The kernel holds these merged: taking out one CIDR would tear a hole into
                // another that covers it.
                replace(&mut script, &name, &new);
            } else {
                elements(&mut script, "delete", &name, old.difference(&new));
                elements(&mut script, "add", &name, new.difference(&old));
            }
        }
        (!script.is_empty()).then_some(script)
    }

    /// The pods' networks without those that lie within another. The kernel stores each network by itself, so that a
    /// change touches only its own element: before Linux 6.17 (nft_set_rbtree) a lookup can miss an element that is
    /// being replaced, and the packet passes.
    fn outermost(&self) -> BTreeSet<IpNet> {
        let all: BTreeSet<IpNet> = self.pods.iter().map(IpNet::trunc).collect();
        let within = |net: &IpNet| all.iter().any(|other| other != net && other.contains(net));
        all.iter().filter(|net| !within(net)).copied().collect()
    }

    /// Every set by its table and name, with its elements as nft writes them.
    fn by_name(&self) -> Vec<(String, BTreeSet<String>)> {
        let mut sets = Vec::new();
        let inet = |name: &str, family: &str| format!("inet {TABLE} {name}{family}");
        for (family, is_ours) in FAMILIES {
            let of = |set: &BTreeSet<IpAddr>| -> BTreeSet<String> {
                set.iter()
                    .filter(|a| is_ours(a))
                    .map(ToString::to_string)
                    .collect()
            };
            let networks = |all: &mut dyn Iterator<Item = &IpNet>| -> BTreeSet<String> {
                all.filter(|n| is_ours(&n.addr()))
                    .map(|n| n.trunc().to_string())
                    .collect()
            };
            let pods = networks(&mut self.outermost().iter());
            if self.bridged.is_some() {
                sets.push((format!("{BRIDGE} {TABLE} {PODS}{family}"), pods.clone()));
            }
            sets.push((inet(PODS, family), pods));
            sets.push((inet(CLUSTER, family), networks(&mut self.cluster.iter())));
            sets.push((
                inet(EGRESS_NON_ISOLATED, family),
                of(&self.egress_non_isolated),
            ));
            sets.push((
                inet(INGRESS_NON_ISOLATED, family),
                of(&self.ingress_non_isolated),
            ));
            let selves = self.selves.iter().filter(|a| is_ours(a));
            let selves = selves.map(|a| format!("{a} . {a}")).collect();
            sets.push((inet(HAIRPIN, family), selves));
        }
        if let Some(groups) = self.bridged {
            let all = ["ip", "ip6"].map(String::from).into();
            let pass = match groups {
                Groups::Pass => all,
                Groups::Stay => BTreeSet::new(),
            };
            sets.push((format!("{BRIDGE} {TABLE} {GROUPS}"), pass));
        }
        let judged = ["ipv4", "ipv6"].iter().filter(|_| self.own_node_judged);
        sets.push((
            format!("inet {TABLE} {OWN_NODE_JUDGED}"),
            judged.map(ToString::to_string).collect(),
        ));
        sets
    }
}

/// Runs `script` by `nft -f -`: all of it takes effect at once, or nothing. Blocks for some
/// milliseconds.
///
/// # Errors
/// [`SetsError`] with what nft said.
pub fn load(script: &str) -> Result<(), SetsError> {
    noting(script, || run(script))
}

fn run(script: &str) -> Result<(), SetsError> {
    match command::run(Program::Nft, &["-f", "-"], script) {
        Ok(_) => Ok(()),
        Err(CommandError::Refused { message, .. })
            if message.contains("No such file or directory") =>
        {
            Err(SetsError::NotInstalled { message })
        }
        Err(error) => Err(error.into()),
    }
}

/// The elements of a set with concatenated keys, for both families, as nft lists them. `name` has no family number.
///
/// # Errors
/// If there is no such set, or on unexpected output of nft.
pub(crate) fn pairs(table: &str, name: &str) -> Result<Vec<[String; 2]>, CommandError> {
    let mut all = Vec::new();
    for (number, _) in FAMILIES {
        let name = format!("{name}{number}");
        let listing = command::run(
            Program::Nft,
            &["-j", "list", "set", table, TABLE, &name],
            "",
        )?;
        let listing: Value =
            serde_json::from_str(&listing).map_err(|source| CommandError::Run {
                program: Program::Nft,
                source: source.into(),
            })?;
        all.extend(listed_pairs(&listing));
    }
    Ok(all)
}

fn listed_pairs(listing: &Value) -> Vec<[String; 2]> {
    let objects = listing["nftables"].as_array().into_iter().flatten();
    let elements = objects.filter_map(|object| object["set"]["elem"].as_array());
    let part = |part: &Value| match part {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    };
    let pair = |element: &Value| {
        let pair = element["concat"].as_array()?;
        Some([part(pair.first()?)?, part(pair.get(1)?)?])
    };
    elements.flatten().filter_map(pair).collect()
}

const PODS: &str = "pods";
const CLUSTER: &str = "cluster";
const GROUPS: &str = "groups";
const EGRESS_NON_ISOLATED: &str = "egress_non_isolated";
const INGRESS_NON_ISOLATED: &str = "ingress_non_isolated";
const HAIRPIN: &str = "hairpin";
const OWN_NODE_JUDGED: &str = "own_node_judged";
const POD_LINKS: &str = "pod_links";
/// The sets of the source addresses that each link may send, without the number of the family.
pub const LINK_SOURCES: &str = "link_sources";

type IsFamily = fn(&IpAddr) -> bool;
const FAMILIES: [(&str, IsFamily); 2] = [("4", IpAddr::is_ipv4), ("6", IpAddr::is_ipv6)];

/// Whether nft can parse a link's name in quotes.
pub(crate) fn is_plain(link: &str) -> bool {
    !link.contains(['"', '*', '\\'])
}

/// Makes `all` the only elements of a set, named with its table.
pub(crate) fn replace(script: &mut String, name: &str, all: &BTreeSet<String>) {
    // Writing to a String cannot fail, here and below.
    let _ = writeln!(script, "flush set {name}");
    elements(script, "add", name, all.iter());
}

/// Writes `verb element` of a set, named with its table, for all of `items`; nothing if there are none.
pub fn elements<T: Display>(
    script: &mut String,
    verb: &str,
    set: &str,
    items: impl Iterator<Item = T>,
) {
    let items: Vec<_> = items.map(|item| item.to_string()).collect();
    for chunk in items.chunks(CHUNK) {
        let _ = writeln!(script, "{verb} element {set} {{ {} }}", chunk.join(", "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sets(pods: &[&str], egress: &[&str], ingress: &[&str], selves: &[&str]) -> Sets {
        let addresses = |list: &[&str]| list.iter().map(|a| a.parse().unwrap()).collect();
        Sets {
            pods: pods.iter().map(|n| n.parse().unwrap()).collect(),
            cluster: ["10.1.0.0/16".parse().unwrap()].into(),
            egress_non_isolated: addresses(egress),
            ingress_non_isolated: addresses(ingress),
            selves: addresses(selves),
            own_node_judged: false,
            bridged: None,
        }
    }

    #[test]
    fn replacing_flushes_all_sets_and_fills_nonempty_ones() {
        let wanted = sets(
            &["10.1.2.3/24", "fd00:1::/64"],
            &["10.1.2.4"],
            &["10.1.2.4", "fd00:1::4"],
            &["10.1.2.4", "fd00:1::4"],
        );
        insta::assert_snapshot!(wanted.replace_script(), @r"
        flush set inet portreeve pods4
        add element inet portreeve pods4 { 10.1.2.0/24 }
        flush set inet portreeve cluster4
        add element inet portreeve cluster4 { 10.1.0.0/16 }
        flush set inet portreeve egress_non_isolated4
        add element inet portreeve egress_non_isolated4 { 10.1.2.4 }
        flush set inet portreeve ingress_non_isolated4
        add element inet portreeve ingress_non_isolated4 { 10.1.2.4 }
        flush set inet portreeve hairpin4
        add element inet portreeve hairpin4 { 10.1.2.4 . 10.1.2.4 }
        flush set inet portreeve pods6
        add element inet portreeve pods6 { fd00:1::/64 }
        flush set inet portreeve cluster6
        flush set inet portreeve egress_non_isolated6
        flush set inet portreeve ingress_non_isolated6
        add element inet portreeve ingress_non_isolated6 { fd00:1::4 }
        flush set inet portreeve hairpin6
        add element inet portreeve hairpin6 { fd00:1::4 . fd00:1::4 }
        flush set inet portreeve own_node_judged
        ");
    }

    #[test]
    fn change_script_has_only_the_differences() {
        let from = sets(
            &["10.1.2.0/24"],
            &["10.1.2.4", "10.1.2.5"],
            &["10.1.2.4"],
            &["10.1.2.4"],
        );
        let to = sets(
            &["10.1.2.0/24"],
            &["10.1.2.5", "10.1.2.6"],
            &["10.1.2.4"],
            &["10.1.2.4"],
        );
        insta::assert_snapshot!(to.change_script(&from).unwrap(), @r"
        delete element inet portreeve egress_non_isolated4 { 10.1.2.4 }
        add element inet portreeve egress_non_isolated4 { 10.1.2.6 }
        ");
    }

    #[test]
    fn judging_own_node_traffic_changes_one_set() {
        let from = Sets::default();
        let to = Sets {
            own_node_judged: true,
            ..Sets::default()
        };
        insta::assert_snapshot!(to.change_script(&from).unwrap(), @"add element inet portreeve own_node_judged { ipv4, ipv6 }");
    }

    #[test]
    fn links_with_any_name_are_replaced_together() {
        let links = Links {
            pods: ["cali0a@x", "eth0.100"].map(str::to_owned).into(),
            link_sources: ["10.1.2.3", "fd00:1::3"]
                .map(|it| (7, it.parse().unwrap()))
                .into(),
            ..Links::default()
        };
        insta::assert_snapshot!(pod_links_script(&links), @r#"
        flush set inet portreeve pod_links
        add element inet portreeve pod_links { "cali0a@x", "eth0.100" }
        flush set inet portreeve link_sources4
        add element inet portreeve link_sources4 { 7 . 10.1.2.3 }
        flush set inet portreeve link_sources6
        add element inet portreeve link_sources6 { 7 . fd00:1::3 }
        "#);
    }

    #[test]
    fn bridge_table_gets_the_pods_too() {
        let mut from = sets(&["10.1.2.0/24"], &[], &[], &[]);
        from.bridged = Some(Groups::Pass);
        let mut to = sets(&["10.1.3.0/24"], &[], &[], &[]);
        to.bridged = Some(Groups::Stay);
        insta::assert_snapshot!(to.change_script(&from).unwrap(), @r"
        delete element bridge portreeve pods4 { 10.1.2.0/24 }
        add element bridge portreeve pods4 { 10.1.3.0/24 }
        delete element inet portreeve pods4 { 10.1.2.0/24 }
        add element inet portreeve pods4 { 10.1.3.0/24 }
        delete element bridge portreeve groups { ip, ip6 }
        ");
    }

    #[test]
    fn pairs_are_read_as_nft_lists_them() {
        let listing = serde_json::json!({"nftables": [{"metainfo": {}}, {"set": {"name": "link_sources4", "elem": [
            {"concat": ["pod0", "10.0.0.5"]}, {"concat": ["77", "10.0.0.6"]}, {"concat": [78, "10.0.0.7"]}, "odd", {"concat": ["1"]}
        ]}}]});
        let pairs = listed_pairs(&listing);
        let pairs: Vec<_> = pairs
            .iter()
            .map(|[one, other]| (&**one, &**other))
            .collect();
        let expected = [("pod0", "10.0.0.5"), ("77", "10.0.0.6"), ("78", "10.0.0.7")];
        assert_eq!(pairs, expected);
        let empty = serde_json::json!({"nftables": [{"set": {"name": "link_sources6"}}]});
        assert_eq!(listed_pairs(&empty), Vec::<[String; 2]>::new());
    }

    #[test]
    fn equal_sets_need_no_change() {
        let same = sets(&["10.1.2.0/24"], &["10.1.2.4"], &[], &[]);
        let host_bits = sets(&["10.1.2.9/24"], &["10.1.2.4"], &[], &[]);
        assert_eq!(same.change_script(&same), None);
        assert_eq!(
            same.change_script(&host_bits),
            None,
            "bits beyond the prefix do not count"
        );
    }

    #[test]
    fn pod_network_change_leaves_other_networks_alone() {
        let change = |from: &[&str], to: &[&str]| {
            let script = sets(to, &[], &[], &[]).change_script(&sets(from, &[], &[], &[]));
            script.unwrap_or_default().replace("inet portreeve ", "")
        };
        let (both, wide) = (&["10.1.0.0/16", "10.1.2.0/24"][..], &["10.1.0.0/16"][..]);
        assert_eq!(
            change(both, wide),
            "",
            "one within the other counts for nothing"
        );
        insta::assert_snapshot!(change(both, &["10.1.2.0/24"]), @r"
        delete element pods4 { 10.1.0.0/16 }
        add element pods4 { 10.1.2.0/24 }
        ");
        let pods = [
            "10.1.0.0/16",
            "192.168.0.4/32",
            "192.168.0.5/32",
            "fd00::5/128",
        ];
        insta::assert_snapshot!(change(&pods[..3], &pods), @"add element pods6 { fd00::5/128 }");
        insta::assert_snapshot!(change(&pods[..2], &pods[..3]), @"add element pods4 { 192.168.0.5/32 }");
        insta::assert_snapshot!(change(&pods[..3], &["10.1.0.0/16", "192.168.0.5/32"]), @"delete element pods4 { 192.168.0.4/32 }");
    }

    #[test]
    fn many_elements_are_split_into_bounded_lines() {
        let mut many = Sets::default();
        many.selves
            .extend((0..1200u32).map(|n| IpAddr::from((0x0a00_0000 + n).to_be_bytes())));
        let script = many.replace_script();
        assert_eq!(script.matches("add element").count(), 3);
        assert_eq!(script.matches(" . ").count(), 1200);
    }
}
