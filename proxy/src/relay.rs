//! Moves bytes between the two legs of a connection until both are done or one breaks.
//!
//! The first bytes of a direction go through a buffer that the whole thread shares; a direction
//! that proves to be bulk goes through a pipe by `splice`. An idle connection holds neither. Knows
//! nothing of policy: dropping the future leaves both sockets to the caller.
mod pipe;

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::net::Shutdown;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;

use socket2::SockRef;
use tokio::io::{Interest, Ready};
use tokio::net::TcpStream;

use crate::trail::{Moment, Trail};

use pipe::Pipe;

/// Bytes that one read through the shared buffer can take.
const BUFFER: usize = 64 << 10;
/// So many reads in a row that fill the buffer make a direction bulk.
const FULL_READS_OF_BULK: u32 = 2;

thread_local! {
    static SHARED: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into_boxed_slice());
}

/// Payload bytes moved so far, as others may read them while the connection lives.
#[derive(Debug, Default)]
pub(crate) struct Moved {
    /// From the client to the server.
    pub(crate) sent: AtomicU64,
    /// From the server to the client.
    pub(crate) received: AtomicU64,
    told: [AtomicU64; 2],
}

impl Moved {
    /// Bytes sent and received since this was last asked: each byte is told once, whoever asks.
    pub(crate) fn untold(&self) -> [u64; 2] {
        let mut moved = [&self.sent, &self.received].map(|all| all.load(Ordering::Relaxed));
        for (now, told) in moved.iter_mut().zip(&self.told) {
            *now = now.saturating_sub(told.fetch_max(*now, Ordering::Relaxed));
        }
        moved
    }
}

/// Relays until both sides have closed. A half-close is passed on and the other direction goes on.
///
/// # Errors
/// The first error of either side: a reset, a keep-alive that nobody answered. The caller is to
/// reset the other side.
pub(crate) async fn relay(
    client: &TcpStream,
    server: &TcpStream,
    moved: &Moved,
    trail: Option<&Trail>,
) -> io::Result<()> {
    let (client_ended, server_ended) = (Cell::new(false), Cell::new(false));
    let mut up = pin!(direction(
        client,
        server,
        Side {
            moved: &moved.sent,
            trail,
            first: Moment::Sent,
            last: Moment::ClientEnded,
        },
        &client_ended,
        &server_ended
    ));
    let mut down = pin!(direction(
        server,
        client,
        Side {
            moved: &moved.received,
            trail,
            first: Moment::Received,
            last: Moment::ServerEnded,
        },
        &server_ended,
        &client_ended
    ));
    poll_fn(|cx| {
        if let Poll::Ready(error) = up.as_mut().poll(cx) {
            return Poll::Ready(Err(error));
        }
        if let Poll::Ready(error) = down.as_mut().poll(cx) {
            return Poll::Ready(Err(error));
        }
        if client_ended.get() && server_ended.get() {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    })
    .await
}

/// What one direction has to tell while the connection lives.
#[derive(Clone, Copy)]
struct Side<'a> {
    moved: &'a AtomicU64,
    trail: Option<&'a Trail>,
    /// Its first byte.
    first: Moment,
    /// Its end before the other's.
    last: Moment,
}

impl Side<'_> {
    fn took(&self, bytes: usize) {
        if self.moved.fetch_add(bytes as u64, Ordering::Relaxed) == 0 && bytes > 0 {
            self.note(self.first);
        }
    }

    fn note(&self, moment: Moment) {
        if let Some(trail) = self.trail {
            trail.note(moment);
        }
    }
}

