//! Messages with descriptors between two processes, with timeouts. Does not interpret them.
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use kernel::sys::{self, Received};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessage, MsgFlags, Shutdown, getsockopt, sendmsg, shutdown, sockopt,
};
use nix::unistd::Uid;

use super::{HandoverError, IN_ALL};

/// Bytes of the longest message.
pub(super) const LONGEST: usize = 64 << 10;

/// A connected socket of kind `SOCK_SEQPACKET`.
#[derive(Debug)]
pub(super) struct Channel {
    socket: OwnedFd,
    /// The time limit for each message.
    within: Duration,
    /// The deadline for all messages.
    until: Instant,
    buffer: Vec<u8>,
}

/// A message that has been received.
pub(super) struct Heard<'a> {
    pub(super) message: &'a [u8],
    pub(super) descriptors: Vec<OwnedFd>,
    /// Whether all of its descriptors are there.
    pub(super) whole: bool,
}

impl Channel {
    /// Takes a socket whose other end belongs to `user`; each message is due `within` this time.
    ///
    /// # Errors
    /// [`HandoverError::Stranger`] if it belongs to somebody else.
    pub(super) fn to(socket: OwnedFd, user: Uid, within: Duration) -> Result<Self, HandoverError> {
        let peer = getsockopt(&socket, sockopt::PeerCredentials).map_err(io::Error::from)?;
        if peer.uid() != user.as_raw() {
            return Err(HandoverError::Stranger { uid: peer.uid() });
        }
        Ok(Self {
            socket,
            within,
            until: Instant::now() + IN_ALL,
            buffer: vec![0; LONGEST],
        })
    }

    /// Sets the time limit for each further message.
    pub(super) fn wait(&mut self, within: Duration) {
        self.within = within;
    }

    /// Lets no further message arrive; those that have arrived can still be received.
    pub(super) fn break_off(&self) {
        // It fails only if the other end is gone, and then nothing arrives either.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
    }

    /// Sends a message, with copies of these descriptors.
    pub(super) fn send(
        &self,
        message: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), HandoverError> {
        let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let rights = if raw.is_empty() { &[] } else { &rights[..] };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let parts = [IoSlice::new(message)];
        let socket = self.socket.as_raw_fd();
        let send = || Ok(sendmsg::<()>(socket, &parts, rights, flags, None)?);
        self.in_time(PollFlags::POLLOUT, send).map(drop)
    }

    /// Receives a message.
    pub(super) fn receive(&mut self) -> Result<Heard<'_>, HandoverError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let received = self.in_time(PollFlags::POLLIN, || {
            sys::receive(&self.socket, &mut buffer)
        });
        self.buffer = buffer;
        let Received {
            length,
            descriptors,
            whole,
        } = received?;
        match &self.buffer[..length] {
            [] => Err(HandoverError::Gone),
            message => Ok(Heard {
                message,
                descriptors,
                whole,
            }),
        }
    }

    fn in_time<T>(
        &self,
        ready: PollFlags,
        mut act: impl FnMut() -> io::Result<T>,
    ) -> Result<T, HandoverError> {
        let due = self.until.min(Instant::now() + self.within);
        loop {
            match act() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if is_end(&error) => return Err(HandoverError::Gone),
                other => return Ok(other?),
            }
            let left = due.saturating_duration_since(Instant::now());
            let wait = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.socket.as_fd(), ready)], wait) {
                Ok(0) => return Err(HandoverError::Late),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
    }
}

fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}
