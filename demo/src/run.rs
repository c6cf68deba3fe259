//! The steps of the demo in their order, from the first namespace to the report.
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use lab::Entered;
use policy::{Cluster, NetworkPolicy};
use serde_json::json;

use super::decisions::{Decisions, count};
use super::error::DemoError;
use super::plan::{Plan, counted, shortened};
use super::probe::{Change, Question, Route, Survey};
use super::report::{self, Live};
use super::span_proxy::SpanProxy;
use super::terminal::{Step, Terminal, Tone};
use super::testbed::{Daemons, Programs, Testbed};

/// How long a change may take until connections follow it. A second is promised; what is slower is
/// shown in the report.
const FOLLOW: Duration = Duration::from_secs(10);

/// How many policies are compared to choose the one that is removed for a moment.
const CANDIDATES: usize = 50;

/// The checked inputs of the demo.
pub(super) struct Demo {
    pub(super) terminal: Terminal,
    /// The user's own manifests.
    pub(super) own: Option<PathBuf>,
    pub(super) keep: bool,
    pub(super) headless: bool,
    pub(super) entered: Entered,
    pub(super) started: Instant,
    pub(super) plan: Plan,
    /// The policies as they were read; the daemons must be given the same.
    pub(super) expected: Vec<NetworkPolicy>,
    pub(super) programs: Programs,
    /// Where spans go, if they do.
    pub(super) span_proxy: Option<Arc<SpanProxy>>,
    pub(super) daemons: Daemons,
    /// Whether all results match policy, once that is known and `--keep` waits.
    pub(super) settled: Arc<OnceLock<bool>>,
}

/// The first round of connections, and the change of policy after it.
struct Findings {
    first: Survey,
    live: Option<Live>,
}

impl Demo {
    /// Builds, measures and reports. True if all results match policy.
    ///
    /// # Errors
    /// Why the demo cannot run; differences are not errors.
    pub(super) fn run(self) -> Result<bool, DemoError> {
        let terminal = self.terminal;
        self.greet();
        let notes = self.plan.notes.clone();
        let (nodes, own) = (self.plan.nodes.clone(), self.own.clone());
        let (plan, programs, daemons) = (self.plan, self.programs, self.daemons);
        let span_proxy = self.span_proxy;
        let testbed = build(terminal, plan, programs, daemons, span_proxy.clone())?;
        let cluster = testbed.cluster()?;
        same(&self.expected, &cluster)?;
        let questions = Question::all(&testbed, &cluster);
        let first = survey(terminal, &testbed, questions)?;
        if own.is_some() {
            report::own_manifests(terminal, &notes);
        }
        report::policies(terminal, &cluster);
        report::matrices(terminal, &testbed, &first);
        let decisions = Decisions::read(&testbed.records(), first.counts().1);
        report::decisions(terminal, &decisions, first.counts().1);
        let live = change(terminal, &testbed, &cluster, &first.questions)?;
        let findings = Findings { first, live };
        let agree = all_agree(&findings);
        report::verdict(
            terminal,
            &testbed,
            &findings.surveys(),
            agree,
            self.started.elapsed(),
        );
        if let Some(span_proxy) = &span_proxy {
            report::where_to_look(terminal, span_proxy);
        }
        if self.keep {
            report::how_to_enter(terminal, &testbed, self.entered);
        }
        if self.headless {
            let denied = count(&decisions.denied);
            let summary = findings.summary(&testbed, &nodes, denied, self.started.elapsed());
            terminal.line(&summary);
        }
        if self.keep {
            let _once = self.settled.set(agree);
            loop {
                // A signal ends the process.
                thread::park();
            }
        }
        Ok(agree)
    }

    fn greet(&self) {
        let what = match &self.own {
            Some(path) => format!("the pods and policies of {}", path.display()),
            None => "the Kubernetes documentation's own policies".to_owned(),
        };
        let title = self.terminal.paint(Tone::Strong, "portreeve demo");
        self.terminal
            .line(&format!("{title}: {what}, real kernel, real connections"));
        self.terminal.line("");
    }
}

/// Builds the cluster and starts enforcement, with a line of progress for each step.
fn build(
    terminal: Terminal,
    plan: Plan,
    programs: Programs,
    daemons: Daemons,
    span_proxy: Option<Arc<SpanProxy>>,
) -> Result<Testbed, DemoError> {
    let (nodes, pods) = (
        counted(plan.nodes.len(), "node"),
        counted(plan.pods.len(), "pod"),
    );
    let mut namespaces: Vec<_> = plan.pods.iter().map(|pod| pod.namespace.clone()).collect();
    namespaces.dedup();
    let testbed = terminal.step("cluster", || {
        let testbed = Testbed::build(plan, programs, daemons, span_proxy)?;
        let services = counted(testbed.pods.len(), "Service");
        let within = shortened(&namespaces, ", ", 4);
        let text = format!("{nodes}, {pods} in {within}, {services} by DNAT");
        Ok::<_, DemoError>(Step::done(testbed, text))
    })?;
    let names: Vec<_> = testbed
        .lab
        .nodes()
        .map(|node| node.name().to_owned())
        .collect();
    let names = shortened(&names, ", ", 3);
    terminal.step("redirect", || {
        testbed.install()?;
        let text = format!("iptables-init install on {names}");
        Ok::<_, DemoError>(Step::done((), text))
    })?;
    terminal.step("daemons", || {
        testbed.start()?;
        let text = format!("portreeve run on {names}, ready");
        Ok::<_, DemoError>(Step::done((), text))
    })?;
    Ok(testbed)
}

