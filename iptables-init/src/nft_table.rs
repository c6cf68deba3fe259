//! The nft tables in the kernel: reads and replaces them.
//!
//! A rule's comment records what was loaded, so that it is not loaded again.
use kernel::command::{self, CommandError, Program};
use kernel::names::{FAMILIES, TABLE};
use kernel::sets::{LINK_SOURCES, elements};
use serde_json::Value;

use crate::contents::Digest;
use crate::ruleset::{QUEUE_CHAIN, QueueRule, Ruleset};

/// The chain whose rules never run: one has the [`Stamp`] as its comment, another the digest of the kernel's tables.
pub(crate) const STAMP_CHAIN: &str = "installed_by";

/// The prefix of the comment with the digest of the kernel's tables after the installation.
const NOTED: &str = "portreeve holds ";

/// The comment of tables that are about to be removed.
pub(crate) const LEAVING: &str = "portreeve is being uninstalled";

/// What a loaded table was made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Hash of what cannot be changed in place: the declarations of chains, sets and counters.
    layout: String,
    /// Hash of everything.
    content: String,
    /// Hash of the settings; empty in tables of versions without it.
    settings: String,
}

impl Stamp {
    pub(crate) fn of(ruleset: &Ruleset) -> Self {
        let text = format!("{ruleset}\n# {:?}", ruleset.queue());
        let declarations = text.lines().map(str::trim).filter(|line| {
            ["table ", "chain ", "set ", "map ", "type "]
                .iter()
                .any(|word| line.starts_with(word))
                || (line.starts_with("counter ") && line.ends_with('}'))
        });
        Self {
            layout: fnv1a(&declarations.collect::<String>()),
            content: fnv1a(&text),
            settings: fnv1a(&ruleset.settings()),
        }
    }

    /// Whether both were made from the same settings, by whatever versions.
    pub(crate) fn has_settings_of(&self, other: &Self) -> bool {
        self.settings == other.settings
    }

    fn parse(comment: &str) -> Option<Self> {
        let (layout, rest) = comment
            .strip_prefix("portreeve layout ")?
            .split_once(" content ")?;
        let (content, settings) = rest.split_once(" settings ").unwrap_or((rest, ""));
        let [layout, content, settings] = [layout, content, settings].map(str::to_owned);
        Some(Self {
            layout,
            content,
            settings,
        })
    }
}

impl std::fmt::Display for Stamp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "portreeve layout {} content {} settings {}",
            self.layout, self.content, self.settings
        )
    }
}

/// Our tables as the kernel lists them.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    /// `None`: made by something else, or tampered with.
    pub(crate) stamp: Option<Stamp>,
    /// The digest of the kernel's tables after the installation; `None` if that was not finished.
    pub(crate) noted: Option<Digest>,
    /// They are about to be removed, by [`leaving_script`].
    pub(crate) leaving: bool,
    /// The families that there is a table of.
    families: Vec<&'static str>,
    objects: Vec<Value>,
}

impl Loaded {
    /// Reads them; `None` if there is no such table.
    pub(crate) fn read() -> Result<Option<Self>, CommandError> {
        let (mut families, mut objects) = (Vec::new(), Vec::new());
        for family in FAMILIES {
            if let Some(mut listed) = list(family)? {
                families.push(family);
                objects.append(&mut listed);
            }
        }
        if families.is_empty() {
            return Ok(None);
        }
        let comments = || {
            let rules = objects.iter().map(|object| &object["rule"]);
            let ours = rules.filter(|rule| rule["chain"] == STAMP_CHAIN);
            ours.filter_map(|rule| rule["comment"].as_str())
        };
        let stamp = comments().find_map(Stamp::parse);
        let noted = comments().find_map(|it| Digest::parse(it.strip_prefix(NOTED)?));
        let leaving = comments().any(|it| it == LEAVING);
        Ok(Some(Self {
            stamp,
            noted,
            leaving,
            families,
            objects,
        }))
    }

