//! A real Jaeger on a host of the lab, and the spans that it received.
//!
//! Jaeger's Go module does not contain its UI; `PORTREEVE_JAEGER_UI` is the directory of one that was built.
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use lab::{Child, Host, wait_for, wait_until};
use serde_json::Value;
use tempfile::TempDir;

use crate::DEADLINE;
use crate::certificates::Certificates;

const OTLP_GRPC: u16 = 4317;
const OTLP_HTTP: u16 = 4318;
const QUERY: u16 = 16_686;
/// More traces than any test makes.
const ALL: u32 = 100_000;

/// Jaeger with its own memory.
pub struct Jaeger {
    host: Host,
    scheme: &'static str,
    _child: Child,
    _files: TempDir,
}

/// A span as Jaeger has it.
#[derive(Clone, Debug)]
pub struct Span {
    /// The trace's id, in hexadecimal.
    pub trace: String,
    /// Its own id.
    pub id: String,
    /// Its parent's id.
    pub parent: Option<String>,
    /// Attributes.
    pub tags: BTreeMap<String, Value>,
    /// Those of the resource that sent it.
    pub process: BTreeMap<String, Value>,
    /// Names of what happened in it, in order.
    pub events: Vec<String>,
}

impl Jaeger {
    /// Starts it and waits until it answers.
    pub fn start(host: Host) -> Self {
        Self::start_as(host, None)
    }

    /// The same, but it accepts spans over TLS only, as `server`, from clients with a certificate of `ca`.
    pub fn start_with_tls(host: Host, certificates: &Certificates) -> Self {
        Self::start_as(host, Some(certificates))
    }

    fn start_as(host: Host, certificates: Option<&Certificates>) -> Self {
        let program = lab::built("jaeger").unwrap().join("jaeger");
        let files = TempDir::new().unwrap();
        let config = files.path().join("config.yaml");
        fs::write(&config, configuration(&host, certificates)).unwrap();
        let log = files.path().join("log");
        let mut command = host.command(program);
        command.args(["--config".as_ref(), config.as_os_str()]);
        let written = fs::File::create(&log).unwrap();
        command.stdout(written.try_clone().unwrap()).stderr(written);
        let jaeger = Self {
            _child: command.spawn().unwrap(),
            scheme: if certificates.is_some() {
                "https"
            } else {
                "http"
            },
            host,
            _files: files,
        };
        let up = wait_until(DEADLINE * 3, "Jaeger to answer", || {
            jaeger.get("/api/services").is_some()
        });
        if let Err(error) = up {
            panic!("{error}\n{}", fs::read_to_string(log).unwrap_or_default());
        }
        jaeger
    }

    /// Where it takes spans by gRPC.
    pub fn grpc(&self) -> String {
        format!("{}://{}", self.scheme, self.host.addr_v4(OTLP_GRPC))
    }

    /// Where it takes spans by HTTP, over IPv6.
    pub fn http(&self) -> String {
        format!("{}://{}", self.scheme, self.host.addr_v6(OTLP_HTTP))
    }

    /// The page of a trace.
    pub fn page(&self, trace: &str) -> String {
        format!("http://{}/trace/{trace}", self.host.addr_v4(QUERY))
    }

    /// Every span of a verdict that it has now.
    pub fn spans(&self, verdict: &str) -> Vec<Span> {
        let path =
            format!("/api/traces?service=portreeve&operation={verdict}&limit={ALL}&lookback=1h");
        let answer = self.get(&path).expect("Jaeger answers");
        let traces = answer["data"].as_array().cloned().unwrap_or_default();
        let spans = traces.iter().flat_map(spans_of);
        spans
            .filter(|span| span.tags["verdict"] == verdict)
            .collect()
    }

    /// The spans of a verdict once `enough` says so of them.
    #[track_caller]
    pub fn spans_when(&self, verdict: &str, enough: impl Fn(&[Span]) -> bool) -> Vec<Span> {
        let mut last = Vec::new();
        let found = wait_for(DEADLINE * 4, format!("{verdict} in Jaeger"), || {
            last = self.spans(verdict);
            enough(&last).then_some(())
        });
        assert!(found.is_ok(), "{found:?}; there are {last:#?}");
        last
    }

    fn get(&self, path: &str) -> Option<Value> {
        let connect = || TcpStream::connect(SocketAddr::from((self.host.ipv4(), QUERY)));
        let mut stream = self.host.run(connect).unwrap().ok()?;
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        // HTTP 1.0: the answer ends with the connection.
        let request = format!("GET {path} HTTP/1.0\r\nHost: jaeger\r\n\r\n");
        stream.write_all(request.as_bytes()).ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let (head, body) = text.split_once("\r\n\r\n")?;
        assert!(head.contains(" 200 "), "{path}: {head}\n{body}");
        serde_json::from_str(body).ok()
    }
}

fn configuration(host: &Host, certificates: Option<&Certificates>) -> String {
    let (v4, v6) = (host.ipv4(), host.ipv6());
    let page = std::env::var("PORTREEVE_JAEGER_UI").unwrap_or_default();
    let tls = certificates.map_or_else(String::new, |of| {
        let (own, key) = (of.certificate("server"), of.key("server"));
        let clients = of.certificate("ca");
        format!(
            r#", tls: {{ cert_file: "{own}", key_file: "{key}", client_ca_file: "{clients}" }}"#
        )
    });
    let receiver = |address: &str| format!("\"{address}\"{tls}");
    include_str!("../jaeger.yaml")
        .replace("PAGE", &page)
        .replace("\"OTLP_GRPC\"", &receiver(&format!("{v4}:{OTLP_GRPC}")))
        .replace("\"OTLP_HTTP\"", &receiver(&format!("[{v6}]:{OTLP_HTTP}")))
        .replace("QUERY_HTTP", &format!("{v4}:{QUERY}"))
        .replace("QUERY_GRPC", &format!("{v4}:{}", QUERY - 1))
}

fn spans_of(trace: &Value) -> Vec<Span> {
    let tags = |holder: &Value| -> BTreeMap<String, Value> {
        let tags = holder["tags"].as_array().into_iter().flatten();
        tags.map(|tag| {
            (
                tag["key"].as_str().unwrap().to_owned(),
                tag["value"].clone(),
            )
        })
        .collect()
    };
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let spans = trace["spans"].as_array().unwrap().iter();
    spans
        .map(|span| {
            let process = &trace["processes"][span["processID"].as_str().unwrap()];
            let parent = span["references"].as_array().and_then(|it| it.first());
            let events = span["logs"].as_array().into_iter().flatten();
            let name = |event: &Value| {
                let fields = event["fields"].as_array().unwrap();
                let name = fields.iter().find(|field| field["key"] == "event").unwrap();
                text(&name["value"])
            };
            Span {
                trace: text(&span["traceID"]),
                id: text(&span["spanID"]),
                parent: parent.map(|parent| text(&parent["spanID"])),
                tags: tags(span),
                process: tags(process),
                events: events.map(name).collect(),
            }
        })
        .collect()
}
