//! Text of one manifest file -> its documents as JSON values.
//!
//! YAML is read as kubectl reads it: documents are cut at lines that begin with `---`, so that a
//! document which does not parse says nothing about the others, and its number is the one that a
//! person counts. Stricter than kubectl in one point: a key given twice is an error, not "the last
//! one wins". Knows nothing of Kubernetes objects.
use std::fmt;
use std::thread;

use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use serde_json::{Map, Number, Value};

use crate::Problem;

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
/// The parsers are foreign code on hostile input, so they run on a thread of their own: a panic of
/// theirs is one more way of not being a manifest.
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
                format!("cannot be parsed: no thread is to be had ({error})"),
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
    let stream = serde_json::Deserializer::from_str(text).into_iter::<Tree>();
    (1..)
        .zip(stream)
        .map(|(number, value)| Document {
            number,
            value: value.map(|Tree(value)| value).map_err(|error| {
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
        Ok(trees) => return Ok(trees.into_iter().map(|Tree(value)| value).collect()),
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

fn parse_yaml(chunk: &str) -> Result<Vec<Tree>, serde_saphyr::Error> {
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

/// A JSON value, read strictly (no key twice) and sparingly (see [`BULKY`]).
struct Tree(Value);

/// Keys under which a dump of a cluster keeps most of its bytes and nothing that is read. What they
/// hold is dropped while parsing if it is a list or mapping; plain values stay, they may be labels.
const BULKY: [&str; 10] = [
    "managedFields",
    "annotations",
    "env",
    "volumes",
    "volumeMounts",
    "resources",
    "conditions",
    "containerStatuses",
    "initContainerStatuses",
    "images",
];

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer
            .deserialize_any(TreeVisitor { keep: true })
            .map(Self)
    }
}

#[derive(Clone, Copy)]
struct TreeVisitor {
    /// Whether lists and mappings are kept.
    keep: bool,
}

impl<'de> DeserializeSeed<'de> for TreeVisitor {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for TreeVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i128<E>(self, value: i128) -> Result<Value, E> {
        Ok(Value::String(value.to_string()))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Value, E> {
        Ok(Value::String(value.to_string()))
    }

    /// `80.0` and `8e1` are the whole number 80, as for kubectl.
    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        if value.fract() == 0.0 && value.abs() < 1e15 {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "whole and below 2^53, so exact"
            )]
            return Ok((value as i64).into());
        }
        Ok(Number::from_f64(value).map_or_else(|| Value::String(value.to_string()), Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_bytes<E>(self, value: &[u8]) -> Result<Value, E> {
        Ok(Value::String(String::from_utf8_lossy(value).into_owned()))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        if !self.keep {
            while seq.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(Value::Null);
        }
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(self)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        if !self.keep {
            while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            return Ok(Value::Null);
        }
        let mut entries = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let keep = !BULKY.contains(&key.as_str());
            let value = map.next_value_seed(Self { keep })?;
            if entries.contains_key(&key) {
                let message = format_args!("the key {key:?} is given twice");
                return Err(serde::de::Error::custom(message));
            }
            entries.insert(key, value);
        }
        Ok(Value::Object(entries))
    }
}

#[cfg(test)]
mod tests;
