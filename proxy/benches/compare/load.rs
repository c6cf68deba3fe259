//! The work that is measured: what clients and servers do, and how it is counted.
//!
//! Blocking threads with as few system calls as the work allows, since the load's own cost is
//! shared by all ways and hides their differences. Knows nothing of what lies between the ends.
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::Host;

use crate::flood::Kind;
use crate::way::Path;

/// Bytes of a request, and of its answer.
const MESSAGE: usize = 128;
/// Bytes that a stream's ends read and write at a time.
const CHUNK: usize = 128 << 10;
/// Connections that ask at once, kept or new ones.
const CLIENTS: u16 = 16;
/// Time before the count begins: connections open, windows grow, caches fill.
const WARM_UP: Duration = Duration::from_millis(150);
/// What no answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

const SINK: u16 = 7001;
const ECHO: u16 = 7002;
/// Says which peer it sees.
pub(crate) const WHO: u16 = 7003;
/// New connections spread over so many ports, each with its own: none of the ends runs out of
/// ports while ended connections are still in TIME_WAIT.
const SPREAD: u16 = 8;
const SERVER_CLOSES: u16 = 7100;
const CLIENT_CLOSES: u16 = 7200;
/// Threads that accept on each of those ports: one more than clients that dial it.
const ACCEPTORS: u16 = CLIENTS / SPREAD + 1;

/// One kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// So many streams, each as fast as it can, from client to server.
    Streams(u16),
    /// Small requests and answers over connections that stay.
    Requests,
    /// Connect, one request, one answer; the server closes first.
    ServerCloses,
    /// The same; the client closes first.
    ClientCloses,
    /// How long one connect takes while nothing else happens.
    Latency,
    /// The same while another pod floods the node.
    Flooded(Kind),
    /// Small datagrams and answers, each client over a flow that stays.
    Datagrams,
    /// How long the first datagram of a flow and its answer take, at so many new flows a second.
    FirstDatagrams(u16),
}

/// A figure that a load yields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Figure {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) decimals: usize,
}

/// What one measurement found: a value for each of the load's figures, and how many operations
/// all of it took, warm-up included.
pub(crate) struct Measured {
    pub(crate) values: Vec<f64>,
    pub(crate) operations: u64,
}

impl Load {
    pub(crate) const ALL: [Self; 13] = [
        Self::Streams(1),
        Self::Streams(4),
        Self::Requests,
        Self::ServerCloses,
        Self::ClientCloses,
        Self::Latency,
        Self::Flooded(Kind::Denied),
        Self::Flooded(Kind::Unfinished),
        Self::Flooded(Kind::Renewed),
        Self::Flooded(Kind::Silent),
        Self::Flooded(Kind::Unknown),
        Self::Datagrams,
        Self::FirstDatagrams(1000),
    ];

    /// The name of this load's row for connections of one `path`.
    pub(crate) fn row(self, path: Path) -> String {
        let load = match self {
            Self::Streams(1) => "one stream",
            Self::Streams(_) => "four streams",
            Self::Requests => "requests, kept connections",
            Self::ServerCloses => "new connections, server closes",
            Self::ClientCloses => "new connections, client closes",
            Self::Latency => "connect",
            Self::Flooded(kind) => return format!("{path}, connect in a flood of {}", kind.name()),
            Self::Datagrams => "UDP request-reply",
            Self::FirstDatagrams(_) => "first datagram and answer, 1,000 flows a second",
        };
        format!("{path}, {load}")
    }

