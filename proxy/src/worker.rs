//! One thread per core: its own runtime, queue, listener and relays.
pub(crate) mod accept;

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use kernel::nfqueue::Queue;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use socket2::SockRef;
use tokio::sync::{oneshot, watch};
use tokio::task::LocalSet;

use crate::enforcer::Enforcer;
use crate::gate::Gate;
use crate::handover::transfer::Relayed;
use crate::handover::{Outgoing, WorkerSockets};
use crate::tcp::connections::StageName;

use accept::Relays;

/// How long resetting connections may take when the daemon stops, or exporting them in a handover.
const STOP_WITHIN: Duration = Duration::from_secs(1);
/// How long a handover waits for pending upstream connects; the clients of the rest retransmit their SYNs.
const ANSWER_WITHIN: Duration = Duration::from_millis(50);

/// A worker whose queue is bound and that waits for its work.
pub(crate) struct Worker {
    work: oneshot::Sender<Work>,
    thread: JoinHandle<io::Result<()>>,
}

/// The initial work of a worker.
struct Work {
    listener: Option<std::net::TcpListener>,
    /// Connections that another daemon has left.
    left: Vec<Relayed>,
    /// Where it leaves connections for a daemon that takes over.
    outgoing: Arc<Outgoing>,
}

impl Worker {
    /// Starts worker `number` of `workers` on NFQUEUE `queue` and waits until the queue is bound, if it is not by
    /// this socket already.
    ///
    /// # Errors
    /// `EBUSY` if someone else has the queue, `EPERM` without `CAP_NET_ADMIN`; the errors of creating a thread.
    pub(crate) fn start(
        number: usize,
        workers: usize,
        queue: u16,
        bound: Option<OwnedFd>,
        enforcer: Arc<Enforcer>,
        stop: watch::Receiver<bool>,
    ) -> io::Result<Self> {
        let (work, given) = oneshot::channel();
        let (report, ready) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name(format!("worker-{number}"))
            .spawn(move || {
                keep_to_own_cores(number, workers);
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()?;
                let queue = {
                    let _guard = runtime.enter();
                    match bound {
                        Some(socket) => Queue::of(socket, queue),
                        None => Queue::bind(queue),
                    }
                };
                let queue = match queue {
                    Ok(queue) => queue,
                    Err(error) => {
                        let _ = report.send(Err(error));
                        return Ok(());
                    }
                };
                let _ = report.send(Ok(()));
                LocalSet::new().block_on(&runtime, serve(queue, given, number, enforcer, stop))
            })?;
        match ready.recv() {
            Ok(Ok(())) => Ok(Self { work, thread }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("the worker ended before it had its queue")),
        }
    }

    /// Hands the worker its listener, if there is a proxy, and what was `left` for it: from now on connections come.
    pub(crate) fn listen(
        self,
        listener: Option<std::net::TcpListener>,
        left: Vec<Relayed>,
        outgoing: Arc<Outgoing>,
    ) -> JoinHandle<io::Result<()>> {
        // It fails only if the worker is gone; its thread's result says why.
        let _ = self.work.send(Work {
            listener,
            left,
            outgoing,
        });
        self.thread
    }
}

/// Pins this thread to the cores whose packets come to its queue. So a sender on a core wakes the
/// worker there: the packet is in that core's cache, and no other core has to wake up.
fn keep_to_own_cores(number: usize, workers: usize) {
    let this_thread = Pid::from_raw(0);
    let Ok(allowed) = sched_getaffinity(this_thread) else {
        return;
    };
    let mut own = CpuSet::new();
    for core in cores_of_queue(number, workers) {
        if allowed.is_set(core).unwrap_or(false) {
            // Within the set's size, as the iterator is.
            let _ = own.set(core);
        }
    }
    // This fails if the container may use none of them: then the thread runs on any core.
    let _ = sched_setaffinity(this_thread, &own);
}

/// The cores whose packets the kernel puts into queue `number` of `queues` (`NFQ_FLAG_CPU_FANOUT`).
fn cores_of_queue(number: usize, queues: usize) -> impl Iterator<Item = usize> {
    (number..CpuSet::count()).step_by(queues)
}

