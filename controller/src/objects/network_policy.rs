//! A `networking.k8s.io/v1` NetworkPolicy as its author wrote it, and the replacement for one that cannot be
//! read.
//!
//! Knows nothing of the other kinds, nor what a policy means.
use policy::PolicyKey;
use serde_json::{Value, json};

use super::typed;
use crate::{Object, Problem};

pub(super) fn read(key: &PolicyKey, mut value: Value) -> Result<Object, Vec<Problem>> {
    const FIELDS: [&str; 5] = ["apiVersion", "kind", "metadata", "spec", "status"];
    let mut problems: Vec<Problem> = value
        .as_object()
        .into_iter()
        .flat_map(serde_json::Map::keys)
        .filter(|field| !FIELDS.contains(&field.as_str()))
        .map(|field| {
            let remedy = "remove it, or indent it under spec if it belongs there";
            Problem::error("unknown field: it could change what is allowed", remedy).at(field)
        })
        .collect();
    let spec = value.get_mut("spec").map(Value::take).unwrap_or_default();
    if spec.is_null() {
        let remedy = "add it; `spec: {podSelector: {}}` denies all ingress in the namespace";
        problems.push(Problem::error("missing", remedy).at("spec"));
        return Err(problems);
    }
    // The labels of a policy mean nothing to enforcement, so they are not looked at.
    match typed::<policy::v1::NetworkPolicySpec>("networkpolicy", "spec", spec) {
        Ok(spec) => match policy::NetworkPolicy::new(key.clone(), spec) {
            Ok(policy) if problems.is_empty() => return Ok(policy.into()),
            Ok(_) => {}
            Err(invalid) => problems.extend(invalid),
        },
        Err(problem) => problems.push(*problem),
    }
    Err(problems)
}

/// The replacement for a policy that cannot be read and has no last good state: it isolates the pods that
/// it selects in its directions, and allows nothing.
///
/// A part that cannot be read either is taken at its widest: every pod of the namespace, both ways.
pub(crate) fn closed_policy(key: &PolicyKey, value: &Value) -> Option<policy::NetworkPolicy> {
    let spec = &value["spec"];
    let both = json!(["Ingress", "Egress"]);
    let given = spec["policyTypes"].as_array();
    let types = match given {
        Some(given) if !given.is_empty() => spec["policyTypes"].clone(),
        // The API server's default, if the rules can be distinguished at all.
        _ if spec.is_object() && spec["egress"].is_null() => json!(["Ingress"]),
        _ => both.clone(),
    };
    let (pods, every_pod) = (&spec["podSelector"], json!({}));
    let candidates = [
        (pods, &types),
        (pods, &both),
        (&every_pod, &types),
        (&every_pod, &both),
    ];
    candidates.into_iter().find_map(|(pods, types)| {
        let spec = json!({"podSelector": pods, "policyTypes": types});
        let spec = serde_json::from_value(spec).ok()?;
        policy::NetworkPolicy::new(key.clone(), spec).ok()
    })
}
