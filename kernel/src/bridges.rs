//! Finds the Linux bridges that pods are attached to, and switches off what breaks the redirect there.
//!
//! A bridge that looks into IP packets itself (`br_netfilter`) runs the prerouting chains below IP,
//! and IP does not run them again: an intercepted packet would lose its socket on the way up. Knows
//! neither pods nor policies, only links and addresses.
use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use ipnet::IpNet;
use serde_json::Value;

use crate::command::{self, CommandError, Program};
use crate::names::{BRIDGE, BRIDGE_FAMILY, BRIDGE_OPTION, MODULE_PACKAGES, TABLE};
use crate::sysctl::{self, NODES_OWN};

use crate::sets::{self, SetsError};

/// The set of ports of bridges, in the table of family `bridge`.
pub const PORTS: &str = "ports";
/// The set that notes for [`switch_on_again`] what [`switch_off`] did.
pub const SWITCHED_OFF: &str = "switched_off";
/// The set that notes for [`switch_on_again`] what [`keep_from_learning`] did.
pub const KEPT_FROM_LEARNING: &str = "kept_from_learning";
/// The bridge's own parameter, as `ip` names it.
const NO_LEARNING: &str = "no_linklocal_learn";

/// Why policies cannot be enforced for pods on a bridge.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    /// The kernel has no nft for bridges.
    #[error(
        "the kernel lacks {BRIDGE_FAMILY} ({BRIDGE_OPTION}), so policies cannot be enforced for pods on a Linux bridge; install the kernel's full set of modules ({MODULE_PACKAGES})"
    )]
    NoFamily,
    /// The sysctl cannot be written.
    #[error(
        "sysctl {} is 1 and cannot be changed from here ({source}); run `iptables-init install --bridge NAME` where /proc/sys/net can be written, or with the node's own mounted at {NODES_OWN} as deploy/components/bridge does",
        name(switch)
    )]
    Switch {
        /// The last part of its name.
        switch: String,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The previous settings could not be recorded.
    #[error(transparent)]
    Sets(#[from] SetsError),
}

/// A bridge, as its links and addresses describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// Its name.
    pub name: String,
    /// Its own address (IEEE 802), as `ip` writes it.
    pub address: String,
    /// Its addresses of IP.
    pub addresses: Vec<IpAddr>,
    /// The links that are its ports, oldest first.
    pub ports: Vec<Port>,
    /// Whether the bridge itself looks into IP packets (`nf_call_iptables`,
    /// `nf_call_ip6tables`), whatever the sysctls say.
    pub looks_into_ip: bool,
    /// Whether it learns addresses from frames to the reserved group addresses (IEEE 802.1Q,
    /// table 8-1), and that can be switched off (`no_linklocal_learn`, Linux 5.0 and iproute2 5.0).
    pub learns_unseen: bool,
}

/// A port of a bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// Its interface index, which is never reused.
    pub index: u32,
    /// Its own address (IEEE 802), as `ip` writes it.
    pub address: String,
    /// Its veth peer, if that is in another network namespace.
    pub peer: Option<Peer>,
}

/// The peer of a veth, by the numbers of this network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The number of its network namespace (`IFLA_LINK_NETNSID`).
    pub netns: i32,
    /// Its own number there (`IFLA_LINK`).
    pub index: u32,
}

/// The bridges of `names`, and those with an address in one of the `pods` networks, or whose own
/// network holds one of them. Runs `ip`; blocks for some milliseconds.
///
/// # Errors
/// [`CommandError`] if `ip` is missing or fails.
pub fn find(names: &[String], pods: &[IpNet]) -> Result<Vec<Bridge>, CommandError> {
    let text = command::run(Program::Ip, &["-j", "-d", "addr", "show"], "")?;
    let links: Vec<Value> = serde_json::from_str(&text).map_err(|source| CommandError::Run {
        program: Program::Ip,
        source: source.into(),
    })?;
    Ok(among(&links, names, pods))
}

