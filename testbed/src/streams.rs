//! Traffic that runs on threads beside a test until it is asked to stop.
use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use lab::traffic::bulk;
use lab::{Host, Kind};

/// Stops the threads beside a test, even if the test fails.
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sends `size` bytes of bulk data with a pause after each write until `stop`, and ends the stream. Returns how many
/// bytes it has sent.
pub fn send_until(mut to: &TcpStream, stop: &AtomicBool, size: usize, pause: Duration) -> u64 {
    let mut buffer = vec![0; size];
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        bulk::fill(sent, &mut buffer);
        to.write_all(&buffer).unwrap();
        sent += buffer.len() as u64;
        // All at full speed would leave nothing for the daemons.
        thread::sleep(pause);
    }
    to.shutdown(Shutdown::Write).unwrap();
    sent
}

/// Receives bulk data up to the end of the stream; every byte must be right. Returns how many there were.
pub fn receive_all(from: &TcpStream) -> u64 {
    let seen = bulk::receive(from).unwrap();
    assert_eq!(seen.wrong_at(), None, "{seen}");
    seen.count()
}

/// Dials a denied server, for `patience` each time, until `stop`; it must never answer. Returns how often.
pub fn dial_denied(from: &Host, to: SocketAddr, patience: Duration, stop: &AtomicBool) -> usize {
    let mut times = 0;
    while !stop.load(Ordering::Relaxed) {
        let outcome = from.connect(to, patience).unwrap();
        assert_eq!(outcome.kind(), Kind::TimedOut);
        times += 1;
    }
    times
}
