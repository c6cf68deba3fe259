//! Prints the results of the demo.
use std::time::Duration;

use lab::Entered;
use policy::{Cluster, Direction};

use super::decisions::{Decisions, Group, count, ranked};
use super::grid::{self, Cell, Grid};
use super::plan::{counted, shortened};
use super::probe::{Change, Question, Route, Seen, Survey, agrees};
use super::screen::{Screen, Tone, WIDTH};
use super::span_proxy::SpanProxy;
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
pub(super) fn own_manifests(screen: Screen, notes: &[String]) {
    screen.heading("Your manifests in this cluster");
    let kept = "names, labels, namespaces, nodes and ports are yours; addresses are the lab's (pods 10.244.0.0/16 \
                and fd00:10:244::/48), so an ipBlock means those";
    screen.paragraph(Tone::Plain, 2, kept);
    for note in notes {
        screen.paragraph(Tone::Plain, 2, note);
    }
}

/// Prints every policy and the pods that it isolates.
pub(super) fn policies(screen: Screen, cluster: &Cluster) {
    let keys: Vec<_> = cluster
        .policies()
        .map(|policy| policy.key().to_string())
        .collect();
    screen.heading(&format!(
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
        screen.line(&(line + &of));
    }
}

/// Prints the expected matrix and the observed ones, by pod address and through Services.
pub(super) fn matrices(screen: Screen, testbed: &Testbed, survey: &Survey) {
    screen.heading("Who reaches whom (rows are sources)");
    screen.line("");
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
    grid::draw(screen, &testbed.pods, &grids);
    screen.line("");
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
        .for_each(|line| screen.line(&screen.paint(Tone::Faint, line)));
}

/// A matrix after a change, with what changed.
pub(super) fn changed(screen: Screen, testbed: &Testbed, before: &[Question], survey: &Survey) {
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
    screen.line("");
    grid::draw(screen, &testbed.pods, &grids);
    screen.line("");
    let legend =
        "  + opened by the change   − closed by it   ✓ reached as before   · denied as before";
    screen.line(&screen.paint(Tone::Faint, legend));
    screen.line("");
}

/// What the daemons decided, by reason.
pub(super) fn decisions(screen: Screen, decisions: &Decisions, denied: usize) {
    screen.heading("Why: the daemons' records, by reason");
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
            let mark = screen.paint(tone, mark);
            screen.line(&format!(
                "  {mark}{count}  {example:<34} {others:<14} on {nodes}"
            ));
            screen.paragraph(Tone::Faint, 10, reason);
        }
        if groups.len() > REASONS {
            screen.line(&format!(
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
    screen.line(&screen.paint(tone, &text));
}

/// Prints the policy that is changed next.
pub(super) fn announce_change(screen: Screen, policy: &str) {
    screen.heading(&format!("Policy changes under way: NetworkPolicy {policy}"));
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
    screen: Screen,
    testbed: &Testbed,
    surveys: &[&Survey],
    agree: bool,
    took: Duration,
) {
    let differences = surveys.iter().flat_map(|survey| survey.differences());
    let differences: Vec<_> = differences.collect();
    if !differences.is_empty() {
        screen.heading("Not as policy asks for");
        for (question, seen) in differences.iter().take(LISTED) {
            let asked = if question.asked { "allowed" } else { "denied" };
            let seen = match seen {
                Seen::Answered(_) => "connected",
                Seen::Silence => "timed out",
                Seen::Other(what) => what,
            };
            screen.line(&format!(
                "  {}: {asked}, but {seen}",
                question.describe(testbed)
            ));
        }
        if differences.len() > LISTED {
            screen.line(&format!("  and {} more", differences.len() - LISTED));
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
    screen.line("");
    screen.line(&screen.paint(tone, &text));
    if let Some((median, slowest)) = surveys.first().and_then(|survey| survey.latencies()) {
        let text = format!(
            "  a handshake took {:.1} ms in the median, {:.1} ms at most, all connections being opened at once",
            median.as_secs_f64() * 1000.0,
            slowest.as_secs_f64() * 1000.0
        );
        screen.line(&screen.paint(Tone::Faint, &text));
    }
}

/// Prints where to find the spans.
pub(super) fn where_to_look(screen: Screen, span_proxy: &SpanProxy) {
    screen.heading("In Jaeger");
    screen.line("  Every connection is a span there, with pods, policies and reason:");
    for verdict in ["deny", "allow", "sever"] {
        screen.line(&format!("    {}", span_proxy.page(verdict)));
    }
}

/// Prints commands to explore the running cluster.
pub(super) fn how_to_enter(screen: Screen, testbed: &Testbed, entered: Entered) {
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
    screen.heading("The cluster runs until Ctrl-C. From another shell:");
    for pod in testbed.lab.pods() {
        screen.line(&format!(
            "  {:<20} {}  # {}",
            pod.name(),
            enter(pod.netns()),
            pod.ipv4()
        ));
    }
    for node in testbed.lab.nodes() {
        let curl = format!("{} curl -s http://{ADMIN}/policies", enter(node.netns()));
        screen.line(&format!("  {:<20} {curl}", node.name()));
    }
    let paths = "/livez /readyz /metrics /connections";
    screen.line(&format!("  {:<20} {paths} are there too", ""));
    let dir = seen_by_all(&testbed.cluster_dir());
    screen.line(&format!("  {:<20} {}", "manifests", dir.display()));
    screen.line(&format!(
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
        screen.line(&format!("  {names:<20} {} {dial}", enter(from.netns())));
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
