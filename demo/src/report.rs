//! Prints the results of the demo.
use std::time::Duration;

use lab::Entered;
use policy::{Cluster, Direction};

use super::decisions::{Decisions, Group, count, ranked};
use super::grid::{self, Cell, Grid};
use super::plan::{counted, shortened};
use super::probe::{Change, Question, Route, Seen, Survey, agrees};
use super::span_proxy::SpanProxy;
use super::terminal::{Terminal, Tone, WIDTH};
use super::testbed::{ADMIN, Testbed, seen_by_all};

/// Differences that are listed one by one.
const LISTED: usize = 40;
/// Reasons that are shown of each verdict.
const REASONS: usize = 6;

/// A policy that was removed and restored.
pub(super) struct Live {
    /// How soon connections followed each change.
    pub(super) followed: [Option<Duration>; 2],
    pub(super) surveys: Vec<Survey>,
}

/// How the lab differs from the user's manifests.
pub(super) fn own_manifests(terminal: Terminal, notes: &[String]) {
    terminal.heading("Your manifests in this cluster");
    let kept = "names, labels, namespaces, nodes and ports are yours; addresses are the lab's (pods 10.244.0.0/16 \
                and fd00:10:244::/48), so an ipBlock means those";
    terminal.paragraph(Tone::Plain, 2, kept);
    for note in notes {
        terminal.paragraph(Tone::Plain, 2, note);
    }
}

/// Prints every policy and the pods that it isolates.
pub(super) fn policies(terminal: Terminal, cluster: &Cluster) {
    let keys: Vec<_> = cluster
        .policies()
        .map(|policy| policy.key().to_string())
        .collect();
    terminal.heading(&format!(
        "{} in force",
        counted(keys.len(), "NetworkPolicy")
    ));
    let widest = keys.iter().map(String::len).max().unwrap_or(0).min(44);
    for policy in cluster.policies() {
        let directions = [
            (Direction::Ingress, "ingress"),
            (Direction::Egress, "egress"),
        ];
        let isolates: Vec<_> = directions
            .iter()
            .filter(|(direction, _)| policy.isolates(*direction))
            .map(|(_, name)| *name)
            .collect();
        let selected = cluster.selected_by(policy.key());
        let selected: Vec<_> = selected.iter().map(ToString::to_string).collect();
        let isolates = isolates.join(" and ");
        let line = format!(
            "  {:<widest$}  {isolates:<18}  of ",
            policy.key().to_string()
        );
        let of = match selected.is_empty() {
            true => "no pod".to_owned(),
            false => fitting(&selected, WIDTH.saturating_sub(line.chars().count())),
        };
        terminal.line(&(line + &of));
    }
}

/// Prints the expected matrix and the observed ones, by pod address and through Services.
pub(super) fn matrices(terminal: Terminal, testbed: &Testbed, survey: &Survey) {
    terminal.heading("Who reaches whom (rows are sources)");
    terminal.line("");
    let observed = |title: &str, route| Grid {
        title: title.to_owned(),
        cell: Box::new(move |from, to| observed(survey, route, from, to)),
    };
    let grids = [
        Grid {
            title: "policy asks for".to_owned(),
            cell: Box::new(|from, to| asked(survey, from, to)),
        },
        observed("seen, by pod address", Route::Pod),
        observed("seen, by Service", Route::Service),
    ];
    grid::draw(terminal, &testbed.pods, &grids);
    terminal.line("");
    let pairs = survey
        .questions
        .chunk_by(|one, next| (one.from, one.to) == (next.from, next.to));
    let mixed = pairs
        .into_iter()
        .any(|pair| asked(survey, pair[0].from, pair[0].to).0 == '◐');
    let mut legend = "  ✓ reached, the right pod answered and saw the client's own address   ✗ not a single answer".to_owned();
    if mixed {
        legend.push_str("\n  ◐ some of its ports or families");
    }
    if survey.differences().next().is_some() {
        legend.push_str("\n  ! not as asked for");
    }
    legend
        .lines()
        .for_each(|line| terminal.line(&terminal.paint(Tone::Faint, line)));
}

