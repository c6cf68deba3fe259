//! A headless Chromium on a node, driven by WebDriver (<https://www.w3.org/TR/webdriver2/>).
//!
//! Owns the browser's process and its profile. Knows no page.
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::process::Stdio;
use std::time::Duration;

use lab::{Child, Host, wait_for};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A browser on two shared cores takes its time to start.
const PATIENCE: Duration = Duration::from_secs(60);

/// A browser window; dropped, it is closed.
pub struct Browser {
    node: Host,
    port: u16,
    session: String,
    _driver: Child,
    _profile: TempDir,
}

impl Browser {
    /// Opens a window of this size on a node.
    pub fn on(node: &Host, width: u32, height: u32) -> Self {
        let profile = TempDir::new().unwrap();
        // The browser is the driver's child: in a pid namespace of their own neither outlives us.
        let mut command = node.command("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
        command.args(["chromedriver", "--port=0"]);
        command.env("HOME", profile.path());
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut driver = command.spawn().unwrap();
        let port = port_of(&mut driver);
        let flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
        ];
        let mut arguments: Vec<String> = flags.map(str::to_owned).into();
        arguments.push(format!("--window-size={width},{height}"));
        arguments.push(format!("--user-data-dir={}", profile.path().display()));
        let capabilities = json!({ "capabilities": { "alwaysMatch": {
            "goog:chromeOptions": { "binary": "/usr/bin/chromium", "args": arguments },
        } } });
        let mut browser = Self {
            node: node.clone(),
            port,
            session: String::new(),
            _driver: driver,
            _profile: profile,
        };
        let session = browser.command("POST", "/session", &capabilities);
        browser.session = session["sessionId"].as_str().unwrap().to_owned();
        browser
    }

    /// Loads a page.
    pub fn open(&self, url: &str) {
        self.in_session("POST", "/url", &json!({ "url": url }));
    }

    /// What a script returns.
    pub fn run(&self, script: &str) -> Value {
        let script = json!({ "script": script, "args": [] });
        self.in_session("POST", "/execute/sync", &script)
    }

    /// Waits until a script returns something that is not false, null or empty, and returns that.
    #[track_caller]
    pub fn wait_for(&self, what: &str, script: &str) -> Value {
        let waited = wait_for(PATIENCE, what, || {
            let value = self.run(script);
            let nothing = [json!(null), json!(false), json!(""), json!([])];
            (!nothing.contains(&value)).then_some(value)
        });
        waited.unwrap_or_else(|error| {
            let page = self.run("return document.body.innerText");
            panic!("{error}\n{}", page.as_str().unwrap_or_default())
        })
    }

    /// The window as PNG.
    pub fn screenshot(&self) -> Vec<u8> {
        let text = self.in_session("GET", "/screenshot", &json!({}));
        from_base64(text.as_str().unwrap())
    }

    fn in_session(&self, method: &str, path: &str, body: &Value) -> Value {
        self.command(method, &format!("/session/{}{path}", self.session), body)
    }

    fn command(&self, method: &str, path: &str, body: &Value) -> Value {
        let answer = self.exchange(method, path, body);
        let answer =
            answer.unwrap_or_else(|| panic!("chromedriver does not answer {method} {path}"));
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert!(
            answer["value"]["error"].is_null(),
            "{method} {path}: {answer}"
        );
        answer["value"].clone()
    }

    fn exchange(&self, method: &str, path: &str, body: &Value) -> Option<String> {
        let body = if method == "POST" {
            body.to_string()
        } else {
            String::new()
        };
        let connect = || TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        let mut stream = self.node.run(connect).ok()?.ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).ok()?;
        // The driver leaves the connection open whatever it was asked for.
        let mut answer = BufReader::new(stream);
        let mut length = 0;
        loop {
            let mut line = String::new();
            answer.read_line(&mut line).ok()?;
            let line = line.trim_end().to_ascii_lowercase();
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().ok()?;
            } else if line.is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        answer.read_exact(&mut body).ok()?;
        String::from_utf8(body).ok()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let path = format!("/session/{}", self.session);
        let _ = self.exchange("DELETE", &path, &json!({}));
    }
}

/// The port that the driver says it has taken.
fn port_of(driver: &mut Child) -> u16 {
    let output = driver.take_stdout().unwrap();
    let mut lines = BufReader::new(output).lines().map_while(Result::ok);
    let port = lines.find_map(|line| {
        let (_, after) = line.split_once("successfully on port ")?;
        after.trim_end_matches('.').parse().ok()
    });
    // It writes no more to a closed pipe than to an open one.
    port.expect("chromedriver and chromium are needed; run `make test-prerequisites`")
}

/// RFC 4648, section 4.
fn from_base64(text: &str) -> Vec<u8> {
    let value = |byte: u8| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let text = text.trim_end_matches('=').as_bytes();
    let mut bytes = Vec::with_capacity(text.len() * 3 / 4);
    for chunk in text.chunks(4) {
        let bits = chunk
            .iter()
            .fold(0_u32, |bits, &byte| bits << 6 | u32::from(value(byte)));
        let whole = (bits << (6 * (4 - chunk.len()))).to_be_bytes();
        bytes.extend_from_slice(&whole[1..chunk.len()]);
    }
    bytes
}