fn among(links: &[Value], names: &[String], pods: &[IpNet]) -> Vec<Bridge> {
    let ours = |link: &&Value| {
        let named = names.iter().any(|name| link["ifname"] == name.as_str());
        link["linkinfo"]["info_kind"] == "bridge"
            && (named || networks(link).any(|net| pods.iter().any(|pods| overlap(&net, pods))))
    };
    let bridge = |link: &Value| {
        let name = link["ifname"].as_str()?;
        let ports = links.iter().filter(|port| port["master"] == name);
        let port = |link: &Value| {
            let name = link["ifname"].as_str()?.to_owned();
            let address = link["address"].as_str()?.to_owned();
            let peer = || {
                Some(Peer {
                    netns: i32::try_from(link["link_netnsid"].as_i64()?).ok()?,
                    index: u32::try_from(link["link_index"].as_i64()?).ok()?,
                })
            };
            let peer = peer();
            let index = u32::try_from(link["ifindex"].as_i64()?).ok()?;
            Some(Port {
                name,
                index,
                address,
                peer,
            })
        };
        let options = &link["linkinfo"]["info_data"];
        Some(Bridge {
            name: name.to_owned(),
            address: link["address"].as_str()?.to_owned(),
            addresses: networks(link).map(|net| net.addr()).collect(),
            ports: ports.filter_map(port).collect(),
            learns_unseen: options[NO_LEARNING] == 0,
            looks_into_ip: SWITCHES
                .iter()
                .any(|it| options[format!("nf_call_{it}")] == 1),
        })
    };
    links.iter().filter(ours).filter_map(bridge).collect()
}

/// The networks that a link has an address in.
fn networks(link: &Value) -> impl Iterator<Item = IpNet> {
    let addresses = link["addr_info"].as_array().map(Vec::as_slice);
    addresses.unwrap_or_default().iter().filter_map(|address| {
        let length = u8::try_from(address["prefixlen"].as_u64()?).ok()?;
        IpNet::new(address["local"].as_str()?.parse().ok()?, length).ok()
    })
}

fn overlap(one: &IpNet, other: &IpNet) -> bool {
    one.contains(other) || other.contains(one)
}

/// One nft transaction that makes these bridges' ports the only ones in the table.
#[must_use]
pub fn ports_script(bridges: &[Bridge]) -> String {
    let ports: BTreeMap<&str, &str> = bridges
        .iter()
        .flat_map(|bridge| {
            let ports = bridge.ports.iter();
            ports.map(|port| (&*port.name, &*port.address))
        })
        // A port name that nft cannot parse is left out, so its pod has no connectivity.
        .filter(|(port, _)| sets::is_plain(port))
        .collect();
    let mut script = String::new();
    let names = ports.keys().map(|port| format!("\"{port}\"")).collect();
    sets::replace(&mut script, &format!("{BRIDGE} {TABLE} {PORTS}"), &names);
    let macs = ports
        .iter()
        .map(|(port, address)| format!("\"{port}\" : {address}"));
    // Flushing a map takes another keyword than flushing a set.
    let map = format!("{BRIDGE} {TABLE} bridge_mac");
    script += &format!("flush map {map}\n");
    sets::elements(&mut script, "add", &map, macs);
    script
}

/// The ends of the names of the sysctls that make bridges look into IP packets, and of the bridges'
/// own parameters (linux Documentation/networking/ip-sysctl: `bridge-nf-call-*`).
const SWITCHES: [&str; 2] = ["iptables", "ip6tables"];

fn name(switch: &str) -> String {
    format!("net.bridge.bridge-nf-call-{switch}")
}

fn under_net(switch: &str) -> String {
    format!("bridge/bridge-nf-call-{switch}")
}

fn file(switch: &str) -> String {
    format!("/proc/sys/net/{}", under_net(switch))
}

