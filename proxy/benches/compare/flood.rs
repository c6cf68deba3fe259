//! Floods of first packets that one pod sends while another one connects.
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use lab::Host;
use lab::traffic::craft;

/// SYNs a millisecond: half as many again as the rules let one source have.
const EACH_MILLISECOND: u32 = 15;

/// What a flood asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// What policy denies.
    Denied,
    /// Connections whose handshakes it does not complete.
    Unfinished,
    /// Connections from one port, each of which ends the attempt before.
    Renewed,
    /// Connections to an address that does not answer.
    Silent,
    /// Connections to an address of the cluster that nobody has.
    Unknown,
}

impl Kind {
    /// As it is called in a row.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Denied => "denied SYNs",
            Self::Unfinished => "unfinished handshakes",
            Self::Renewed => "SYNs from one port",
            Self::Silent => "SYNs to a silent address",
            Self::Unknown => "SYNs to an unknown address",
        }
    }
}

/// Where a flood goes.
pub(crate) struct Targets {
    pub(crate) denied: SocketAddr,
    pub(crate) server: SocketAddr,
    pub(crate) silent: SocketAddr,
}

impl Targets {
    fn of(&self, kind: Kind) -> SocketAddr {
        match kind {
            Kind::Denied => self.denied,
            Kind::Unfinished | Kind::Renewed => self.server,
            Kind::Silent => self.silent,
            Kind::Unknown => {
                let mut address = self.server;
                if let IpAddr::V4(server) = address.ip() {
                    let [a, b, c, _] = server.octets();
                    address.set_ip(Ipv4Addr::new(a, b, c, 250).into());
                }
                address
            }
        }
    }
}

/// A flood that ends when this is dropped.
pub(crate) struct Flood {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Flood {
    /// Starts it.
    ///
    /// # Errors
    /// If `from` has sent nothing yet, or a packet socket is not to be had.
    pub(crate) fn start(kind: Kind, from: &Host, targets: &Targets) -> io::Result<Self> {
        let (to, own) = (targets.of(kind), from.ipv4());
        let way = from.injector()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let send = move |number: u32| {
            let port = match kind {
                Kind::Renewed => 1024,
                _ => 1024 + u16::try_from(number % 60_000).unwrap_or_default(),
            };
            let from = SocketAddr::new(own.into(), port);
            let sequence = number.wrapping_mul(2_654_435_761);
            // A full interface queue is not an error here.
            let _ = way.send(&craft::tcp(from, to, craft::SYN, sequence, &[]));
        };
        let thread = thread::Builder::new().name("flood".into()).spawn(move || {
            let (mut number, mut next) = (0, Instant::now());
            while !stopped.load(Ordering::Relaxed) {
                (number..number + EACH_MILLISECOND).for_each(&send);
                number += EACH_MILLISECOND;
                next += Duration::from_millis(1);
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It panics only if a packet cannot be made.
            let _ = thread.join();
        }
    }
}
