//! Which files a source consists of, and their bytes, within bounds.
//!
//! Knows the disk and nothing of what the bytes mean.
use std::ffi::OsStr;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use nix::fcntl::OFlag;

use crate::Problem;

/// The largest file that is read, in bytes (64 MiB): some 8,000 pods as `kubectl get -o yaml`
/// dumps them.
pub(super) const MAX_FILE_BYTES: u64 = 64 << 20;

/// A file by its path. Not a `Path`, which compares part by part: within one directory the bytes give
/// the same order at a fraction of the cost.
pub(super) type Name = Arc<OsStr>;

/// Changes whenever a file's contents may have changed, or its readability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// The stamp of what `path` leads to now; `None` if that is nothing.
    pub(super) fn at(path: &Path) -> Option<Self> {
        fs::metadata(path).ok().map(|metadata| Self::of(&metadata))
    }
}

/// A file of a source as it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// `None`: there is such a name, but it leads nowhere (a dangling symbolic link).
    pub(super) stamp: Option<Stamp>,
    /// Its contents may change without an event of its directory.
    pub(super) link: bool,
}

/// The files of a source at one moment, in the order of their names.
#[derive(Debug, Default)]
pub(super) struct Listing {
    pub(super) files: Vec<(Name, Found)>,
    pub(super) warnings: Vec<Problem>,
}

/// Lists the files of a directory, or the one file that `root` is.
///
/// # Errors
/// The problem, if `root` itself cannot be listed.
pub(super) fn list(root: &Path) -> Result<Listing, Box<Problem>> {
    let metadata = fs::metadata(root).map_err(|error| root_problem(root, &error))?;
    let mut listing = Listing::default();
    if metadata.is_file() {
        let stamp = Some(Stamp::of(&metadata));
        let found = Found { stamp, link: true };
        listing.files.push((root.as_os_str().into(), found));
        return Ok(listing);
    }
    if !metadata.is_dir() {
        return Err(not_a_file(root));
    }
    for entry in fs::read_dir(root).map_err(|error| root_problem(root, &error))? {
        let entry = entry.map_err(|error| root_problem(root, &error))?;
        if is_hidden(&entry.file_name()) {
            continue;
        }
        let path = entry.path();
        // An entry that vanished after its name was read counts as a file, which is found missing later.
        let link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
        let metadata = fs::metadata(&path);
        if metadata.as_ref().is_ok_and(Metadata::is_dir) {
            let remedy = "put its manifests directly into the directory above it, or into one file";
            listing
                .warnings
                .push(Problem::warning("subdirectories are not read", remedy).in_file(path));
        } else if is_manifest(&path) {
            let stamp = metadata.ok().map(|metadata| Stamp::of(&metadata));
            let found = Found { stamp, link };
            listing.files.push((path.as_os_str().into(), found));
        }
    }
    listing
        .files
        .sort_unstable_by(|(one, _), (two, _)| one.cmp(two));
    listing.warnings.sort();
    if listing.files.is_empty() {
        listing.warnings.push(
            Problem::warning(
                "no manifests: the directory holds no *.yaml, *.yml or *.json file",
                "put manifests there, for example by `kubectl get \
                 pods,namespaces,nodes,networkpolicies -A -o yaml > state.yaml`",
            )
            .in_file(root),
        );
    }
    Ok(listing)
}

/// One file of a source; `None` if there is no such name.
///
/// # Errors
/// If it is a directory, or cannot be looked up.
pub(super) fn find(file: &OsStr) -> io::Result<Option<Found>> {
    let own = match fs::symlink_metadata(file) {
        Ok(own) => own,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let link = own.is_symlink();
    let metadata = if link {
        fs::metadata(file).ok()
    } else {
        Some(own)
    };
    if metadata.as_ref().is_some_and(Metadata::is_dir) {
        return Err(ErrorKind::IsADirectory.into());
    }
    let stamp = metadata.map(|metadata| Stamp::of(&metadata));
    Ok(Some(Found { stamp, link }))
}

/// Whether a file of this name in a source's directory is one of its files.
pub(super) fn is_read(name: &OsStr) -> bool {
    !is_hidden(name) && is_manifest(Path::new(name))
}

/// Reads a whole file, and the stamp that it had when it was opened.
///
/// # Errors
/// The problem, if it is no plain file, is larger than [`MAX_FILE_BYTES`], or cannot be read.
pub(super) fn read(path: &Path) -> Result<(Stamp, Vec<u8>), Box<Problem>> {
    // Without O_NONBLOCK the open of a FIFO would wait for its writer.
    let mut file: File = OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)
        .map_err(|error| file_problem(path, &error))?;
    let metadata = file
        .metadata()
        .map_err(|error| file_problem(path, &error))?;
    if !metadata.is_file() {
        return Err(not_a_file(path));
    }
    if metadata.len() > MAX_FILE_BYTES {
        return Err(too_large(path, metadata.len()));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or(0));
    (&mut file)
        .take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| file_problem(path, &error))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(too_large(path, bytes.len() as u64));
    }
    Ok((Stamp::of(&metadata), bytes))
}

/// Editors' and ConfigMap volumes' own files (`.a.yaml.swp`, `..data`) begin with a dot.
pub(super) fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

/// Kustomize's own file says what to build, not what is in the cluster.
fn is_manifest(path: &Path) -> bool {
    let manifest = path.extension().is_some_and(|extension| {
        ["yaml", "yml", "json"]
            .iter()
            .any(|known| extension.eq_ignore_ascii_case(known))
    });
    manifest && path.file_stem().is_none_or(|stem| stem != "kustomization")
}

fn too_large(path: &Path, length: u64) -> Box<Problem> {
    let (length, limit) = (length.div_ceil(1 << 20), MAX_FILE_BYTES >> 20);
    error(
        path,
        format!("{length} MiB is more than the {limit} MiB that are read of one file"),
        "split it, or dump only `kubectl get pods,namespaces,nodes,networkpolicies -A`",
    )
}

fn not_a_file(path: &Path) -> Box<Problem> {
    error(
        path,
        "neither a plain file nor a directory",
        "name a plain file or a directory",
    )
}

fn file_problem(path: &Path, cause: &io::Error) -> Box<Problem> {
    error(path, format!("cannot be read: {cause}"), advice(cause))
}

fn root_problem(path: &Path, cause: &io::Error) -> Box<Problem> {
    error(path, format!("cannot be listed: {cause}"), advice(cause))
}

fn error(path: &Path, problem: impl Into<String>, remedy: &str) -> Box<Problem> {
    Box::new(Problem::error(problem, remedy).in_file(path))
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::NotFound => "check the path after `dir:`, and where a symbolic link leads",
        ErrorKind::PermissionDenied => "make it readable for the user that runs this",
        _ => "check the file system it lies on",
    }
}

#[cfg(test)]
mod tests;
