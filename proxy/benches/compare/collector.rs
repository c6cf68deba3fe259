//! A collector that costs as little as one can: it reads what OTLP over gRPC brings it and says yes.
//!
//! It has a thread of its own, whose CPU time is measured apart from the daemons': what spans cost a node
//! is to be measured, not what somebody else does with them. Owns the scrapes too, since who has spans
//! collected has metrics scraped. Must not know what is in a span.
use std::convert::Infallible;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use lab::Host;

use crate::machine::cpu_time;

const OTLP: u16 = 4317;
const ADMIN: u16 = 15020;
const SCRAPE_EVERY: Duration = Duration::from_secs(1);

/// The collector's thread; it runs until the program ends.
pub(crate) struct Collector {
    /// Its `/proc/PID/task/TID`.
    task: String,
    endpoint: String,
    scraped: Vec<Host>,
    /// Broken when dropped: the scrapes end.
    stop: Arc<AtomicBool>,
}

/// What became of the spans of all daemons.
pub(crate) struct Spans {
    pub(crate) sent: u64,
    pub(crate) lost: u64,
}

impl Collector {
    /// Starts it on `host`.
    ///
    /// # Errors
    /// If its port is in use there or a thread is not to be had.
    pub(crate) fn start(host: &Host) -> anyhow::Result<Self> {
        let at = host.addr_v4(OTLP);
        let listener = host.listen(at)?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (sender, receiver) = mpsc::channel();
        thread::Builder::new()
            .name("collector".into())
            .spawn(move || {
                let _ = sender.send(std::fs::read_link("/proc/thread-self"));
                if let Err(error) = runtime.block_on(collect(listener)) {
                    eprintln!("compare: the collector has ended: {error}");
                }
            })?;
        let task = receiver.recv()??;
        Ok(Self {
            task: format!("/proc/{}", task.display()),
            endpoint: format!("http://{at}"),
            scraped: Vec::new(),
            stop: Arc::default(),
        })
    }

    /// What daemons take as `--otlp-endpoint`.
    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Scrapes the metrics of the daemon on `node` from now on, as Prometheus would.
    ///
    /// # Errors
    /// If a thread is not to be had.
    pub(crate) fn scrape(&mut self, node: Host) -> io::Result<()> {
        let (host, stop) = (node.clone(), Arc::clone(&self.stop));
        thread::Builder::new()
            .name("scrapes".into())
            .spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    // A daemon that does not answer shows at the end.
                    let _ = metrics(&host);
                    thread::sleep(SCRAPE_EVERY);
                }
            })?;
        self.scraped.push(node);
        Ok(())
    }

    /// CPU time that its thread has used so far.
    pub(crate) fn busy(&self) -> Duration {
        cpu_time(&self.task)
    }

    /// What the daemons say of their spans so far.
    ///
    /// # Errors
    /// If one does not answer.
    pub(crate) fn spans(&self) -> anyhow::Result<Spans> {
        let mut spans = Spans { sent: 0, lost: 0 };
        for node in &self.scraped {
            let page = metrics(node).with_context(|| format!("no metrics of {}", node.name()))?;
            let sum = |name: &str| -> u64 {
                let series = page.lines().filter(|line| line.starts_with(name));
                series
                    .filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok())
                    .sum()
            };
            spans.sent += sum("portreeve_spans_sent_total");
            spans.lost += sum("portreeve_spans_dropped_total");
        }
        Ok(spans)
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn metrics(node: &Host) -> io::Result<String> {
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, ADMIN));
    let connect = || TcpStream::connect(at);
    let mut stream = node.run(connect).map_err(io::Error::other)??;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    Ok(page)
}

async fn collect(listener: TcpListener) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        let (stream, _) = listener.accept().await?;
        let served = http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(stream), service_fn(take));
        tokio::spawn(served);
    }
}

/// Reads a request to its end and answers with an empty message and the status OK.
async fn take(mut request: Request<Incoming>) -> Result<Response<Answer>, hyper::Error> {
    while let Some(frame) = request.body_mut().frame().await {
        frame?;
    }
    let mut ok = HeaderMap::new();
    ok.insert("grpc-status", HeaderValue::from_static("0"));
    // Not compressed, no bytes.
    let body = Full::new(Bytes::from_static(&[0; 5]));
    let body = body.with_trailers(std::future::ready(Some(Ok(ok))));
    let mut response = Response::new(body);
    let kind = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    Ok(response)
}

type Trailers = std::future::Ready<Option<Result<HeaderMap, Infallible>>>;
type Answer = http_body_util::combinators::WithTrailers<Full<Bytes>, Trailers>;
