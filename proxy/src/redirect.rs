//! Keeps the redirect in the kernel while this daemon depends on it: what others take away or change is put back and
//! counted; what cannot be is why this node is not ready.
//!
//! Knows not what the sets hold; who fills them is told when they are to be filled again.
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use iptables_init::ruleset::Kernel;
use iptables_init::settings::Settings;
use iptables_init::watch::{Damage, Found, Part, Watch};
use tokio::sync::watch;
use tracing::warn;

use crate::enforcer::Enforcer;
use crate::readiness::Readiness;

const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A table, rule or route that is gone is looked for once more before it is put back: `iptables-init uninstall`
/// takes some steps, between which a part is missing.
const LOOK_AGAIN: Duration = Duration::from_millis(300);
/// How soon what could not be put back is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// Who takes the same away again and again gets one line in the log in this time; all are counted.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// The redirect, as it was when this daemon began to depend on it.
pub(crate) struct Redirect {
    watch: Watch,
    renewed: watch::Sender<()>,
    /// What the last look found.
    damages: Vec<Damage>,
    said: Option<Instant>,
}

impl Redirect {
    /// As it is now.
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

    /// Tells when the sets of the tables are to be filled again.
    pub(crate) fn renewed(&self) -> watch::Receiver<()> {
        self.renewed.subscribe()
    }

    /// Watches without end.
    pub(crate) async fn watch(mut self, readiness: Readiness, enforcer: Arc<Enforcer>) {
        loop {
            let step = {
                let (readiness, enforcer) = (readiness.clone(), Arc::clone(&enforcer));
                tokio::task::spawn_blocking(move || {
                    let pause = self.step(&readiness, &enforcer);
                    (self, pause)
                })
            };
            // If it panicked it took everything with it; the runtime has said where.
            let Ok((next, pause)) = step.await else {
                return readiness
                    .not_ready("this daemon no longer watches the redirect; restart it");
            };
            self = next;
            tokio::time::sleep(pause).await;
        }
    }

    /// Looks, and puts back what was damaged at the last look too. Returns when to look next.
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
        } = found;
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
            // What began without the rules is judged when the sets are filled again.
            self.renewed.send_replace(());
        }
        if self.said.is_none_or(|said| said.elapsed() > SAY_EVERY) {
            self.said = Some(Instant::now());
            warn!(
                "{}; this daemon has repaired it: find out which software removes or changes it",
                said(&damages)
            );
        }
        // The next look says whether all is well.
        LOOK_AGAIN
    }
}

/// All of it in one line.
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

/// Whether it says problem and remedy itself.
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
