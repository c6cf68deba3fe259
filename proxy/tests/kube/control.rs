//! The one control plane of all tests: started by the first, emptied for each.
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lab::Cluster;
use lab::kubernetes::ControlPlane;
use tempfile::TempDir;

/// The control plane and its directory, ended in this order.
struct Shared {
    control: Arc<ControlPlane>,
    _directory: TempDir,
}

static SHARED: Mutex<Option<Shared>> = Mutex::new(None);

/// The control plane without objects of earlier tests, on the network of `cluster`.
pub(crate) fn joined(cluster: &Cluster) -> Arc<ControlPlane> {
    let control = {
        let mut shared = shared();
        let shared = shared.get_or_insert_with(|| {
            let directory = TempDir::new().unwrap();
            let control = ControlPlane::start(directory.path());
            Shared {
                control: Arc::new(control.unwrap_or_else(|error| panic!("{error}"))),
                _directory: directory,
            }
        });
        Arc::clone(&shared.control)
    };
    control.publish(&[]).unwrap();
    control.join(cluster).unwrap();
    control
}

/// Ends it; a static value is never dropped.
pub(crate) fn stop() {
    drop(shared().take());
}

fn shared() -> MutexGuard<'static, Option<Shared>> {
    SHARED.lock().unwrap_or_else(PoisonError::into_inner)
}
