//! Connects every pod to every pod and keeps the results with the expected verdicts.
//!
//! Expected verdicts come from the policy crate, not the daemons, so both are independent.
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use lab::traffic::{connect_all, greeting};
use lab::{Dial, Kind, Outcome};
use policy::{Cluster, OwnNode, Protocol};

use super::testbed::Testbed;

/// Timeout of a dial that policy denies. A SYN is retransmitted after a second.
const SILENCE: Duration = Duration::from_millis(1000);
/// How long a dial that policy allows may take; milliseconds, unless the machine is very busy.
const ANSWER: Duration = Duration::from_secs(5);
/// Up to this many connections, all are tried again after a change.
const WHOLE: usize = 4000;
/// Maximum number of changed connections that are dialled repeatedly until they match the policy.
const SAMPLE: usize = 200;
/// Sockets at a time: each has two ends in this process.
const AT_ONCE: usize = 2000;

/// How a pod is addressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// By its own address.
    Pod,
    /// By the ClusterIP of its Service.
    Service,
}

/// One connection to be tried. Pods are named by their place in the list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) port: u16,
    pub(super) route: Route,
    /// IPv4: 0, IPv6: 1.
    family: usize,
    /// Whether policy allows it.
    pub(super) asked: bool,
}

/// What a client saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// The right pod answered, and knew the client by its own address.
    Answered(Duration),
    /// Nothing came back.
    Silence,
    /// Anything else, in words.
    Other(String),
}

/// All connections of one round.
pub(super) struct Survey {
    pub(super) questions: Vec<Question>,
    /// In the order of the questions.
    pub(super) seen: Vec<Seen>,
}

impl Question {
    /// All connections with their expected verdicts, in the order of `from`, then `to`.
    pub(super) fn all(testbed: &Testbed, cluster: &Cluster) -> Vec<Self> {
        let hosts: Vec<_> = testbed
            .pods
            .iter()
            .map(|pod| testbed.lab.pod(&pod.key()))
            .collect();
        let mut questions = Vec::new();
        for (from, source) in hosts.iter().enumerate() {
            for (to, pod) in testbed.pods.iter().enumerate() {
                for (port, family) in pod.ports.iter().flat_map(|port| [(*port, 0), (*port, 1)]) {
                    let party = |address: IpAddr| cluster.party(address);
                    let asked = policy::allows(
                        party(source.addresses()[family]),
                        party(hosts[to].addresses()[family]),
                        Some(port),
                        Protocol::Tcp,
                        OwnNode::Allow,
                    );
                    questions.extend([Route::Pod, Route::Service].map(|route| Self {
                        from,
                        to,
                        port,
                        route,
                        family,
                        asked,
                    }));
                }
            }
        }
        questions
    }

    /// Whether this is the same connection, regardless of the verdict.
    pub(super) fn same(&self, other: &Self) -> bool {
        (self.from, self.to, self.port, self.family)
            == (other.from, other.to, other.port, other.family)
            && self.route == other.route
    }

    fn dial(&self, testbed: &Testbed) -> Dial {
        let (from, to) = (testbed.pods[self.from].key(), testbed.pods[self.to].key());
        let address = match self.route {
            Route::Pod => testbed.lab.pod(&to).addrs(self.port)[self.family],
            Route::Service => testbed.lab.service(&to).addrs(self.port)[self.family],
        };
        Dial::new(&testbed.lab.pod(&from), address)
    }

    /// `x/a -> y/b:80 through its Service, IPv6`.
    pub(super) fn describe(&self, testbed: &Testbed) -> String {
        let (from, to) = (testbed.pods[self.from].key(), testbed.pods[self.to].key());
        let route = match self.route {
            Route::Pod => "by its address",
            Route::Service => "through its Service",
        };
        let family = ["IPv4", "IPv6"][self.family];
        format!("{from} → {to}:{} {route}, {family}", self.port)
    }

    fn judge(&self, testbed: &Testbed, outcome: Outcome) -> Seen {
        let (latency, kind) = (outcome.latency(), outcome.kind());
        match (outcome, latency) {
            (Outcome::Connected { stream, .. }, Some(latency)) => match greeting(&stream, ANSWER) {
                Ok(greeting) => {
                    let (from, to) = (&testbed.pods[self.from], &testbed.pods[self.to]);
                    let client = testbed.lab.pod(&from.key()).addresses()[self.family];
                    // Through its own Service a pod is masqueraded to its node's address (hairpin).
                    let hidden = self.from == self.to && self.route == Route::Service;
                    if greeting.server != to.key() {
                        Seen::Other(format!("{} answered", greeting.server))
                    } else if !hidden && greeting.client.ip() != client {
                        Seen::Other(format!("was seen as {}", greeting.client.ip()))
                    } else {
                        Seen::Answered(latency)
                    }
                }
                Err(error) => Seen::Other(format!("connected, then {error}")),
            },
            _ if kind == Kind::TimedOut => Seen::Silence,
            (other, _) => Seen::Other(other.to_string()),
        }
    }
}

impl Survey {
    /// Opens every connection, as many at once as descriptors allow.
    ///
    /// # Errors
    /// If sockets cannot be made.
    pub(super) fn take(testbed: &Testbed, questions: Vec<Question>) -> io::Result<Self> {
        let mut seen = Vec::with_capacity(questions.len());
        for batch in questions.chunks(at_once()) {
            seen.extend(dial(testbed, batch, ANSWER, SILENCE)?);
        }
        Ok(Self { questions, seen })
    }

    /// All questions with their answers.
    pub(super) fn answers(&self) -> impl Iterator<Item = (&Question, &Seen)> {
        self.questions.iter().zip(&self.seen)
    }

