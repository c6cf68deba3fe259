//! Takes connections whose handshake the kernel has completed, pairs each with the upstream that
//! waits for it, and relays until both sides have ended.
//!
//! Until both sides have ended, closing a socket resets the connection: the kernel closes the sockets of a killed
//! daemon, and a FIN would make a reset stream look complete.
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpStream};

use crate::enforcer::Enforcer;
use crate::handover::Outgoing;
use crate::handover::transfer::{self, Relayed};
use crate::limits::Source;
use crate::tcp::connect::{bound_unsent, keepalive, reset_when_closed};
use crate::tcp::connections::{Connection, ConnectionKey, Legs, Upstream};
use crate::tcp::relay::{InFlight, Pressure, relay};
use crate::tcp::unread::CROWD;
use crate::telemetry::occasional::warn_occasionally;
use crate::telemetry::record::Outcome;

/// Length of the accept queue; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 16_384;

/// Opens one of several transparent listeners on `port` for both families.
///
/// Accepted sockets inherit its options, which saves system calls for every connection.
///
/// # Errors
/// `EADDRINUSE` if another program has the port, `EPERM` without `CAP_NET_ADMIN`.
pub(crate) fn listen(port: u16) -> io::Result<std::net::TcpListener> {
    match open(
        Domain::IPV6,
        SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port),
    ) {
        // A node may have IPv6 switched off.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
            ) =>
        {
            open(
                Domain::IPV4,
                SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port),
            )
        }
        other => other,
    }
}