/// A matrix after a change, with what changed.
pub(super) fn changed(terminal: Terminal, testbed: &Testbed, before: &[Question], survey: &Survey) {
    let change = Change::between(before, &survey.questions);
    let (opened, closed) = (change.pairs(true), change.pairs(false));
    let mark = move |from: usize, to: usize, cell: Cell| match cell.0 {
        '!' => cell,
        _ if opened.contains(&(from, to)) => ('+', Tone::Good),
        _ if closed.contains(&(from, to)) => ('−', Tone::Bad),
        '✓' => ('✓', Tone::Faint),
        '✗' => ('·', Tone::Faint),
        _ => cell,
    };
    let seen = |from, to| {
        let routes = [Route::Pod, Route::Service].map(|route| observed(survey, route, from, to));
        let wrong = routes.into_iter().find(|cell| cell.0 == '!');
        wrong.unwrap_or(routes[0])
    };
    let grids = [
        Grid {
            title: "policy asks for".to_owned(),
            cell: Box::new(|from, to| mark(from, to, asked(survey, from, to))),
        },
        Grid {
            title: "seen, either way".to_owned(),
            cell: Box::new(|from, to| mark(from, to, seen(from, to))),
        },
    ];
    terminal.line("");
    grid::draw(terminal, &testbed.pods, &grids);
    terminal.line("");
    let legend =
        "  + opened by the change   − closed by it   ✓ reached as before   · denied as before";
    terminal.line(&terminal.paint(Tone::Faint, legend));
    terminal.line("");
}

/// What the daemons decided, by reason.
pub(super) fn decisions(terminal: Terminal, decisions: &Decisions, denied: usize) {
    terminal.heading("Why: the daemons' records, by reason");
    let show = |tone, mark: &str, groups: Vec<(&str, &Group)>| {
        for (reason, group) in groups.iter().take(REASONS) {
            let count = format!("{:>5}", group.count);
            let others = match group.count {
                1 => String::new(),
                count => format!("and {} more", count - 1),
            };
            let nodes = match group.nodes.len() {
                ..=2 => group.nodes.join(", "),
                many => counted(many, "node"),
            };
            let example = fitting(std::slice::from_ref(&group.example), 52);
            let mark = terminal.paint(tone, mark);
            terminal.line(&format!(
                "  {mark}{count}  {example:<34} {others:<14} on {nodes}"
            ));
            terminal.paragraph(Tone::Faint, 10, reason);
        }
        if groups.len() > REASONS {
            terminal.line(&format!(
                "         and {} more reasons",
                groups.len() - REASONS
            ));
        }
    };
    show(Tone::Bad, "✗", ranked(&decisions.denied));
    show(Tone::Good, "✓", ranked(&decisions.allowed));
    let recorded = count(&decisions.denied);
    let text =
        format!("  {recorded} of {denied} denied connections are on record with their reason");
    let tone = if recorded == denied {
        Tone::Plain
    } else {
        Tone::Mixed
    };
    terminal.line(&terminal.paint(tone, &text));
}

/// Prints the policy that is changed next.
pub(super) fn announce_change(terminal: Terminal, policy: &str) {
    terminal.heading(&format!("Policy changes under way: NetworkPolicy {policy}"));
}

/// `15 pairs opened, 0.31 s after ...`.
pub(super) fn follow_text(change: &Change, followed: Option<Duration>, survey: &Survey) -> String {
    let (opened, closed) = (change.pairs(true).len(), change.pairs(false).len());
    let pairs = [(opened, "opened"), (closed, "closed")];
    let pairs: Vec<_> = pairs
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{} {what}", counted(*count, "pair")))
        .collect();
    let pairs = pairs.join(" and ");
    let Some(followed) = followed else {
        return format!("{pairs} by the manifest's change, but connections did NOT follow");
    };
    let wrong = survey.differences().count();
    let agree = match wrong {
        0 => "all as asked for".to_owned(),
        _ => format!("{wrong} NOT as asked for"),
    };
    format!(
        "{pairs} {:.2} s after the file changed; {} tried, {agree}",
        followed.as_secs_f64(),
        survey.questions.len(),
    )
}

/// Prints whether all results match policy, the differences pair by pair, and the duration.
pub(super) fn verdict(
    terminal: Terminal,
    testbed: &Testbed,
    surveys: &[&Survey],
    agree: bool,
    took: Duration,
) {
    let differences = surveys.iter().flat_map(|survey| survey.differences());
    let differences: Vec<_> = differences.collect();
    if !differences.is_empty() {
        terminal.heading("Not as policy asks for");
        for (question, seen) in differences.iter().take(LISTED) {
            let asked = if question.asked { "allowed" } else { "denied" };
            let seen = match seen {
                Seen::Answered(_) => "connected",
                Seen::Silence => "timed out",
                Seen::Other(what) => what,
            };
            terminal.line(&format!(
                "  {}: {asked}, but {seen}",
                question.describe(testbed)
            ));
        }
        if differences.len() > LISTED {
            terminal.line(&format!("  and {} more", differences.len() - LISTED));
        }
    }
    let tried: usize = surveys.iter().map(|survey| survey.questions.len()).sum();
    let took = format!("{:.1} s", took.as_secs_f64());
    let (tone, text) = if agree {
        (
            Tone::Good,
            format!("✓ Observed is asked for: {tried} connections, no difference, in {took}"),
        )
    } else {
        let count = differences.len();
        (
            Tone::Bad,
            format!(
                "✗ Observed is NOT asked for: {count} of {tried} connections differ, after {took}"
            ),
        )
    };
    terminal.line("");
    terminal.line(&terminal.paint(tone, &text));
    if let Some((median, slowest)) = surveys.first().and_then(|survey| survey.latencies()) {
        let text = format!(
            "  a handshake took {:.1} ms in the median, {:.1} ms at most, all connections being opened at once",
            median.as_secs_f64() * 1000.0,
            slowest.as_secs_f64() * 1000.0
        );
        terminal.line(&terminal.paint(Tone::Faint, &text));
    }
}