    /// A chain, with its table's family, whose number of rules differs from `ruleset`; the
    /// queue chain apart.
    pub(crate) fn tampered_chain(&self, ruleset: &Ruleset) -> Option<(String, String)> {
        let text = ruleset.to_string();
        rules_by_chain(&text)
            .into_iter()
            .find_map(|(family, chain, wanted)| {
                let rules = self.objects.iter().map(|object| &object["rule"]);
                let there = rules
                    .filter(|rule| rule["chain"] == chain && rule["family"] == family)
                    .count();
                (there != wanted && chain != QUEUE_CHAIN).then_some((family, chain))
            })
    }

    /// The nft script that removes all tables.
    pub(crate) fn delete_script(&self) -> String {
        let delete = |family: &&str| format!("delete table {family} {TABLE}\n");
        self.families.iter().map(delete).collect()
    }

    /// What a set of the table of `family` holds; nothing if there is none.
    pub(crate) fn strings<'a>(
        &'a self,
        family: &'a str,
        set: &'a str,
    ) -> impl Iterator<Item = &'a str> {
        let sets = self.objects.iter().map(|object| &object["set"]);
        sets.filter(move |it| it["family"] == family && it["name"] == set)
            .filter_map(|it| it["elem"].as_array())
            .flatten()
            .filter_map(Value::as_str)
    }
}