/// The sysctls by which all bridges of this network namespace look into IP packets; none without
/// the module `br_netfilter`.
#[must_use]
pub fn switched_on() -> Vec<String> {
    let on = SWITCHES.iter().filter(|switch| is_on(switch));
    on.map(|switch| name(switch)).collect()
}

fn is_on(switch: &str) -> bool {
    sysctl::is_on(&under_net(switch))
}

/// Stops bridges from looking into IP packets, and records in the table what `uninstall` has to switch
/// on again. Returns whether anything changed.
///
/// # Errors
/// [`BridgeError`]; another run continues where it stopped.
pub fn switch_off() -> Result<bool, BridgeError> {
    let on: Vec<_> = SWITCHES
        .into_iter()
        .filter(|switch| is_on(switch))
        .collect();
    if on.is_empty() {
        return Ok(false);
    }
    let mut note = String::new();
    let names = on.iter().map(|switch| format!("\"{switch}\""));
    sets::elements(
        &mut note,
        "add",
        &format!("{BRIDGE} {TABLE} {SWITCHED_OFF}"),
        names,
    );
    sets::load(&note)?;
    on.iter().try_for_each(|switch| write(switch, "0"))?;
    Ok(true)
}

/// Keeps a bridge that [learns from frames which no table sees](Bridge::learns_unseen) from it: with one, a pod could
/// attract another pod's packets to its own port. Records it in the table for `uninstall`.
///
/// # Errors
/// If `nft` or `ip` is missing or refuses.
pub fn keep_from_learning(bridge: &Bridge) -> Result<(), SetsError> {
    if !sets::is_plain(&bridge.name) {
        return Ok(());
    }
    let mut note = String::new();
    let set = format!("{BRIDGE} {TABLE} {KEPT_FROM_LEARNING}");
    let name = format!("\"{}\"", bridge.name);
    sets::elements(&mut note, "add", &set, [name].into_iter());
    sets::load(&note)?;
    Ok(set_no_learning(&bridge.name, "1")?)
}

fn set_no_learning(bridge: &str, value: &str) -> Result<(), CommandError> {
    let set = ["link", "set", "dev", bridge, "type", "bridge"];
    command::run(Program::Ip, &[&set[..], &[NO_LEARNING, value]].concat(), "").map(drop)
}

/// What [`switch_off`] does, for `print`.
#[must_use]
pub fn switch_off_script() -> String {
    let lines = SWITCHES.map(|switch| format!("[ ! -e {0} ] || echo 0 > {0}\n", file(switch)));
    format!(
        "# What this changes is noted in the table, for `uninstall`.\n{}",
        lines.concat()
    )
}

/// Undoes [`switch_off`] and [`keep_from_learning`], as [`SWITCHED_OFF`] and [`KEPT_FROM_LEARNING`] have it noted.
///
/// # Errors
/// [`BridgeError::Switch`]; running it again goes on where it stopped.
pub fn switch_on_again<'a>(
    switched_off: impl Iterator<Item = &'a str>,
    kept_from_learning: impl Iterator<Item = &'a str>,
) -> Result<(), BridgeError> {
    for bridge in kept_from_learning {
        // `ip` fails for a bridge that is gone.
        let _ = set_no_learning(bridge, "0");
    }
    let noted: Vec<_> = switched_off.collect();
    let there = SWITCHES
        .iter()
        .filter(|switch| noted.contains(switch) && Path::new(&file(switch)).exists());
    there.into_iter().try_for_each(|switch| write(switch, "1"))
}

