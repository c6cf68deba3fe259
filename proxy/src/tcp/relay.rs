//! Moves bytes between the two legs of a connection until both are done or one breaks.
//!
//! The first bytes of a direction go through a buffer that the whole thread shares; a direction
//! that proves to be bulk goes through a pipe by `splice`. An idle connection holds neither. Knows
//! nothing of policy: dropping the future leaves both sockets to the caller, and what is on its way between
//! them.
mod in_flight;
mod pipe;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::net::Shutdown;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;

use socket2::SockRef;
use tokio::io::{Interest, Ready};
use tokio::net::TcpStream;

use crate::telemetry::moved::Moved;
use crate::telemetry::timeline::{Milestone, Timeline};

use in_flight::Passing;
pub(crate) use in_flight::{InFlight, Left};
use pipe::Pipe;
pub(crate) use pipe::{Unread, allow_pipes};

/// Bytes that one read through the shared buffer can take.
const BUFFER: usize = 64 << 10;
/// A read of this many bytes makes a direction busy until its source has no more bytes ready.
const PRESSING_READ: usize = BUFFER / 2;
/// Bytes of a direction for which no socket is set up. The kernel enlarges the receive buffer of a socket when more is
/// read than ten segments (`TCP_INIT_CWND`, `tcp_rcv_space_adjust`): no read crosses this line.
const FEW: usize = 12 << 10;
/// A direction is bulk after this many consecutive reads that fill the buffer.
const FULL_READS_OF_BULK: u32 = 2;

/// Bytes that a direction moves before the other tasks of its thread run, among them first packets: the thread runs up
/// to 61 tasks before it reads its queue again.
const TURN: usize = 256 << 10;

thread_local! {
    static SHARED: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into_boxed_slice());
}

/// Is notified when a direction of a stream becomes busy or idle: 0 is the direction to the server, 1 that to the
/// client.
pub(crate) trait Pressure {
    /// It has moved its first few bytes, and goes on.
    fn grows(&self, direction: usize);
    /// Its source sends much, or its receiver reads nothing now; the relay has this many of its bytes.
    fn presses(&self, direction: usize, bytes: usize);
    /// Neither holds any more, or the relay has ended.
    fn eases(&self, direction: usize);
    /// Bytes that a direction may take from its source before it gives them to the receiver.
    fn most(&self) -> usize;
}

/// A busy direction: its source sends much, or its receiver reads nothing.
struct Pressed<'a>(Side<'a>);

impl Drop for Pressed<'_> {
    fn drop(&mut self) {
        self.0.pressure.eases(self.0.direction);
    }
}

