//! Moves bytes between the two legs of a connection until both are done or one breaks.
//!
//! The first bytes of a direction go through a buffer that the whole thread shares; a direction
//! that proves to be bulk goes through a pipe by `splice`. An idle connection holds neither. Knows
//! nothing of policy: dropping the future leaves both sockets to the caller.
mod pipe;

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

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
}

/// Relays until both sides have closed. A half-close is passed on and the other direction goes on.
///
/// # Errors
/// The first error of either side: a reset, a keep-alive that nobody answered. The caller is to
/// reset the other side.
pub(crate) async fn relay(
    client: &mut TcpStream,
    server: &mut TcpStream,
    moved: &Moved,
) -> io::Result<()> {
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let (client_ended, server_ended) = (Cell::new(false), Cell::new(false));
    let mut up = pin!(direction(
        from_client,
        to_server,
        &moved.sent,
        &client_ended
    ));
    let mut down = pin!(direction(
        from_server,
        to_client,
        &moved.received,
        &server_ended
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

/// Moves bytes until `from` has ended, says so in `ended`, and ends itself only by an error: a side
/// that has said its last word can still be reset while the other speaks.
async fn direction(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    moved: &AtomicU64,
    ended: &Cell<bool>,
) -> io::Error {
    if let Err(error) = one_way(&mut from, &mut to, moved).await {
        return error;
    }
    ended.set(true);
    match from
        .as_ref()
        .ready(Interest::ERROR)
        .await
        .and_then(|_| from.as_ref().take_error())
    {
        Ok(Some(error)) | Err(error) => error,
        Ok(None) => io::ErrorKind::ConnectionReset.into(),
    }
}

async fn one_way(
    from: &mut ReadHalf<'_>,
    to: &mut WriteHalf<'_>,
    moved: &AtomicU64,
) -> io::Result<()> {
    let mut full_reads = 0;
    let mut rest = Vec::new();
    loop {
        match poll_fn(|cx| poll_copy(cx, from, to, &mut rest, moved)).await? {
            0 => break,
            BUFFER => full_reads += 1,
            _ => full_reads = 0,
        }
        if !rest.is_empty() {
            to.write_all(&rest).await?;
            rest = Vec::new();
        }
        if full_reads >= FULL_READS_OF_BULK {
            full_reads = 0;
            if splice_while_bulk(from, to, moved).await? == Source::Ended {
                break;
            }
        }
    }
    to.shutdown().await
}

/// One read and one write; what the write leaves over is put into `rest`.
fn poll_copy(
    cx: &mut Context<'_>,
    from: &mut ReadHalf<'_>,
    to: &mut WriteHalf<'_>,
    rest: &mut Vec<u8>,
    moved: &AtomicU64,
) -> Poll<io::Result<usize>> {
    SHARED.with_borrow_mut(|shared| {
        let mut buffer = ReadBuf::new(shared);
        ready!(Pin::new(from).poll_read(cx, &mut buffer))?;
        let bytes = buffer.filled();
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let written = match Pin::new(to).poll_write(cx, bytes) {
            Poll::Ready(written) => written?,
            Poll::Pending => 0,
        };
        rest.extend_from_slice(&bytes[written..]);
        moved.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Poll::Ready(Ok(bytes.len()))
    })
}

#[derive(PartialEq, Eq)]
enum Source {
    Ended,
    Paused,
}

/// Moves bytes through a pipe for as long as the source has them ready.
async fn splice_while_bulk(
    from: &ReadHalf<'_>,
    to: &WriteHalf<'_>,
    moved: &AtomicU64,
) -> io::Result<Source> {
    // Without a pipe (descriptors are short) the shared buffer does the work.
    let Ok(pipe) = Pipe::take() else {
        return Ok(Source::Paused);
    };
    loop {
        let taken = match from
            .as_ref()
            .try_io(Interest::READABLE, || pipe.fill_from(from.as_ref()))
        {
            Ok(0) => return Ok(Source::Ended),
            Ok(taken) => taken,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Source::Paused),
            Err(error) => return Err(error),
        };
        moved.fetch_add(taken as u64, Ordering::Relaxed);
        let mut left = taken;
        while left > 0 {
            left -= to
                .as_ref()
                .async_io(Interest::WRITABLE, || pipe.drain_to(to.as_ref(), left))
                .await?;
        }
        tokio::task::consume_budget().await;
    }
}
