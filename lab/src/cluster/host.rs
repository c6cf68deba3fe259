//! A host of the lab (pod, node or the outside host): its addresses, servers and dials.
//!
//! The methods read as a script: `a.serve(&[80])`, `b.connect(a.addr_v4(80), limit)`. How a connection
//! is made is `traffic`'s business.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::{Netns, NetnsError};
use crate::process::Command;
use crate::traffic::server::Server;
use crate::traffic::{self, Capture, Dial, Injector, Outcome, Serve, UdpOutcome};

/// A pod, a node or the outside host; clones refer to the same one.
#[derive(Debug, Clone)]
pub struct Host(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    netns: Netns,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    servers: Mutex<Vec<Server>>,
}

impl Host {
    pub(crate) fn new(name: &str, netns: Netns, v4: Ipv4Addr, v6: Ipv6Addr) -> Self {
        let servers = Mutex::default();
        Self(Arc::new(Inner {
            name: name.into(),
            netns,
            v4,
            v6,
            servers,
        }))
    }

    /// `namespace/name` of a pod, a node's name, or `outside`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The host's network namespace; a pod with `hostNetwork` has its node's.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.0.netns
    }

    /// The IPv4 address.
    #[must_use]
    pub fn ipv4(&self) -> Ipv4Addr {
        self.0.v4
    }

    /// The IPv6 address.
    #[must_use]
    pub fn ipv6(&self) -> Ipv6Addr {
        self.0.v6
    }

    /// Both addresses, IPv4 first.
    #[must_use]
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.0.v4.into(), self.0.v6.into()]
    }

    /// A port at the IPv4 address.
    #[must_use]
    pub fn addr_v4(&self, port: u16) -> SocketAddr {
        (self.0.v4, port).into()
    }

    /// A port at the IPv6 address.
    #[must_use]
    pub fn addr_v6(&self, port: u16) -> SocketAddr {
        (self.0.v6, port).into()
    }

    /// A port at both addresses, IPv4 first.
    #[must_use]
    pub fn addrs(&self, port: u16) -> [SocketAddr; 2] {
        [self.addr_v4(port), self.addr_v6(port)]
    }

    /// Answers TCP on `ports`, both families, with [`Serve::Echo`].
    ///
    /// The servers stop when the cluster or the pod is gone, or by [`Host::stop_serving`].
    ///
    /// # Errors
    /// What the kernel answers, `EADDRINUSE` most often.
    pub fn serve(&self, ports: &[u16]) -> io::Result<()> {
        self.serve_as(ports, Serve::Echo)
    }

    /// Answers TCP on `ports` as `behaviour` has it.
    ///
    /// # Errors
    /// As [`Host::serve`].
    pub fn serve_as(&self, ports: &[u16], behaviour: Serve) -> io::Result<()> {
        self.keep(Server::tcp(&self.0.netns, &self.0.name, ports, behaviour)?);
        Ok(())
    }

    /// Echoes UDP on `ports`, both families.
    ///
    /// # Errors
    /// As [`Host::serve`].
    pub fn serve_udp(&self, ports: &[u16]) -> io::Result<()> {
        let addresses = self.addresses();
        self.keep(Server::udp(&self.0.netns, &addresses, ports, None)?);
        Ok(())
    }

    /// Closes all servers and the connections that they have.
    pub fn stop_serving(&self) {
        let servers = std::mem::take(&mut *self.servers());
        drop(servers);
    }

    /// Dials `to` and waits for the outcome for at most `limit`.
    ///
    /// # Errors
    /// If no socket could be made; what the network answers is an [`Outcome`].
    pub fn connect(&self, to: SocketAddr, limit: Duration) -> io::Result<Outcome> {
        Dial::new(self, to).connect(limit)
    }

    /// Dials from a chosen source port, see [`Host::connect`].
    ///
    /// # Errors
    /// As [`Host::connect`], and if the port is in use.
    pub fn connect_from(&self, port: u16, to: SocketAddr, limit: Duration) -> io::Result<Outcome> {
        Dial::new(self, to).source_port(port).connect(limit)
    }

    /// Dials all of `to` at once; outcomes are in the same order.
    ///
    /// # Errors
    /// As [`Host::connect`].
    pub fn connect_all(&self, to: &[SocketAddr], limit: Duration) -> io::Result<Vec<Outcome>> {
        let dials: Vec<_> = to.iter().map(|to| Dial::new(self, *to)).collect();
        traffic::connect_all(&dials, limit)
    }

    /// Sends one datagram and waits for the answer for at most `limit`. It is sent once only.
    ///
    /// # Errors
    /// If no socket could be made; what the network answers is a [`UdpOutcome`].
    pub fn ask_udp(&self, to: SocketAddr, text: &[u8], limit: Duration) -> io::Result<UdpOutcome> {
        traffic::udp::ask(&self.0.netns, to, text, limit)
    }

    /// Records what passes `eth0`, in both directions, from now on.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn capture(&self) -> io::Result<Capture> {
        self.capture_on("eth0")
    }

    /// Records what passes an interface, in both directions, from now on.
    ///
    /// # Errors
    /// `ENODEV` if there is no such interface.
    pub fn capture_on(&self, interface: &str) -> io::Result<Capture> {
        Capture::start(&self.0.netns, interface)
    }

    /// Sends crafted packets on `eth0`, to the neighbour that this host knows there: a pod has
    /// one, its gateway.
    ///
    /// # Errors
    /// `NotFound` without a neighbour; what the kernel answers.
    pub fn injector(&self) -> io::Result<Injector> {
        Injector::open(&self.0.netns, "eth0")
    }

    /// A socket of this host, blocking, not bound: IPv4 or IPv6 after `family`'s address.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn tcp_socket(&self, family: IpAddr) -> io::Result<Socket> {
        let domain = if family.is_ipv4() {
            Domain::IPV4
        } else {
            Domain::IPV6
        };
        self.run(|| Socket::new(domain, Type::STREAM, Some(Protocol::TCP)))
            .map_err(io_error)?
    }

    /// A blocking listener of this host, for servers that [`Serve`] has no behaviour for.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn listen(&self, at: SocketAddr) -> io::Result<TcpListener> {
        self.run(|| traffic::server::listen(at))
            .map_err(io_error)?
            .map(Into::into)
    }

    /// A program to be started here, see [`Command`].
    #[must_use]
    pub fn command(&self, program: impl Into<PathBuf>) -> Command {
        self.0.netns.command(program)
    }

    /// Loads an nftables script here: all of it or nothing.
    ///
    /// # Errors
    /// If `nft` is missing or refuses it.
    pub fn nft(&self, script: &str) -> Result<(), crate::ToolError> {
        crate::tools::nft(&self.0.netns, script)
    }

    /// Carries out an `ip -batch` script here, one command a line without the leading `ip`.
    ///
    /// # Errors
    /// If `ip` is missing or refuses a line; those before it are done.
    pub fn ip(&self, script: &str) -> Result<(), crate::ToolError> {
        crate::tools::ip(&self.0.netns, script)
    }

    /// Runs `work` on a throw-away thread here, see [`Netns::run`].
    ///
    /// # Errors
    /// If the namespace could not be entered; `work` has not run then.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        self.0.netns.run(work)
    }

    fn keep(&self, server: Server) {
        self.servers().push(server);
    }

    fn servers(&self) -> std::sync::MutexGuard<'_, Vec<Server>> {
        self.0
            .servers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A namespace's fault as an I/O error, which keeps the remedy in its text.
pub(crate) fn io_error(error: NetnsError) -> io::Error {
    io::Error::other(error)
}
