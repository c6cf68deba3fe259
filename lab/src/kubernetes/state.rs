//! The lab's objects in the API, and how they are updated: only differences are sent.
//!
//! Knows the order that the API asks for: a namespace and its ServiceAccount before a pod.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::api::Api;
use super::error::KubernetesError;
use super::objects;

/// Namespaces that the API server keeps for itself.
const OWN: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

/// An object's position in the order of writes, and its path.
type Place = (u8, String);

/// Objects by place, as they were written last.
#[derive(Debug, Default)]
pub(super) struct State(BTreeMap<Place, Value>);

impl State {
    pub(super) fn become_these(
        &mut self,
        api: &Api,
        objects: &[Value],
    ) -> Result<(), KubernetesError> {
        let wanted = complete(objects)?;
        let gone: Vec<Place> = self
            .0
            .keys()
            .filter(|place| !wanted.contains_key(place))
            .rev()
            .cloned()
            .collect();
        for place in gone {
            self.delete(api, &place)?;
        }
        for (place, object) in wanted {
            self.write(api, place, object)?;
        }
        Ok(())
    }

    fn write(&mut self, api: &Api, place: Place, object: Value) -> Result<(), KubernetesError> {
        let mut known = self.0.get(&place);
        if known == Some(&object) {
            return Ok(());
        }
        // A pod's specification cannot be changed: it is another pod.
        if object["kind"] == "Pod" && known.is_some_and(|known| known["spec"] != object["spec"]) {
            self.delete(api, &place)?;
            known = None;
        }
        let (body, status) = split(&object);
        if known.is_none_or(|known| split(known).0 != body) {
            api.apply(&place.1, &body)?;
        }
        // A namespace's status is the API server's own.
        if object["kind"] != "Namespace"
            && !status.is_null()
            && known.is_none_or(|known| known["status"] != status)
        {
            let path = format!("{}/status", place.1);
            api.request("PATCH", &path, Some(&json!({ "status": status })))?;
        }
        self.0.insert(place, object);
        Ok(())
    }

    fn delete(&mut self, api: &Api, place: &Place) -> Result<(), KubernetesError> {
        let Some(object) = self.0.remove(place) else {
            return Ok(());
        };
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let namespace = object["kind"] == "Namespace";
        if namespace && OWN.contains(&name) {
            return Ok(());
        }
        // At once, as after a kubelet's confirmation.
        let options = json!({ "gracePeriodSeconds": 0 });
        match api.request("DELETE", &place.1, Some(&options)) {
            Err(KubernetesError::Refused { status: 404, .. }) => return Ok(()),
            other => other?,
        };
        if namespace {
            // The namespace controller's part, once nothing is in it.
            let mut emptied = objects::namespace(name);
            emptied["spec"] = json!({ "finalizers": [] });
            api.request("PUT", &format!("{}/finalize", place.1), Some(&emptied))?;
        }
        Ok(())
    }
}

/// The objects with those that controllers would add.
fn complete(objects: &[Value]) -> Result<BTreeMap<Place, Value>, KubernetesError> {
    let mut all = BTreeMap::new();
    let mut add = |object: Value| -> Result<(), KubernetesError> {
        let place = (turn(&object), objects::path(&object)?);
        all.entry(place).or_insert(object);
        Ok(())
    };
    let pods: Vec<&Value> = objects.iter().filter(|it| it["kind"] == "Pod").collect();
    for object in objects {
        add(cleaned(object))?;
        if object["kind"] == "Service" {
            let slices = objects::endpoint_slices(object, &pods);
            slices.into_iter().try_for_each(&mut add)?;
        }
    }
    for object in objects {
        let metadata = &object["metadata"];
        let namespace = match object["kind"].as_str() {
            Some("Namespace") => metadata["name"].as_str(),
            _ => metadata["namespace"].as_str(),
        };
        if let Some(namespace) = namespace {
            add(objects::namespace(namespace))?;
            add(objects::default_account(namespace))?;
        }
    }
    Ok(all)
}

/// Writes come in this order, deletes in the reverse one.
fn turn(object: &Value) -> u8 {
    match object["kind"].as_str() {
        Some("Namespace") => 0,
        Some("ServiceAccount") => 1,
        _ => 2,
    }
}

/// Without what only the API server may choose.
fn cleaned(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(metadata) = object["metadata"].as_object_mut() {
        for key in ["uid", "resourceVersion", "creationTimestamp"] {
            metadata.remove(key);
        }
    }
    object
}

/// What is written to the object, and what to its status.
pub(super) fn split(object: &Value) -> (Value, Value) {
    let mut body = object.clone();
    let status = body.as_object_mut().and_then(|it| it.remove("status"));
    (body, status.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pod_adds_its_namespace_and_service_account() {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "namespace": "x", "name": "a", "uid": "u" },
        });
        let all = complete(&[pod]).unwrap();
        let paths: Vec<_> = all.keys().map(|(_, path)| path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "/api/v1/namespaces/x",
                "/api/v1/namespaces/x/serviceaccounts/default",
                "/api/v1/namespaces/x/pods/a",
            ]
        );
        assert!(
            all.values()
                .all(|object| object["metadata"].get("uid").is_none())
        );
    }

    #[test]
    fn described_namespace_keeps_its_labels() {
        let namespace = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": { "name": "x", "labels": { "team": "red" } },
        });
        let policy = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": { "namespace": "x", "name": "p" },
        });
        for order in [[&policy, &namespace], [&namespace, &policy]] {
            let all = complete(&order.map(Clone::clone)).unwrap();
            let (_, first) = all.first_key_value().unwrap();
            assert_eq!(first["metadata"]["labels"]["team"], "red");
        }
    }
}
