//! TCP connections to the servers of the lab's pods.
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use lab::Host;
use lab::traffic::{Greeting, greeting};

use crate::DEADLINE;

/// The name of the server at `to`, and the client address that it sees.
#[track_caller]
pub fn greeted(from: &Host, to: SocketAddr) -> Greeting {
    let outcome = from.connect(to, DEADLINE).unwrap();
    let stream = outcome
        .into_stream()
        .unwrap_or_else(|error| panic!("{to}: {error}"));
    greeting(&stream, DEADLINE).unwrap()
}

/// Says `text` and expects it back; the greeting has been read.
#[track_caller]
pub fn echoes(mut stream: &TcpStream, text: &str) {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(String::from_utf8_lossy(&back), text);
}

/// A connection that has been greeted.
#[track_caller]
pub fn connected(from: &Host, to: SocketAddr) -> TcpStream {
    let outcome = from.connect(to, DEADLINE).unwrap();
    let stream = outcome
        .into_stream()
        .unwrap_or_else(|error| panic!("{to}: {error}"));
    greeting(&stream, DEADLINE).unwrap();
    stream
}