/// Prefers the connections whose SYN arrived on core `number`: this worker also has that core's queue, so
/// the upstream waits in this worker. Linux 6.2; without it any worker may get any connection.
fn prefer_own_core(listener: &std::net::TcpListener, number: usize) {
    let _ = SockRef::from(listener).set_cpu_affinity(number);
}

/// Runs until stopped, then hands live connections over to the new daemon; without one it resets
/// them: a plain close would look like a complete stream.
async fn serve(
    queue: Queue,
    work: oneshot::Receiver<Work>,
    number: usize,
    enforcer: Arc<Enforcer>,
    mut stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let Ok(Work {
        listener,
        left,
        outgoing,
    }) = work.await
    else {
        return Ok(());
    };
    listener.iter().for_each(|it| prefer_own_core(it, number));
    let listener = listener
        .map(tokio::net::TcpListener::from_std)
        .transpose()?;
    let relays = Rc::new(Relays {
        enforcer: Arc::clone(&enforcer),
        outgoing,
        worker: number,
    });
    for relayed in left {
        accept::resume(relayed, &relays);
    }
    let gate = Gate::new(queue, Arc::clone(&enforcer), number);
    let result = tokio::select! {
        biased;
        _ = stop.wait_for(|stop| *stop) => Ok(()),
        result = Rc::clone(&gate).serve() => result,
        () = accept::serve(listener.as_ref(), &relays) => Ok(()),
    };
    if enforcer.draining.has_begun() {
        return leave(&gate, listener, &relays).await;
    }
    enforcer.connections.end_all();
    // Their tasks run on this very thread; each takes itself out of the table once it is done. Past the
    // deadline the rest is closed by the kernel.
    within(STOP_WITHIN, || enforcer.connections.len() == 0).await;
    result
}

/// Hands everything over to the new daemon.
async fn leave(
    gate: &Gate,
    listener: Option<tokio::net::TcpListener>,
    relays: &Relays,
) -> io::Result<()> {
    let Relays {
        enforcer, outgoing, ..
    } = relays;
    let flows = &enforcer.connections;
    outgoing.gate_stopped();
    let gates = enforcer.queues.len();
    let answered = || outgoing.gates_stopped() == gates && !flows.has_any(&[StageName::Held]);
    within(ANSWER_WITHIN, answered).await;
    flows.let_go();
    let at_work = [StageName::Held, StageName::Live];
    within(STOP_WITHIN, || !flows.has_any(&at_work)).await;
    let (number, queue) = gate.leave()?;
    let listener = listener
        .map(tokio::net::TcpListener::into_std)
        .transpose()?;
    let listener = listener.map(Into::into);
    outgoing.worker(number, WorkerSockets { queue, listener });
    Ok(())
}

/// Waits until `done`, for at most `limit`.
async fn within(limit: Duration, done: impl Fn() -> bool) {
    let look = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    let _ = tokio::time::timeout(limit, look).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The cores that a thread may run on after it was asked to keep to those of a queue.
    fn kept(number: usize, workers: usize) -> CpuSet {
        let thread = std::thread::spawn(move || {
            keep_to_own_cores(number, workers);
            sched_getaffinity(Pid::from_raw(0)).unwrap()
        });
        thread.join().unwrap()
    }

    #[test]
    fn nfqueue_fanout_maps_each_core_to_one_queue() {
        for (number, queues, expected) in [(0, 1, [0, 1, 2]), (1, 2, [1, 3, 5]), (2, 4, [2, 6, 10])]
        {
            let cores: Vec<_> = cores_of_queue(number, queues).take(3).collect();
            assert_eq!(cores, expected, "queue {number} of {queues}");
        }
    }

    #[test]
    fn worker_is_pinned_to_allowed_queue_cores() {
        let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
        assert_eq!(kept(0, 1), allowed, "one worker has all");
        let mut cores = (0..CpuSet::count()).filter(|core| allowed.is_set(*core).unwrap());
        let first = cores.next().unwrap();
        let alone = kept(first, CpuSet::count());
        let cores = (0..CpuSet::count()).filter(|core| alone.is_set(*core).unwrap());
        assert_eq!(cores.collect::<Vec<_>>(), [first]);
    }

    #[test]
    fn worker_without_allowed_cores_runs_on_any() {
        let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let none = (0..CpuSet::count()).find(|core| !allowed.is_set(*core).unwrap());
        assert_eq!(kept(none.unwrap(), CpuSet::count()), allowed);
    }
}
