//! Watches the installed redirect for a daemon that depends on it: finds missing or changed parts, and repairs them.
//!
//! A look asks the kernel by netlink and reads sysctls: some ten microseconds while nothing has changed. `nft` and `ip`
//! run only if something is wrong. Knows neither pods nor policies; [`elements`] knows the contents of the sets.
use std::io;
use std::path::Path;
use std::time::Duration;

use kernel::command::CommandError;
use kernel::elements;
use kernel::names::TABLE;
use kernel::nf_tables;

use crate::conntrack_acct;
use crate::contents::Contents;
use crate::inspect::{Finding, breaking_sysctls, interfaces, validates_by_mark};
use crate::lookup;
use crate::nft_table::{Loaded, Stamp};
use crate::redirect::{self, RedirectError};
use crate::routes::{self, Family, State};
use crate::ruleset::{Kernel, Ruleset};
use crate::settings::Settings;

const NET: &str = "/proc/sys/net";
/// A daemon has looked twice within this time.
pub(crate) const SEEN_WITHIN: Duration = Duration::from_millis(1200);
/// Links whose sysctls are read at one look, unless there are more than [`LOOKS`] times as many.
const LINKS: usize = 64;
/// Looks in which the sysctls of all links are read. With one every half second, none is wrong for two seconds.
const LOOKS: usize = 3;
/// Settings that apply to all links; read at every look.
const ALWAYS: [&str; 2] = ["all", "default"];

/// A part of the redirect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// An nft table.
    Table,
    /// Rules, chains, hooks or declared sets of a table.
    Rules,
    /// Elements of sets.
    Elements,
    /// The `ip rule` for diverted packets.
    IpRule,
    /// The route for diverted packets.
    Route,
    /// Rule and route are there, but another one takes precedence.
    Shadowed,
    /// A sysctl with which the redirect does not work.
    Sysctl,
}

impl Part {
    /// Every one of them, in the order in which they are declared.
    pub const ALL: [Self; 7] = [
        Self::Table,
        Self::Rules,
        Self::Elements,
        Self::IpRule,
        Self::Route,
        Self::Shadowed,
        Self::Sysctl,
    ];

    /// Its name as a metric's label.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Table => "table",
            Self::Rules => "rules",
            Self::Elements => "elements",
            Self::IpRule => "ip_rule",
            Self::Route => "route",
            Self::Shadowed => "shadowed",
            Self::Sysctl => "sysctl",
        }
    }
}

/// A part that is missing or changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Which part of the redirect.
    pub part: Part,
    /// The part by name, or a problem and its remedy.
    pub what: String,
    /// Whether [`Watch::put_back`], or filling the sets again, can undo it.
    pub ours: bool,
}

/// What a look found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Empty: all is as it was installed.
    pub damages: Vec<Damage>,
    /// The tables were installed again: their sets have to be filled.
    pub installed_again: bool,
    /// Conntrack's counting of bytes was off, and is on again.
    pub counts_again: bool,
}

