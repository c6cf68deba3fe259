//! NetworkPolicies as their authors wrote them, to be given to the daemons one file each.
//!
//! The manifests have been parsed and validated before; this only extracts the objects. The result
//! is compared with the parsed policies, so a difference is detected.
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::error::DemoError;

/// A NetworkPolicy object.
#[derive(Clone, Debug)]
pub(super) struct RawPolicy {
    /// `namespace/name`.
    pub(super) key: String,
    pub(super) object: Value,
}

/// Every NetworkPolicy of a manifest file, or of a directory of them; of two with one name the
/// later, as the manifest source has it.
///
/// # Errors
/// If a file cannot be read.
pub(super) fn read(path: &Path) -> Result<Vec<RawPolicy>, DemoError> {
    let mut found = BTreeMap::new();
    let unreadable = |source| DemoError::Unreadable {
        path: path.to_owned(),
        source,
    };
    for file in files(path).map_err(unreadable)? {
        let bytes = fs::read(&file).map_err(unreadable)?;
        for document in documents(&String::from_utf8_lossy(&bytes)).map_err(unreadable)? {
            collect(document, &mut found);
        }
    }
    let policies = found.into_iter();
    Ok(policies
        .map(|(key, object)| RawPolicy { key, object })
        .collect())
}

/// The files that the manifest source reads, in its order.
fn files(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !fs::metadata(path)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let file = entry?.path();
        let extension = file.extension().and_then(|extension| extension.to_str());
        let manifest = extension.is_some_and(|extension| {
            ["yaml", "yml", "json"].contains(&extension.to_ascii_lowercase().as_str())
        });
        let hidden = file
            .file_name()
            .is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        let kustomize = file.file_stem().is_some_and(|stem| stem == "kustomization");
        if manifest && !hidden && !kustomize && fs::metadata(&file)?.is_file() {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

fn documents(text: &str) -> io::Result<Vec<Value>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.trim_start().starts_with('{') {
        let json: Result<Vec<Value>, _> = serde_json::Deserializer::from_str(text)
            .into_iter()
            .collect();
        if let Ok(documents) = json {
            return Ok(documents);
        }
    }
    let budget = serde_saphyr::budget! {
        max_events: text.len().saturating_mul(2).saturating_add(100_000),
        max_nodes: text.len().saturating_add(100_000),
        max_documents: text.len().saturating_add(1),
        max_total_scalar_bytes: text.len().saturating_add(16 << 20),
    };
    let options = serde_saphyr::options! { budget: budget, legacy_octal_numbers: true };
    serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))
}

fn collect(document: Value, found: &mut BTreeMap<String, Value>) {
    if let Some(items) = document.get("items").and_then(Value::as_array) {
        // In a typed list (`NetworkPolicyList`) the items need not name their kind.
        let kind = document["kind"].as_str().unwrap_or_default();
        let typed = kind.strip_suffix("List").filter(|kind| !kind.is_empty());
        for item in items {
            let mut item = item.clone();
            if let (Some(kind), Some(object)) = (typed, item.as_object_mut())
                && !object.contains_key("kind")
            {
                object.insert("kind".to_owned(), kind.into());
                object.insert("apiVersion".to_owned(), document["apiVersion"].clone());
            }
            collect(item, found);
        }
        return;
    }
    if document["kind"] != "NetworkPolicy" || document["apiVersion"] != "networking.k8s.io/v1" {
        return;
    }
    let metadata = &document["metadata"];
    let namespace = metadata["namespace"]
        .as_str()
        .filter(|name| !name.is_empty());
    let key = format!(
        "{}/{}",
        namespace.unwrap_or("default"),
        metadata["name"].as_str().unwrap_or_default()
    );
    found.insert(key, document);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_found_in_documents_and_lists() {
        let text = "kind: Pod\n---\n{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: a}}\n---\n\
            apiVersion: networking.k8s.io/v1\nkind: NetworkPolicyList\nitems:\n- metadata: {namespace: x, name: b}\n---\n\
            apiVersion: v1\nkind: List\nitems:\n- {apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {namespace: x, name: c}}\n";
        let mut found = BTreeMap::new();
        for document in documents(text).unwrap() {
            collect(document, &mut found);
        }
        assert_eq!(
            found.keys().collect::<Vec<_>>(),
            ["default/a", "x/b", "x/c"]
        );
        assert_eq!(found["x/b"]["kind"], "NetworkPolicy");
    }
}
