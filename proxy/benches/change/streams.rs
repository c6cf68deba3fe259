//! Many streams of a byte every now and then. Both ends are sockets of this process, and a byte costs one
//! call at each end, no poll and no allocation: the traffic is to measure itself as little as can be.
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use lab::Host;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const PORT: u16 = 80;
const PATIENCE: Duration = Duration::from_secs(10);
/// A byte is its offset modulo this prime, so that a lost or doubled one shows in all that follow.
const PERIOD: u64 = 251;

/// Where streams end: a port of a pod, for both families.
pub(crate) struct Sink {
    pod: Host,
    listener: TcpListener,
}

impl Sink {
    pub(crate) fn new(pod: Host) -> anyhow::Result<Self> {
        let listener = pod.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT)))??;
        Ok(Self { pod, listener })
    }
}

/// Streams between one pod and a sink.
pub(crate) struct Streams {
    clients: Vec<End>,
    /// In no order of the clients'.
    servers: Vec<End>,
    /// Whether they are to be cut: then it is no error if they are.
    doomed: bool,
}

/// An end of a stream: a client's sends, a server's takes.
struct End {
    stream: TcpStream,
    bytes: u64,
}

impl Streams {
    pub(crate) fn open(from: &Host, to: &Sink, count: u32, doomed: bool) -> anyhow::Result<Self> {
        let addresses = to.pod.addrs(PORT).into_iter().cycle();
        let addresses: Vec<_> = addresses.take(count as usize).collect();
        let mut clients = Vec::new();
        for outcome in from.connect_all(&addresses, PATIENCE)? {
            clients.push(End::new(outcome.into_stream()?)?);
        }
        let accept = |_| End::new(to.listener.accept()?.0);
        let servers = (0..count).map(accept).collect::<Result<_, _>>()?;
        Ok(Self {
            clients,
            servers,
            doomed,
        })
    }

    /// The ends of each stream once more, for who waits for their reset.
    pub(crate) fn ends(&self) -> io::Result<Vec<TcpStream>> {
        let ends = self.clients.iter().chain(&self.servers);
        ends.map(|end| end.stream.try_clone()).collect()
    }

    /// Sends a byte on each stream and takes what has come.
    fn step(&mut self) -> io::Result<()> {
        let doomed = self.doomed;
        let mut fault = Ok(());
        // What was cut has nothing more to say.
        let mut goes_on = |step: io::Result<()>| match step {
            Err(_) if doomed => false,
            Err(error) => {
                fault = Err(error);
                true
            }
            Ok(()) => true,
        };
        self.clients.retain_mut(|client| goes_on(client.send()));
        self.servers.retain_mut(|server| goes_on(server.take()));
        fault
    }

    /// Ends all streams; every server must have had all that its client has sent.
    fn finish(mut self) -> anyhow::Result<()> {
        for client in &self.clients {
            client.stream.shutdown(Shutdown::Write)?;
        }
        for server in &mut self.servers {
            server.stream.set_nonblocking(false)?;
            server.stream.set_read_timeout(Some(PATIENCE))?;
            while !server.take_some()? {}
            server.stream.write_all(&server.bytes.to_be_bytes())?;
        }
        for client in &mut self.clients {
            client.stream.set_nonblocking(false)?;
            client.stream.set_read_timeout(Some(PATIENCE))?;
            let mut had = [0; 8];
            client.stream.read_exact(&mut had)?;
            let (had, sent) = (u64::from_be_bytes(had), client.bytes);
            ensure!(had == sent, "{sent} bytes sent, the server had {had}");
        }
        Ok(())
    }
}

impl End {
    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream, bytes: 0 })
    }

    fn send(&mut self) -> io::Result<()> {
        match self.stream.write(&[byte_at(self.bytes)]) {
            Ok(sent) => self.bytes += sent as u64,
            // As full as a stream can be: it is behind.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn take(&mut self) -> io::Result<()> {
        match self.take_some() {
            Ok(false) => Ok(()),
            Ok(true) => Err(io::Error::other("ended before its time")),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// One read; whether the stream has ended.
    fn take_some(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 256];
        let count = self.stream.read(&mut buffer)?;
        for byte in &buffer[..count] {
            if *byte != byte_at(self.bytes) {
                return Err(io::Error::other(format!("byte {} is wrong", self.bytes)));
            }
            self.bytes += 1;
        }
        Ok(count == 0)
    }
}

fn byte_at(offset: u64) -> u8 {
    (offset % PERIOD) as u8
}

/// Sends a byte each `interval` until asked to stop, then ends the streams that were not to be cut. Returns
/// how far apart the bytes of a stream were in truth.
///
/// # Errors
/// If such a stream broke or lost a byte.
pub(crate) fn keep_busy(
    mut all: Vec<Streams>,
    interval: Duration,
    stop: &AtomicBool,
) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let mut steps = 0;
    while !stop.load(Ordering::Relaxed) {
        let next = Instant::now() + interval;
        for streams in &mut all {
            streams.step()?;
        }
        steps += 1;
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    let took = begun.elapsed();
    for streams in all.into_iter().filter(|it| !it.doomed) {
        streams.finish()?;
    }
    Ok(took / steps)
}

/// When each of these was reset.
///
/// # Errors
/// If one was not, for long.
pub(crate) fn resets(streams: &[TcpStream]) -> anyhow::Result<Vec<Instant>> {
    let patience = PollTimeout::try_from(PATIENCE)?;
    // An error and a hang-up are reported unasked, and wake for nothing else.
    let wait = |stream| PollFd::new(TcpStream::as_fd(stream), PollFlags::empty());
    let mut left: Vec<_> = streams.iter().map(wait).collect();
    let mut resets = Vec::new();
    while !left.is_empty() {
        let ready = poll(&mut left, patience)?;
        let now = Instant::now();
        ensure!(
            ready > 0,
            "{} of {} ends were not cut",
            left.len(),
            streams.len()
        );
        left.retain(|end| !end.any().unwrap_or(true));
        resets.resize(streams.len() - left.len(), now);
    }
    Ok(resets)
}
