//! Which bridge port owns each address: no other port may send with it.
//!
//! Pure: values in, a script out. Knows no pods, only ports and addresses.
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use nix::net::if_::if_nametoindex;

use crate::command::CommandError;
use crate::names::{BRIDGE, TABLE};

use crate::bridges::Bridge;
use crate::sets;

/// An address of IEEE 802.
pub type LinkAddress = [u8; 6];

/// What is behind a port: a pod's end of a veth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// The port's name.
    pub port: String,
    /// The end's own address.
    pub link: LinkAddress,
    /// Its addresses of IP.
    pub addresses: Vec<IpAddr>,
}

/// Which port each address is behind; `None`: it is a bridge's own, so behind none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owners {
    links: BTreeMap<LinkAddress, Option<String>>,
    addresses: BTreeMap<IpAddr, Option<String>>,
}

impl Owners {
    /// The present owners. An address that two ends have belongs to the bridge, or stays with the
    /// previous owner, or goes to the first of the two.
    #[must_use]
    pub fn now(&self, bridges: &[Bridge], ends: &[End]) -> Self {
        let mut new = Self::default();
        for bridge in bridges {
            let own = bridge.addresses.iter().map(|ip| (*ip, None));
            new.addresses.extend(own);
            new.links
                .extend(parsed(&bridge.address).map(|it| (it, None)));
        }
        for before in [true, false] {
            for End {
                port,
                link,
                addresses,
            } in ends
            {
                let port = Some(port.clone());
                if !before || self.links.get(link) == Some(&port) {
                    new.links.entry(*link).or_insert_with(|| port.clone());
                }
                for ip in addresses {
                    if !before || self.addresses.get(ip) == Some(&port) {
                        new.addresses.entry(*ip).or_insert_with(|| port.clone());
                    }
                }
            }
        }
        new
    }

    /// The addresses that are behind a port, with its name.
    pub fn ports(&self) -> impl Iterator<Item = (IpAddr, &str)> {
        let ports = self.addresses.iter();
        ports.filter_map(|(address, port)| Some((*address, port.as_deref()?)))
    }

    /// One nft transaction after which the table for bridges knows these owners and no others.
    #[must_use]
    pub fn script(&self) -> String {
        let mut script = String::new();
        let links = self.links.iter();
        let links = links.map(|(link, port)| (written(link), port));
        write(&mut script, ["bound_mac", "mac_ports"], links);
        let v4 = self.addresses.iter().filter(|(ip, _)| ip.is_ipv4());
        let v4 = v4.map(|(ip, port)| (ip.to_string(), port));
        write(&mut script, ["bound_ip4", "ip_ports4"], v4);
        let v6 = || self.addresses.iter().filter(|(ip, _)| ip.is_ipv6());
        let addresses = v6().map(|(ip, port)| (ip.to_string(), port));
        write(&mut script, ["bound_ip6", "ip_ports6"], addresses);
        let targets = v6().filter_map(|(ip, port)| match ip {
            IpAddr::V6(ip) => Some((format!("{:#034x}", ip.to_bits()), port)),
            IpAddr::V4(_) => None,
        });
        write(&mut script, ["bound_target", "target_ports"], targets);
        script
    }
}

/// The index of each address's port in the kernel's table, as the previous daemon left it; 0, which is no link's index,
/// if the port is gone.
///
/// # Errors
/// [`CommandError`] if `nft` is missing, or the table is.
pub fn ports_before() -> Result<BTreeMap<IpAddr, u32>, CommandError> {
    let pairs = sets::pairs(BRIDGE, "ip_ports")?.into_iter();
    let index = |port: &str| if_nametoindex(port).unwrap_or_default();
    let known = pairs.filter_map(|[address, port]| Some((address.parse().ok()?, index(&port))));
    Ok(known.collect())
}

fn parsed(link: &str) -> Option<LinkAddress> {
    let bytes = link
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).ok());
    bytes.collect::<Option<Vec<_>>>()?.try_into().ok()
}

fn written(link: &LinkAddress) -> String {
    link.map(|byte| format!("{byte:02x}")).join(":")
}

