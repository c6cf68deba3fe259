//! An API server for tests: lists, streamed lists, watches, and every way in which they go wrong.
//!
//! Speaks just enough HTTP/1.1 itself, so that a test can cut a connection at any byte. Knows nothing
//! of what is under test.
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Objects of a page.
const PAGE: usize = 2;

/// The server; it ends with the test's runtime.
pub(crate) struct Api {
    pub(crate) address: SocketAddr,
    state: Arc<Mutex<ServerState>>,
    /// Changes whenever the state does.
    changes: watch::Sender<u64>,
}

pub(crate) struct ServerState {
    version: u64,
    /// Watches from before this version are gone (410).
    pub(crate) floor: u64,
    objects: BTreeMap<(&'static str, String), Value>,
    log: Vec<(u64, &'static str, &'static str, Value)>,
    /// Text to be sent on watches of a resource as it is.
    raw: HashMap<&'static str, String>,
    /// Whether lists can be streamed; `None`: the server does not know the parameter.
    pub(crate) streams: Option<bool>,
    /// The status with which streamed lists are refused, if they are.
    pub(crate) stream_refusal: u16,
    /// `apiVersion`, kind and resource of foreign objects, and how many there are; `None`: listing them is forbidden.
    pub(crate) others: Vec<(&'static str, &'static str, &'static str, Option<usize>)>,
    /// Answers every request for a resource with this status.
    pub(crate) refuse: HashMap<&'static str, u16>,
    pub(crate) requests: Vec<String>,
    pub(crate) events: Vec<Value>,
    up: bool,
    /// Connections of another epoch are cut.
    epoch: u64,
}

const RESOURCES: [&str; 4] = ["pods", "namespaces", "nodes", "networkpolicies"];

impl Api {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let state = Arc::new(Mutex::new(ServerState {
            version: 10,
            floor: 0,
            objects: BTreeMap::new(),
            log: Vec::new(),
            raw: HashMap::new(),
            streams: Some(true),
            stream_refusal: 422,
            others: Vec::new(),
            refuse: HashMap::new(),
            requests: Vec::new(),
            events: Vec::new(),
            up: true,
            epoch: 0,
        }));
        let changes = watch::Sender::new(0);
        let (shared, changed) = (Arc::clone(&state), changes.subscribe());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (state, changed) = (Arc::clone(&shared), changed.clone());
                tokio::spawn(async move {
                    // A connection that ends early is what many tests are about.
                    let _ = serve(stream, &state, changed).await;
                });
            }
        });
        Self {
            address,
            state,
            changes,
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, ServerState> {
        lock(&self.state)
    }

    fn notify(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// Creates or replaces an object.
    pub(crate) fn put(&self, resource: &'static str, mut object: Value) {
        {
            let mut state = self.state();
            state.version += 1;
            let version = state.version;
            object["metadata"]["resourceVersion"] = version.to_string().into();
            let key = (resource, name(&object));
            let old = state.objects.insert(key, object.clone());
            let what = if old.is_some() { "MODIFIED" } else { "ADDED" };
            state.log.push((version, resource, what, object));
        }
        self.notify();
    }

    pub(crate) fn delete(&self, resource: &'static str, key: &str) {
        {
            let mut state = self.state();
            state.version += 1;
            let version = state.version;
            let mut object = state
                .objects
                .remove(&(resource, key.to_owned()))
                .expect("it exists");
            object["metadata"]["resourceVersion"] = version.to_string().into();
            state.log.push((version, resource, "DELETED", object));
        }
        self.notify();
    }

    /// Sends `text` as a line on the watches of a resource, once.
    pub(crate) fn send_raw(&self, resource: &'static str, text: &str) {
        self.state().raw.insert(resource, format!("{text}\n"));
        self.notify();
    }

    /// Cuts every connection.
    pub(crate) fn cut(&self) {
        self.state().epoch += 1;
        self.notify();
    }

    /// Cuts every connection, and each new one until it is back up.
    pub(crate) fn set_up(&self, up: bool) {
        self.state().up = up;
        self.cut();
    }

    /// Requests whose line has all of `words`.
    pub(crate) fn request_count(&self, words: &[&str]) -> usize {
        let state = self.state();
        let requests = state.requests.iter();
        requests
            .filter(|line| words.iter().all(|word| line.contains(word)))
            .count()
    }
}

fn lock(state: &Mutex<ServerState>) -> MutexGuard<'_, ServerState> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn name(object: &Value) -> String {
    let metadata = &object["metadata"];
    match metadata["namespace"].as_str() {
        Some(namespace) => format!("{namespace}/{}", metadata["name"].as_str().unwrap_or("")),
        None => metadata["name"].as_str().unwrap_or("").to_owned(),
    }
}