/// Relays until both sides have closed. A half-close is passed on and the other direction goes on. What is `in_flight`
/// goes first; what the future leaves there when it is dropped has been taken from one side and not given to the other.
///
/// # Errors
/// The first error of either side: a reset, a keep-alive that nobody answered. The caller is to
/// reset the other side.
pub(crate) async fn relay(
    client: &TcpStream,
    server: &TcpStream,
    moved: &Moved,
    timeline: Option<&Timeline>,
    in_flight: &InFlight,
    pressure: &dyn Pressure,
) -> io::Result<()> {
    let (client_ended, server_ended) = (Cell::new(false), Cell::new(false));
    let mut up = pin!(direction(
        client,
        server,
        Side {
            moved: &moved.sent,
            passing: &in_flight.up,
            timeline,
            first: Milestone::Sent,
            last: Milestone::ClientEnded,
            direction: 0,
            pressure,
        },
        &client_ended,
        &server_ended
    ));
    let mut down = pin!(direction(
        server,
        client,
        Side {
            moved: &moved.received,
            passing: &in_flight.down,
            timeline,
            first: Milestone::Received,
            last: Milestone::ServerEnded,
            direction: 1,
            pressure,
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

/// The state of one direction, visible to others.
#[derive(Clone, Copy)]
struct Side<'a> {
    moved: &'a AtomicU64,
    passing: &'a Passing,
    timeline: Option<&'a Timeline>,
    /// Its first byte.
    first: Milestone,
    /// Its end before the other's.
    last: Milestone,
    direction: usize,
    pressure: &'a dyn Pressure,
}

impl<'a> Side<'a> {
    /// Marks the direction as busy until it is dropped, with this many bytes at first.
    fn presses(self, bytes: usize) -> Pressed<'a> {
        self.pressure.presses(self.direction, bytes);
        Pressed(self)
    }

    /// Bytes that the next read may take: what is left of the first few, then a whole buffer.
    fn most(&self) -> usize {
        let moved = usize::try_from(self.moved.load(Ordering::Relaxed)).unwrap_or(usize::MAX);
        match FEW.saturating_sub(moved) {
            0 => {
                self.pressure.grows(self.direction);
                BUFFER
            }
            left => left,
        }
    }

    fn took(&self, bytes: usize) {
        if self.moved.fetch_add(bytes as u64, Ordering::Relaxed) == 0 && bytes > 0 {
            self.note(self.first);
        }
    }

    fn note(&self, moment: Milestone) {
        if let Some(timeline) = self.timeline {
            timeline.note(moment);
        }
    }
}

/// The bytes that a direction has moved in its turn.
#[derive(Default)]
struct Turn(usize);

impl Turn {
    /// Counts bytes, and lets other tasks run if there were many.
    async fn took(&mut self, bytes: usize) {
        self.0 += bytes;
        if self.0 >= TURN {
            self.0 = 0;
            tokio::task::yield_now().await;
        }
    }
}

/// Moves bytes until `from` has ended, sets `ended`, and returns only on an error: a side
/// that has sent its FIN can still be reset while the other sends.
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
    // After the FINs of both sides, the caller's close passes the last one on at no cost.
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
    let (mut full_reads, mut turn) = (0, Turn::default());
    let (mut pressed, mut most) = (None, 0);
    let rest = &side.passing.rest;
    pass_on(to, side, &mut pressed).await?;
    if let Some(pipe) = side.passing.kept() {
        pressed.get_or_insert_with(|| side.presses(pipe.held()));
        empty(&pipe, to, side).await?;
    }
    loop {
        most = if most < BUFFER { side.most() } else { most };
        // After a short read this is still ready, and the next read returns EAGAIN. To trust the
        // short read instead would strand what is behind urgent data, where a read stops too.
        let ready = from.ready(Interest::READABLE | Interest::ERROR).await?;
        let taken = match copy(from, to, ready, most, rest) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !ready.is_error() => {
                pressed = None;
                continue;
            }
            other => other?,
        };
        side.took(taken);
        if taken >= PRESSING_READ {
            pressed.get_or_insert_with(|| side.presses(0));
        }
        pass_on(to, side, &mut pressed).await?;
        if is_last(ready, taken, most) {
            return Ok(());
        }
        turn.took(taken).await;
        full_reads = if taken == BUFFER { full_reads + 1 } else { 0 };
        if full_reads >= FULL_READS_OF_BULK {
            full_reads = 0;
            if splice_while_bulk(from, to, side).await? == Source::Ended {
                return Ok(());
            }
        }
    }
}

/// Whether nothing follows a read of `taken` of at most `most` bytes. The kernel says that the source has sent its
/// FIN only when all that came before it is there to read: a read that leaves room has it all.
/// After a reset the next read says so.
fn is_last(ready: Ready, taken: usize, most: usize) -> bool {
    taken == 0 || ready.is_read_closed() && !ready.is_error() && taken < most
}

/// One read of at most `most` bytes and one write; what the write leaves over is put into `rest`. Last bytes are left to
/// travel with the FIN that follows.
fn copy(
    from: &TcpStream,
    to: &TcpStream,
    ready: Ready,
    most: usize,
    rest: &RefCell<VecDeque<u8>>,
) -> io::Result<usize> {
    SHARED.with_borrow_mut(|shared| {
        let taken = from.try_read(&mut shared[..most])?;
        let bytes = &shared[..taken];
        if bytes.is_empty() {
            return Ok(0);
        }
        let written = if is_last(ready, taken, most) {
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
        rest.borrow_mut().extend(&bytes[written..]);
        Ok(taken)
    })
}

/// Writes all of the rest; if this is dropped, the unwritten bytes stay there.
async fn pass_on<'a>(
    to: &TcpStream,
    side: Side<'a>,
    pressed: &mut Option<Pressed<'a>>,
) -> io::Result<()> {
    let rest = &side.passing.rest;
    if rest.borrow().is_empty() {
        return Ok(());
    }
    // The receiver has just accepted less than there was.
    let bytes = rest.borrow().len();
    match pressed {
        Some(_) => side.pressure.presses(side.direction, bytes),
        None => *pressed = Some(side.presses(bytes)),
    }
    while !rest.borrow().is_empty() {
        let write = || to.try_write(rest.borrow().as_slices().0);
        let written = to.async_io(Interest::WRITABLE, write).await?;
        rest.borrow_mut().drain(..written);
    }
    // An idle connection keeps no buffer.
    rest.take();
    side.pressure.presses(side.direction, 0);
    Ok(())
}

