//! Draws matrices of pods side by side, within the width of the terminal.
//!
//! Pure: cells in, text out. Rows are sources, columns destinations, grouped by namespace.
use super::plan::Planned;
use super::terminal::{Terminal, Tone, WIDTH};

/// Between two matrices.
const GAP: usize = 4;

/// One symbol and its meaning.
pub(super) type Cell = (char, Tone);

/// A matrix: its title and what it shows from one pod to another.
pub(super) struct Grid<'a> {
    pub(super) title: String,
    pub(super) cell: Box<dyn Fn(usize, usize) -> Cell + 'a>,
}

/// How pods are written at rows and columns.
struct Layout<'a> {
    pods: &'a [Planned],
    /// The heading of each column.
    tags: Vec<String>,
    /// Characters of a column, the space before the next one included.
    column: usize,
    /// Whether the tags are written downwards.
    upright: bool,
    /// Whether there is a space between namespaces.
    grouped: bool,
    label: usize,
}

/// Draws the matrices, as many beside each other as fit.
pub(super) fn draw(terminal: Terminal, pods: &[Planned], grids: &[Grid<'_>]) {
    for line in lines(terminal, pods, grids) {
        terminal.line(&line);
    }
}

fn lines(terminal: Terminal, pods: &[Planned], grids: &[Grid<'_>]) -> Vec<String> {
    let layout = Layout::of(pods);
    let widest = grids.iter().map(|grid| grid.title.chars().count()).max();
    let width = layout.width().max(widest.unwrap_or_default());
    let beside = ((WIDTH - layout.label.min(WIDTH) + GAP) / (width + GAP)).max(1);
    let mut lines = Vec::new();
    for row in grids.chunks(beside) {
        if !lines.is_empty() {
            lines.push(String::new());
        }
        let gap = " ".repeat(GAP);
        let across = |part: &dyn Fn(&Grid<'_>) -> String| -> String {
            row.iter().map(part).collect::<Vec<_>>().join(&gap)
        };
        let label = " ".repeat(layout.label);
        let strong = |text: &str| terminal.paint(Tone::Strong, &format!("{text:<width$}"));
        lines.push(label.clone() + &across(&|grid| strong(&grid.title)));
        let faint = |text: &str| terminal.paint(Tone::Faint, &format!("{text:<width$}"));
        for header in layout.headers() {
            lines.push(label.clone() + &across(&|_| faint(&header)));
        }
        for from in 0..pods.len() {
            let cells = across(&|grid| layout.row(terminal, grid, from, width));
            lines.push(layout.label_of(from) + &cells);
        }
    }
    lines
}

impl<'a> Layout<'a> {
    fn of(pods: &'a [Planned]) -> Self {
        let longest = pods.iter().map(|pod| pod.name.len()).max().unwrap_or(1);
        let named = longest <= 3;
        let tags: Vec<_> = (1..)
            .zip(pods)
            .map(|(number, pod)| {
                if named {
                    pod.name.clone()
                } else {
                    format!("{number}")
                }
            })
            .collect();
        let widest = 1 + tags.iter().map(String::len).max().unwrap_or(1);
        let keys = pods.iter().map(|pod| pod.key().chars().count());
        let number = if named {
            0
        } else {
            pods.len().to_string().len() + 1
        };
        let label = (2 + number + keys.max().unwrap_or(0)).min(44) + 2;
        let layout = |(column, grouped)| Self {
            pods,
            tags: tags.clone(),
            column,
            upright: column < widest,
            grouped,
            label,
        };
        // From the easiest to read to the narrowest: two matrices beside each other, or else one.
        let ways = [(widest, true), (2, true), (1, true), (1, false)].map(layout);
        let fits = |grids: usize| {
            move |way: &Self| way.label + grids * way.width() + (grids - 1) * GAP <= WIDTH
        };
        let [.., narrowest] = &ways;
        let narrowest = Self {
            label: label.min(WIDTH.saturating_sub(narrowest.width())),
            ..layout((1, false))
        };
        let two = ways.iter().position(fits(2));
        match two.or_else(|| ways.iter().position(fits(1))) {
            Some(at) => ways.into_iter().nth(at).unwrap_or(narrowest),
            None => narrowest,
        }
    }

    /// Whether a namespace begins at this pod.
    fn begins(&self, at: usize) -> bool {
        self.grouped && at > 0 && self.pods[at].namespace != self.pods[at - 1].namespace
    }

    fn width(&self) -> usize {
        let groups = (0..self.pods.len()).filter(|at| self.begins(*at)).count();
        self.pods.len() * self.column + groups
    }

    /// The namespaces, then the tags.
    fn headers(&self) -> Vec<String> {
        let mut namespaces = String::new();
        for group in self
            .pods
            .chunk_by(|one, other| one.namespace == other.namespace)
        {
            let width = group.len() * self.column;
            let name: String = group[0]
                .namespace
                .chars()
                .take(width.saturating_sub(1).max(1))
                .collect();
            namespaces.push_str(&format!("{name:<width$}"));
            namespaces.push_str(if self.grouped { " " } else { "" });
        }
        let mut headers = vec![namespaces.trim_end().to_owned()];
        if !self.upright {
            headers.push(self.across(|at| format!("{:<1$}", self.tags[at], self.column)));
            return headers;
        }
        let digits = self.tags.iter().map(String::len).max().unwrap_or(1);
        headers.extend((0..digits).map(|digit| {
            self.across(|at| {
                let tag = format!("{:>digits$}", self.tags[at]);
                let digit = tag.chars().nth(digit).unwrap_or(' ');
                format!("{digit:<0$}", self.column)
            })
        }));
        headers
    }

    fn across(&self, text: impl Fn(usize) -> String) -> String {
        (0..self.pods.len())
            .map(|at| if self.begins(at) { " " } else { "" }.to_owned() + &text(at))
            .collect()
    }

    fn row(&self, terminal: Terminal, grid: &Grid<'_>, from: usize, width: usize) -> String {
        let cells = self.across(|to| {
            let (symbol, tone) = (grid.cell)(from, to);
            terminal.paint(tone, &symbol.to_string()) + &" ".repeat(self.column - 1)
        });
        cells + &" ".repeat(width.saturating_sub(self.width()))
    }

    fn label_of(&self, at: usize) -> String {
        let key = self.pods[at].key();
        let text = if self.tags[at] == self.pods[at].name {
            format!("  {key}")
        } else {
            let digits = self.pods.len().to_string().len();
            format!("  {:>digits$} {key}", at + 1)
        };
        let width = self.label;
        let text: String = text.chars().take(width - 1).collect();
        format!("{text:<width$}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pods(names: &[(&str, &str)]) -> Vec<Planned> {
        let pod = |(namespace, name): &(&str, &str)| Planned {
            namespace: (*namespace).into(),
            name: (*name).into(),
            ports: vec![80],
        };
        names.iter().map(pod).collect()
    }

    fn drawn(pods: &[Planned]) -> Vec<String> {
        let grid = |title: &str| Grid {
            title: title.into(),
            cell: Box::new(|from, to| (if from == to { '✓' } else { '✗' }, Tone::Plain)),
        };
        let lines = lines(Terminal::new(true), pods, &[grid("asked"), grid("seen")]);
        lines
            .into_iter()
            .map(|line| line.trim_end().to_owned())
            .collect()
    }

    #[test]
    fn short_names_head_columns_of_adjacent_matrices() {
        let expected = [
            "       asked      seen",
            "       x    y     x    y",
            "       a b  a     a b  a",
            "  x/a  ✓ ✗  ✗     ✓ ✗  ✗",
            "  x/b  ✗ ✓  ✗     ✗ ✓  ✗",
            "  y/a  ✗ ✗  ✓     ✗ ✗  ✓",
        ];
        assert_eq!(
            drawn(&pods(&[("x", "a"), ("x", "b"), ("y", "a")])),
            expected
        );
    }

    #[test]
    fn grid_fits_the_screen_for_any_pod_count() {
        for count in [1, 10, 25, 60] {
            let names: Vec<_> = (0..count)
                .map(|at| format!("a-rather-long-name-{at}"))
                .collect();
            let names: Vec<_> = names
                .iter()
                .map(|name| ("somewhere", name.as_str()))
                .collect();
            for line in drawn(&pods(&names)) {
                assert!(line.chars().count() <= WIDTH, "{count} pods: {line}");
            }
        }
    }
}