/// Why a look or a repair failed.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The kernel cannot be asked.
    #[error("cannot ask the kernel whether the redirect is there: {0}")]
    Kernel(#[from] io::Error),
    /// `nft` or `ip` failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// It could not be installed.
    #[error(transparent)]
    Redirect(#[from] RedirectError),
}

/// The redirect as it was when it was last complete.
#[derive(Debug)]
pub struct Watch {
    settings: Settings,
    stamp: Stamp,
    wanted: Contents,
    /// Whether `wanted` has been compared with what `install` noted.
    checked: bool,
    /// Of the tables when they were last found complete; `None` if they have to be read.
    generation: Option<u32>,
    /// The last look found an installation in progress.
    unfinished: bool,
    /// A look found that `uninstall` has marked the tables.
    leaving: bool,
    /// Whether conntrack counted when this began.
    counts: bool,
    /// The links whose sysctls are still to be read in this round, and how many of them at a look.
    links: Vec<String>,
    at_a_look: usize,
    /// Those whose sysctls break the redirect.
    broken: Vec<String>,
}

impl Watch {
    /// Takes the present state as complete if the first look confirms it, and forgets which elements this process loaded
    /// while it enforced before.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn begin(settings: &Settings, kernel: Kernel) -> io::Result<Self> {
        elements::forget();
        let (_, wanted) = Contents::read()?;
        Ok(Self {
            settings: settings.clone(),
            stamp: Stamp::of(&Ruleset::new(settings, kernel)),
            wanted,
            checked: false,
            generation: None,
            unfinished: false,
            leaving: false,
            counts: conntrack_acct::is_on(),
            links: Vec::new(),
            at_a_look: LINKS,
            broken: Vec::new(),
        })
    }

    /// Looks at everything, but at each look only at the sysctls of some links. Blocks: see above.
    ///
    /// # Errors
    /// If the kernel, `nft` or `ip` cannot be asked.
    pub fn look(&mut self) -> Result<Found, WatchError> {
        let mut found = Found::default();
        self.tables(&mut found)?;
        if self.settings.tcp.has_proxy() {
            for family in routes::enabled_families() {
                self.routing(family, &mut found)?;
            }
            self.sysctls(&mut found);
        }
        // A daemon must not repair what is uninstalled.
        if !found.damages.is_empty() && self.is_uninstalled(&found.damages)? {
            found.damages.iter_mut().for_each(|it| it.ours = false);
        }
        if self.counts && !conntrack_acct::is_on() {
            conntrack_acct::switch_on_again()?;
            self.counts = conntrack_acct::is_on();
            found.counts_again = self.counts;
        }
        Ok(found)
    }

    /// Repairs those of `damages` that are ours, except for elements of sets. Blocks for as long as `nft` and `ip`
    /// take.
    ///
    /// # Errors
    /// What [`redirect::install`] says.
    pub fn put_back(&mut self, damages: &[Damage]) -> Result<(), WatchError> {
        let any = |parts: &[Part]| damages.iter().any(|it| it.ours && parts.contains(&it.part));
        self.generation = None;
        if any(&[Part::Table, Part::Rules]) {
            redirect::install(&self.settings)?;
        } else if any(&[Part::IpRule, Part::Route]) {
            redirect::install_routes(&self.settings)?;
        }
        Ok(())
    }

    fn tables(&mut self, found: &mut Found) -> Result<(), WatchError> {
        if self.generation == Some(nf_tables::generation()?) {
            return Ok(());
        }
        self.generation = None;
        let (generation, now) = match Contents::read() {
            // Other software keeps changing its tables: the next look will succeed.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => return Ok(()),
            read => read?,
        };
        // It may have changed since somebody looked whether this daemon can begin.
        if now != self.wanted || !self.checked {
            self.compare(now, found)?;
            if self.unfinished {
                return Ok(());
            }
            self.checked |= found.damages.is_empty();
        }
        self.leaving &= !found.damages.is_empty();
        if found.damages.is_empty() {
            match elements::differing()? {
                // The next look will tell.
                None => return Ok(()),
                Some(sets) => found.damages.extend(sets.into_iter().map(|set| Damage {
                    part: Part::Elements,
                    what: format!("elements of nft set {set}"),
                    ours: true,
                })),
            }
        }
        if found.damages.is_empty() {
            self.generation = Some(generation);
        }
        Ok(())
    }

    fn sysctls(&mut self, found: &mut Found) {
        let net = Path::new(NET);
        if self.links.is_empty() {
            self.links = interfaces(net);
            self.at_a_look = self.links.len().div_ceil(LOOKS).max(LINKS);
        }
        let rest = self.links.len().saturating_sub(self.at_a_look);
        let mut links = self.links.split_off(rest);
        links.extend(ALWAYS.map(str::to_owned));
        // A link that was wrong is read at every look until it is right.
        links.append(&mut self.broken);
        links.sort_unstable();
        links.dedup();
        links.retain(|it| validates_by_mark(net, it));
        self.broken = links;
        let sysctls = breaking_sysctls(net, &self.broken);
        found.damages.extend(sysctls.into_iter().map(of_sysctl));
    }

    /// Finds out why the kernel's tables differ from before.
    fn compare(&mut self, now: Contents, found: &mut Found) -> Result<(), WatchError> {
        if now.handles.len() < self.wanted.handles.len() {
            found.damages.push(Damage {
                part: Part::Table,
                what: format!("nft table {TABLE}"),
                ours: true,
            });
            return Ok(());
        }
        if now.leaving {
            self.leaving = true;
            found.damages.push(Damage {
                part: Part::Table,
                what: format!("nft table {TABLE} is being uninstalled"),
                ours: false,
            });
            return Ok(());
        }
        let loaded = Loaded::read()?;
        let loaded = loaded.as_ref();
        let stamp = loaded.and_then(|it| it.stamp.as_ref());
        let noted = loaded.and_then(|it| it.noted);
        // `install` stores the digest right after it has loaded the tables.
        let installing = stamp.is_some() && noted.is_none();
        if installing && !std::mem::replace(&mut self.unfinished, installing) {
            return Ok(());
        }
        self.unfinished = installing;
        if noted != Some(now.digest()) {
            // Only the version that installed the tables can repair them.
            let ours = stamp.is_none_or(|it| *it == self.stamp);
            let mut parts = now.differing(&self.wanted);
            if parts.is_empty() {
                parts.push(format!("rules of table {TABLE}"));
            }
            found.damages.extend(parts.into_iter().map(|part| Damage {
                part: Part::Rules,
                what: format!("nft {part}"),
                ours,
            }));
            return Ok(());
        }
        if !stamp.is_some_and(|it| it.has_settings_of(&self.stamp)) {
            found.damages.push(Damage {
                part: Part::Table,
                what: "the redirect was installed again, with other flags than this daemon's; run `iptables-init install` with the daemon's flags, or start the daemon with the other ones".to_owned(),
                ours: false,
            });
            return Ok(());
        }
        found.installed_again = now != self.wanted;
        self.wanted = now;
        Ok(())
    }

    fn routing(&self, family: Family, found: &mut Found) -> Result<(), WatchError> {
        let marks = self.settings.mark_mask;
        if lookup::diverts(family, marks)? {
            return Ok(());
        }
        let state = State::read(family)?;
        let name = family.name();
        let before = found.damages.len();
        if !state.has_rule(marks) {
            found.damages.push(Damage {
                part: Part::IpRule,
                what: format!("the {name} `ip rule` for diverted packets"),
                ours: true,
            });
        }
        if !state.route {
            found.damages.push(Damage {
                part: Part::Route,
                what: format!("the {name} route for diverted packets"),
                ours: true,
            });
        }
        if found.damages.len() == before && !lookup::diverts(family, marks)? {
            let (what, remedy) = routes::shadowed(family);
            found.damages.push(Damage {
                part: Part::Shadowed,
                what: format!("{what}; {remedy}"),
                ours: false,
            });
        }
        Ok(())
    }

    /// Whether `iptables-init uninstall` removes the missing parts: it marks the tables first, then removes the routes
    /// if there are any, and deletes the tables last.
    fn is_uninstalled(&self, damages: &[Damage]) -> Result<bool, WatchError> {
        let gone = |part| damages.iter().filter(|it| it.part == part).count();
        let families = routes::enabled_families().count();
        if gone(Part::Table) > 0 && gone(Part::IpRule) == families && gone(Part::Route) == families
        {
            return Ok(true);
        }
        let any = gone(Part::IpRule) + gone(Part::Route) > 0;
        Ok(self.leaving || any && Loaded::read()?.is_some_and(|it| it.leaving))
    }
}

fn of_sysctl(finding: Finding) -> Damage {
    Damage {
        part: Part::Sysctl,
        what: format!("{}; {}", finding.problem, finding.remedy),
        ours: false,
    }
}
