//! Keeps unread bytes within their bounds, in a thread of its own, so that memory does not grow during a long change of
//! policy.
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use kernel::sys::{self, Memory};
use tokio::sync::watch;
use tracing::warn;

use crate::enforcer::Enforcer;
use crate::tcp::connections::Connection;
use crate::tcp::unread::{Holding, Use};

/// The shortest and the longest pause between two measurements of busy streams. In between, measuring takes a twentieth
/// of the time at most.
const LOOK_EVERY: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(100)];
/// From this many busy streams on, the pause can be shorter than the longest.
const MANY: usize = 16;
/// How often resets are logged at most.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Keeps the bounds until it is stopped.
///
/// # Errors
/// If the thread cannot be started.
pub(super) fn start(enforcer: Arc<Enforcer>, stopped: watch::Receiver<bool>) -> anyhow::Result<()> {
    let keep = move || {
        let mut log = Log::default();
        let [soon, late] = LOOK_EVERY;
        let (mut pressed, mut pause) = (0, late);
        // If the sender is gone, the daemon has ended.
        while !*stopped.borrow() && stopped.has_changed().is_ok() {
            thread::sleep(pause);
            let began = Instant::now();
            if pressed > 0 || !enforcer.unread.is_idle() {
                pressed = look(&enforcer, &mut log);
            }
            pause = match pressed {
                0..MANY => late,
                _ => (began.elapsed() * 20).clamp(soon, late),
            };
        }
    };
    let thread = thread::Builder::new().name("reclaim".to_owned());
    thread
        .spawn(keep)
        .context("the thread that bounds unread bytes cannot be started; see the process limits")?;
    Ok(())
}

/// Measures every busy stream, and resets those beyond the bounds. Returns how many streams were busy.
fn look(enforcer: &Enforcer, log: &mut Log) -> usize {
    let now = Instant::now();
    let pressed = enforcer.connections.pressed();
    let measured: Vec<_> = pressed
        .iter()
        .filter_map(|flow| Some((flow, measure(enforcer, flow, now)?)))
        .collect();
    let uses: Vec<_> = measured.iter().map(|(_, taken)| *taken).collect();
    let gone = enforcer.unread.give_way(&uses);
    for at in &gone {
        measured[*at].0.give_way();
    }
    let bytes: usize = uses.iter().map(|it| it.bytes).sum();
    let freed: usize = gone.iter().map(|at| uses[*at].bytes).sum();
    enforcer.metrics.unread(bytes - freed, gone.len());
    log.note(gone.iter().map(|at| &**measured[*at].0), now);
    enforcer.unread.forget_gone();
    pressed.len()
}

/// Measures a stream, and adapts its buffers to its share.
fn measure(enforcer: &Enforcer, flow: &Connection, now: Instant) -> Option<Use> {
    let legs = flow.legs()?;
    let stream = &flow.holding;
    let presses = stream.pressing();
    if presses == [false; 2] {
        stream.restore();
        return None;
    }
    let (source, held) = stream.source_and_bytes()?;
    let memory =
        [&legs.client, &legs.server].map(|leg| sys::socket_memory(leg).unwrap_or_default());
    match enforcer.unread.share(stream) {
        None => stream.free([&legs.client, &legs.server]),
        Some(share) => {
            for direction in [0, 1] {
                let [from, to] = legs.of(direction);
                let buffer = memory[direction].receive_buffer;
                if presses[direction] && Holding::is_outgrown(buffer, share) {
                    stream.reduce(from, to, share);
                }
            }
        }
    }
    let bytes: usize = memory.iter().map(|it| it.received + it.sent).sum();
    let sent = memory.iter().map(|it: &Memory| it.sent as u64).sum::<u64>();
    let moved = [&flow.moved.sent, &flow.moved.received];
    let moved = moved.map(|moved| moved.load(Ordering::Relaxed));
    let sign = moved
        .iter()
        .fold(sent, |sign, moved| sign.wrapping_add(*moved));
    Some(Use {
        source,
        server: flow.key.server.ip(),
        bytes: bytes + held,
        stalled: stream.stalled(sign, now),
    })
}

/// Logs resets from time to time.
#[derive(Default)]
struct Log {
    last: Option<Instant>,
    since: usize,
}

impl Log {
    fn note<'a>(&mut self, gone: impl Iterator<Item = &'a Connection>, now: Instant) {
        let mut one = None;
        for flow in gone {
            self.since += 1;
            one = Some(flow);
        }
        let due = self.last.is_none_or(|last| now - last >= LOG_EVERY);
        if let (Some(flow), true) = (one, due) {
            let streams = self.since;
            warn!(
                streams,
                client = %flow.key.client,
                server = %flow.key.server,
                "streams were reset, this one among them: their source has more unread bytes than its share (--max-unread)"
            );
            (self.last, self.since) = (Some(now), 0);
        }
    }
}
