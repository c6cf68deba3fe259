//! Keeps the redirect in the kernel while this daemon depends on it: missing or changed parts are counted and repaired;
//! if one cannot be repaired, the node is not ready.
//!
//! Does not know the contents of the sets; notifies the tasks that fill them when they have to do it again.
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use iptables_init::ruleset::Kernel;
use iptables_init::settings::Settings;
use iptables_init::watch::{Damage, Found, Part, Watch};
use tokio::sync::watch;
use tracing::warn;

use super::readiness::Readiness;
use super::reconcile::{Reconcile, reconcile};
use crate::enforcer::Enforcer;
use crate::telemetry::occasional::warn_occasionally;

const LOOK_EVERY: Duration = Duration::from_millis(500);
/// The pause before a second look for a missing table, rule or route: between the steps of `iptables-init uninstall` a
/// part is missing, and must not be repaired.
const LOOK_AGAIN: Duration = Duration::from_millis(300);
/// The pause after a failed repair.
const RETRY: Duration = Duration::from_secs(1);
/// At most one repair is logged in this time; all faults are counted.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// The redirect as it was when this daemon began to depend on it.
pub(crate) struct Redirect {
    watch: Watch,
    renewed: watch::Sender<()>,
    /// What the last look found.
    damages: Vec<Damage>,
    said: Option<Instant>,
}

impl Redirect {
    /// Takes the redirect as it is now.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn now(settings: &Settings, kernel: Kernel) -> anyhow::Result<Self> {
        let watch = Watch::begin(settings, kernel);
        Ok(Self {
            watch: watch.context("cannot ask the kernel for its tables (nf_tables)")?,
            renewed: watch::Sender::new(()),
            damages: Vec::new(),
            said: None,
        })
    }

    /// Notifies the receiver when the sets have to be filled again.
    pub(crate) fn renewed(&self) -> watch::Receiver<()> {
        self.renewed.subscribe()
    }

    /// Watches without end.
    pub(crate) async fn watch(self, readiness: Readiness, enforcer: Arc<Enforcer>) {
        let watched = Watched {
            redirect: self,
            readiness: readiness.clone(),
            enforcer,
        };
        reconcile(watched, readiness, "watches the redirect").await;
    }

    /// Looks, and repairs the damage; a missing table, rule or route only at the second look. Returns the pause before
    /// the next look.
    fn step(&mut self, readiness: &Readiness, enforcer: &Enforcer) -> Duration {
        let found = match self.watch.look() {
            Ok(found) => found,
            Err(error) => {
                readiness.found(Some(error.to_string()));
                return RETRY;
            }
        };
        let Found {
            damages,
            installed_again,
            counts_again,
        } = found;
        if counts_again {
            enforcer.metrics.redirect_fault(Part::Sysctl);
            warn_occasionally!(
                "sysctl net.netfilter.nf_conntrack_acct was set to 0, so records would lack bytes; this daemon has set it to 1 again: find out which software changes it"
            );
        }
        if installed_again {
            warn!("the redirect was installed again; this daemon fills its sets");
            self.renewed.send_replace(());
        }
        let before = std::mem::replace(&mut self.damages, damages);
        for new in self.damages.iter().filter(|it| !before.contains(it)) {
            enforcer.metrics.redirect_fault(new.part);
        }
        if self.damages.is_empty() {
            readiness.found(None);
            return LOOK_EVERY;
        }
        let reason = said(&self.damages);
        match self.damages.iter().all(|it| it.ours) {
            true => readiness.not_ready(reason),
            false => readiness.found(Some(reason)),
        }
        if !self.damages.iter().any(|it| it.ours) {
            return LOOK_EVERY;
        }
        let in_steps = [Part::Table, Part::IpRule, Part::Route];
        if self.damages.iter().any(|it| in_steps.contains(&it.part)) && self.damages != before {
            return LOOK_AGAIN;
        }
        self.put_back(readiness)
    }

    fn put_back(&mut self, readiness: &Readiness) -> Duration {
        let damages: Vec<_> = self.damages.extract_if(.., |it| it.ours).collect();
        if let Err(error) = self.watch.put_back(&damages) {
            let reason = format!(
                "{}, and the daemon cannot repair it: {error}",
                said(&damages)
            );
            readiness.found(Some(reason));
            self.damages.extend(damages);
            return RETRY;
        }
        let in_tables = [Part::Table, Part::Rules, Part::Elements];
        if damages.iter().any(|it| in_tables.contains(&it.part)) {
            // Flows that began without the rules are evaluated when the sets are filled again.
            self.renewed.send_replace(());
        }
        if self.said.is_none_or(|said| said.elapsed() > SAY_EVERY) {
            self.said = Some(Instant::now());
            warn!(
                "{}; this daemon has repaired it: find out which software removes or changes it",
                said(&damages)
            );
        }
        // The next look checks the repair.
        LOOK_AGAIN
    }
}

