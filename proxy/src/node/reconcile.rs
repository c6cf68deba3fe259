//! The loop of each task that keeps a part of the kernel in sync with its source.
use std::ops::ControlFlow;

use super::readiness::Readiness;

/// A part of the kernel and its source.
pub(crate) trait Reconcile: Send + Sized + 'static {
    /// The result of a sync.
    type Synced: Send + 'static;

    /// Brings the kernel in sync with the source. May block.
    fn sync(&mut self) -> Self::Synced;

    /// Reports the result of a sync, and waits until the next one is due. Break: none will be.
    fn until_due(&mut self, synced: Self::Synced) -> impl Future<Output = ControlFlow<()>> + Send;
}

/// Syncs each time that it is due. If a sync panics its state is lost, and the runtime has logged where: then, as at the
/// end, the node is not ready, because this daemon no longer does its `task`.
pub(crate) async fn reconcile(mut part: impl Reconcile, readiness: Readiness, task: &str) {
    loop {
        let step = tokio::task::spawn_blocking(move || {
            let synced = part.sync();
            (part, synced)
        });
        let Ok((same, synced)) = step.await else {
            break;
        };
        part = same;
        if part.until_due(synced).await.is_break() {
            break;
        }
    }
    readiness.not_ready(format!("this daemon no longer {task}; restart it"));
}
