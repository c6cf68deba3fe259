//! Rewriting a world or a policy: other spellings that mean the same, and undoing a change.
use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};
use testbed::cases::world::{Change, World, policy_key};

/// A permutation of `items` from random keys.
pub(crate) fn shuffled<T>(items: Vec<T>, keys: &[Index]) -> Vec<T> {
    let mut keyed: Vec<_> = items.into_iter().enumerate().collect();
    keyed.sort_by_key(|(at, _)| (keys[at % keys.len()].index(usize::MAX), *at));
    keyed.into_iter().map(|(_, item)| item).collect()
}

pub(crate) fn keys() -> impl Strategy<Value = Vec<Index>> {
    proptest::collection::vec(any::<Index>(), 32)
}

/// Puts the items of every list below `value` in another order.
pub(crate) fn turn(value: &mut Value, keys: &[Index]) {
    match value {
        Value::Array(items) => {
            *items = shuffled(std::mem::take(items), keys);
            items.iter_mut().for_each(|item| turn(item, keys));
        }
        Value::Object(fields) => fields.values_mut().for_each(|field| turn(field, keys)),
        _ => {}
    }
}

/// Takes `field` out of every object below `value`.
pub(crate) fn without(value: &mut Value, field: &str) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| without(item, field)),
        Value::Object(fields) => {
            fields.remove(field);
            fields.values_mut().for_each(|value| without(value, field));
        }
        _ => {}
    }
}

/// One policy per rule, all with the selector and the types of the first.
pub(crate) fn split(policy: Value) -> Vec<Value> {
    let rules = |list: &str| policy["spec"][list].as_array().cloned().unwrap_or_default();
    let (ingress, egress) = (rules("ingress"), rules("egress"));
    let parts = ingress.len().max(egress.len()).max(1);
    let part = |number: usize| {
        let mut part = policy.clone();
        let name = format!(
            "{}-{number}",
            policy["metadata"]["name"].as_str().expect("a name")
        );
        part["metadata"]["name"] = name.into();
        part["spec"]["policyTypes"] = types(&policy["spec"]);
        part["spec"]["ingress"] = ingress.get(number).cloned().into_iter().collect();
        part["spec"]["egress"] = egress.get(number).cloned().into_iter().collect();
        part
    };
    (0..parts).map(part).collect()
}

/// `policyTypes`, written out.
fn types(spec: &Value) -> Value {
    let written = spec["policyTypes"].clone();
    let egress = spec["egress"]
        .as_array()
        .is_some_and(|rules| !rules.is_empty());
    match (written, egress) {
        (Value::Null, true) => json!(["Ingress", "Egress"]),
        (Value::Null, false) => json!(["Ingress"]),
        (written, _) => written,
    }
}

/// Defaults written out, matchLabels as expressions, short ranges as single ports.
pub(crate) fn respell(spec: &mut Value) {
    spec["policyTypes"] = types(spec);
    respell_selectors(spec);
    for (list, peers) in [("ingress", "from"), ("egress", "to")] {
        for rule in spec
            .get_mut(list)
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            if rule
                .get(peers)
                .is_some_and(|peers| peers.as_array().is_some_and(Vec::is_empty))
            {
                rule[peers] = Value::Null;
            }
            if let Some(ports) = rule.get_mut("ports").and_then(Value::as_array_mut) {
                *ports = ports.drain(..).flat_map(respell_port).collect();
            }
        }
    }
}

fn respell_port(mut port: Value) -> Vec<Value> {
    if port.get("protocol").is_none() {
        port["protocol"] = "TCP".into();
    }
    let Some(last) = port.get("endPort").and_then(Value::as_u64) else {
        return vec![port];
    };
    let first = port["port"].as_u64().expect("a range starts at a number");
    (first..=last)
        .map(|number| json!({"protocol": port["protocol"], "port": number}))
        .collect()
}

fn respell_selectors(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(respell_selectors),
        Value::Object(fields) => {
            if let Some(Value::Object(labels)) = fields.remove("matchLabels") {
                let spelled = labels
                    .into_iter()
                    .map(|(key, value)| json!({"key": key, "operator": "In", "values": [value]}));
                let all = fields
                    .entry("matchExpressions")
                    .or_insert_with(|| json!([]));
                all.as_array_mut().expect("a list").extend(spelled);
            }
            fields.values_mut().for_each(respell_selectors);
        }
        _ => {}
    }
}

/// `world` with each policy replaced by what `rewrite` makes of it.
pub(crate) fn rewritten(world: &World, mut rewrite: impl FnMut(Value) -> Vec<Value>) -> World {
    let mut new = World {
        policies: BTreeMap::new(),
        ..world.clone()
    };
    for policy in world.policies.values() {
        rewrite(policy.clone())
            .into_iter()
            .for_each(|policy| new.apply(&Change::Policy(policy)));
    }
    new
}

/// What brings `world` back after `added`.
pub(crate) fn undo(world: &World, added: &Change) -> Vec<Change> {
    let before = |key: &dyn Fn(&Change) -> bool| world.changes().into_iter().find(|one| key(one));
    let back = match added.clone() {
        Change::Namespace(name, _) => vec![
            Some(Change::NoNamespace(name.clone())),
            before(&|one| matches!(one, Change::Namespace(n, _) if *n == name)),
        ],
        Change::Node(node) => vec![
            Some(Change::NoNode(node.name.clone())),
            before(&|one| matches!(one, Change::Node(n) if n.name == node.name)),
        ],
        Change::Pod(pod) => vec![
            Some(Change::NoPod(pod.key())),
            before(&|one| matches!(one, Change::Pod(p) if p.key() == pod.key())),
        ],
        Change::Policy(policy) => {
            let key = policy_key(&policy);
            vec![
                Some(Change::NoPolicy(key.clone())),
                before(&|one| matches!(one, Change::Policy(p) if policy_key(p) == key)),
            ]
        }
        Change::NoNamespace(name) => vec![before(
            &|one| matches!(one, Change::Namespace(n, _) if *n == name),
        )],
        Change::NoNode(name) => vec![before(
            &|one| matches!(one, Change::Node(n) if n.name == name),
        )],
        Change::NoPod(key) => vec![before(
            &|one| matches!(one, Change::Pod(p) if p.key() == key),
        )],
        Change::NoPolicy(key) => vec![before(
            &|one| matches!(one, Change::Policy(p) if policy_key(p) == key),
        )],
    };
    back.into_iter().flatten().collect()
}
