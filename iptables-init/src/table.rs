//! The nft table in the kernel: which one is there, and how one takes the place of another.
//!
//! A chain with one commented rule tells what was loaded, so that loading it again can be left out.
use std::net::IpAddr;

use serde_json::Value;

use crate::command::{self, CommandError, Program};
use crate::ruleset::{QUEUE_CHAIN, QueueRule, Ruleset, TABLE};
use crate::sets::elements;

/// The chain whose one rule never runs and carries the [`Stamp`] as its comment.
pub(crate) const STAMP_CHAIN: &str = "installed_by";

/// What a loaded table was made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Hash of what cannot be changed in place: the declarations of chains, sets and counters.
    layout: String,
    /// Hash of everything.
    content: String,
}

impl Stamp {
    pub(crate) fn of(ruleset: &Ruleset) -> Self {
        let text = format!("{ruleset}\n# {:?}", ruleset.queue());
        let declarations = text.lines().map(str::trim).filter(|line| {
            ["chain ", "set ", "type "]
                .iter()
                .any(|word| line.starts_with(word))
                || (line.starts_with("counter ") && line.ends_with('}'))
        });
        Self {
            layout: fnv1a(&declarations.collect::<String>()),
            content: fnv1a(&text),
        }
    }

    fn parse(comment: &str) -> Option<Self> {
        let mut words = comment
            .strip_prefix("portreeve layout ")?
            .split(" content ");
        let stamp = Self {
            layout: words.next()?.to_owned(),
            content: words.next()?.to_owned(),
        };
        Some(stamp)
    }
}

impl std::fmt::Display for Stamp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "portreeve layout {} content {}",
            self.layout, self.content
        )
    }
}

/// Our table as the kernel lists it.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    /// `None`: made by something else, or tampered with.
    pub(crate) stamp: Option<Stamp>,
    objects: Vec<Value>,
}

impl Loaded {
    /// Reads it; `None` if there is no such table.
    pub(crate) fn read() -> Result<Option<Self>, CommandError> {
        let listing = match command::run(Program::Nft, &["-j", "list", "table", "inet", TABLE], "")
        {
            Ok(listing) => listing,
            Err(CommandError::Refused { message, .. }) if message.contains("No such file") => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let mut listing: Value =
            serde_json::from_str(&listing).map_err(|source| CommandError::Run {
                program: Program::Nft,
                source: source.into(),
            })?;
        let objects: Vec<Value> = match listing["nftables"].take() {
            Value::Array(objects) => objects,
            _ => Vec::new(),
        };
        let stamp = objects
            .iter()
            .map(|object| &object["rule"])
            .filter(|rule| rule["chain"] == STAMP_CHAIN)
            .find_map(|rule| Stamp::parse(rule["comment"].as_str()?));
        Ok(Some(Self { stamp, objects }))
    }

    /// How many rules each chain of `ruleset` lacks or has too many; the queue chain apart.
    pub(crate) fn tampered_chain(&self, ruleset: &Ruleset) -> Option<String> {
        let text = ruleset.to_string();
        rules_by_chain(&text)
            .into_iter()
            .find_map(|(chain, wanted)| {
                let rules = self.objects.iter().map(|object| &object["rule"]);
                let there = rules.filter(|rule| rule["chain"] == chain.as_str()).count();
                (there != wanted && chain != QUEUE_CHAIN).then_some(chain)
            })
    }

    fn names<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a str> {
        self.objects
            .iter()
            .filter_map(move |object| object[kind]["name"].as_str())
    }
}

/// The nft script that loads `ruleset` where there is none.
pub(crate) fn create_script(ruleset: &Ruleset) -> String {
    format!(
        "{ruleset}\ntable inet {TABLE} {{\n\tchain {STAMP_CHAIN} {{\n\t\treturn comment \"{}\"\n\t}}\n}}\n",
        Stamp::of(ruleset)
    )
}

/// The nft script that puts `ruleset` in the place of `loaded`, in one transaction. The sets keep
/// their elements.
///
/// # Errors
/// [`UnknownElement`] rather than to leave one out: a pod's address could be among them.
pub(crate) fn replace_script(loaded: &Loaded, ruleset: &Ruleset) -> Result<String, UnknownElement> {
    let new = create_script(ruleset);
    if loaded
        .stamp
        .as_ref()
        .is_some_and(|stamp| stamp.layout == Stamp::of(ruleset).layout)
    {
        return Ok(swap_rules(loaded, ruleset) + &new);
    }
    // The daemon may change a set between the listing and this; it fills its sets anew when it
    // starts, which an upgrade that changes the layout calls for anyway.
    let mut script = format!("delete table inet {TABLE}\n{new}");
    for object in &loaded.objects {
        let set = &object["set"];
        let Some(name) = set["name"].as_str().filter(|name| declares_set(&new, name)) else {
            continue;
        };
        let listed = set["elem"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        let listed: Result<Vec<_>, _> = listed
            .iter()
            .map(|value| {
                let unknown = || UnknownElement {
                    set: name.to_owned(),
                    element: value.to_string(),
                };
                element(value).ok_or_else(unknown)
            })
            .collect();
        elements(&mut script, "add", name, listed?.into_iter());
    }
    Ok(script)
}

/// A set holds what this version cannot carry over.
#[derive(Debug, thiserror::Error)]
#[error(
    "set {set} of nft table inet {TABLE} holds {element}, which cannot be carried over; run `iptables-init uninstall` and install again"
)]
pub struct UnknownElement {
    /// The set.
    pub set: String,
    /// The element as nft lists it.
    pub element: String,
}

