//! The spans that the daemon sends to a real Jaeger, and the cost of collectors that do not accept them.
//!
//! `PORTREEVE_TRACE_PICTURE=FILE.png`, with `PORTREEVE_JAEGER_UI`, has the test of a connection that the second
//! node denies take the picture that the documents show.
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use lab::{Host, wait_until};
use serde_json::{Value, json};
use socket2::SockRef;
use testbed::runner::Test;

use crate::carried::accounting;
use crate::policies::Manifests;
use testbed::browser::Browser;
use testbed::cases::world::{Change, World, policy_key};
use testbed::certificates::Certificates;
use testbed::jaeger::{Jaeger, Span};
use testbed::matrix::{self, MatrixCluster, Refused, Source};
use testbed::{
    DEADLINE, SOON, TestCluster, allow_all, connected, deny_ingress, echoes, metric, policy, small,
};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    denied_upstream_connections_are_found_in_jaeger,
    connection_across_nodes_is_one_trace,
    connection_denied_by_second_node_is_one_trace,
    denials_of_retrying_client_become_counted_spans,
    only_verified_tls_collectors_get_spans,
    faulty_collector_delays_nothing_and_losses_are_counted,
];

/// Spans are sent this soon in tests.
const PROMPT: &str = "50";

/// The upstream cases, with spans; and what is to be found of them.
struct TracedCases {
    manifests: Manifests,
    jaeger: Jaeger,
    refused: BTreeMap<Denial, u64>,
    /// All that ever were, by `namespace/name`.
    policies: BTreeSet<String>,
}

/// What identifies a denial: both ends with the pods' uids.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Denial {
    client: (IpAddr, Option<String>),
    server: (SocketAddr, Option<String>),
}

impl Source for TracedCases {
    fn step(&mut self, bed: &TestCluster, nodes: &[Value], world: &World, changes: &[Change]) {
        let keys = world.policies.values().map(policy_key);
        self.policies
            .extend(keys.map(|(namespace, name)| format!("{namespace}/{name}")));
        self.manifests.step(bed, nodes, world, changes);
    }

    fn start(&self, bed: &mut TestCluster, node: usize) {
        let endpoint = self.jaeger.grpc();
        bed.start(
            node,
            &["--otlp-endpoint", &endpoint, "--trace-allowed", "0"],
        );
    }

    fn refused(&mut self, world: &World, refused: Refused) {
        let uid = |address: IpAddr| {
            let mut pods = world.pods.values();
            let pod = pods.find(|pod| pod.addresses.contains(&address))?;
            Some(format!("uid-of-{}-{}", pod.namespace, pod.name))
        };
        let Refused { client, server } = refused;
        let denial = Denial {
            client: (client, uid(client)),
            server: (server, uid(server.ip())),
        };
        *self.refused.entry(denial).or_default() += 1;
    }
}

fn denied_upstream_connections_are_found_in_jaeger() {
    let cases = matrix::cases("upstream", 48);
    let mut cluster = MatrixCluster::new(&cases, |bed| TracedCases {
        manifests: Manifests::new(bed),
        jaeger: Jaeger::start(bed.lab.outside()),
        refused: BTreeMap::new(),
        policies: BTreeSet::new(),
    });
    cluster.play_all(&cases);
    let (mut bed, source) = cluster.into_parts();
    // What is still being counted is sent at the end.
    for node in [1, 2] {
        let daemon = bed.daemon(node);
        daemon.child.terminate();
        daemon.child.wait(DEADLINE).unwrap();
    }
    let mut found: BTreeMap<Denial, Vec<Span>> = BTreeMap::new();
    for span in source.jaeger.spans("deny") {
        let named = policies(&span);
        assert!(
            !named.is_empty() && named.is_subset(&source.policies),
            "{span:?}"
        );
        assert_eq!(span.tags["error"], true, "{span:?}");
        assert_eq!(span.tags["otel.status_description"], span.tags["reason"]);
        found.entry(denial(&span)).or_default().push(span);
    }
    for (denial, times) in &source.refused {
        let spans = found.remove(denial).unwrap_or_default();
        // Behind a Service conntrack may give a repeated SYN another port; then it counts again.
        assert!(count(&spans) >= *times, "{times} {denial:?}: {spans:#?}");
    }
    assert!(found.is_empty(), "nobody tried {found:#?}");
    assert!(source.refused.len() > 100, "{}", source.refused.len());
    assert_eq!(source.jaeger.spans("allow").len(), 0, "--trace-allowed 0");
}