fn open(domain: Domain, address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    if domain == Domain::IPV6 {
        socket.set_only_v6(false)?;
        socket.set_ip_transparent_v6(true)?;
    }
    socket.set_ip_transparent_v4(true)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_out_of_band_inline(true)?;
    socket.set_tcp_keepalive(&keepalive())?;
    reset_when_closed(&socket)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// What the relays of one worker share.
pub(crate) struct Relays {
    pub(crate) enforcer: Arc<Enforcer>,
    /// Where they leave connections for a daemon that takes over.
    pub(crate) outgoing: Arc<Outgoing>,
    pub(crate) worker: usize,
}

/// Accepts connections forever. Must run inside a `LocalSet`.
pub(crate) async fn serve(listener: Option<&TcpListener>, relays: &Rc<Relays>) {
    let Some(listener) = listener else {
        return std::future::pending().await;
    };
    loop {
        match listener.accept().await {
            Ok((client, peer)) => accepted(client, peer, relays),
            Err(error) => {
                // Out of descriptors: wait until ending connections free theirs.
                warn_occasionally!(%error, "cannot accept");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

fn accepted(client: TcpStream, peer: SocketAddr, relays: &Rc<Relays>) {
    let pair = client.local_addr().ok().and_then(|server| {
        relays.enforcer.connections.pair(&ConnectionKey {
            client: unmapped(peer),
            server: unmapped(server),
        })
    });
    match pair {
        Some((flow, upstream)) => {
            let relays = Rc::clone(relays);
            let task = live(client, upstream, InFlight::default(), flow, relays);
            tokio::task::spawn_local(task);
        }
        // The client connected to the proxy port itself, or its upstream was closed meanwhile: reset it.
        None => drop(client),
    }
}

/// Resumes a connection that was proxied before a handover. Must run inside a `LocalSet`.
pub(crate) fn resume(relayed: Relayed, relays: &Rc<Relays>) {
    let Relayed {
        flow,
        client,
        server,
        in_flight,
    } = relayed;
    let watched = TcpStream::from_std(client).and_then(|client| {
        let stream = TcpStream::from_std(server)?;
        let worker = relays.worker;
        Ok((client, Upstream { stream, worker }))
    });
    match watched {
        Ok((client, server)) => {
            flow.holding.is_taken_over();
            let in_flight = InFlight::resumed(in_flight);
            let task = live(client, server, in_flight, flow, Rc::clone(relays));
            tokio::task::spawn_local(task);
        }
        Err(error) => relays.enforcer.ended(&flow, Outcome::Broken(error.kind())),
    }
}

async fn live(
    client: TcpStream,
    upstream: Upstream,
    in_flight: InFlight,
    flow: Arc<Connection>,
    relays: Rc<Relays>,
) {
    let Relays {
        enforcer,
        outgoing,
        worker,
    } = &*relays;
    let outcome = match at_home(upstream, *worker) {
        Ok(server) => {
            let legs = Arc::new(Legs { server, client });
            let ended = relayed(&legs, &flow, &in_flight, enforcer).await;
            match ended {
                Outcome::Closed => {
                    close_in_order(&legs.client);
                    close_in_order(&legs.server);
                }
                // Otherwise dropping the sockets resets both legs.
                Outcome::Stopped if transfer::leave(enforcer, outgoing, &flow, legs, in_flight) => {
                    return;
                }
                _ => {}
            }
            ended
        }
        Err(error) => {
            drop(client);
            Outcome::Broken(error.kind())
        }
    };
    enforcer.ended(&flow, outcome);
}

/// Relays until both sides have ended, one breaks, or the connection is closed.
async fn relayed(
    legs: &Arc<Legs>,
    flow: &Connection,
    in_flight: &InFlight,
    enforcer: &Enforcer,
) -> Outcome {
    flow.lend(legs);
    let pressed = Pressed {
        legs,
        flow,
        enforcer,
    };
    let (client, server) = (&legs.client, &legs.server);
    tokio::select! {
        biased;
        () = flow.close_requested() => match flow.holding.gave_way() {
            true => Outcome::Unread,
            false => Outcome::Stopped,
        },
        ended = relay(client, server, &flow.moved, flow.timeline.get(), in_flight, &pressed) => match ended {
            Ok(()) => Outcome::Closed,
            Err(error) => Outcome::Broken(error.kind()),
        },
    }
}

/// A stream whose unread bytes are counted.
struct Pressed<'a> {
    legs: &'a Legs,
    flow: &'a Connection,
    enforcer: &'a Enforcer,
}

impl Pressed<'_> {
    fn source(&self) -> Source {
        let decision = self.flow.decision();
        let from = decision.as_ref().and_then(|it| it.from.as_deref());
        Source::behind(from, self.flow.key.client.ip())
    }
}

impl Pressure for Pressed<'_> {
    fn grows(&self, direction: usize) {
        let (stream, [from, to]) = (&self.flow.holding, self.legs.of(direction));
        // It fails only if this is no socket of TCP.
        let _ = bound_unsent(to);
        // Buffers that the kernel has enlarged would be reduced when many streams become busy, and lose segments.
        if self.flow.connections_of_source() > CROWD {
            stream.keep_small(from);
        }
    }

    fn presses(&self, direction: usize, bytes: usize) {
        let (unread, stream) = (&self.enforcer.unread, &self.flow.holding);
        if let Some(share) = unread.presses(stream, || self.source(), direction, bytes) {
            let [from, to] = self.legs.of(direction);
            stream.reduce(from, to, share);
        }
    }

    fn eases(&self, direction: usize) {
        self.enforcer.unread.eases(&self.flow.holding, direction);
    }

    fn most(&self) -> usize {
        self.enforcer.unread.most_relayed(&self.flow.holding)
    }
}

/// Registers the upstream with this worker's reactor, if another worker created it.
fn at_home(upstream: Upstream, worker: usize) -> io::Result<TcpStream> {
    if upstream.worker == worker {
        return Ok(upstream.stream);
    }
    TcpStream::from_std(upstream.stream.into_std()?)
}

/// Makes the kernel send the waiting bytes and a FIN when the socket is dropped, instead of a reset.
fn close_in_order(stream: &TcpStream) {
    // This fails only for a descriptor that is not a socket; then there is nothing to close.
    let _ = SockRef::from(stream).set_linger(None);
}

/// Converts the IPv4-mapped address that a dual-stack socket reports for an IPv4 peer.
fn unmapped(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
