//! The counters of the rules: packets that they drop before any verdict.
//!
//! Asks the kernel directly: one request and its response, so it may be called often. Changes nothing.
use std::io;

use crate::names::TABLE;
use crate::netlink::{chunk, find};
use crate::nf_tables::{ANY_FAMILY, dump};

const NFT_MSG_GETOBJ: u16 = 19;
const NFT_OBJECT_COUNTER: u32 = 1;
const NFTA_OBJ_TABLE: u16 = 1;
const NFTA_OBJ_NAME: u16 = 2;
const NFTA_OBJ_TYPE: u16 = 3;
const NFTA_OBJ_DATA: u16 = 4;
const NFTA_COUNTER_PACKETS: u16 = 2;

/// The counters of `ruleset.nft` and `bridges.nft`, as nft names them.
pub const NAMES: [&str; 9] = [
    "no_daemon",
    "spoofed",
    "out_of_state",
    "rate_limited",
    "bridge_drop",
    "frame",
    "link_local",
    "martian",
    "source_route",
];

/// Packets by counter, in the order of [`NAMES`], since the tables were loaded.
pub type Packets = [u64; NAMES.len()];

/// Their values in this network namespace; zero where there is no such table. Blocks for some
/// microseconds.
///
/// # Errors
/// What the kernel answered, such as `EPERM` without `CAP_NET_ADMIN`.
pub fn read() -> io::Result<Packets> {
    let counters = dump(NFT_MSG_GETOBJ, ANY_FAMILY, |m| {
        m.string(NFTA_OBJ_TABLE, TABLE);
        m.bytes(NFTA_OBJ_TYPE, &NFT_OBJECT_COUNTER.to_be_bytes());
    })?;
    let mut all = Packets::default();
    for (name, packets) in counters.iter().filter_map(|it| counter(it)) {
        if let Some(place) = NAMES.iter().position(|known| known.as_bytes() == name) {
            all[place] += packets;
        }
    }
    Ok(all)
}

/// Name and packets of a counter of our table. A kernel that ignores our request's filter lists those of
/// other tables too.
fn counter(object: &[u8]) -> Option<(&[u8], u64)> {
    let text = |kind| find(object, kind)?.value.strip_suffix(&[0]);
    let kind = chunk(find(object, NFTA_OBJ_TYPE)?.value, 0).map(u32::from_be_bytes)?;
    if text(NFTA_OBJ_TABLE)? != TABLE.as_bytes() || kind != NFT_OBJECT_COUNTER {
        return None;
    }
    let data = find(object, NFTA_OBJ_DATA)?.value;
    let packets = chunk(find(data, NFTA_COUNTER_PACKETS)?.value, 0)?;
    Some((text(NFTA_OBJ_NAME)?, u64::from_be_bytes(packets)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::{self, Header, Message};

    fn object(table: &str, name: &str, kind: u32, packets: u64) -> Vec<u8> {
        let mut message = Vec::new();
        netlink::write(&mut message, Header::default(), |m| {
            m.string(NFTA_OBJ_TABLE, table);
            m.string(NFTA_OBJ_NAME, name);
            m.bytes(NFTA_OBJ_TYPE, &kind.to_be_bytes());
            m.nested(NFTA_OBJ_DATA, |data| {
                data.bytes(1, &1500_u64.to_be_bytes());
                data.bytes(NFTA_COUNTER_PACKETS, &packets.to_be_bytes());
            });
        });
        let (message, _) = Message::split(&message).unwrap();
        message.attributes().to_vec()
    }

    #[test]
    fn counters_of_other_tables_are_ignored() {
        let ours = object(TABLE, "stray", NFT_OBJECT_COUNTER, 7);
        assert_eq!(counter(&ours), Some((&b"stray"[..], 7)));
        for other in [
            object("others", "stray", NFT_OBJECT_COUNTER, 7),
            object(TABLE, "stray", 2, 7),
        ] {
            assert_eq!(counter(&other), None);
        }
        for cut in 0..ours.len() {
            counter(&ours[..cut]);
        }
    }
}