fn denial(span: &Span) -> Denial {
    let text = |key: &str| span.tags.get(key)?.as_str().map(str::to_owned);
    let address =
        |side: &str| -> IpAddr { text(&format!("{side}.address")).unwrap().parse().unwrap() };
    let port = span.tags["destination.port"].as_u64().unwrap();
    Denial {
        client: (address("source"), text("source.k8s.pod.uid")),
        server: (
            (address("destination"), u16::try_from(port).unwrap()).into(),
            text("destination.k8s.pod.uid"),
        ),
    }
}

/// How many connections the spans stand for.
fn count(spans: &[Span]) -> u64 {
    let counts = spans
        .iter()
        .map(|span| span.tags["count"].as_u64().unwrap());
    counts.sum()
}

/// The policies that a span names.
fn policies(span: &Span) -> BTreeSet<String> {
    serde_json::from_str(span.tags["policies"].as_str().unwrap()).unwrap()
}

/// Starts a daemon on each node that sends to `collectors`, one a node.
fn trace(bed: &mut TestCluster, policies: &[Value], collectors: [&str; 2], flags: &[&str]) {
    bed.set_env("OTEL_BSP_SCHEDULE_DELAY", PROMPT);
    bed.write_policies(policies);
    for (node, collector) in collectors.iter().enumerate() {
        bed.install(node, &[]);
        bed.start(node, &[&["--otlp-endpoint", collector], flags].concat());
    }
}

fn node(span: &Span) -> &str {
    span.process["k8s.node.name"].as_str().unwrap()
}

fn connection_across_nodes_is_one_trace() {
    let mut bed = TestCluster::bare(small());
    let jaeger = Jaeger::start(bed.lab.outside());
    // What the kernel carries is reported when conntrack forgets it.
    accounting(&bed, "1");
    // Both transports.
    trace(
        &mut bed,
        &[allow_all()],
        [&jaeger.grpc(), &jaeger.http()],
        &[],
    );
    let (a, c) = (bed.lab.pod("x/a"), bed.lab.pod("x/c"));
    let ways = bed.ways(80);
    for way in &ways {
        let stream = connected(&a, way.to);
        echoes(&stream, "once");
    }
    c.serve_udp(&[53]).unwrap();
    for to in c.addrs(53) {
        a.ask_udp(to, b"kernel", DEADLINE).unwrap();
    }
    let across = ways.iter().filter(|way| way.server == "x/c").count();
    let expected = ways.len() + across + 2 * 2;
    let spans = jaeger.spans_when("allow", |spans| spans.len() >= expected);
    let mut traces: BTreeMap<&str, Vec<&Span>> = BTreeMap::new();
    for span in &spans {
        traces.entry(&span.trace).or_default().push(span);
    }
    assert_eq!(traces.len(), ways.len() + 2, "{traces:#?}");
    for spans in traces.values() {
        let root = spans.iter().find(|span| span.parent.is_none()).unwrap();
        assert_eq!(node(root), bed.lab.node_of("x/a").name());
        for (key, value) in [
            ("source.k8s.pod.name", "a"),
            ("direction", "both"),
            ("reason", root.tags["reason"].as_str().unwrap()),
        ] {
            assert!(
                spans.iter().all(|span| span.tags[key] == value),
                "{key}: {spans:#?}"
            );
        }
        let others: Vec<_> = spans.iter().filter(|span| span.id != root.id).collect();
        match (root.tags["destination.k8s.pod.name"].as_str(), &others[..]) {
            (Some("b"), []) => {}
            (Some("c"), [second]) => {
                assert_eq!(second.parent.as_ref(), Some(&root.id));
                assert_eq!(node(second), bed.lab.node_of("x/c").name());
            }
            other => panic!("{other:?}: {spans:#?}"),
        }
        let events: BTreeSet<_> = root.events.iter().map(String::as_str).collect();
        let happened: BTreeSet<_> = match root.tags["path"].as_str() {
            Some("spliced") => ["held", "upstream connected", "first byte", "half-closed"].into(),
            _ => ["held"].into(),
        };
        assert_eq!(events, happened, "{root:#?}");
    }
}