    /// The questions and answers of one pair of pods.
    pub(super) fn of_pair(
        &self,
        from: usize,
        to: usize,
    ) -> impl Iterator<Item = (&Question, &Seen)> {
        // All questions are in the order of their pairs.
        let first = self
            .questions
            .partition_point(|q| (q.from, q.to) < (from, to));
        let end = self
            .questions
            .partition_point(|q| (q.from, q.to) <= (from, to));
        self.questions[first..end]
            .iter()
            .zip(&self.seen[first..end])
    }

    /// Those that differ from policy.
    pub(super) fn differences(&self) -> impl Iterator<Item = (&Question, &Seen)> {
        self.answers()
            .filter(|(question, seen)| !agrees(question, seen))
    }

    /// How many connections policy allows, and how many it denies.
    pub(super) fn counts(&self) -> (usize, usize) {
        let allowed = self.questions.iter().filter(|question| question.asked);
        let allowed = allowed.count();
        (allowed, self.questions.len() - allowed)
    }

    /// The median and the slowest time of a handshake that went through.
    pub(super) fn latencies(&self) -> Option<(Duration, Duration)> {
        let mut all: Vec<_> = self
            .seen
            .iter()
            .filter_map(|seen| match seen {
                Seen::Answered(latency) => Some(*latency),
                _ => None,
            })
            .collect();
        all.sort_unstable();
        Some((*all.get(all.len() / 2)?, *all.last()?))
    }
}

/// Whether the result matches policy.
pub(super) fn agrees(question: &Question, seen: &Seen) -> bool {
    match seen {
        Seen::Answered(_) => question.asked,
        Seen::Silence => !question.asked,
        Seen::Other(_) => false,
    }
}

/// Pairs whose verdict differs after a change.
pub(super) struct Change {
    /// With the verdicts after the change; by pod address, since Services lead there.
    pub(super) questions: Vec<Question>,
}

impl Change {
    /// What differs between two lists of all questions.
    pub(super) fn between(before: &[Question], after: &[Question]) -> Self {
        let changed = before.iter().zip(after).filter(|(one, other)| {
            debug_assert!(one.same(other));
            one.asked != other.asked && other.route == Route::Pod
        });
        Self {
            questions: changed.map(|(_, after)| *after).collect(),
        }
    }

    /// The pairs of pods that were opened, or closed.
    pub(super) fn pairs(&self, opened: bool) -> BTreeSet<(usize, usize)> {
        let changed = self.questions.iter();
        changed
            .filter(|question| question.asked == opened)
            .map(|question| (question.from, question.to))
            .collect()
    }

    /// The connections to try after the change: all, or only the changed ones in a large cluster.
    pub(super) fn to_try(&self, after: &[Question]) -> Vec<Question> {
        if after.len() <= WHOLE {
            return after.to_vec();
        }
        let pairs: BTreeSet<_> = self
            .pairs(true)
            .union(&self.pairs(false))
            .copied()
            .collect();
        let changed = after
            .iter()
            .filter(|question| pairs.contains(&(question.from, question.to)));
        changed.take(WHOLE).copied().collect()
    }

    /// Dials some of the changed pairs repeatedly until all match policy. Returns how long after `since`
    /// that round began, or `None` if they do not match within `limit`.
    ///
    /// # Errors
    /// If sockets cannot be made.
    pub(super) fn followed(
        &self,
        testbed: &Testbed,
        since: Instant,
        limit: Duration,
    ) -> io::Result<Option<Duration>> {
        let mut open: Vec<_> = self.questions.iter().take(SAMPLE).copied().collect();
        let mut latest = since.elapsed();
        while !open.is_empty() {
            if since.elapsed() > limit {
                return Ok(None);
            }
            latest = since.elapsed();
            // A machine that is too busy for short rounds gets longer ones.
            let busy = latest > Duration::from_secs(1);
            let round = Duration::from_millis(if busy { 500 } else { 100 });
            let seen = dial(testbed, &open[..open.len().min(at_once())], round, round)?;
            let mut seen = seen.iter();
            open.retain(|question| !seen.next().is_some_and(|seen| agrees(question, seen)));
        }
        Ok(Some(latest))
    }
}

/// Dials a batch, with different patience for what policy allows and denies.
fn dial(
    testbed: &Testbed,
    batch: &[Question],
    answer: Duration,
    silence: Duration,
) -> io::Result<Vec<Seen>> {
    let part = |asked: bool| -> Vec<(usize, Dial)> {
        let chosen = batch.iter().enumerate().filter(|(_, q)| q.asked == asked);
        chosen
            .map(|(at, question)| (at, question.dial(testbed)))
            .collect()
    };
    let run = |dials: Vec<(usize, Dial)>, limit| -> io::Result<Vec<(usize, Outcome)>> {
        let (places, dials): (Vec<_>, Vec<_>) = dials.into_iter().unzip();
        Ok(places
            .into_iter()
            .zip(connect_all(&dials, limit)?)
            .collect())
    };
    let (allowed, denied) = (part(true), part(false));
    let outcomes = thread::scope(|scope| {
        let silent = scope.spawn(|| run(denied, silence));
        let mut outcomes = run(allowed, answer)?;
        let silent = silent.join();
        outcomes.extend(silent.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        Ok::<_, io::Error>(outcomes)
    })?;
    let mut seen = vec![Seen::Silence; batch.len()];
    for (at, outcome) in outcomes {
        seen[at] = batch[at].judge(testbed, outcome);
    }
    Ok(seen)
}

/// How many dials the descriptor limit leaves room for.
fn at_once() -> usize {
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE);
    let soft = limit.map_or(1024, |(soft, _)| soft);
    let room = usize::try_from(soft).unwrap_or(AT_ONCE).saturating_sub(400) / 2;
    room.clamp(50, AT_ONCE)
}