    /// What it yields, in the order of [`Measured::values`].
    pub(crate) fn figures(self) -> &'static [Figure] {
        const fn figure(name: &'static str, unit: &'static str, decimals: usize) -> Figure {
            Figure {
                name,
                unit,
                decimals,
            }
        }
        const STREAM: [Figure; 1] = [figure("", "Gbit/s", 2)];
        const RATE: [Figure; 1] = [figure("", "1/s", 0)];
        const LATENCY: [Figure; 2] = [figure(", median", "µs", 0), figure(", p99", "µs", 0)];
        match self {
            Self::Streams(_) => &STREAM,
            Self::Requests | Self::ServerCloses | Self::ClientCloses | Self::Datagrams => &RATE,
            Self::Latency | Self::Flooded(_) | Self::FirstDatagrams(_) => &LATENCY,
        }
    }

    /// Whether there is a decision for each of its operations.
    pub(crate) fn is_of_decisions(self) -> bool {
        matches!(
            self,
            Self::ServerCloses | Self::ClientCloses | Self::FirstDatagrams(_)
        )
    }

    /// What the proxy's CPU time is divided by: a unit of this many operations, and its name.
    pub(crate) fn cost(self) -> (f64, &'static str) {
        match self {
            Self::Streams(_) => (1e6, "MB"),
            Self::Requests | Self::Datagrams => (1.0, "request"),
            Self::FirstDatagrams(_) => (1.0, "flow"),
            Self::ServerCloses | Self::ClientCloses | Self::Latency | Self::Flooded(_) => {
                (1.0, "connection")
            }
        }
    }

    /// Puts the load on for [`WARM_UP`] and `window`, and counts during `window`.
    pub(crate) fn measure(
        self,
        client: &Host,
        server: &Servers,
        window: Duration,
    ) -> anyhow::Result<Measured> {
        let run = Run::default();
        let before = server.received();
        let measured = client.run(|| {
            thread::scope(|scope| {
                self.start(scope, &run, server.host.ipv4().into());
                thread::sleep(WARM_UP);
                let count = || match self {
                    Self::Streams(_) => server.received(),
                    _ => run.done.load(Ordering::Relaxed),
                };
                let (first, since) = (count(), Instant::now());
                run.connects().clear();
                thread::sleep(window);
                let (counted, took) = (count() - first, since.elapsed());
                run.stop.store(true, Ordering::Relaxed);
                (counted, took)
            })
        })?;
        if let Some(failure) = run
            .failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            return Err(failure).context("a client gave up");
        }
        let (counted, took) = measured;
        ensure!(counted > 0, "nothing came through");
        #[expect(
            clippy::cast_precision_loss,
            reason = "counts of a second are far below 2^52"
        )]
        let rate = counted as f64 / took.as_secs_f64();
        Ok(match self {
            Self::Streams(_) => Measured {
                values: vec![rate * 8.0 / 1e9],
                operations: server.received() - before,
            },
            Self::Latency | Self::Flooded(_) | Self::FirstDatagrams(_) => Measured {
                values: percentiles(&mut run.connects()),
                operations: run.done.load(Ordering::Relaxed),
            },
            _ => Measured {
                values: vec![rate],
                operations: run.done.load(Ordering::Relaxed),
            },
        })
    }

    fn start<'scope>(
        self,
        scope: &'scope Scope<'scope, '_>,
        run: &'scope Run,
        server: std::net::IpAddr,
    ) {
        let clients = match self {
            Self::Streams(streams) => streams,
            Self::Latency | Self::Flooded(_) | Self::FirstDatagrams(_) => 1,
            _ => CLIENTS,
        };
        for number in 0..clients {
            let to = move |port: u16| SocketAddr::new(server, port);
            let spread = move |base: u16| to(base + number % SPREAD);
            scope.spawn(move || {
                run.note(match self {
                    Self::Streams(_) => stream(to(SINK), run),
                    Self::Requests => requests(to(ECHO), run),
                    Self::ServerCloses => one_shots(spread(SERVER_CLOSES), true, run),
                    Self::ClientCloses => one_shots(spread(CLIENT_CLOSES), false, run),
                    Self::Latency | Self::Flooded(_) => one_shots(spread(SERVER_CLOSES), true, run),
                    Self::Datagrams => datagrams(to(ECHO), run),
                    Self::FirstDatagrams(rate) => first_datagrams(to(ECHO), rate, run),
                });
            });
        }
    }
}

/// What the clients of one measurement share.
#[derive(Default)]
struct Run {
    stop: AtomicBool,
    done: AtomicU64,
    connects: Mutex<Vec<Duration>>,
    failure: Mutex<Option<io::Error>>,
}

impl Run {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn connects(&self) -> std::sync::MutexGuard<'_, Vec<Duration>> {
        self.connects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, result: io::Result<()>) {
        if let Err(error) = result {
            self.failure
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert(error);
        }
    }
}

fn stream(to: SocketAddr, run: &Run) -> io::Result<()> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let chunk = vec![0x5a; CHUNK];
    while run.goes_on() {
        stream.write_all(&chunk)?;
    }
    Ok(())
}