/// The objects of our table of a family; `None` if there is none.
fn list(family: &str) -> Result<Option<Vec<Value>>, CommandError> {
    let listing = match command::run(Program::Nft, &["-j", "list", "table", family, TABLE], "") {
        Ok(listing) => listing,
        Err(CommandError::Refused { message, .. })
            if message.contains("No such file") || message.contains("not supported") =>
        {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let mut listing: Value =
        serde_json::from_str(&listing).map_err(|source| CommandError::Run {
            program: Program::Nft,
            source: source.into(),
        })?;
    Ok(match listing["nftables"].take() {
        Value::Array(objects) => Some(objects),
        _ => Some(Vec::new()),
    })
}

/// The nft script that loads `ruleset` where there is none.
pub(crate) fn create_script(ruleset: &Ruleset) -> String {
    format!(
        "{ruleset}\ntable inet {TABLE} {{\n\tchain {STAMP_CHAIN} {{\n\t\treturn comment \"{}\"\n\t}}\n}}\n",
        Stamp::of(ruleset)
    )
}

/// The nft script that stores the digest of the kernel's tables after `ruleset` was loaded.
pub(crate) fn note_script(ruleset: &Ruleset, digest: Digest) -> String {
    let chain = format!("inet {TABLE} {STAMP_CHAIN}");
    let stamp = Stamp::of(ruleset);
    format!(
        "flush chain {chain}\nadd rule {chain} return comment \"{stamp}\"\nadd rule {chain} return comment \"{NOTED}{digest}\"\n"
    )
}

/// The nft script that marks the tables as about to be removed.
pub(crate) fn leaving_script() -> String {
    let chain = format!("inet {TABLE} {STAMP_CHAIN}");
    format!("flush chain {chain}\nadd rule {chain} return comment \"{LEAVING}\"\n")
}

/// The nft script that replaces `loaded` with `ruleset` in one transaction. The sets keep their elements, but
/// for those that time out: counts of the last seconds start at zero. `now` is the kernel's present state: if chains
/// and sets are unchanged, no chain is created again.
///
/// # Errors
/// [`UnknownElement`] rather than to leave one out: a pod's address could be among them.
pub(crate) fn replace_script(
    loaded: &Loaded,
    ruleset: &Ruleset,
    now: Digest,
) -> Result<String, UnknownElement> {
    let new = create_script(ruleset);
    let whole = loaded
        .noted
        .is_none_or(|noted| noted.declared == now.declared);
    if whole
        && loaded
            .stamp
            .as_ref()
            .is_some_and(|stamp| stamp.layout == Stamp::of(ruleset).layout)
    {
        return Ok(swap_rules(loaded, ruleset) + &new);
    }
    // The daemon may change a set between the listing and this; it fills its sets again when it
    // starts, which an upgrade that changes the layout calls for anyway.
    let mut script = loaded.delete_script() + &new;
    let declared = sets_by_table(&new);
    for object in &loaded.objects {
        let set = [&object["set"], &object["map"]]
            .into_iter()
            .find(|set| set.is_object());
        let Some(name) = set
            .filter(|set| set["timeout"].is_null())
            // Only saves a route lookup, and the daemon fills it again.
            .filter(|set| {
                !set["name"]
                    .as_str()
                    .is_some_and(|it| it.starts_with(LINK_SOURCES))
            })
            .and_then(set_name)
            .filter(|name| declared.contains(name))
        else {
            continue;
        };
        let set = set.unwrap_or(&Value::Null);
        let listed = set["elem"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        let listed: Result<Vec<_>, _> = listed
            .iter()
            .map(|value| {
                let unknown = || UnknownElement {
                    set: name.clone(),
                    element: value.to_string(),
                };
                let element = element(value).ok_or_else(unknown)?;
                let types = set["type"].as_array().map(Vec::as_slice);
                // A name can be an nft keyword.
                Ok(match types.unwrap_or_default().last() {
                    _ if set["type"] == LINK_NAMES => quoted(&element),
                    Some(last) if last == LINK_NAMES => last_quoted(&element),
                    _ => element,
                })
            })
            .collect();
        elements(&mut script, "add", &name, listed?.into_iter());
    }
    Ok(script)
}

/// The type of a set of links' names.
const LINK_NAMES: &str = "ifname";

/// `name` or `name : value` with the name in quotes.
fn quoted(element: &str) -> String {
    match element.split_once(" : ") {
        Some((name, value)) => format!("\"{name}\" : {value}"),
        None => format!("\"{element}\""),
    }
}

/// `key . name` with the name in quotes.
fn last_quoted(element: &str) -> String {
    match element.rsplit_once(" . ") {
        Some((key, name)) => format!("{key} . \"{name}\""),
        None => element.to_owned(),
    }
}

/// A set's name with its table's, as nft commands have it.
fn set_name(set: &Value) -> Option<String> {
    let (family, name) = (set["family"].as_str()?, set["name"].as_str()?);
    Some(format!("{family} {TABLE} {name}"))
}

/// A set holds what this version cannot carry over.
#[derive(Debug, thiserror::Error)]
#[error(
    "nft set {set} holds {element}, which cannot be carried over; run `iptables-init uninstall` and install again"
)]
pub struct UnknownElement {
    /// The set, with its table.
    pub set: String,
    /// The element as nft lists it.
    pub element: String,
}

/// Empties every chain in place, so that neither a queued packet nor a set element is lost.
fn swap_rules(loaded: &Loaded, ruleset: &Ruleset) -> String {
    let chains = loaded.objects.iter().map(|object| &object["chain"]);
    chains
        .filter_map(|chain| Some((chain["family"].as_str()?, chain["name"].as_str()?)))
        // The netlink rule is replaced on its own, at once.
        .filter(|(_, name)| *name != QUEUE_CHAIN || ruleset.queue_rule() == QueueRule::Native)
        .map(|(family, name)| format!("flush chain {family} {TABLE} {name}\n"))
        .collect()
}

/// The sets and maps that a script declares, named with their tables.
fn sets_by_table(script: &str) -> Vec<String> {
    let mut table = "";
    let mut sets = Vec::new();
    for line in script.lines() {
        let line = line.trim();
        if let Some(rest) = line.strip_prefix("table ") {
            table = rest.trim_end_matches(" {");
        } else if let Some(rest) = ["set ", "map "].iter().find_map(|it| line.strip_prefix(it)) {
            let name = rest.split(' ').next().unwrap_or_default();
            sets.push(format!("{table} {name}"));
        }
    }
    sets
}

/// An element of a set from `nft -j` to the nft language.
fn element(value: &Value) -> Option<String> {
    if let Some(text) = value.as_str() {
        return Some(text.to_owned());
    }
    if let Some([key, value]) = value.as_array().map(Vec::as_slice) {
        return Some(format!("{} : {}", element(key)?, element(value)?));
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

/// How many rules each chain of rendered tables has, with its table's family.
fn rules_by_chain(text: &str) -> Vec<(String, String, usize)> {
    let mut chains: Vec<(String, String, usize)> = Vec::new();
    let (mut family, mut inside) = ("", false);
    for line in text.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("table ") {
            family = rest.split(' ').next().unwrap_or_default();
        } else if let Some(rest) = line.strip_prefix("chain ") {
            let name = rest.split(' ').next().unwrap_or_default();
            chains.push((family.to_owned(), name.to_owned(), 0));
            inside = !line.ends_with('}');
        } else if line == "}" {
            inside = false;
        } else if inside
            && !line.is_empty()
            && !line.starts_with("type ")
            && !line.starts_with('#')
            && let Some((.., count)) = chains.last_mut()
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
    use crate::ruleset::Kernel;
    use crate::settings::{Fail, Settings, Tcp};
    use kernel::marks::Marks;

    const KERNEL: Kernel = Kernel {
        queue_rule: QueueRule::Target,
        bridges: true,
    };
    const NATIVE: Kernel = Kernel {
        queue_rule: QueueRule::Native,
        ..KERNEL
    };

    fn settings() -> Settings {
        Settings {
            proxy_port: 15001,
            queue: 100,
            queues: Some(2),
            mark_mask: Marks::default(),
            bridge: Vec::new(),
            fail: Fail::Closed,
            tcp: Tcp::Auto,
        }
    }

    #[test]
    fn stamp_has_every_setting_and_layout_has_none() {
        let default = Stamp::of(&Ruleset::new(&settings(), KERNEL));
        for (other, kernel, what) in [
            (
                Settings {
                    proxy_port: 1,
                    ..settings()
                },
                KERNEL,
                "port",
            ),
            (
                Settings {
                    queue: 1,
                    ..settings()
                },
                KERNEL,
                "first queue",
            ),
            (
                Settings {
                    queues: Some(3),
                    ..settings()
                },
                KERNEL,
                "queues",
            ),
            (
                Settings {
                    fail: Fail::Open,
                    ..settings()
                },
                KERNEL,
                "fail",
            ),
            (settings(), NATIVE, "way to queue"),
        ] {
            let other = Stamp::of(&Ruleset::new(&other, kernel));
            assert_ne!(other.content, default.content, "{what}");
            assert_eq!(other.layout, default.layout, "{what}");
        }
    }

    #[test]
    fn stamp_reads_back_as_written() {
        let stamp = Stamp::of(&Ruleset::new(&settings(), KERNEL));
        assert_eq!(Stamp::parse(&stamp.to_string()), Some(stamp));
        assert_eq!(Stamp::parse("portreeve"), None);
    }

    #[test]
    fn set_elements_are_written_in_nft_syntax() {
        for (listed, expected) in [
            (r#""10.0.0.1""#, Some("10.0.0.1")),
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
            (
                r#"["pod0", "0a:58:0a:f4:00:01"]"#,
                Some("pod0 : 0a:58:0a:f4:00:01"),
            ),
            (r#"{"unheard": "of"}"#, None),
        ] {
            let value = serde_json::from_str(listed).unwrap();
            assert_eq!(element(&value).as_deref(), expected, "{listed}");
        }
    }

    #[test]
    fn link_names_are_quoted() {
        assert_eq!(quoted("1veth@x"), r#""1veth@x""#);
        assert_eq!(quoted("pod0 : 02::1"), r#""pod0" : 02::1"#);
    }

    #[test]
    fn rules_are_counted_without_comments_and_chain_types() {
        let text = "table inet x {\n chain a {\n type filter hook input priority 0;\n # why\n drop\n accept\n }\n chain b { type nat hook input priority 0; }\n chain c {\n }\n}\ntable bridge x {\n chain a {\n drop\n }\n}";
        let expected = [
            ("inet", "a", 2),
            ("inet", "b", 0),
            ("inet", "c", 0),
            ("bridge", "a", 1),
        ]
        .map(|(family, name, n)| (family.to_owned(), name.to_owned(), n));
        assert_eq!(rules_by_chain(text), expected);
    }
}
