//! A set of addresses as sorted ranges: the ipBlocks of one rule with their exceptions cut out.
//!
//! The blocks of a rule are alternatives and an exception concerns its own block only, so the union
//! of "block minus its exceptions" is exactly what the rule matches, and one binary search looks it up.
use std::net::IpAddr;

use ipnet::IpNet;

/// An `ipBlock`: `except` lies strictly within `cidr`, and both are truncated to their prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct IpBlock {
    pub(crate) cidr: IpNet,
    pub(crate) except: Vec<IpNet>,
}

/// Addresses of both families; ranges are inclusive, disjoint and sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct AddressSet {
    v4: Box<[(u32, u32)]>,
    v6: Box<[Range]>,
}

type Range = (u128, u128);

impl AddressSet {
    pub(crate) fn new<'a>(blocks: impl IntoIterator<Item = &'a IpBlock>) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for block in blocks {
            let family = match block.cidr {
                IpNet::V4(_) => &mut v4,
                IpNet::V6(_) => &mut v6,
            };
            family.extend(without_exceptions(block));
        }
        let v4 = merged(v4).into_iter();
        Self {
            v4: v4
                .map(|(first, last)| (narrow(first), narrow(last)))
                .collect(),
            v6: merged(v6).into(),
        }
    }

    pub(crate) fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) => within(&self.v4, v4.to_bits()),
            IpAddr::V6(v6) => within(&self.v6, v6.to_bits()),
        }
    }

    /// First and last addresses of the IPv4 ranges; sorted and disjoint.
    pub(crate) fn v4(&self) -> &[(u32, u32)] {
        &self.v4
    }

    /// The same of IPv6.
    pub(crate) fn v6(&self) -> &[(u128, u128)] {
        &self.v6
    }
}

fn within<A: Ord + Copy>(ranges: &[(A, A)], address: A) -> bool {
    let after = ranges.partition_point(|&(first, _)| first <= address);
    after > 0 && address <= ranges[after - 1].1
}

/// The bits of an IPv4 address, from the type that holds both families.
fn narrow(bits: u128) -> u32 {
    u32::try_from(bits).unwrap_or(u32::MAX)
}

fn without_exceptions(block: &IpBlock) -> Vec<Range> {
    let (first, last) = range(&block.cidr);
    let mut holes: Vec<Range> = block.except.iter().map(range).collect();
    holes.sort_unstable();
    let mut kept = Vec::new();
    let mut next = first;
    for (hole_first, hole_last) in holes {
        if next < hole_first {
            kept.push((next, hole_first - 1));
        }
        if hole_last >= last {
            return kept;
        }
        next = next.max(hole_last + 1);
    }
    kept.push((next, last));
    kept
}

fn merged(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.sort_unstable();
    let mut merged: Vec<Range> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(previous) if first <= previous.1.saturating_add(1) => {
                previous.1 = previous.1.max(last);
            }
            _ => merged.push((first, last)),
        }
    }
    merged
}

fn range(net: &IpNet) -> Range {
    (bits(net.network()), bits(net.broadcast()))
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => v4.to_bits().into(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(cidr: &str, except: &[&str]) -> IpBlock {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        IpBlock {
            cidr: net(cidr),
            except: except.iter().map(|text| net(text)).collect(),
        }
    }

    #[test]
    fn address_set_subtracts_exceptions_from_their_own_block() {
        let set = AddressSet::new(&[
            block(
                "10.0.0.0/8",
                &["10.9.0.0/16", "10.255.0.0/16", "10.9.1.0/24"],
            ),
            block("10.9.2.0/24", &[]),
            block("0.0.0.0/5", &["0.0.0.0/6"]),
            block("2001:db8::/32", &["2001:db8:1::/48"]),
            block("ffff::/16", &["ffff:ffff::/32"]),
        ]);
        for (address, expected, why) in [
            ("10.1.2.3", true, "inside the cidr"),
            ("10.9.1.3", false, "inside an exception"),
            ("10.9.0.0", false, "first of an exception"),
            ("10.9.255.255", false, "last of an exception"),
            ("10.8.255.255", true, "just before it"),
            ("10.10.0.0", true, "just after it"),
            ("10.9.2.3", true, "another block has it"),
            ("10.255.255.255", false, "an exception at the end"),
            ("9.255.255.255", false, "just before the cidr"),
            ("11.0.0.0", false, "just after the cidr"),
            ("0.0.0.1", false, "an exception at the start"),
            ("4.0.0.0", true, "after an exception at the start"),
            ("7.255.255.255", true, "last of a block"),
            ("2001:db8::1", true, "IPv6"),
            ("2001:db8:1::1", false, "IPv6 exception"),
            ("2001:db9::", false, "outside"),
            ("ffff:fffe::", true, "high end"),
            (
                "ffff:ffff::1",
                false,
                "an exception at the very end of the space",
            ),
            (
                "::a01:203",
                false,
                "the bits of 10.1.2.3 in the other family",
            ),
        ] {
            assert_eq!(
                set.contains(address.parse().unwrap()),
                expected,
                "{address}: {why}"
            );
        }
    }

    #[test]
    fn default_route_block_covers_only_its_family() {
        let all4 = AddressSet::new(&[block("0.0.0.0/0", &[])]);
        let all6 = AddressSet::new(&[block("::/0", &[]), block("::/1", &[])]);
        for (address, v4, v6) in [
            ("0.0.0.0", true, false),
            ("255.255.255.255", true, false),
            ("::", false, true),
        ] {
            let address = address.parse().unwrap();
            assert_eq!(
                (all4.contains(address), all6.contains(address)),
                (v4, v6),
                "{address}"
            );
        }
        assert!(!AddressSet::default().contains("10.0.0.1".parse().unwrap()));
    }
}
