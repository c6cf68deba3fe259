//! Relays spans out of the demo's network namespaces.
//!
//! The namespaces have no route to the machine's network. But a socket stays in the namespace in
//! which it was made: connections to Jaeger are opened before the namespaces are entered, and each
//! daemon's connection is relayed through one of them.
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use hyper::Uri;
use lab::Host;

use super::error::DemoError;

/// Where Jaeger takes spans by gRPC, and where people look at them.
const OTLP: u16 = 4317;
const PAGE: u16 = 16_686;

/// Open connections to a Jaeger.
pub(super) struct SpanProxy {
    host: String,
    port: u16,
    connections: Mutex<Vec<TcpStream>>,
}

impl SpanProxy {
    /// Connects to the Jaeger at `url` `number` times; the port of its page is replaced by that of gRPC.
    ///
    /// # Errors
    /// [`DemoError::JaegerUrl`], or [`DemoError::NoJaeger`] if nobody answers there.
    pub(super) fn open(url: &str, number: usize) -> Result<Self, DemoError> {
        let wrong = || DemoError::JaegerUrl {
            url: url.to_owned(),
        };
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let host = uri.host().filter(|_| uri.scheme_str() == Some("http"));
        let host = host.ok_or_else(wrong)?;
        let port = uri.port_u16().filter(|port| *port != PAGE).unwrap_or(OTLP);
        let connect = |_| TcpStream::connect((host.trim_matches(['[', ']']), port));
        let connections = (0..number).map(connect).collect::<io::Result<_>>();
        let connections = connections.map_err(|source| DemoError::NoJaeger {
            at: format!("{host}:{port}"),
            source,
        })?;
        Ok(Self {
            host: host.to_owned(),
            port,
            connections: Mutex::new(connections),
        })
    }

    /// Accepts spans at an address of `host`, which is in the lab, and relays them. Returns the URL.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub(super) fn serve(self: &Arc<Self>, host: &Host) -> io::Result<String> {
        let at = host.addr_v4(self.port);
        let listener = host.listen(at)?;
        let span_proxy = Arc::clone(self);
        thread::spawn(move || {
            for inner in listener.incoming().flatten() {
                let mut connections = span_proxy
                    .connections
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                // When no connection is left, a daemon that reconnects is closed, and counts its spans as lost.
                if let Some(outer) = connections.pop() {
                    relay(inner, outer);
                }
            }
        });
        Ok(format!("http://{at}"))
    }

    /// The URL of the spans with a verdict.
    pub(super) fn page(&self, verdict: &str) -> String {
        let host = &self.host;
        format!("http://{host}:{PAGE}/search?service=portreeve&operation={verdict}")
    }
}

fn relay(inner: TcpStream, outer: TcpStream) {
    // Out of descriptors: the connection breaks, and the daemon logs that.
    let (Ok(inner_too), Ok(outer_too)) = (inner.try_clone(), outer.try_clone()) else {
        return;
    };
    thread::spawn(move || copy(inner, outer));
    thread::spawn(move || copy(outer_too, inner_too));
}

/// Copies bytes until EOF, then shuts the other side down for writing.
fn copy(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = [0; 16 << 10];
    while let Ok(taken @ 1..) = from.read(&mut buffer)
        && to.write_all(&buffer[..taken]).is_ok()
    {}
    // This fails if the peer is already gone.
    let _ = to.shutdown(Shutdown::Write);
}
