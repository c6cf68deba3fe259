//! Creates many objects with as many concurrent requests as the API server can use.
//!
//! Knows no order among the objects.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use serde_json::{Value, json};

use super::api::Api;
use super::error::KubernetesError;
use super::{objects, state};

/// Concurrent requests; more do not make the API server faster.
const AT_ONCE: usize = 8;

pub(super) fn create(api: &Api, objects: &[Value]) -> Result<(), KubernetesError> {
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(object) = objects.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = create_one(api, object) {
                // The others stop, too.
                next.store(objects.len(), Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        let join = |worker: thread::ScopedJoinHandle<'_, _>| match worker.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        workers.into_iter().try_for_each(join)
    })
}

fn create_one(api: &Api, object: &Value) -> Result<(), KubernetesError> {
    let path = objects::path(object)?;
    let (body, status) = state::split(object);
    let (collection, _name) = path.rsplit_once('/').unwrap_or((&path, ""));
    api.request("POST", collection, Some(&body))?;
    // A namespace's status is the API server's own.
    if !status.is_null() && object["kind"] != "Namespace" {
        let status = json!({ "status": status });
        api.request("PATCH", &format!("{path}/status"), Some(&status))?;
    }
    Ok(())
}
