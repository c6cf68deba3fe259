//! Records as JSON lines, for use without a collector (`--trace-file`).
//!
//! A slow disk costs records, which are counted, and never delays a packet.
use std::fs::OpenOptions;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::records::{Queue, Record, Sink};

/// Records that may wait for the disk.
const WAITING: usize = 16_384;
/// Records that are worth a write of their own.
const BATCH: usize = 512;
/// How long a record waits for others to be written with it.
const LINGER: Duration = Duration::from_millis(5);

/// A sink that appends records of `node` to the file at `path`; `-` is standard output.
///
/// # Errors
/// If the file cannot be opened for appending or the thread cannot be started.
pub(super) fn open(path: &Path, node: Arc<str>) -> io::Result<Sink> {
    let out: Box<dyn Write + Send> = if path == Path::new("-") {
        Box::new(io::stdout())
    } else {
        Box::new(OpenOptions::new().create(true).append(true).open(path)?)
    };
    let queue = Queue::new(WAITING, BATCH);
    Sink::start("records", queue, move |queue| write_all(queue, out, &node))
}

/// Writes until there is nothing more to come; flushes whenever nothing waits.
fn write_all(queue: &Queue<Arc<Record>>, out: Box<dyn Write + Send>, node: &str) {
    let mut out = BufWriter::new(out);
    let mut records = Vec::new();
    while queue.take(&mut records, LINGER, None) {
        let written = records
            .drain(..)
            .try_for_each(|record| writeln!(out, "{}", record.json(node)));
        if let Err(error) = written.and_then(|()| out.flush()) {
            tracing::error!(%error, "cannot write records; no more are written");
            queue.close();
            return;
        }
    }
}
