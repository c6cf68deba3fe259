//! Starts the workers: queues, listeners, and connections that another daemon has left.
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use tokio::sync::watch;
use tracing::info;

use crate::enforcer::Enforcer;
use crate::handover::transfer;
use crate::handover::{Outgoing, State};
use crate::worker::Worker;
use crate::worker::accept;

use super::settings::RunArgs;
use super::shutdown::Thread;

/// Binds every queue before the first listener: a SYN that finds a listener must find its queue. Goes on with the
/// connections of `state`, none of which moves a byte before everything is in place. The state is another daemon's,
/// which was asked at `since`, or this daemon's own.
///
/// # Errors
/// If a queue or the port is in use, or the daemon that left `state` no longer waits.
pub(super) fn start_workers(
    args: &RunArgs,
    enforcer: &Arc<Enforcer>,
    outgoing: &Arc<Outgoing>,
    stopped: &watch::Receiver<bool>,
    state: Option<State>,
    since: Option<Instant>,
) -> anyhow::Result<Vec<Thread>> {
    let settings = &args.redirect;
    let mut workers = Vec::new();
    let mut listeners = Vec::new();
    let count = settings.queue_count();
    let relieves = state.is_some();
    let mut state = state.unwrap_or_default();
    for number in 0..count {
        let queue = settings.queue + number;
        let sockets = state.workers.remove(&queue);
        let (bound, listener) = sockets
            .map(|sockets| (sockets.queue, sockets.listener))
            .unzip();
        listeners.push(listener.flatten());
        let worker = Worker::start(number.into(), count.into(), queue, bound, Arc::clone(enforcer), stopped.clone())
            .with_context(|| format!("cannot bind NFQUEUE {queue}: is another daemon running, or another program on that queue? (--queue chooses others)"))?;
        workers.push(worker);
    }
    let port = settings.proxy_port;
    let listen = |left: Option<OwnedFd>| match left {
        _ if !settings.tcp.has_proxy() => Ok(None),
        Some(listener) => Ok(Some(listener.into())),
        None => accept::listen(port).map(Some),
    };
    let listeners = listeners.into_iter().map(listen).collect::<Result<Vec<_>, _>>()
        .with_context(|| format!("cannot listen on port {port}: is it in use? (--proxy-port chooses another, for iptables-init too)"))?;
    let mut shares: Vec<Vec<_>> = workers.iter().map(|_| Vec::new()).collect();
    let left = state.take_connections();
    let connections = left.len();
    let left = transfer::adopt(enforcer, left);
    for (turn, relayed) in left.into_iter().enumerate() {
        shares[turn % workers.len()].push(relayed);
    }
    state.begin(connections)?;
    match since {
        Some(since) if relieves => {
            let milliseconds = since.elapsed().as_millis();
            info!(
                connections,
                milliseconds, "took over from the previous daemon"
            );
        }
        None => info!(
            connections,
            "goes on with the connections that no other daemon took over"
        ),
        Some(_) => {}
    }
    let given = listeners.into_iter().zip(shares);
    let begin = |(worker, (listener, share)): (Worker, _)| {
        worker.listen(listener, share, Arc::clone(outgoing))
    };
    Ok(workers.into_iter().zip(given).map(begin).collect())
}