/// Fills the set of addresses that belong to a port, and the set of their ports.
fn write<'a>(
    script: &mut String,
    [bound, ports]: [&str; 2],
    all: impl Iterator<Item = (String, &'a Option<String>)>,
) {
    let all: Vec<_> = all.collect();
    let keys: BTreeSet<_> = all.iter().map(|(key, _)| key.clone()).collect();
    sets::replace(script, &format!("{BRIDGE} {TABLE} {bound}"), &keys);
    let with_port = all.iter().filter_map(|(key, port)| {
        let port = port.as_deref().filter(|port| sets::is_plain(port))?;
        Some(format!("{key} . \"{port}\""))
    });
    let set = format!("{BRIDGE} {TABLE} {ports}");
    sets::replace(script, &set, &with_port.collect());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(port: &str, link: u8, addresses: &[&str]) -> End {
        End {
            port: port.into(),
            link: [2, 0, 0, 0, 0, link],
            addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        }
    }

    fn bridge() -> Bridge {
        Bridge {
            name: "cni0".into(),
            address: "02:00:00:00:00:01".into(),
            addresses: vec!["10.1.0.1".parse().unwrap()],
            ports: Vec::new(),
            looks_into_ip: false,
            learns_unseen: false,
        }
    }

    #[test]
    fn address_has_one_owner_and_bridge_wins() {
        let ends = [
            end("pod0", 5, &["10.1.0.5", "fd00::5"]),
            end("pod1", 5, &["10.1.0.5", "10.1.0.1", "10.1.0.6"]),
        ];
        let owners = Owners::default().now(&[bridge()], &ends);
        insta::assert_snapshot!(owners.script(), @r#"
        flush set bridge portreeve bound_mac
        add element bridge portreeve bound_mac { 02:00:00:00:00:01, 02:00:00:00:00:05 }
        flush set bridge portreeve mac_ports
        add element bridge portreeve mac_ports { 02:00:00:00:00:05 . "pod0" }
        flush set bridge portreeve bound_ip4
        add element bridge portreeve bound_ip4 { 10.1.0.1, 10.1.0.5, 10.1.0.6 }
        flush set bridge portreeve ip_ports4
        add element bridge portreeve ip_ports4 { 10.1.0.5 . "pod0", 10.1.0.6 . "pod1" }
        flush set bridge portreeve bound_ip6
        add element bridge portreeve bound_ip6 { fd00::5 }
        flush set bridge portreeve ip_ports6
        add element bridge portreeve ip_ports6 { fd00::5 . "pod0" }
        flush set bridge portreeve bound_target
        add element bridge portreeve bound_target { 0xfd000000000000000000000000000005 }
        flush set bridge portreeve target_ports
        add element bridge portreeve target_ports { 0xfd000000000000000000000000000005 . "pod0" }
        "#);
    }

    #[test]
    fn current_owner_keeps_its_address_from_later_claims() {
        let first = end("pod1", 6, &["10.1.0.6"]);
        let before = Owners::default().now(&[], std::slice::from_ref(&first));
        let thief = end("pod0", 6, &["10.1.0.5", "10.1.0.6"]);
        let kept = before.now(&[], &[thief.clone(), first]).script();
        assert!(
            kept.contains(r#"ip_ports4 { 10.1.0.5 . "pod0", 10.1.0.6 . "pod1" }"#),
            "{kept}"
        );
        assert!(
            kept.contains(r#"mac_ports { 02:00:00:00:00:06 . "pod1" }"#),
            "{kept}"
        );
        let alone = before.now(&[], &[thief]).script();
        assert!(
            alone.contains(r#"10.1.0.6 . "pod0""#),
            "its owner is gone: {alone}"
        );
    }

    #[test]
    fn address_at_unnameable_port_has_no_owner() {
        let script = Owners::default()
            .now(&[], &[end("pod*", 5, &["10.1.0.5"])])
            .script();
        assert!(script.contains("bound_ip4 { 10.1.0.5 }"), "{script}");
        assert!(!script.contains("pod*"), "{script}");
    }
}