#[derive(PartialEq, Eq)]
enum Source {
    Ended,
    Paused,
}

/// Moves bytes through a pipe for as long as the source has them ready.
async fn splice_while_bulk(from: &TcpStream, to: &TcpStream, side: Side<'_>) -> io::Result<Source> {
    // Without a pipe (descriptors are short) the shared buffer does the work.
    let Ok(pipe) = Pipe::take() else {
        return Ok(Source::Paused);
    };
    let pipe = side.passing.keep(pipe);
    let mut turn = Turn::default();
    loop {
        let taken = match from.try_io(Interest::READABLE, || {
            pipe.fill_from(from, side.pressure.most())
        }) {
            Ok(0) => return Ok(Source::Ended),
            Ok(taken) => taken,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Source::Paused),
            Err(error) => return Err(error),
        };
        side.moved.fetch_add(taken as u64, Ordering::Relaxed);
        empty(&pipe, to, side).await?;
        turn.took(taken).await;
    }
}

/// Moves all bytes in the pipe to `to`; if this is dropped, the rest stays in the pipe.
async fn empty(pipe: &Pipe, to: &TcpStream, side: Side<'_>) -> io::Result<()> {
    while !pipe.is_empty() {
        match to.try_io(Interest::WRITABLE, || pipe.drain_to(to)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                side.pressure.presses(side.direction, pipe.held());
                to.writable().await?;
            }
            other => drop(other?),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// Notes how many bytes had been moved when a direction grew.
    struct Grown<'a>(&'a Moved, RefCell<Vec<(usize, [u64; 2])>>);

    impl Pressure for Grown<'_> {
        fn grows(&self, direction: usize) {
            let moved = [&self.0.sent, &self.0.received];
            let moved = moved.map(|moved| moved.load(Ordering::Relaxed));
            self.1.borrow_mut().push((direction, moved));
        }

        fn presses(&self, _: usize, _: usize) {}

        fn eases(&self, _: usize) {}

        fn most(&self) -> usize {
            BUFFER
        }
    }

    /// A connected stream and its peer.
    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap());
        let (stream, peer) = tokio::join!(stream, listener.accept());
        (stream.unwrap(), peer.unwrap().0)
    }

    /// Relays this many bytes from the client and one from the server. Returns which directions grew, and when.
    async fn grown(bytes: usize) -> Vec<(usize, [u64; 2])> {
        let ((client, mut from), (server, mut to)) = (pair().await, pair().await);
        let moved = Moved::default();
        let grown = Grown(&moved, RefCell::default());
        // The first read finds them all.
        from.write_all(&vec![1; bytes]).await.unwrap();
        to.write_all(&[2]).await.unwrap();
        let ends = async {
            from.shutdown().await.unwrap();
            let mut all = Vec::new();
            to.read_to_end(&mut all).await.unwrap();
            assert_eq!(all, vec![1; bytes]);
            drop(to);
            from.read_exact(&mut [0]).await.unwrap();
        };
        let in_flight = InFlight::default();
        let relay = relay(&client, &server, &moved, None, &in_flight, &grown);
        tokio::join!(relay, ends).0.unwrap();
        grown.1.into_inner()
    }

    #[tokio::test]
    async fn no_read_crosses_the_few_bytes_limit() {
        assert_eq!(grown(FEW - 1).await, []);
        for bytes in [FEW, FEW + 1, 8 * FEW] {
            let few = FEW as u64;
            let [(direction, [sent, _])] = grown(bytes).await[..] else {
                panic!("one direction grows, once: {bytes}");
            };
            assert_eq!((direction, sent), (0, few), "{bytes}");
        }
    }
}