/// Checks that the daemons' manifests have the same policies as the user's.
fn same(expected: &[NetworkPolicy], cluster: &Cluster) -> Result<(), DemoError> {
    let given: Vec<_> = cluster.policies().cloned().collect();
    let differ = |policy: &&NetworkPolicy| !given.contains(policy) || !expected.contains(policy);
    match expected.iter().chain(&given).find(differ) {
        Some(policy) => Err(DemoError::NotTheSame(policy.key().to_string())),
        None => Ok(()),
    }
}

fn survey(
    terminal: Terminal,
    testbed: &Testbed,
    questions: Vec<Question>,
) -> Result<Survey, DemoError> {
    terminal.step("connections", || {
        let survey = Survey::take(testbed, questions).map_err(DemoError::Dial)?;
        let tried = survey.questions.len();
        let wrong = survey.differences().count();
        let agree = if wrong == 0 {
            "all as asked for".to_owned()
        } else {
            format!("{wrong} NOT as asked for")
        };
        let text = format!("{tried} by pod address and Service, IPv4 and IPv6: {agree}");
        Ok(Step {
            value: survey,
            text,
            good: wrong == 0,
        })
    })
}

/// Removes the policy with the largest effect and restores it, while connections are tried.
fn change(
    terminal: Terminal,
    testbed: &Testbed,
    cluster: &Cluster,
    before: &[Question],
) -> Result<Option<Live>, DemoError> {
    let mut without = testbed.cluster()?;
    let mut largest: Option<(String, Vec<Question>, usize)> = None;
    for policy in cluster.policies().take(CANDIDATES) {
        let _changes = without.remove_policy(policy.key());
        let after = Question::all(testbed, &without);
        let _changes = without.upsert_policy(policy.clone());
        let changed = Change::between(before, &after).questions.len();
        if changed > largest.as_ref().map_or(0, |(_, _, most)| *most) {
            largest = Some((policy.key().to_string(), after, changed));
        }
    }
    let Some((policy, after, _)) = largest else {
        return Ok(None);
    };
    report::announce_change(terminal, &policy);
    let removed = step(terminal, testbed, "deleted", before, &after, || {
        testbed.remove_policy(&policy)
    })?;
    if removed.1.questions.len() == after.len() {
        report::changed(terminal, testbed, before, &removed.1);
    }
    let back = step(terminal, testbed, "put back", &after, before, || {
        testbed.put_policy(&policy)
    })?;
    Ok(Some(Live {
        followed: [removed.0, back.0],
        surveys: vec![removed.1, back.1],
    }))
}

/// One change: how soon connections followed it, and a whole round of them afterwards.
fn step(
    terminal: Terminal,
    testbed: &Testbed,
    name: &str,
    before: &[Question],
    after: &[Question],
    act: impl FnOnce() -> Result<(), DemoError>,
) -> Result<(Option<Duration>, Survey), DemoError> {
    let change = Change::between(before, after);
    terminal.step(name, || {
        let since = Instant::now();
        act()?;
        let followed = change
            .followed(testbed, since, FOLLOW)
            .map_err(DemoError::Dial)?;
        let survey = Survey::take(testbed, change.to_try(after)).map_err(DemoError::Dial)?;
        let text = report::follow_text(&change, followed, &survey);
        let good = followed.is_some() && survey.differences().next().is_none();
        Ok(Step {
            value: (followed, survey),
            text,
            good,
        })
    })
}

fn all_agree(findings: &Findings) -> bool {
    let mut surveys = findings.surveys().into_iter();
    surveys.all(|survey| survey.differences().next().is_none())
}

impl Findings {
    fn surveys(&self) -> Vec<&Survey> {
        let live = self.live.iter().flat_map(|live| &live.surveys);
        std::iter::once(&self.first).chain(live).collect()
    }

    /// The last line of `--headless`.
    fn summary(
        &self,
        testbed: &Testbed,
        nodes: &[String],
        on_record: usize,
        took: Duration,
    ) -> String {
        let (allowed, denied) = self.first.counts();
        let of = |route: Route| {
            self.first
                .questions
                .iter()
                .filter(move |q| q.route == route)
        };
        let seconds = |time: Option<Duration>| time.map(|time| rounded(time.as_secs_f64()));
        let followed = self.live.as_ref().map(|live| live.followed.map(seconds));
        let differences: usize = self.surveys().iter().map(|s| s.differences().count()).sum();
        let tried: usize = self
            .surveys()
            .iter()
            .map(|survey| survey.questions.len())
            .sum();
        json!({
            "agree": all_agree(self),
            "nodes": nodes.len(),
            "pods": testbed.pods.len(),
            "allowed": allowed,
            "denied": denied,
            "by_pod": of(Route::Pod).count(),
            "by_service": of(Route::Service).count(),
            "denials_on_record": on_record,
            "connections": tried,
            "differences": differences,
            "change_followed_seconds": followed,
            "seconds": rounded(took.as_secs_f64()),
        })
        .to_string()
    }
}

/// To the millisecond.
fn rounded(seconds: f64) -> f64 {
    (seconds * 1000.0).round() / 1000.0
}