fn connection_denied_by_second_node_is_one_trace() {
    let mut bed = TestCluster::bare(small());
    let jaeger = Jaeger::start(bed.lab.outside());
    bed.set_env("OTEL_BSP_SCHEDULE_DELAY", PROMPT);
    let egress = json!({ "podSelector": { "matchLabels": { "pod": "a" } }, "policyTypes": ["Egress"], "egress": [{}] });
    let egress = policy("a-goes-anywhere", &egress);
    bed.write_policies(std::slice::from_ref(&egress));
    // The second node knows of a policy that the first has not heard of yet.
    let ahead = bed.file("ahead");
    std::fs::create_dir(&ahead).unwrap();
    let cluster = "cluster.json";
    std::fs::copy(bed.manifests().join(cluster), ahead.join(cluster)).unwrap();
    for (name, policy) in [("egress", egress), ("ingress", deny_ingress("c"))] {
        std::fs::write(ahead.join(format!("{name}.json")), policy.to_string()).unwrap();
    }
    let source = format!("dir:{}", ahead.display());
    let sent = ["--otlp-endpoint", &jaeger.grpc()];
    for node in [0, 1] {
        bed.install(node, &[]);
    }
    bed.start(0, &sent);
    bed.start(
        1,
        &[&sent[..], &["--cluster", &source, "--deny", "reject"]].concat(),
    );
    let refused = bed
        .lab
        .pod("x/a")
        .connect(bed.lab.pod("x/c").addr_v4(80), DEADLINE);
    assert!(refused.unwrap().into_stream().is_err());
    let denied = jaeger.spans_when("deny", |spans| spans.len() == 1);
    let allowed = jaeger.spans_when("allow", |spans| spans.len() == 1);
    assert_eq!(denied[0].trace, allowed[0].trace);
    assert_eq!(denied[0].parent.as_ref(), Some(&allowed[0].id));
    assert_ne!(node(&denied[0]), node(&allowed[0]));
    assert_eq!(
        policies(&denied[0]),
        BTreeSet::from(["x/deny-ingress-c".to_owned()])
    );
    let reason = allowed[0].tags["reason"].as_str().unwrap();
    assert!(reason.contains("Not connected"), "{reason}");
    if let Some(file) = std::env::var_os("PORTREEVE_TRACE_PICTURE") {
        let browser = Browser::on(&bed.lab.node(0), 1400, 1400);
        std::fs::write(file, picture(&browser, &jaeger.page(&denied[0].trace))).unwrap();
    }
}

/// Jaeger's page of a trace with the denied span opened.
fn picture(browser: &Browser, page: &str) -> Vec<u8> {
    browser.open(page);
    browser.wait_for(
        "the trace",
        "const rows = document.querySelectorAll('.span-row'); return rows.length === 2 && rows.length",
    );
    browser.run("document.querySelectorAll('.span-row .span-view')[1].click()");
    browser.wait_for(
        "its attributes",
        "const head = document.querySelector('.detail-row .AccordianKeyValues--header, .detail-row [class*=KeyValues] [role=switch]'); \
         if (head) head.click(); return !!head;",
    );
    browser.wait_for(
        "the policies",
        "return document.querySelector('.detail-row').innerText.includes('deny-ingress-c')",
    );
    // All of them, without a scroll bar.
    browser.run(
        "for (let it = document.querySelector('.detail-row table'); !it.matches('.detail-row'); it = it.parentElement) { \
           it.style.maxHeight = 'none'; it.style.height = 'auto'; \
         }",
    );
    browser.screenshot()
}

fn denials_of_retrying_client_become_counted_spans() {
    const TRIES: u64 = 60;
    let mut bed = TestCluster::bare(small());
    let jaeger = Jaeger::start(bed.lab.outside());
    let to = [&*jaeger.grpc(), &*jaeger.grpc()];
    trace(&mut bed, &[deny_ingress("b")], to, &["--deny", "reject"]);
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b").addr_v4(80));
    let try_once = || assert!(a.connect(b, DEADLINE).unwrap().into_stream().is_err());
    try_once();
    let first = jaeger.spans_when("deny", |spans| !spans.is_empty());
    assert_eq!(first[0].tags["count"], 1, "seen before its window ends");
    (1..TRIES).for_each(|_| try_once());
    let spans = jaeger.spans_when("deny", |spans| count(spans) == TRIES);
    assert!(spans.len() <= 3, "{spans:#?}");
}