fn write(switch: &str, value: &str) -> Result<(), BridgeError> {
    sysctl::write(&under_net(switch), value).map_err(|source| BridgeError::Switch {
        switch: switch.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `ip -j -d addr show` writes them, without what nobody reads.
    fn links() -> Vec<Value> {
        let bridge = |name: &str, address: &str, local: &str, length: u8, looks: u8| {
            serde_json::json!({
                "ifname": name, "address": address,
                "linkinfo": { "info_kind": "bridge", "info_data": { "nf_call_iptables": looks, "nf_call_ip6tables": 0, "no_linklocal_learn": 0 } },
                "addr_info": [
                    { "local": local, "prefixlen": length },
                    { "local": "fe80::1", "prefixlen": 64 },
                ],
            })
        };
        let port = |name: &str, master: &str| {
            serde_json::json!({
                "ifname": name, "address": "02::9", "master": master,
                "ifindex": 9, "link_index": 2, "link_netnsid": 5,
                "linkinfo": { "info_kind": "veth" }, "addr_info": [],
            })
        };
        vec![
            serde_json::json!({ "ifname": "lo", "addr_info": [{ "local": "127.0.0.1", "prefixlen": 8 }] }),
            bridge("cni0", "0a::1", "10.244.0.1", 24, 0),
            bridge("docker0", "0a::2", "172.17.0.1", 16, 1),
            port("pod0", "cni0"),
            port("pod\"1", "cni0"),
            port("c0", "docker0"),
            serde_json::json!({ "ifname": "pod9", "linkinfo": { "info_kind": "veth" }, "addr_info": [{ "local": "10.244.0.1", "prefixlen": 32 }] }),
        ]
    }

    fn found(names: &[&str], pods: &[&str]) -> Vec<String> {
        let names: Vec<_> = names.iter().map(ToString::to_string).collect();
        let pods: Vec<_> = pods.iter().map(|net| net.parse().unwrap()).collect();
        let found = among(&links(), &names, &pods);
        found.into_iter().map(|bridge| bridge.name).collect()
    }

    #[test]
    fn bridge_is_found_by_name_or_pod_network() {
        for (names, pods, expected, why) in [
            (
                &[][..],
                &["10.244.0.0/24"][..],
                &["cni0"][..],
                "the same network",
            ),
            (&[], &["10.244.0.0/16"], &["cni0"], "a part of the pods'"),
            (
                &[],
                &["10.244.0.128/25"],
                &["cni0"],
                "a part of the bridge's",
            ),
            (&[], &["10.245.0.0/16", "fd00::/64"], &[], "another network"),
            (
                &["docker0"],
                &["10.244.0.0/24"],
                &["cni0", "docker0"],
                "named",
            ),
            (&["pod0", "cni9"], &[], &[], "no bridge, or not there"),
        ] {
            assert_eq!(found(names, pods), expected, "{why}");
        }
    }

    #[test]
    fn bridge_has_its_addresses_ports_and_settings() {
        let pods = ["172.17.0.0/24".parse().unwrap()];
        let expected = Bridge {
            name: "docker0".into(),
            address: "0a::2".into(),
            addresses: ["172.17.0.1", "fe80::1"]
                .map(|ip| ip.parse().unwrap())
                .into(),
            ports: vec![Port {
                name: "c0".into(),
                index: 9,
                address: "02::9".into(),
                peer: Some(Peer { netns: 5, index: 2 }),
            }],
            looks_into_ip: true,
            learns_unseen: true,
        };
        assert_eq!(among(&links(), &[], &pods), [expected]);
    }

    #[test]
    fn ports_are_quoted_and_unquotable_ones_skipped() {
        let bridges = among(
            &links(),
            &["docker0".into()],
            &["10.244.0.0/24".parse().unwrap()],
        );
        insta::assert_snapshot!(ports_script(&bridges), @r#"
        flush set bridge portreeve ports
        add element bridge portreeve ports { "c0", "pod0" }
        flush map bridge portreeve bridge_mac
        add element bridge portreeve bridge_mac { "c0" : 02::9, "pod0" : 02::9 }
        "#);
        insta::assert_snapshot!(ports_script(&[]), @r"
        flush set bridge portreeve ports
        flush map bridge portreeve bridge_mac
        ");
    }
}