fn requests(to: SocketAddr, run: &Run) -> io::Result<()> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut message = [0x5a; MESSAGE];
    while run.goes_on() {
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        run.done.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

fn one_shots(to: SocketAddr, server_closes: bool, run: &Run) -> io::Result<()> {
    let mut message = [0x5a; MESSAGE];
    while run.goes_on() {
        let started = Instant::now();
        let mut stream = TcpStream::connect(to)?;
        let connected = started.elapsed();
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        if server_closes && stream.read(&mut message)? > 0 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        drop(stream);
        run.done.fetch_add(1, Ordering::Relaxed);
        run.connects().push(connected);
    }
    Ok(())
}

fn datagrams(to: SocketAddr, run: &Run) -> io::Result<()> {
    let socket = flow(to)?;
    let mut message = [0x5a; MESSAGE];
    while run.goes_on() {
        socket.send(&message)?;
        socket.recv(&mut message)?;
        run.done.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// One flow after the other, each at its time; one that is late delays none but itself.
fn first_datagrams(to: SocketAddr, rate: u16, run: &Run) -> io::Result<()> {
    let step = Duration::from_secs(1) / u32::from(rate);
    let mut message = [0x5a; MESSAGE];
    let mut next = Instant::now();
    while run.goes_on() {
        let socket = flow(to)?;
        thread::sleep(next.saturating_duration_since(Instant::now()));
        next += step;
        let started = Instant::now();
        socket.send(&message)?;
        socket.recv(&mut message)?;
        run.done.fetch_add(1, Ordering::Relaxed);
        run.connects().push(started.elapsed());
    }
    Ok(())
}

fn flow(to: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(to)?;
    Ok(socket)
}

/// The median and the 99th of a hundred, in microseconds.
fn percentiles(connects: &mut [Duration]) -> Vec<f64> {
    connects.sort_unstable();
    let at = |hundredth: usize| connects.get(connects.len().saturating_sub(1) * hundredth / 100);
    [50, 99]
        .map(|hundredth| at(hundredth).map_or(f64::NAN, |connect| connect.as_secs_f64() * 1e6))
        .to_vec()
}

/// The servers of one pod, for all loads; they run until the program ends.
pub(crate) struct Servers {
    host: Host,
    received: Arc<AtomicU64>,
}

impl Servers {
    /// Starts them all.
    ///
    /// # Errors
    /// If a port is in use or a thread is not to be had.
    pub(crate) fn start(host: Host) -> io::Result<Self> {
        let received = Arc::new(AtomicU64::new(0));
        let bytes = Arc::clone(&received);
        serve(&host, SINK, 1, move |stream| {
            let bytes = Arc::clone(&bytes);
            thread::spawn(move || sink(stream, &bytes));
        })?;
        serve(&host, ECHO, 1, |stream| {
            thread::spawn(move || echo(stream));
        })?;
        let bind = || UdpSocket::bind(host.addr_v4(ECHO));
        let datagrams = host.run(bind).map_err(io::Error::other)??;
        thread::spawn(move || echo_datagrams(&datagrams));
        serve(&host, WHO, 1, |mut stream| {
            if let Ok(peer) = stream.peer_addr() {
                let _ = write!(stream, "{peer}");
            }
        })?;
        for port in 0..SPREAD {
            serve(&host, SERVER_CLOSES + port, ACCEPTORS, |mut stream| {
                let _ = answer(&mut stream);
            })?;
            serve(&host, CLIENT_CLOSES + port, ACCEPTORS, |mut stream| {
                if answer(&mut stream).is_ok() {
                    let _ = stream.read(&mut [0]);
                }
            })?;
        }
        Ok(Self { host, received })
    }

    /// Whom this pod sees when `client` dials it, and from which of its own addresses the client did.
    ///
    /// # Errors
    /// What the network answered within `limit`.
    pub(crate) fn seen_from(
        &self,
        client: &Host,
        limit: Duration,
    ) -> io::Result<(SocketAddr, SocketAddr)> {
        let to = self.host.addr_v4(WHO);
        let dialled = client.run(|| {
            let mut stream = TcpStream::connect_timeout(&to, limit)?;
            stream.set_read_timeout(Some(limit))?;
            let mut seen = String::new();
            stream.read_to_string(&mut seen)?;
            Ok::<_, io::Error>((seen, stream.local_addr()?))
        });
        let (seen, own) = dialled.map_err(io::Error::other)??;
        Ok((seen.parse().map_err(io::Error::other)?, own))
    }

    fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

/// Has so many threads accept on `port`; a connection that ends badly is its client's to report.
fn serve(
    host: &Host,
    port: u16,
    threads: u16,
    each: impl Fn(TcpStream) + Clone + Send + 'static,
) -> io::Result<()> {
    let listener: TcpListener = host.listen(host.addr_v4(port))?;
    for _ in 0..threads {
        let (listener, each) = (listener.try_clone()?, each.clone());
        thread::Builder::new()
            .name("server".into())
            .spawn(move || {
                for stream in listener.incoming().flatten() {
                    each(stream);
                }
            })?;
    }
    Ok(())
}

fn sink(mut stream: TcpStream, received: &AtomicU64) {
    let mut chunk = vec![0; CHUNK];
    while let Ok(bytes @ 1..) = stream.read(&mut chunk) {
        received.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    loop {
        answer(&mut stream)?;
    }
}

fn echo_datagrams(socket: &UdpSocket) {
    let mut message = [0; MESSAGE];
    loop {
        // What goes wrong with an answer is its client's to report.
        if let Ok((length, from)) = socket.recv_from(&mut message) {
            let _ = socket.send_to(&message[..length], from);
        }
    }
}

fn answer(stream: &mut TcpStream) -> io::Result<()> {
    let mut message = [0; MESSAGE];
    stream.read_exact(&mut message)?;
    stream.write_all(&message)
}
