//! What one manifest file holds: its objects, and what is wrong with it.
//!
//! Unpacks lists and picks out the kinds that are read. Knows nothing of the disk: bytes come in.
use std::path::Path;

use serde_json::Value;

use super::document::{Document, documents};
use crate::objects::{self, Kind};
use crate::{Object, ObjectKey, Problem};

/// A file's objects in the order in which they stand there.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Contents {
    pub(super) entries: Vec<Entry>,
    pub(super) problems: Vec<Problem>,
    /// A fault hides which objects are meant, so an object that is not in `entries` may be in the
    /// file all the same.
    pub(super) incomplete: bool,
}

/// One object of a file.
#[derive(Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) key: ObjectKey,
    /// The document that it stands in, counted from 1.
    pub(super) document: usize,
    /// `None` if it is not valid; the reason is among the problems.
    pub(super) object: Option<Object>,
}

impl Contents {
    /// Reads the bytes of `file`. Any bytes: what cannot be used is a [`Problem`], never a panic.
    pub(super) fn read(file: &Path, bytes: Vec<u8>) -> Self {
        let text = match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                let at = error.utf8_error().valid_up_to();
                return Self::unreadable(
                    Problem::error(
                        format!("not text: byte {at} is not UTF-8"),
                        "save it as UTF-8, or give it a name that does not end in .yaml, .yml or .json",
                    )
                    .in_file(file),
                );
            }
        };
        let mut contents = Self::default();
        for Document { number, value } in documents(&text) {
            match value {
                Ok(value) => Reader {
                    file,
                    document: number,
                    contents: &mut contents,
                }
                .top(value),
                Err(problem) => {
                    contents.incomplete = true;
                    contents
                        .problems
                        .push(problem.in_file(file).in_document(number));
                }
            }
        }
        contents.shorten(file);
        contents
    }

    /// Keeps a mangled file from filling logs: the first faults are enough.
    fn shorten(&mut self, file: &Path) {
        const SHOWN: usize = 100;
        let Some(more) = self
            .problems
            .len()
            .checked_sub(SHOWN)
            .filter(|more| *more > 0)
        else {
            return;
        };
        self.problems.sort_by_key(|problem| problem.severity);
        // Errors come first, so this one has the highest severity of those that are not shown.
        let severity = self.problems.get(SHOWN).map(|problem| problem.severity);
        self.problems.truncate(SHOWN);
        let mut problem = Problem::error(
            format!("{more} more problems are not shown"),
            "correct the first ones first",
        );
        problem.severity = severity.unwrap_or(problem.severity);
        self.problems.push(problem.in_file(file));
    }

    /// A file of which nothing could be read.
    pub(super) fn unreadable(problem: Problem) -> Self {
        Self {
            entries: Vec::new(),
            problems: vec![problem],
            incomplete: true,
        }
    }
}

/// `apiVersion` and `kind`: those of a typed list's items are not repeated on each.
#[derive(Clone, Copy)]
struct TypeMeta<'a> {
    api_version: &'a str,
    kind: &'a str,
}

/// Reads the objects of one document.
struct Reader<'a> {
    file: &'a Path,
    document: usize,
    contents: &'a mut Contents,
}

