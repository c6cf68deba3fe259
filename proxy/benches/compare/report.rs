//! What was found, as Markdown: medians with their spread, and the ratios that matter.
//!
//! Pure: values in, text out.
use std::fmt::Write;
use std::time::Duration;

use crate::collector::Spans;
use crate::load::{Load, Measured};
use crate::way::{self, Path};

/// The values of all rounds.
pub(crate) struct Results {
    ways: Vec<String>,
    rows: Vec<Row>,
}

struct Row {
    path: Path,
    load: Load,
    /// For each figure of the load, for each way, the rounds' values.
    values: Vec<Vec<Vec<f64>>>,
    /// For each way, the proxy's CPU time per operation in microseconds, round by round.
    costs: Vec<Vec<f64>>,
}

impl Results {
    /// No results yet for ways of these names.
    pub(crate) fn new(ways: Vec<String>) -> Self {
        Self {
            ways,
            rows: Vec::new(),
        }
    }

    /// Adds what one way did in one round, and the CPU time that its proxies took for it.
    pub(crate) fn add(
        &mut self,
        way: usize,
        path: Path,
        load: Load,
        measured: &Measured,
        spent: Duration,
    ) {
        let known = self
            .rows
            .iter()
            .position(|row| row.path == path && row.load == load);
        let at = known.unwrap_or_else(|| {
            let none = vec![Vec::new(); self.ways.len()];
            self.rows.push(Row {
                path,
                load,
                values: vec![none.clone(); load.figures().len()],
                costs: none,
            });
            self.rows.len() - 1
        });
        let row = &mut self.rows[at];
        for (figure, value) in row.values.iter_mut().zip(&measured.values) {
            figure[way].push(*value);
        }
        #[expect(
            clippy::cast_precision_loss,
            reason = "counts of a second are far below 2^52"
        )]
        let operations = measured.operations as f64 / load.cost().0;
        row.costs[way].push(spent.as_secs_f64() * 1e6 / operations);
    }

    /// Two tables: what was carried, and what it cost the proxies.
    pub(crate) fn markdown(&self) -> String {
        let mut out = String::new();
        let ratios = self.ratios();
        let heads = ratios.iter().map(|(of, to)| format!("{of} / {to}"));
        self.head(&mut out, "load", heads.collect());
        for row in &self.rows {
            for (figure, values) in row.load.figures().iter().zip(&row.values) {
                let name = row.load.row(row.path) + figure.name;
                let _ = write!(out, "| {name} | {} |", figure.unit);
                for rounds in values {
                    let _ = write!(out, " {} |", spread(rounds, figure.decimals));
                }
                for (of, to) in &ratios {
                    let _ = match self.ratio(values, of, to) {
                        ratio if ratio.is_nan() => write!(out, " - |"),
                        ratio => write!(out, " {ratio:.2} |"),
                    };
                }
                out.push('\n');
            }
        }
        out.push_str("\nCPU time of the proxies' threads, in microseconds:\n\n");
        self.head(&mut out, "load", Vec::new());
        for row in &self.rows {
            let _ = write!(
                out,
                "| {} | µs a {} |",
                row.load.row(row.path),
                row.load.cost().1
            );
            for rounds in &row.costs {
                let _ = write!(out, " {} |", spread(rounds, 1));
            }
            out.push('\n');
        }
        out
    }

    fn head(&self, out: &mut String, first: &str, more: Vec<String>) {
        let columns: Vec<_> = self.ways.iter().cloned().chain(more).collect();
        let _ = writeln!(out, "| {first} | unit | {} |", columns.join(" | "));
        let _ = writeln!(out, "|---|---|{}", "---:|".repeat(columns.len()));
    }

    /// Every build of Portreeve to what others do, other builds to this one too, and one that is
    /// collected to itself without that.
    fn ratios(&self) -> Vec<(String, String)> {
        const OTHERS: [&str; 3] = [way::BARE, way::TRACKED, way::HAPROXY];
        let has = |name: &str| self.ways.iter().any(|way| way == name);
        let mut ratios = Vec::new();
        for of in self.ways.iter().filter(|it| !OTHERS.contains(&it.as_str())) {
            if let Some(itself) = of.strip_suffix(way::COLLECTED) {
                if has(itself) {
                    ratios.push((of.clone(), itself.to_owned()));
                }
                continue;
            }
            for to in OTHERS.into_iter().chain([way::PORTREEVE]) {
                if of != to && has(to) {
                    ratios.push((of.clone(), to.to_owned()));
                }
            }
        }
        ratios
    }

    /// The median of the rounds' ratios: neighbours in time are compared.
    fn ratio(&self, values: &[Vec<f64>], of: &str, to: &str) -> f64 {
        let rounds = |name: &str| {
            let at = self.ways.iter().position(|way| way == name);
            at.map_or(&[][..], |at| &values[at])
        };
        let pairs = rounds(of).iter().zip(rounds(to));
        median(&pairs.map(|(of, to)| of / to).collect::<Vec<_>>())
    }
}

/// What a collector was sent by all daemons of a way, and what it took to take that.
pub(crate) fn collected(way: &str, spans: &Spans, busy: Duration) -> String {
    #[expect(
        clippy::cast_precision_loss,
        reason = "counts of a run are far below 2^52"
    )]
    let each = busy.as_secs_f64() * 1e6 / spans.sent as f64;
    format!(
        "{way}: the collector took {} spans, {} were lost; its own thread had {each:.1} µs of CPU time a span, \
         which is in none of the figures above.\n",
        spans.sent, spans.lost
    )
}

/// `median (least-most)`.
fn spread(values: &[f64], decimals: usize) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if values.is_empty() || most == 0.0 {
        return "-".to_owned();
    }
    let median = median(values);
    format!("{median:.decimals$} ({least:.decimals$}-{most:.decimals$})")
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}
