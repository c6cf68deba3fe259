//! Whether the tables that a daemon has filled are there still, and still the same.
//!
//! Asks the kernel directly: one question and its answer, so that it may be asked often. Changes nothing.
use std::io;

use crate::netlink::{chunk, find};
use crate::nf_tables::{ANY_FAMILY, dump};
use crate::ruleset::TABLE;

const NFT_MSG_GETTABLE: u16 = 1;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_HANDLE: u16 = 4;

/// The kernel's numbers of our tables in this network namespace, sorted; a table that is made anew has another.
/// Blocks for some microseconds.
///
/// # Errors
/// What the kernel answered, such as `EPERM` without `CAP_NET_ADMIN`.
pub fn handles() -> io::Result<Vec<u64>> {
    let tables = dump(NFT_MSG_GETTABLE, ANY_FAMILY, |_| {})?;
    let mut handles: Vec<_> = tables.iter().filter_map(|it| handle(it)).collect();
    handles.sort_unstable();
    Ok(handles)
}

/// Of a table that is ours.
fn handle(table: &[u8]) -> Option<u64> {
    let name = find(table, NFTA_TABLE_NAME)?.value.strip_suffix(&[0])?;
    let handle = chunk(find(table, NFTA_TABLE_HANDLE)?.value, 0)?;
    (name == TABLE.as_bytes()).then(|| u64::from_be_bytes(handle))
}
