//! What is wrong with an object, and how to correct it: one shape for all who read objects.
//!
//! Those who know the file and the document name them. Knows nothing of how the problem was found.
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

/// How much a [`Problem`] matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The object or file is not applied; its last good state is, if there was one.
    Error,
    /// It is applied, but probably not as its author meant.
    Warning,
}

/// One fault of the input: where it is, what is wrong, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// Error or warning.
    pub severity: Severity,
    /// The file (or directory) it is about; `None` when it concerns no single file.
    pub file: Option<PathBuf>,
    /// Which YAML or JSON document of the file, counted from 1.
    pub document: Option<usize>,
    /// The object, as `Kind namespace/name` or `Kind name`.
    pub object: Option<String>,
    /// The path of the field, as `kubectl explain` writes it, with indexes.
    pub field: Option<String>,
    /// What is wrong.
    pub problem: String,
    /// What to do about it.
    pub remedy: String,
}

impl Problem {
    /// An error that names no place yet; the `in_*`, `of` and `at` methods add it.
    #[must_use]
    pub fn error(problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            file: None,
            document: None,
            object: None,
            field: None,
            problem: problem.into(),
            remedy: remedy.into(),
        }
    }

    /// As [`Problem::error`], but a warning.
    #[must_use]
    pub fn warning(problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            severity: Severity::Warning,
            ..Self::error(problem, remedy)
        }
    }

    /// Names the file.
    #[must_use]
    pub fn in_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.file = Some(file.into());
        self
    }

    /// Names the document, counted from 1.
    #[must_use]
    pub fn in_document(mut self, document: usize) -> Self {
        self.document = Some(document);
        self
    }

    /// Names the object.
    #[must_use]
    pub fn of(mut self, object: impl fmt::Display) -> Self {
        self.object = Some(object.to_string());
        self
    }

    /// Names the field; an empty path is the whole object.
    #[must_use]
    pub fn at(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into()).filter(|field| !field.is_empty());
        self
    }
}

/// One line: `file, document 2, NetworkPolicy x/deny, spec.ingress[0].ports[0].port: problem; remedy`.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place: Vec<String> = [
            self.file.as_ref().map(|file| file.display().to_string()),
            self.document.map(|number| format!("document {number}")),
            self.object.clone(),
            self.field.clone(),
        ]
        .into_iter()
        .flatten()
        .collect();
        if !place.is_empty() {
            write!(f, "{}: ", one_line(&place.join(", ")))?;
        }
        write!(f, "{}; {}", one_line(&self.problem), one_line(&self.remedy))
    }
}

/// Control characters in a manifest must not forge log lines or control a terminal.
fn one_line(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// Problems of one object that are named; further ones are only counted.
const NAMED: usize = 100;

/// The errors found so far in one object.
#[derive(Debug, Default)]
pub(crate) struct Problems {
    named: Vec<Problem>,
    more: usize,
}

impl Problems {
    pub(crate) fn push(
        &mut self,
        field: impl Into<String>,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        if self.named.len() < NAMED {
            self.named.push(Problem::error(problem, remedy).at(field));
        } else {
            self.more += 1;
        }
    }

    /// `value` if there are no problems, else all of them.
    pub(crate) fn or<T>(mut self, value: T) -> Result<T, Vec<Problem>> {
        if self.named.is_empty() {
            return Ok(value);
        }
        if self.more > 0 {
            let problem = format!("{} more faults are not named", self.more);
            let remedy = "correct the first ones first";
            self.named.push(Problem::error(problem, remedy).at("spec"));
        }
        Err(self.named)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_names_place_problem_and_remedy() {
        let problem = Problem::error("port 0 is out of range", "use 1 to 65535")
            .in_file("a.yaml")
            .in_document(2)
            .of("NetworkPolicy x/deny")
            .at("spec.ingress[0]");
        assert_eq!(
            problem.to_string(),
            "a.yaml, document 2, NetworkPolicy x/deny, spec.ingress[0]: port 0 is out of range; use 1 to 65535"
        );
    }

    #[test]
    fn control_characters_are_removed_from_problem_lines() {
        let problem = Problem::warning("a\nb\u{1b}[31m", "c").of("Pod x/\ny");
        assert_eq!(problem.to_string(), "Pod x/ y: a b [31m; c");
    }

    #[test]
    fn only_the_first_problems_are_named() {
        let mut problems = Problems::default();
        for number in 0..1_000 {
            problems.push(number.to_string(), "wrong", "correct it");
        }
        let named = problems.or(()).unwrap_err();
        assert_eq!(named.len(), NAMED + 1);
        assert_eq!(named[NAMED].problem, "900 more faults are not named");
    }
}