async fn serve(
    mut stream: TcpStream,
    state: &Mutex<ServerState>,
    mut changed: watch::Receiver<u64>,
) -> std::io::Result<()> {
    let epoch = lock(state).epoch;
    let alive = |state: &Mutex<ServerState>| {
        let state = lock(state);
        state.up && state.epoch == epoch
    };
    while alive(state) {
        let Some((line, body)) = request(&mut stream).await? else {
            return Ok(());
        };
        if !alive(state) {
            return Ok(());
        }
        let target = line.split(' ').nth(1).unwrap_or("").to_owned();
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        let resource = RESOURCES
            .into_iter()
            .find(|resource| path.ends_with(resource));
        let response = {
            let mut state = lock(state);
            state.requests.push(line.clone());
            match state.discovery(path) {
                Some((code, value)) => Response::Whole(code, value),
                None => state.respond(resource, query, &body),
            }
        };
        match response {
            Response::Whole(code, value) => whole(&mut stream, code, &value).await?,
            Response::Watch(resource, version, listing) => {
                let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
                stream.write_all(head.as_bytes()).await?;
                for line in listing {
                    chunk(&mut stream, &format!("{line}\n")).await?;
                }
                let mut at = version;
                while alive(state) {
                    let lines = lock(state).new_lines(resource, &mut at);
                    for line in lines {
                        chunk(&mut stream, &line).await?;
                    }
                    if changed.changed().await.is_err() {
                        return Ok(());
                    }
                }
            }
        }
    }
    Ok(())
}

enum Response {
    Whole(u16, Value),
    /// Of a resource, from a version on, after these events.
    Watch(&'static str, u64, Vec<Value>),
}

impl ServerState {
    /// The discovery response for foreign kinds.
    fn discovery(&self, path: &str) -> Option<(u16, Value)> {
        let group = |version: &str| version.split('/').next().unwrap_or("").to_owned();
        if path == "/apis" {
            let groups = self.others.iter().map(|(version, ..)| {
                let versions = json!({"groupVersion": version, "version": version.rsplit('/').next()});
                json!({"name": group(version), "versions": [versions], "preferredVersion": versions})
            });
            return Some((
                200,
                json!({"kind": "APIGroupList", "groups": groups.collect::<Vec<_>>()}),
            ));
        }
        let path = path.strip_prefix("/apis/")?;
        let of_group = self.others.iter().filter(|(version, ..)| *version == path);
        let resources: Vec<Value> = of_group
            .map(|(_, kind, name, _)| {
                json!({"name": name, "singularName": "", "namespaced": true, "kind": kind, "verbs": ["list"]})
            })
            .collect();
        if !resources.is_empty() {
            return Some((
                200,
                json!({"kind": "APIResourceList", "groupVersion": path, "resources": resources}),
            ));
        }
        let mut others = self.others.iter();
        let (.., count) =
            others.find(|(version, _, name, _)| format!("{version}/{name}") == path)?;
        Some(match count {
            Some(count) => {
                let items: Vec<_> = (0..*count)
                    .map(|it| json!({"metadata": {"name": it.to_string()}}))
                    .collect();
                (
                    200,
                    json!({"metadata": {"resourceVersion": "1"}, "items": items}),
                )
            }
            None => (
                403,
                json!({"kind": "Status", "status": "Failure", "code": 403, "message": "no"}),
            ),
        })
    }

