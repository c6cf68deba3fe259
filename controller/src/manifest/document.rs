//! Text of one manifest file -> its documents as JSON values.
//!
//! YAML is read as kubectl reads it: documents are cut at lines that begin with `---`, so that a
//! document which does not parse does not affect the others, and its number is the one that a
//! person counts. Stricter than kubectl in one point: a key given twice is an error, not "the last
//! one wins". Knows nothing of Kubernetes objects.
use std::thread;

use serde_json::Value;

use crate::Problem;
use crate::objects::Trimmed;

/// One document of a file.
pub(super) struct Document {
    /// Counted from 1; empty documents count too.
    pub(super) number: usize,
    /// What it says, or why it cannot be read.
    pub(super) value: Result<Value, Problem>,
}

/// What parsing may use of the stack: several times what the deepest document that is accepted
/// takes, whatever the caller's own thread has left.
const STACK_BYTES: usize = 16 << 20;

/// How deep lists and mappings may be nested; CRDs, which are passed over, reach about 50.
const MAX_DEPTH: usize = 100;

/// Cuts `text` into documents and parses each. Never panics.
///
/// The parsers are third-party code on hostile input, so they run on a thread of their own: a panic of
/// theirs is reported like a syntax error.
pub(super) fn documents(text: &str) -> Vec<Document> {
    thread::scope(|scope| {
        let parser = thread::Builder::new()
            .name("parser".to_owned())
            .stack_size(STACK_BYTES);
        let parsed = parser
            .spawn_scoped(scope, || parse(text))
            .map(thread::ScopedJoinHandle::join);
        let problem = match parsed {
            Ok(Ok(documents)) => return documents,
            Ok(Err(_panic)) => Problem::error(
                "the parser gave up on it",
                "look for binary or mangled text in it, and report this as a bug",
            ),
            Err(error) => Problem::error(
                format!("cannot be parsed: no thread could be started ({error})"),
                "raise the limit of processes and threads",
            ),
        };
        vec![Document {
            number: 1,
            value: Err(problem),
        }]
    })
}

/// JSON is tried first where the text begins with a brace, as kubectl does.
fn parse(text: &str) -> Vec<Document> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.trim_start().starts_with('{') {
        // Flow style YAML begins with a brace too, so JSON's complaint counts only if the text
        // is not YAML either.
        let json = json_documents(text);
        if json.iter().all(|document| document.value.is_ok()) {
            return json;
        }
        let yaml = yaml_documents(text);
        return if yaml.iter().all(|document| document.value.is_ok()) {
            yaml
        } else {
            json
        };
    }
    yaml_documents(text)
}

fn json_documents(text: &str) -> Vec<Document> {
    let stream = serde_json::Deserializer::from_str(text).into_iter::<Trimmed>();
    (1..)
        .zip(stream)
        .map(|(number, value)| Document {
            number,
            value: value.map(|Trimmed(value)| value).map_err(|error| {
                Problem::error(
                    format!("not JSON: {error}"),
                    "correct the syntax at that line",
                )
            }),
        })
        .collect()
}

fn yaml_documents(text: &str) -> Vec<Document> {
    let mut documents = Vec::new();
    for (number, (first_line, chunk)) in (1..).zip(split(text)) {
        match yaml(chunk, first_line) {
            Ok(values) => documents.extend(values.into_iter().map(|value| Document {
                number,
                value: Ok(value),
            })),
            Err(problem) => documents.push(Document {
                number,
                value: Err(*problem),
            }),
        }
    }
    documents
}

/// The documents as slices, each with the number of lines before it. What stands before the first
/// `---` counts only if there is something in it.
fn split(text: &str) -> Vec<(u64, &str)> {
    let mut chunks = Vec::new();
    let (mut start, mut start_line) = (0, 0);
    let mut offset = 0;
    for (number, line) in (0_u64..).zip(text.split_inclusive('\n')) {
        let marker = line.strip_prefix("---").is_some_and(|rest| {
            rest.is_empty() || rest.starts_with(|c: char| c.is_ascii_whitespace())
        });
        if marker && offset > 0 {
            chunks.push((start_line, &text[start..offset]));
            (start, start_line) = (offset, number);
        }
        offset += line.len();
    }
    chunks.push((start_line, &text[start..]));
    let blank = |chunk: &str| {
        chunk.lines().all(|line| {
            let line = line.trim();
            line.is_empty() || line.starts_with(['#', '%'])
        })
    };
    if chunks.first().is_some_and(|(_, chunk)| blank(chunk)) {
        chunks.remove(0);
    }
    chunks
}

/// Parses one document; several values come out where it holds `...` lines, none if it is empty.
fn yaml(chunk: &str, lines_before: u64) -> Result<Vec<Value>, Box<Problem>> {
    let error = match parse_yaml(chunk) {
        Ok(trees) => return Ok(trees.into_iter().map(|Trimmed(value)| value).collect()),
        Err(error) => error,
    };
    let place = error.location().map_or_else(String::new, |location| {
        format!(
            " at line {}, column {}",
            lines_before + location.line(),
            location.column()
        )
    });
    // The parser appends its own idea of the line, which counts from the document's start.
    let text = error.without_snippet().to_string();
    let text = text.lines().next().unwrap_or_default();
    let text = text.split(" at line ").next().unwrap_or(text);
    let problem = format!("not YAML{place}: {text}");
    Err(Box::new(Problem::error(
        problem,
        "correct the syntax at that line",
    )))
}

fn parse_yaml(chunk: &str) -> Result<Vec<Trimmed>, serde_saphyr::Error> {
    // A document cannot hold more nodes than bytes, so what aliases add is the thing to bound.
    let budget = serde_saphyr::budget! {
        max_events: chunk.len().saturating_mul(2).saturating_add(100_000),
        max_nodes: chunk.len().saturating_add(100_000),
        max_depth: MAX_DEPTH,
        max_total_scalar_bytes: chunk.len().saturating_add(16 << 20),
    };
    let options = serde_saphyr::options! {
        budget: budget,
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 100_000 },
        legacy_octal_numbers: true,
        with_snippet: false,
    };
    serde_saphyr::from_multiple_with_options(chunk, options)
}

#[cfg(test)]
mod tests;