/// Empties every chain in place, so that neither a queued packet nor a set element is lost.
fn swap_rules(loaded: &Loaded, ruleset: &Ruleset) -> String {
    loaded
        .names("chain")
        // The netlink rule is replaced on its own, at once.
        .filter(|name| *name != QUEUE_CHAIN || ruleset.queue_rule() == QueueRule::Native)
        .map(|name| format!("flush chain inet {TABLE} {name}\n"))
        .collect()
}

fn declares_set(script: &str, name: &str) -> bool {
    script.contains(&format!("\tset {name} {{"))
}

/// An element of a set from `nft -j` to the nft language.
fn element(value: &Value) -> Option<String> {
    if let Some(text) = value.as_str() {
        // The name of a link may hold anything.
        let address = text.parse::<IpAddr>().is_ok();
        return Some(if address {
            text.to_owned()
        } else {
            format!("\"{text}\"")
        });
    }
    if let Some(parts) = value["concat"].as_array() {
        return Some(
            parts
                .iter()
                .filter_map(element)
                .collect::<Vec<_>>()
                .join(" . "),
        );
    }
    if let Some([first, last]) = value["range"].as_array().map(Vec::as_slice) {
        return Some(format!("{}-{}", element(first)?, element(last)?));
    }
    let prefix = &value["prefix"];
    Some(format!(
        "{}/{}",
        prefix["addr"].as_str()?,
        prefix["len"].as_u64()?
    ))
}

/// How many rules each chain of a rendered table has.
fn rules_by_chain(text: &str) -> Vec<(String, usize)> {
    let mut chains: Vec<(String, usize)> = Vec::new();
    let mut inside = false;
    for line in text.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("chain ") {
            let name = rest.split(' ').next().unwrap_or_default();
            chains.push((name.to_owned(), 0));
            inside = !line.ends_with('}');
        } else if line == "}" {
            inside = false;
        } else if inside
            && !line.is_empty()
            && !line.starts_with("type ")
            && !line.starts_with('#')
            && let Some((_, count)) = chains.last_mut()
        {
            *count += 1;
        }
    }
    chains
}

/// FNV-1a, 64 bits (draft-eastlake-fnv): stable across builds, which std's hashers are not.
fn fnv1a(text: &str) -> String {
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::marks::Marks;
    use crate::settings::{Fail, Settings};

    fn settings() -> Settings {
        Settings {
            proxy_port: 15001,
            queue: 100,
            queues: Some(2),
            mark_mask: Marks::default(),
            bridge: Vec::new(),
            fail: Fail::Closed,
        }
    }

    #[test]
    fn every_setting_is_in_the_stamp_and_none_changes_the_layout() {
        let default = Stamp::of(&Ruleset::new(&settings(), QueueRule::Target));
        for (other, rule, what) in [
            (
                Settings {
                    proxy_port: 1,
                    ..settings()
                },
                QueueRule::Target,
                "port",
            ),
            (
                Settings {
                    queue: 1,
                    ..settings()
                },
                QueueRule::Target,
                "first queue",
            ),
            (
                Settings {
                    queues: Some(3),
                    ..settings()
                },
                QueueRule::Target,
                "queues",
            ),
            (
                Settings {
                    fail: Fail::Open,
                    ..settings()
                },
                QueueRule::Target,
                "fail",
            ),
            (settings(), QueueRule::Native, "way to queue"),
        ] {
            let other = Stamp::of(&Ruleset::new(&other, rule));
            assert_ne!(other.content, default.content, "{what}");
            assert_eq!(other.layout, default.layout, "{what}");
        }
    }

    #[test]
    fn a_stamp_is_read_as_it_was_written() {
        let stamp = Stamp::of(&Ruleset::new(&settings(), QueueRule::Target));
        assert_eq!(Stamp::parse(&stamp.to_string()), Some(stamp));
        assert_eq!(Stamp::parse("portreeve"), None);
    }

    #[test]
    fn elements_of_every_kind_are_written_as_nft_reads_them() {
        for (listed, expected) in [
            (r#""10.0.0.1""#, Some("10.0.0.1")),
            (r#""1veth@x""#, Some(r#""1veth@x""#)),
            (
                r#"{"prefix": {"addr": "10.0.0.0", "len": 24}}"#,
                Some("10.0.0.0/24"),
            ),
            (
                r#"{"range": ["10.0.0.0", "10.0.2.255"]}"#,
                Some("10.0.0.0-10.0.2.255"),
            ),
            (
                r#"{"concat": ["10.0.0.1", "10.0.0.1"]}"#,
                Some("10.0.0.1 . 10.0.0.1"),
            ),
            (r#"{"unheard": "of"}"#, None),
        ] {
            let value = serde_json::from_str(listed).unwrap();
            assert_eq!(element(&value).as_deref(), expected, "{listed}");
        }
    }

    #[test]
    fn rules_are_counted_without_comments_and_chain_types() {
        let text = "table inet x {\n chain a {\n type filter hook input priority 0;\n # why\n drop\n accept\n }\n chain b { type nat hook input priority 0; }\n chain c {\n }\n}";
        let expected = [("a", 2), ("b", 0), ("c", 0)].map(|(name, n)| (name.to_owned(), n));
        assert_eq!(rules_by_chain(text), expected);
    }
}