/// The redirect, and where its state is reported.
struct Watched {
    redirect: Redirect,
    readiness: Readiness,
    enforcer: Arc<Enforcer>,
}

impl Reconcile for Watched {
    /// The pause before the next look.
    type Synced = Duration;

    fn sync(&mut self) -> Duration {
        self.redirect.step(&self.readiness, &self.enforcer)
    }

    async fn until_due(&mut self, pause: Duration) -> ControlFlow<()> {
        tokio::time::sleep(pause).await;
        ControlFlow::Continue(())
    }
}

/// All damages in one line.
fn said(damages: &[Damage]) -> String {
    let (sentences, parts): (Vec<_>, Vec<_>) = damages.iter().partition(|it| is_sentence(it));
    let mut said: Vec<_> = sentences.iter().map(|it| it.what.clone()).collect();
    if !parts.is_empty() {
        let mut list: Vec<_> = parts.iter().map(|it| it.what.as_str()).collect();
        list.sort_unstable();
        let more = list.len().saturating_sub(MOST_NAMED);
        list.truncate(MOST_NAMED);
        let mut list = list.join(", ");
        if more > 0 {
            list += &format!(" and {more} more");
        }
        let remedy = match parts.iter().all(|it| it.ours) {
            true => "",
            false => {
                "; run `iptables-init install` (in a cluster: delete this pod, and the next one does it), and find out which software removes or changes it"
            }
        };
        said.insert(
            0,
            format!("the redirect was removed from the kernel or changed, so policies may not hold on this node: {list}{remedy}"),
        );
    }
    said.join(". ")
}

/// Parts that are named before the rest is counted.
const MOST_NAMED: usize = 6;

/// Whether the text already has a problem and a remedy.
fn is_sentence(damage: &Damage) -> bool {
    damage.what.contains("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn damage(part: Part, what: &str, ours: bool) -> Damage {
        Damage {
            part,
            what: what.to_owned(),
            ours,
        }
    }

    #[test]
    fn damage_that_stays_names_its_remedy() {
        let table = |ours| damage(Part::Table, "nft table portreeve", ours);
        let sysctl = damage(Part::Sysctl, "sysctl x is 1: bad; set it to 0", false);
        for (damages, expected) in [
            (
                vec![table(false)],
                "nft table portreeve; run `iptables-init install`",
            ),
            (vec![table(true)], "nft table portreeve"),
            (
                vec![table(true), sysctl],
                "nft table portreeve. sysctl x is 1: bad; set it to 0",
            ),
        ] {
            let said = said(&damages);
            assert!(said.contains(expected), "{said}");
        }
        let many: Vec<_> = (0..9)
            .map(|n| damage(Part::Rules, &n.to_string(), true))
            .collect();
        assert!(said(&many).ends_with("0, 1, 2, 3, 4, 5 and 3 more"));
    }
}
