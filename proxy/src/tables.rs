//! Watches whether the kernel's tables are those that this daemon has filled: who flushes the node's whole ruleset takes
//! policy with it, and tables that are installed anew lack what changed meanwhile.
//!
//! Knows not what they hold; who fills them is told.
use std::io;
use std::time::Duration;

use iptables_init::presence;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tracing::warn;

use crate::readiness::Readiness;

const LOOK_EVERY: Duration = Duration::from_secs(1);
const TAKEN_AWAY: &str = "the redirect was taken out of the kernel under this daemon, so policy holds for nobody on this node; run `iptables-init install` (in a cluster: delete this pod, the next one does), and find out who flushes foreign nft tables";

/// The tables, as they were when the daemon began to fill them.
pub(crate) struct Tables {
    handles: Vec<u64>,
    renewed: watch::Sender<()>,
}

impl Tables {
    /// Those that are there.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn now() -> io::Result<Self> {
        Ok(Self {
            handles: presence::handles()?,
            renewed: watch::Sender::new(()),
        })
    }

    /// Tells when others have taken their place, which are to be filled again.
    pub(crate) fn renewed(&self) -> watch::Receiver<()> {
        self.renewed.subscribe()
    }

    /// Watches without end.
    pub(crate) async fn watch(mut self, readiness: Readiness) {
        let mut every = tokio::time::interval(LOOK_EVERY);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            every.tick().await;
            readiness.found(self.look().err());
        }
    }

    fn look(&mut self) -> Result<(), String> {
        let unknown =
            |error| format!("the kernel does not tell whether the redirect is there: {error}");
        let handles = presence::handles().map_err(unknown)?;
        if handles.len() < self.handles.len() {
            return Err(TAKEN_AWAY.to_owned());
        }
        if handles != self.handles {
            warn!("the redirect was installed anew under this daemon, which fills its sets again");
            self.handles = handles;
            self.renewed.send_replace(());
        }
        Ok(())
    }
}