    fn respond(&mut self, resource: Option<&'static str>, query: &str, body: &[u8]) -> Response {
        let query: HashMap<&str, &str> = query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .collect();
        let status = |code: u16, message: &str| {
            let status =
                json!({"kind": "Status", "status": "Failure", "code": code, "message": message});
            Response::Whole(code, status)
        };
        let Some(resource) = resource else {
            let event: Value = serde_json::from_slice(body).unwrap_or_default();
            let name = |event: &Value| event["metadata"]["name"].clone();
            if self.events.iter().any(|known| name(known) == name(&event)) {
                return status(409, "exists");
            }
            self.events.push(event.clone());
            return Response::Whole(201, event);
        };
        if let Some(code) = self.refuse.get(resource) {
            return status(*code, "refused by the test");
        }
        let all: Vec<Value> = self
            .objects
            .iter()
            .filter(|((of, _), _)| *of == resource)
            .map(|(_, object)| object.clone())
            .collect();
        if query.get("watch") != Some(&"true") {
            let at: usize = query
                .get("continue")
                .and_then(|at| at.parse().ok())
                .unwrap_or(0);
            let items: Vec<_> = all.iter().skip(at).take(PAGE).collect();
            let more = (at + PAGE < all.len()).then(|| (at + PAGE).to_string());
            let metadata = json!({"resourceVersion": self.version.to_string(), "continue": more});
            return Response::Whole(200, json!({"metadata": metadata, "items": items}));
        }
        if query.get("sendInitialEvents") == Some(&"true") {
            return match self.streams {
                Some(true) => {
                    let mut lines: Vec<_> = all
                        .iter()
                        .map(|object| json!({"type": "ADDED", "object": object}))
                        .collect();
                    lines.push(bookmark(self.version, true));
                    Response::Watch(resource, self.version, lines)
                }
                Some(false) => status(self.stream_refusal, "sendInitialEvents is forbidden"),
                None => {
                    let lines = all
                        .iter()
                        .map(|object| json!({"type": "ADDED", "object": object}));
                    Response::Watch(resource, self.version, lines.collect())
                }
            };
        }
        let version: u64 = query
            .get("resourceVersion")
            .and_then(|v| v.parse().ok())
            .unwrap_or(0);
        if version < self.floor {
            return status(410, "too old resource version");
        }
        Response::Watch(resource, version, Vec::new())
    }

    fn new_lines(&mut self, resource: &'static str, at: &mut u64) -> Vec<String> {
        let mut lines: Vec<String> = self.raw.remove(resource).into_iter().collect();
        for (version, of, what, object) in &self.log {
            if *of == resource && version > at {
                lines.push(format!("{}\n", json!({"type": what, "object": object})));
            }
        }
        *at = self.version;
        lines.push(format!("{}\n", bookmark(self.version, false)));
        lines
    }
}

fn bookmark(version: u64, end: bool) -> Value {
    let mut annotations = serde_json::Map::new();
    if end {
        annotations.insert("k8s.io/initial-events-end".to_owned(), "true".into());
    }
    let metadata = json!({"resourceVersion": version.to_string(), "annotations": annotations});
    json!({"type": "BOOKMARK", "object": {"kind": "X", "apiVersion": "v1", "metadata": metadata}})
}

/// The request line and the body; `None` at the end of the connection.
async fn request(stream: &mut TcpStream) -> std::io::Result<Option<(String, Vec<u8>)>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if stream.read(&mut byte).await? == 0 {
            return Ok(None);
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.trim().parse().ok())?
    });
    let mut body = vec![0; length.unwrap_or(0)];
    stream.read_exact(&mut body).await?;
    Ok(Some((head.lines().next().unwrap_or("").to_owned(), body)))
}

async fn whole(stream: &mut TcpStream, code: u16, value: &Value) -> std::io::Result<()> {
    let body = value.to_string();
    let head = format!(
        "HTTP/1.1 {code} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await
}

async fn chunk(stream: &mut TcpStream, text: &str) -> std::io::Result<()> {
    stream
        .write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes())
        .await
}