impl Reader<'_> {
    fn top(&mut self, value: Value) {
        if !value.is_null() {
            self.object("", value, None);
        }
    }

    /// `at` is the path of the object within the document, empty or ending in a dot.
    fn object(&mut self, at: &str, mut value: Value, inherited: Option<TypeMeta<'_>>) {
        if !value.is_object() {
            return self.unidentified(
                at,
                "not a Kubernetes object",
                "write a mapping with apiVersion, kind and metadata",
            );
        }
        let (api_version, kind) = (value["apiVersion"].take(), value["kind"].take());
        let api_version = api_version
            .as_str()
            .or_else(|| inherited.map(|meta| meta.api_version));
        let kind = kind.as_str().or_else(|| inherited.map(|meta| meta.kind));
        let Some(kind) = kind.filter(|kind| !kind.is_empty()) else {
            let field = format!("{at}kind");
            return self.unidentified(
                &field,
                "missing",
                "add its kind, such as `kind: NetworkPolicy`",
            );
        };
        let Some(api_version) = api_version.filter(|version| !version.is_empty()) else {
            if kind.ends_with("List") || known(kind).is_some() {
                let field = format!("{at}apiVersion");
                let remedy = format!(
                    "add `apiVersion: {}`",
                    known(kind).map_or("v1", Kind::api_version)
                );
                return self.unidentified(&field, &format!("missing on a {kind}"), &remedy);
            }
            return;
        };
        let meta = TypeMeta { api_version, kind };
        match kind.strip_suffix("List") {
            Some("") => self.list(at, value["items"].take(), None),
            Some(item)
                if known(item).is_some() || objects::is_foreign(group(api_version), item) =>
            {
                self.list(
                    at,
                    value["items"].take(),
                    Some(TypeMeta {
                        api_version,
                        kind: item,
                    }),
                );
            }
            _ => self.single(at, value, meta),
        }
    }

    fn list(&mut self, at: &str, items: Value, inherited: Option<TypeMeta<'_>>) {
        match items {
            Value::Null => {}
            Value::Array(items) => {
                for (index, item) in items.into_iter().enumerate() {
                    self.object(&format!("{at}items[{index}]."), item, inherited);
                }
            }
            _ => {
                let field = format!("{at}items");
                self.unidentified(
                    &field,
                    "not a list",
                    "write the objects as a list under items",
                );
            }
        }
    }

    fn single(&mut self, at: &str, value: Value, meta: TypeMeta<'_>) {
        let kind = match select(meta) {
            Selected::Read(kind) => kind,
            Selected::PassedOver => return,
            Selected::Foreign => {
                let problem = self
                    .problem(
                        at,
                        Problem::warning(
                            format!("{} {} is not enforced", meta.api_version, meta.kind),
                            objects::FOREIGN_REMEDY,
                        ),
                    )
                    .of(describe(meta.kind, &value));
                return self.contents.problems.push(problem);
            }
            Selected::Refused { problem, remedy } => {
                let problem = Problem::error(problem, remedy)
                    .of(describe(meta.kind, &value))
                    .at("apiVersion");
                self.contents.incomplete |= !self.note_invalid(meta.kind, &value);
                return self.contents.problems.push(self.problem(at, problem));
            }
        };
        let key = match objects::key_of(kind, &value) {
            Ok(key) => key,
            Err(problem) => {
                let problem = problem.of(describe(meta.kind, &value));
                self.contents.incomplete = true;
                return self.contents.problems.push(self.problem(at, problem));
            }
        };
        let object = objects::read(&key, value);
        let object = object.map_err(|problems| {
            for problem in problems {
                let problem = self.problem(at, problem.of(&key));
                self.contents.problems.push(problem);
            }
        });
        let entry = Entry {
            key,
            document: self.document,
            object: object.ok(),
        };
        self.contents.entries.push(entry);
    }

    /// Notes an object that is refused as a whole; false if it cannot even be named.
    fn note_invalid(&mut self, kind: &str, value: &Value) -> bool {
        let key = known(kind).and_then(|kind| objects::key_of(kind, value).ok());
        let named = key.is_some();
        let entry = key.map(|key| Entry {
            key,
            document: self.document,
            object: None,
        });
        self.contents.entries.extend(entry);
        named
    }

    fn unidentified(&mut self, field: &str, problem: &str, remedy: &str) {
        self.contents.incomplete = true;
        let problem = self.problem(field, Problem::error(problem, remedy));
        self.contents.problems.push(problem);
    }

    /// Names the place of a problem; its field is one of the object at the path `at` of the document.
    fn problem(&self, at: &str, mut problem: Problem) -> Problem {
        let field = format!("{at}{}", problem.field.take().unwrap_or_default());
        problem
            .in_file(self.file)
            .in_document(self.document)
            .at(field.trim_end_matches('.'))
    }
}

/// The kind that is read under this name, however it is capitalised.
fn known(kind: &str) -> Option<Kind> {
    Kind::ALL
        .into_iter()
        .find(|known| known.name().eq_ignore_ascii_case(kind))
}

fn group(api_version: &str) -> &str {
    api_version.rsplit_once('/').map_or("", |(group, _)| group)
}

/// What to do with an object of some `apiVersion` and `kind`.
enum Selected {
    Read(Kind),
    /// Not relevant for policy.
    PassedOver,
    /// A policy of another system: not read, but users may expect it to be enforced.
    Foreign,
    /// Relevant for policy, but in an unsupported form.
    Refused {
        problem: String,
        remedy: String,
    },
}

fn select(TypeMeta { api_version, kind }: TypeMeta<'_>) -> Selected {
    let group = group(api_version);
    if objects::is_foreign(group, kind) {
        return Selected::Foreign;
    }
    let Some(wanted) = known(kind) else {
        return unknown_kind(group, api_version, kind);
    };
    if api_version == wanted.api_version() && kind == wanted.name() {
        return Selected::Read(wanted);
    }
    // Other groups reuse the names: config.openshift.io has a Node.
    if !matches!(group, "" | "core" | "extensions" | "networking.k8s.io") {
        return Selected::PassedOver;
    }
    Selected::Refused {
        problem: format!("{api_version} {kind} is not understood"),
        remedy: format!(
            "write `apiVersion: {}` and `kind: {}`",
            wanted.api_version(),
            wanted.name()
        ),
    }
}

/// An unknown kind is ignored, unless it can only be a mistyped policy.
fn unknown_kind(group: &str, api_version: &str, kind: &str) -> Selected {
    const NETWORKING: [&str; 6] = [
        "Ingress",
        "IngressClass",
        "IPAddress",
        "ServiceCIDR",
        "ClusterCIDR",
        "NetworkPolicy",
    ];
    let kind_or_item = kind.strip_suffix("List").unwrap_or(kind);
    if group == "networking.k8s.io" && !NETWORKING.contains(&kind_or_item) {
        return Selected::Refused {
            problem: format!("{api_version} has no kind {kind:?}"),
            remedy: "write `kind: NetworkPolicy` if that is meant".to_owned(),
        };
    }
    Selected::PassedOver
}

/// Names an object for a problem, as far as it can be named.
fn describe(kind: &str, value: &Value) -> String {
    let metadata = &value["metadata"];
    match (metadata["namespace"].as_str(), metadata["name"].as_str()) {
        (Some(namespace), Some(name)) => format!("{kind} {namespace}/{name}"),
        (None, Some(name)) => format!("{kind} {name}"),
        (_, None) => format!("{kind} without a name"),
    }
}

#[cfg(test)]
mod tests;
