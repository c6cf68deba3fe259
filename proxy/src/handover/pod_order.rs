//! The order in which the daemons' pods started on this node, so that a restarted container does not
//! take over from a newer pod.
//!
//! A file beside the socket, one pod a line, the oldest first: it outlives daemons, pods and the node's reboot.
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// How many pods are remembered; a node has two at a time.
const KEPT: usize = 32;

/// Appends `pod` unless it is recorded already. One line is one write, so concurrent writers lose nothing.
///
/// # Errors
/// If the file can be neither read nor written.
pub(super) fn enter(place: &Path, pod: &str) -> io::Result<()> {
    let file = file(place);
    let text = text(&file)?;
    if text.lines().any(|known| known == pod) {
        return Ok(());
    }
    let lines: Vec<_> = text.lines().collect();
    if lines.len() >= KEPT {
        let newest = &lines[lines.len() - KEPT / 2..];
        let shorter = place.with_extension("order.next");
        writeln!(open(&shorter)?, "{}", newest.join("\n"))?;
        fs::rename(shorter, &file)?;
    }
    open(&file)?.write_all(format!("{pod}\n").as_bytes())
}

/// Whether `pod` came before `other`; not if one of them is unknown.
pub(super) fn is_before(place: &Path, pod: &str, other: &str) -> bool {
    let text = text(&file(place)).unwrap_or_default();
    let turn = |pod| text.lines().position(|known| known == pod);
    matches!((turn(pod), turn(other)), (Some(one), Some(other)) if one < other)
}

fn file(place: &Path) -> PathBuf {
    place.with_extension("order")
}

fn text(file: &Path) -> io::Result<String> {
    match fs::read_to_string(file) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        other => other,
    }
}

fn open(file: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.append(true).create(true).mode(0o600).open(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pod_order_is_by_first_start() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("handover.sock");
        assert!(!is_before(&place, "a", "b"), "nobody has come");
        for pod in ["a", "b", "a", "c", "b"] {
            enter(&place, pod).unwrap();
        }
        assert!(is_before(&place, "a", "b") && is_before(&place, "b", "c"));
        assert!(!is_before(&place, "b", "a") && !is_before(&place, "b", "b"));
        assert!(!is_before(&place, "a", "stranger") && !is_before(&place, "stranger", "a"));
    }

    #[test]
    fn order_file_drops_the_oldest_pods() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("handover.sock");
        for turn in 0..1000 {
            enter(&place, &format!("pod-{turn}")).unwrap();
        }
        assert!(is_before(&place, "pod-998", "pod-999"));
        assert!(fs::read_to_string(file(&place)).unwrap().lines().count() <= KEPT);
    }

    #[test]
    fn unwritable_order_file_is_an_error() {
        let place = Path::new("/proc/no-such-folder/handover.sock");
        assert!(enter(place, "a").is_err());
        assert!(!is_before(place, "a", "b"));
    }
}
