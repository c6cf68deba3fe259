//! The last good state on disk, for a start while the API server is unreachable.
//!
//! One file: a comment line with its owner, length and checksum, then a `kind: List`
//! of the objects, reduced to what is read; `portreeve check --cluster dir:FILE` reads it too. Whole or
//! ignored: it replaces its predecessor by a rename. Knows no network; time is passed in.
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::connect::{ClusterIdentity, fingerprint};

/// The version of the file format; a daemon reads only its own.
const VERSION: u32 = 1;
const FILE: &str = "state.yaml";
const MARK: &str = "# portreeve ";
/// The largest state of a cluster; a larger file was not written by Portreeve.
const LIMIT: u64 = 512 << 20;

/// Why a state on disk is not used.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    #[error("there is none")]
    Missing,
    #[error("it cannot be read: {0}; check the permissions of the state directory")]
    Unreadable(#[source] io::Error),
    #[error("it is damaged: {0}; remove it")]
    Damaged(&'static str),
    #[error("it has format version {0}, not {VERSION}; it will be replaced")]
    Version(u32),
    #[error("it belongs to node {0}; give every node its own state directory")]
    OtherNode(String),
    #[error("it belongs to another cluster, {0}; it will be replaced")]
    OtherCluster(String),
    #[error("it is {} old, more than --state-max-age; it will be replaced", humantime::format_duration(Duration::from_secs(.0.as_secs())))]
    TooOld(Duration),
}

/// What the first line says.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Header {
    version: u32,
    node: String,
    cluster: ClusterIdentity,
    /// RFC 3339.
    written: String,
    /// Of all that follows the line.
    bytes: u64,
    sha256: String,
}

/// Where a node's state is saved, and the owner that it must have.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub(super) folder: PathBuf,
    pub(super) node: String,
    pub(super) cluster: ClusterIdentity,
    pub(super) max_age: Duration,
}

impl Snapshot {
    pub(super) fn path(&self) -> PathBuf {
        self.folder.join(FILE)
    }

    /// The objects, and when they were written.
    ///
    /// # Errors
    /// Why it cannot be used, with the remedy.
    pub(super) fn read(&self, now: SystemTime) -> Result<(Vec<Value>, SystemTime), Unusable> {
        let text = self.text()?;
        let (first, body) = text
            .split_once('\n')
            .ok_or(Unusable::Damaged("it ends early"))?;
        let header = first
            .strip_prefix(MARK)
            .ok_or(Unusable::Damaged("it has no header"))?;
        // Another version may have another header: its number goes first.
        let header: Value =
            serde_json::from_str(header).map_err(|_| Unusable::Damaged("header is not JSON"))?;
        let version = header["version"]
            .as_u64()
            .and_then(|n| u32::try_from(n).ok());
        match version {
            Some(VERSION) => {}
            Some(other) => return Err(Unusable::Version(other)),
            None => return Err(Unusable::Damaged("its header names no version")),
        }
        let header: Header = serde_json::from_value(header)
            .map_err(|_| Unusable::Damaged("its header is not complete"))?;
        if header.bytes != body.len() as u64 || header.sha256 != fingerprint(body.as_bytes()) {
            return Err(Unusable::Damaged("its checksum does not match"));
        }
        let written = self.check(&header, now)?;
        let mut list: Value =
            serde_json::from_str(body).map_err(|_| Unusable::Damaged("it is not JSON"))?;
        match list.get_mut("items").map(Value::take) {
            Some(Value::Array(items)) => Ok((items, written)),
            _ => Err(Unusable::Damaged("it is not a list")),
        }
    }

    /// Replaces the file, or leaves it as it was.
    ///
    /// # Errors
    /// If the folder cannot be made or written to.
    pub(super) fn write(&self, body: &[u8], now: SystemTime) -> io::Result<()> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)?;
        let header = Header {
            version: VERSION,
            node: self.node.clone(),
            cluster: self.cluster.clone(),
            written: humantime::format_rfc3339_seconds(now).to_string(),
            bytes: body.len() as u64,
            sha256: fingerprint(body),
        };
        let next = self.folder.join(format!(".{FILE}.next"));
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&next)?;
        writeln!(file, "{MARK}{}", serde_json::to_string(&header)?)?;
        file.write_all(body)?;
        file.sync_all()?;
        fs::rename(&next, self.path())?;
        File::open(&self.folder)?.sync_all()
    }

    fn text(&self) -> Result<String, Unusable> {
        let unreadable = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => Unusable::Missing,
            io::ErrorKind::InvalidData => Unusable::Damaged("it is not text"),
            _ => Unusable::Unreadable(error),
        };
        let file = File::open(self.path()).map_err(unreadable)?;
        let mut text = String::new();
        file.take(LIMIT)
            .read_to_string(&mut text)
            .map_err(unreadable)?;
        Ok(text)
    }

    /// Checks that it belongs to this node and is recent; returns when it was written.
    fn check(&self, header: &Header, now: SystemTime) -> Result<SystemTime, Unusable> {
        if header.node != self.node {
            return Err(Unusable::OtherNode(header.node.clone()));
        }
        if !header.cluster.is_same(&self.cluster) {
            return Err(Unusable::OtherCluster(header.cluster.server.clone()));
        }
        let written = humantime::parse_rfc3339(&header.written)
            .map_err(|_| Unusable::Damaged("its header has no time"))?;
        // If the clock was set back, its time may be in the future: it counts as new.
        let age = now.duration_since(written).unwrap_or_default();
        if age > self.max_age {
            return Err(Unusable::TooOld(age));
        }
        Ok(written)
    }
}

/// The bytes of the list of `objects`, each JSON, one a line.
pub(super) fn body(objects: impl Iterator<Item = String>) -> Vec<u8> {
    let mut body = b"{\"apiVersion\":\"v1\",\"kind\":\"List\",\"items\":[".to_vec();
    for (index, object) in objects.enumerate() {
        body.extend_from_slice(if index == 0 { b"\n" } else { b",\n" });
        body.extend_from_slice(object.as_bytes());
    }
    body.extend_from_slice(b"\n]}\n");
    body
}

#[cfg(test)]
mod tests;