/// Prints where to find the spans.
pub(super) fn where_to_look(terminal: Terminal, span_proxy: &SpanProxy) {
    terminal.heading("In Jaeger");
    terminal.line("  Every connection is a span there, with pods, policies and reason:");
    for verdict in ["deny", "allow", "sever"] {
        terminal.line(&format!("    {}", span_proxy.page(verdict)));
    }
}

/// Prints commands to explore the running cluster.
pub(super) fn how_to_enter(terminal: Terminal, testbed: &Testbed, entered: Entered) {
    let user = match entered {
        Entered::Capable => String::new(),
        Entered::UserNamespace => {
            format!(
                " --user=/proc/{}/ns/user --preserve-credentials",
                std::process::id()
            )
        }
    };
    let enter = |netns: &lab::Netns| format!("nsenter{user} --net={}", netns.path().display());
    terminal.heading("The cluster runs until Ctrl-C. From another shell:");
    for pod in testbed.lab.pods() {
        terminal.line(&format!(
            "  {:<20} {}  # {}",
            pod.name(),
            enter(pod.netns()),
            pod.ipv4()
        ));
    }
    for node in testbed.lab.nodes() {
        let curl = format!("{} curl -s http://{ADMIN}/policies", enter(node.netns()));
        terminal.line(&format!("  {:<20} {curl}", node.name()));
    }
    let paths = "/livez /readyz /metrics /connections";
    terminal.line(&format!("  {:<20} {paths} are there too", ""));
    let dir = seen_by_all(&testbed.cluster_dir());
    terminal.line(&format!("  {:<20} {}", "manifests", dir.display()));
    terminal.line(&format!(
        "  {:<20} change one: it is in force within a second",
        ""
    ));
    if let (Some(from), Some(to)) = (testbed.lab.pods().next(), testbed.lab.pods().nth(1)) {
        let port = testbed
            .pods
            .get(1)
            .and_then(|pod| pod.ports.first())
            .copied()
            .unwrap_or(80);
        let dial = format!(
            "timeout 2 bash -c 'head -1 < /dev/tcp/{}/{port}'",
            to.ipv4()
        );
        let names = format!("{} → {}", from.name(), to.name());
        terminal.line(&format!("  {names:<20} {} {dial}", enter(from.netns())));
    }
}

/// As many names as fit, and the number of the others.
fn fitting(names: &[String], width: usize) -> String {
    let whole = |most: &usize| shortened(names, " ", *most).chars().count() <= width;
    match (1..=names.len()).rev().find(whole) {
        Some(most) => shortened(names, " ", most),
        // Not even one: it is cut short.
        None => {
            let name = names.first().map(String::as_str).unwrap_or_default();
            name.chars()
                .take(width.saturating_sub(1))
                .chain(['…'])
                .collect()
        }
    }
}

fn asked(survey: &Survey, from: usize, to: usize) -> Cell {
    symbol(survey.of_pair(from, to).map(|(question, _)| question.asked))
}

fn observed(survey: &Survey, route: Route, from: usize, to: usize) -> Cell {
    let of_pair = survey.of_pair(from, to);
    let of_pair: Vec<_> = of_pair
        .filter(|(question, _)| question.route == route)
        .collect();
    if of_pair
        .iter()
        .any(|(question, seen)| !agrees(question, seen))
    {
        return ('!', Tone::Alarm);
    }
    symbol(
        of_pair
            .iter()
            .map(|(_, seen)| matches!(seen, Seen::Answered(_))),
    )
}

fn symbol(reached: impl Iterator<Item = bool>) -> Cell {
    let reached: Vec<_> = reached.collect();
    match (reached.contains(&true), reached.contains(&false)) {
        (true, false) => ('✓', Tone::Good),
        (true, true) => ('◐', Tone::Mixed),
        _ => ('✗', Tone::Bad),
    }
}
