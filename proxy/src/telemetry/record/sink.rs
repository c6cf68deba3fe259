//! A thread that writes records.
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Instant;

use parking_lot::Mutex;

use super::{Queue, Record};

/// The sending end of a sink; after it is dropped, the thread ends with the last queued record.
pub(crate) struct Sink {
    queue: Arc<Queue<Arc<Record>>>,
    /// Never receives anything; it disconnects when the thread ends.
    alive: Mutex<Receiver<()>>,
}

impl Sink {
    /// Starts the thread, which is to read `queue` to its end.
    ///
    /// # Errors
    /// If there can be no thread.
    pub(crate) fn start(
        name: &str,
        queue: Queue<Arc<Record>>,
        read: impl FnOnce(&Queue<Arc<Record>>) + Send + 'static,
    ) -> io::Result<Self> {
        let queue = Arc::new(queue);
        let (life, alive) = sync_channel(1);
        let reader = Arc::clone(&queue);
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                read(&reader);
                drop(life);
            })?;
        Ok(Self {
            queue,
            alive: Mutex::new(alive),
        })
    }

    /// Queues a record, or loses it if the sink does not keep up.
    pub(crate) fn send(&self, record: &Arc<Record>) {
        self.queue.push(Arc::clone(record));
    }

    /// Records that were lost because the sink did not keep up.
    pub(crate) fn lost(&self) -> u64 {
        self.queue.lost()
    }

    /// Waits until `deadline` for the sink to write the queued records; later records are lost.
    pub(crate) fn finish(&self, deadline: Instant) {
        self.queue.close();
        let alive = self.alive.lock();
        // Either way there is no more to do: it has ended, or its time is up.
        let _ = alive.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.queue.close();
    }
}
