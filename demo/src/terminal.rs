//! Text for a terminal: colour if wanted, progress, wrapped lines.
//!
//! Write errors on standard output are ignored.
use std::io::{self, IsTerminal, Write};
use std::time::Instant;

/// Maximum width of lines.
pub(super) const WIDTH: usize = 100;
/// Room for the name of a step.
const NAME: usize = 13;

/// The tone of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    Good,
    Bad,
    Mixed,
    Alarm,
    Faint,
    Strong,
    Plain,
}

/// The result of a step.
pub(super) struct Step<T> {
    pub(super) value: T,
    /// In a few words.
    pub(super) text: String,
    /// Whether the step succeeded.
    pub(super) good: bool,
}

impl<T> Step<T> {
    /// A step that is done.
    pub(super) fn done(value: T, text: String) -> Self {
        Self {
            value,
            text,
            good: true,
        }
    }
}

/// Where the demo writes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terminal {
    colour: bool,
    progress: bool,
}

impl Terminal {
    /// Standard output; plain if it is not a terminal, or with `NO_COLOR` or `headless`.
    pub(super) fn new(headless: bool) -> Self {
        let progress = io::stdout().is_terminal() && !headless;
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self {
            colour: progress && !unwanted,
            progress,
        }
    }

    /// `text` in a tone.
    pub(super) fn paint(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Good => "32",
            Tone::Bad => "31",
            Tone::Mixed => "33",
            Tone::Alarm => "1;97;41",
            Tone::Faint => "2",
            Tone::Strong => "1",
            Tone::Plain => return text.to_owned(),
        };
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    /// A line.
    pub(super) fn line(self, text: &str) {
        let mut out = io::stdout().lock();
        let _gone = writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush());
    }

    /// The heading of a section.
    pub(super) fn heading(self, text: &str) {
        self.line("");
        self.line(&self.paint(Tone::Strong, text));
    }

    /// Text of several lines' length, indented.
    pub(super) fn paragraph(self, tone: Tone, indent: usize, text: &str) {
        for line in wrapped(text, WIDTH - indent) {
            self.line(&format!("{:indent$}{}", "", self.paint(tone, &line)));
        }
    }

    /// Runs a step and prints its name (before, on a terminal), and afterwards its result
    /// and how long it took.
    ///
    /// # Errors
    /// The error of the step.
    pub(super) fn step<T, E>(
        self,
        name: &str,
        work: impl FnOnce() -> Result<Step<T>, E>,
    ) -> Result<T, E> {
        let started = Instant::now();
        if self.progress {
            let mut out = io::stdout().lock();
            let dots = self.paint(Tone::Faint, "…");
            let _gone = write!(out, "  {dots} {name}").and_then(|()| out.flush());
        }
        let done = work();
        let erase = if self.progress { "\r\x1b[K" } else { "" };
        let took = format!("{:.2} s", started.elapsed().as_secs_f64());
        let (good, text) = match &done {
            Ok(step) => (step.good, step.text.as_str()),
            Err(_) => (false, "failed"),
        };
        let mark = if good {
            self.paint(Tone::Good, "✓")
        } else {
            self.paint(Tone::Bad, "✗")
        };
        let room = WIDTH - 4 - NAME - 8;
        let mut lines = wrapped(text, room).into_iter();
        let first = lines.next().unwrap_or_default();
        let took = self.paint(Tone::Faint, &format!("{took:>8}"));
        self.line(&format!(
            "{erase}  {mark} {name:<NAME$}{first:<room$}{took}"
        ));
        for line in lines {
            self.line(&format!("    {:NAME$}{line}", ""));
        }
        done.map(|step| step.value)
    }
}

/// Cuts text at spaces; a word that is longer than a line has a line of its own.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let Some(line) = lines.last_mut() else { break };
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
            lines.push(word.to_owned());
        } else {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_wraps_at_spaces() {
        for (text, width, expected) in [
            ("one two three", 7, vec!["one two", "three"]),
            ("one", 2, vec!["one"]),
            ("", 5, vec![""]),
            ("✗✗✗ ✗✗✗", 7, vec!["✗✗✗ ✗✗✗"]),
        ] {
            assert_eq!(wrapped(text, width), expected, "{text:?} at {width}");
        }
    }
}