fn only_verified_tls_collectors_get_spans() {
    let mut bed = TestCluster::bare(small());
    let outside = bed.lab.outside();
    let addresses = [outside.ipv4().into(), outside.ipv6().into()];
    let certificates = Certificates::make(&addresses);
    let jaeger = Jaeger::start_with_tls(outside, &certificates);
    let ca = "OTEL_EXPORTER_OTLP_CERTIFICATE";
    let own = "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE";
    let key = "OTEL_EXPORTER_OTLP_CLIENT_KEY";
    bed.set_env("OTEL_BSP_SCHEDULE_DELAY", PROMPT);
    bed.write_policies(&[deny_ingress("b")]);
    bed.install(0, &[]);
    let (host, a) = (bed.lab.node(0), bed.lab.pod("x/a"));
    let b = bed.lab.pod("x/b").addr_v4(80);
    for (to, authority, shown, warned) in [
        (jaeger.grpc(), "ca", "client", None),
        (jaeger.http(), "ca", "client", None),
        (jaeger.grpc(), "stranger", "client", Some("UnknownIssuer")),
        (jaeger.http(), "stranger", "client", Some("UnknownIssuer")),
        // Its refusal can be lost with the connection.
        (jaeger.grpc(), "ca", "stranger", Some("WARN")),
        (jaeger.http(), "ca", "stranger", Some("WARN")),
    ] {
        let case = format!("{to} {authority} {shown}");
        bed.set_env(ca, certificates.certificate(authority));
        bed.set_env(own, certificates.certificate(shown));
        bed.set_env(key, certificates.key(shown));
        let before = jaeger.spans("deny").len();
        bed.start(0, &["--otlp-endpoint", &to, "--deny", "reject"]);
        assert!(a.connect(b, DEADLINE).unwrap().into_stream().is_err());
        let gone = [
            "portreeve_spans_dropped_total",
            "portreeve_spans_sent_total",
        ];
        let counts = if warned.is_none() { [0, 1] } else { [1, 0] };
        wait_until(DEADLINE * 2, format!("{case}: a span to go"), || {
            gone.map(|name| metric(&host, name)) == counts
        })
        .unwrap_or_else(|error| panic!("{error}\n{}", bed.logs()));
        let after = before + usize::from(warned.is_none());
        jaeger.spans_when("deny", |spans| spans.len() == after);
        let daemon = bed.daemon(0);
        let said = daemon.log();
        match warned {
            None => assert!(!said.contains("WARN"), "{case}: {said}"),
            Some(why) => assert!(said.contains(why), "{case}: {said}"),
        }
        daemon.child.terminate();
        daemon.child.wait(Duration::from_secs(5)).unwrap();
        std::fs::remove_file(bed.file(&format!("{}.log", host.name()))).unwrap();
    }
    bed.set_env(key, certificates.key("ca"));
    let refused = bed.run_command(0, &["--otlp-endpoint", &jaeger.grpc()]);
    let refused = refused.output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains(own), "{said}");
}

fn faulty_collector_delays_nothing_and_losses_are_counted() {
    const CONNECTIONS: u64 = 100;
    let mut bed = TestCluster::bare(small());
    let outside = bed.lab.outside();
    let (a, b) = (bed.lab.pod("x/a"), bed.lab.pod("x/b").addr_v4(80));
    bed.set_env("OTEL_BSP_SCHEDULE_DELAY", PROMPT);
    bed.set_env("OTEL_BSP_MAX_QUEUE_SIZE", "16");
    bed.set_env("OTEL_EXPORTER_OTLP_TIMEOUT", "500");
    bed.write_policies(&[allow_all()]);
    bed.install(0, &[]);
    for (port, behaviour, cause) in [
        (4001, Some(mute as fn(TcpStream)), "timeout"),
        (4002, Some(resetting as fn(TcpStream)), "refused"),
        (4003, None, "refused"),
    ] {
        let at = outside.addr_v4(port);
        if let Some(behaviour) = behaviour {
            collect(&outside, at, behaviour);
        }
        bed.start(0, &["--otlp-endpoint", &format!("http://{at}")]);
        for _ in 0..CONNECTIONS {
            let began = Instant::now();
            drop(connected(&a, b));
            assert!(began.elapsed() < SOON, "{cause}: {:?}", began.elapsed());
        }
        let host = bed.lab.node(0);
        let lost = |labels: &str| metric(&host, &format!("portreeve_spans_dropped_total{labels}"));
        wait_until(
            DEADLINE * 2,
            format!("{cause}: every span to be lost"),
            || lost("") == CONNECTIONS,
        )
        .unwrap_or_else(|error| panic!("{error}: {}\n{}", lost(""), bed.logs()));
        assert!(lost(&format!("{{reason=\"{cause}\"}}")) > 0, "{cause}");
        assert_eq!(metric(&host, "portreeve_spans_sent_total"), 0);
        let daemon = bed.daemon(0);
        let said = daemon.log();
        let warned = said.matches("spans do not reach the collector").count();
        assert_eq!(warned, 1, "{said}");
        daemon.child.terminate();
        daemon.child.wait(Duration::from_secs(5)).unwrap();
        std::fs::remove_file(bed.file(&format!("{}.log", host.name()))).unwrap();
    }
}

/// A collector that does with each connection what it likes.
fn collect(host: &Host, at: SocketAddr, behaviour: fn(TcpStream)) {
    let listener: TcpListener = host.listen(at).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || behaviour(stream));
        }
    });
}

/// Reads all and never answers.
fn mute(mut stream: TcpStream) {
    let mut bytes = [0; 4096];
    while stream.read(&mut bytes).is_ok_and(|read| read > 0) {}
}

fn resetting(stream: TcpStream) {
    SockRef::from(&stream)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
}