/// Moves bytes until `from` has ended, says so in `ended`, and ends itself only by an error: a side
/// that has said its last word can still be reset while the other speaks.
async fn direction(
    from: &TcpStream,
    to: &TcpStream,
    side: Side<'_>,
    ended: &Cell<bool>,
    other_ended: &Cell<bool>,
) -> io::Error {
    if let Err(error) = one_way(from, to, side).await {
        return error;
    }
    // After the last word of both, the caller's close says the same at no cost.
    if !other_ended.get() {
        side.note(side.last);
        if let Err(error) = SockRef::from(to).shutdown(Shutdown::Write) {
            return error;
        }
    }
    ended.set(true);
    match from
        .ready(Interest::ERROR)
        .await
        .and_then(|_| from.take_error())
    {
        Ok(Some(error)) | Err(error) => error,
        Ok(None) => io::ErrorKind::ConnectionReset.into(),
    }
}

async fn one_way(from: &TcpStream, to: &TcpStream, side: Side<'_>) -> io::Result<()> {
    let mut full_reads = 0;
    let mut rest = Vec::new();
    loop {
        // After a read that left room this still says yes, and the next read hears EAGAIN. To trust the
        // short read instead would strand what is behind urgent data, where a read stops too.
        let ready = from.ready(Interest::READABLE | Interest::ERROR).await?;
        let taken = match copy(from, to, ready, &mut rest) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !ready.is_error() => {
                continue;
            }
            other => other?,
        };
        side.took(taken);
        if !rest.is_empty() {
            write_all(to, &rest).await?;
            rest = Vec::new();
        }
        if is_last(ready, taken) {
            return Ok(());
        }
        full_reads = if taken == BUFFER { full_reads + 1 } else { 0 };
        if full_reads >= FULL_READS_OF_BULK {
            full_reads = 0;
            if splice_while_bulk(from, to, side.moved).await? == Source::Ended {
                return Ok(());
            }
        }
    }
}

/// Whether nothing follows a read of `taken` bytes. The kernel says that the source has sent its
/// FIN only when all that came before it is there to read: a read that leaves room has it all.
/// After a reset the next read says so.
fn is_last(ready: Ready, taken: usize) -> bool {
    taken == 0 || ready.is_read_closed() && !ready.is_error() && taken < BUFFER
}

/// One read and one write; what the write leaves over is put into `rest`. Last bytes are left to
/// travel with the FIN that follows.
fn copy(from: &TcpStream, to: &TcpStream, ready: Ready, rest: &mut Vec<u8>) -> io::Result<usize> {
    SHARED.with_borrow_mut(|shared| {
        let taken = from.try_read(shared)?;
        let bytes = &shared[..taken];
        if bytes.is_empty() {
            return Ok(0);
        }
        let written = if is_last(ready, taken) {
            let socket = SockRef::from(to);
            let send = || socket.send_with_flags(bytes, libc::MSG_MORE);
            to.try_io(Interest::WRITABLE, send)
        } else {
            to.try_write(bytes)
        };
        let written = match written {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            other => other?,
        };
        rest.extend_from_slice(&bytes[written..]);
        Ok(taken)
    })
}

async fn write_all(to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = to
            .async_io(Interest::WRITABLE, || to.try_write(bytes))
            .await?;
        bytes = &bytes[written..];
    }
    Ok(())
}

#[derive(PartialEq, Eq)]
enum Source {
    Ended,
    Paused,
}

/// Moves bytes through a pipe for as long as the source has them ready.
async fn splice_while_bulk(
    from: &TcpStream,
    to: &TcpStream,
    moved: &AtomicU64,
) -> io::Result<Source> {
    // Without a pipe (descriptors are short) the shared buffer does the work.
    let Ok(pipe) = Pipe::take() else {
        return Ok(Source::Paused);
    };
    loop {
        let taken = match from.try_io(Interest::READABLE, || pipe.fill_from(from)) {
            Ok(0) => return Ok(Source::Ended),
            Ok(taken) => taken,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Source::Paused),
            Err(error) => return Err(error),
        };
        moved.fetch_add(taken as u64, Ordering::Relaxed);
        let mut left = taken;
        while left > 0 {
            left -= to
                .async_io(Interest::WRITABLE, || pipe.drain_to(to, left))
                .await?;
        }
        tokio::task::consume_budget().await;
    }
}
