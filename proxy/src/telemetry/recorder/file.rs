//! Records as JSON lines, for use without a collector (`--trace-file`).
//!
//! A slow or full disk costs records, which are counted, and never delays a packet. Records that cannot be written wait
//! for the next attempt. An incomplete last line is removed, or ended before the next record.
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

use crate::telemetry::record::{Queue, Record, Sink, timestamp};

/// Records that may wait for the disk.
const WAITING: usize = 16_384;
/// Records that are written without waiting for more.
const BATCH: usize = 512;
/// How long a record waits for others to be written with it.
const LINGER: Duration = Duration::from_millis(5);
/// The pause after a failed write.
const RETRY: Duration = Duration::from_secs(1);

/// Where lines go.
trait Target: Write + Send {
    /// Removes the last `bytes` that were written.
    ///
    /// # Errors
    /// If other data follow them, or the target does not support it.
    fn take_back(&mut self, bytes: u64) -> io::Result<()>;
}

impl Target for File {
    fn take_back(&mut self, bytes: u64) -> io::Result<()> {
        let length = self.metadata()?.len();
        // Where our last write ended; another daemon may append to the same file.
        if self.stream_position()? != length {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        self.set_len(length.saturating_sub(bytes))
    }
}

impl Target for io::Stdout {
    fn take_back(&mut self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Why nothing is written now, and since when; `None` while all is well.
#[derive(Clone, Default)]
pub(super) struct Trouble(Arc<Mutex<Option<(SystemTime, String)>>>);

impl Trouble {
    /// A line for `/readyz`.
    pub(super) fn note(&self) -> Option<String> {
        let trouble = self.0.lock();
        let (since, what) = trouble.as_ref()?;
        Some(format!("{what} (since {})", timestamp(*since)))
    }

    /// Sets the trouble. Returns whether it has begun or ended with this.
    fn set(&self, what: Option<String>) -> bool {
        let mut trouble = self.0.lock();
        if trouble.is_some() == what.is_some() {
            return false;
        }
        *trouble = what.map(|what| (SystemTime::now(), what));
        true
    }
}

/// A sink that appends records of `node` to the file at `path`; `-` is standard output.
///
/// # Errors
/// If the file cannot be opened for appending or the thread cannot be started.
pub(super) fn open(path: &Path, node: Arc<str>) -> io::Result<(Sink, Trouble)> {
    let (target, torn): (Box<dyn Target>, _) = if path == Path::new("-") {
        (Box::new(io::stdout()), false)
    } else {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        (Box::new(file), is_torn(path).unwrap_or(false))
    };
    let trouble = Trouble::default();
    let mut lines = Lines {
        target,
        torn,
        path: path.to_owned(),
        trouble: trouble.clone(),
    };
    let queue = Queue::new(WAITING, BATCH);
    let sink = Sink::start("records", queue, move |queue| {
        lines.write_all(queue, &node);
    })?;
    Ok((sink, trouble))
}

/// Whether the last line of a file has no end, for example after a power failure.
fn is_torn(path: &Path) -> io::Result<bool> {
    let mut file = File::open(path)?;
    if !file.metadata()?.is_file() || file.seek(SeekFrom::End(0))? == 0 {
        return Ok(false);
    }
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    Ok(last != *b"\n")
}

/// Writes whole lines.
struct Lines {
    target: Box<dyn Target>,
    /// The last line has no end and could not be removed: a line end has to come before the next record.
    torn: bool,
    path: PathBuf,
    trouble: Trouble,
}

impl Lines {
    /// Writes until the queue is closed and empty.
    fn write_all(&mut self, queue: &Queue<Arc<Record>>, node: &str) {
        let mut records = Vec::new();
        while queue.take(&mut records, LINGER, None) {
            let mut text = Vec::new();
            for record in records.drain(..) {
                // Writing to memory cannot fail.
                let _ = writeln!(text, "{}", record.json(node));
            }
            let mut rest = &text[..];
            while let Err(error) = self.append(&mut rest) {
                self.in_trouble(&error);
                if queue.closes_within(RETRY) {
                    let lines = rest.iter().filter(|byte| **byte == b'\n').count();
                    queue.lose(lines as u64);
                    break;
                }
            }
            if rest.is_empty() && self.trouble.set(None) {
                let lost = queue.lost();
                tracing::info!(lost, "records are written again");
            }
        }
    }

    fn in_trouble(&self, error: &io::Error) {
        let path = self.path.display();
        let remedy = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "free space there",
            _ => "make the file writable",
        };
        let what = format!(
            "records cannot be written to {path}: {error}; {remedy}; the daemon tries again every second, and loses records once {WAITING} wait"
        );
        if self.trouble.set(Some(what.clone())) {
            tracing::error!("{what}");
        }
    }

    /// Appends lines, and removes from `rest` those that are complete in the file.
    fn append(&mut self, rest: &mut &[u8]) -> io::Result<()> {
        if self.torn {
            self.target.write_all(b"\n")?;
            self.torn = false;
        }
        let (written, result) = self.write(rest);
        let whole = rest[..written].iter().rposition(|byte| *byte == b'\n');
        let whole = whole.map_or(0, |last| last + 1);
        *rest = &rest[whole..];
        let piece = written - whole;
        self.torn = piece > 0 && self.target.take_back(piece as u64).is_err();
        result
    }

    /// Returns how many bytes were written, and the error that stopped the rest.
    fn write(&mut self, bytes: &[u8]) -> (usize, io::Result<()>) {
        let mut written = 0;
        while written < bytes.len() {
            match self.target.write(&bytes[written..]) {
                Ok(0) => return (written, Err(io::ErrorKind::WriteZero.into())),
                Ok(more) => written += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (written, Err(error)),
            }
        }
        (written, self.target.flush())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk with room for so many bytes.
    struct Disk {
        content: Vec<u8>,
        room: usize,
        takes_back: bool,
    }

    #[derive(Clone)]
    struct Shared(Arc<Mutex<Disk>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut disk = self.0.lock();
            let fits = bytes.len().min(disk.room - disk.content.len());
            if fits == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            disk.content.extend_from_slice(&bytes[..fits]);
            Ok(fits)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Target for Shared {
        fn take_back(&mut self, bytes: u64) -> io::Result<()> {
            let mut disk = self.0.lock();
            if !disk.takes_back {
                return Err(io::ErrorKind::ResourceBusy.into());
            }
            let length = disk.content.len() - usize::try_from(bytes).unwrap();
            disk.content.truncate(length);
            Ok(())
        }
    }

    fn on_disk(takes_back: bool) -> (Shared, Lines) {
        let disk = Shared(Arc::new(Mutex::new(Disk {
            content: Vec::new(),
            room: 10,
            takes_back,
        })));
        let lines = Lines {
            target: Box::new(disk.clone()),
            torn: false,
            path: PathBuf::from("/records"),
            trouble: Trouble::default(),
        };
        (disk, lines)
    }

    #[test]
    fn a_full_disk_tears_no_line() {
        let (disk, mut lines) = on_disk(true);
        let mut rest = &b"one\ntwo\nthree\n"[..];
        assert!(lines.append(&mut rest).is_err());
        assert_eq!(disk.0.lock().content, b"one\ntwo\n");
        assert_eq!(rest, b"three\n");
        disk.0.lock().room = 100;
        lines.append(&mut rest).unwrap();
        assert_eq!(disk.0.lock().content, b"one\ntwo\nthree\n");
    }

    #[test]
    fn a_torn_line_that_stays_gets_its_end() {
        let (disk, mut lines) = on_disk(false);
        let mut rest = &b"one\ntwo\nthree\n"[..];
        assert!(lines.append(&mut rest).is_err());
        disk.0.lock().room = 100;
        lines.append(&mut rest).unwrap();
        assert_eq!(disk.0.lock().content, b"one\ntwo\nth\nthree\n");
    }

    #[test]
    fn a_file_with_a_torn_line_is_recognized() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (content, torn) in [("", false), ("{}\n", false), ("{}\n{", true)] {
            std::fs::write(file.path(), content).unwrap();
            assert_eq!(is_torn(file.path()).unwrap(), torn, "{content:?}");
        }
    }

    #[test]
    fn a_write_error_is_shown_while_it_lasts() {
        let trouble = Trouble::default();
        assert!(!trouble.set(None));
        assert!(trouble.set(Some("no room".to_owned())));
        assert!(!trouble.set(Some("no room".to_owned())), "once");
        assert!(trouble.note().unwrap().starts_with("no room (since "));
        assert!(trouble.set(None));
        assert_eq!(trouble.note(), None);
    }
}
