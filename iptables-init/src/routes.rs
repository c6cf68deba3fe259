//! Policy routing: packets that carry the divert mark belong to this host.
//!
//! One rule and one route per family, identified by routing protocol number 177.
//! Speaks to the kernel through `ip` (iproute2).
use serde_json::Value;

use kernel::command::{self, CommandError, Program};
use kernel::marks::Marks;

/// The routing table that holds the one route.
pub(crate) const ROUTE_TABLE: &str = "15001";
/// Who made the rule and the route (`/etc/iproute2/rt_protos`), so that only ours are removed.
const PROTOCOL: &str = "177";
const PREFERENCE: &str = "10";

/// An IP family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) const ALL: [Self; 2] = [Self::V4, Self::V6];

    fn flag(self) -> &'static str {
        match self {
            Self::V4 => "-4",
            Self::V6 => "-6",
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    /// Whether this network namespace speaks the family on `lo`, where the route points.
    pub(crate) fn enabled(self) -> bool {
        self == Self::V4
            || std::fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
                .is_ok_and(|value| value.trim() == "0")
    }
}

/// The families that packets can come in here.
pub(crate) fn enabled_families() -> impl Iterator<Item = Family> {
    Family::ALL.into_iter().filter(|family| family.enabled())
}

/// The arguments of `ip` that add the rule for the divert mark.
pub(crate) fn add_rule(family: Family, marks: Marks) -> Vec<String> {
    let fwmark = format!("{0:#x}/{0:#x}", marks.divert());
    words(&[
        family.flag(),
        "rule",
        "add",
        "pref",
        PREFERENCE,
        "fwmark",
        &fwmark,
        "lookup",
        ROUTE_TABLE,
        "protocol",
        PROTOCOL,
    ])
}

/// The arguments of `ip` that add the route.
pub(crate) fn add_route(family: Family) -> Vec<String> {
    words(&[
        family.flag(),
        "route",
        "add",
        "local",
        "default",
        "dev",
        "lo",
        "table",
        ROUTE_TABLE,
        "proto",
        PROTOCOL,
    ])
}

/// Our rules and our route of a family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct State {
    /// The rules' `fwmark/fwmask` and preference, as `ip` prints them.
    rules: Vec<(String, String)>,
    /// Whether the route is there.
    pub(crate) route: bool,
}

impl State {
    /// Reads it from the kernel.
    pub(crate) fn read(family: Family) -> Result<Self, CommandError> {
        let rules = list(&["-N", family.flag(), "-j", "rule", "show"])?
            .iter()
            .filter(|rule| rule["protocol"] == PROTOCOL && rule["table"] == ROUTE_TABLE)
            .map(|rule| {
                let mask = rule["fwmask"].as_str().unwrap_or("0xffffffff");
                let mark = rule["fwmark"].as_str().unwrap_or("0x0");
                (format!("{mark}/{mask}"), rule["priority"].to_string())
            })
            .collect();
        let routes = list(&[
            "-N",
            family.flag(),
            "-j",
            "route",
            "show",
            "table",
            ROUTE_TABLE,
        ])?;
        let route = routes.iter().any(|route| {
            route["protocol"] == PROTOCOL && route["dst"] == "default" && route["dev"] == "lo"
        });
        Ok(Self { rules, route })
    }

    /// Whether the rule for `marks` is there, and no other of ours.
    pub(crate) fn has_rule(&self, marks: Marks) -> bool {
        self.rules == [wanted_rule(marks)]
    }
}

/// The problem and the remedy if rule and route exist but do not bring packets to this host.
pub(crate) fn shadowed(family: Family) -> (String, String) {
    (
        format!(
            "another {} rule or route comes before the one for diverted packets, so that they leave the node",
            family.name()
        ),
        format!(
            "see `ip {0} rule show` and `ip {0} route show table {ROUTE_TABLE}`, and give other rules a preference above {PREFERENCE}",
            family.flag()
        ),
    )
}

/// Installs a family's rule and route; returns whether anything changed.
pub(crate) fn install(family: Family, marks: Marks) -> Result<bool, CommandError> {
    let state = State::read(family)?;
    // The new rule is added first, so that diverted packets always have a route.
    if !state.rules.contains(&wanted_rule(marks)) {
        ip(&add_rule(family, marks))?;
    }
    if !state.route {
        ip(&add_route(family))?;
    }
    for stale in state
        .rules
        .iter()
        .filter(|rule| **rule != wanted_rule(marks))
    {
        delete_rule(family, stale)?;
    }
    Ok(!(state.route && state.has_rule(marks)))
}

/// Removes a family's rules and route, for any marks; returns whether there were any.
pub(crate) fn uninstall(family: Family) -> Result<bool, CommandError> {
    let state = State::read(family)?;
    for rule in &state.rules {
        delete_rule(family, rule)?;
    }
    if state.route {
        let mut arguments = add_route(family);
        arguments[2] = "del".to_owned();
        ip(&arguments)?;
    }
    Ok(state.route || !state.rules.is_empty())
}

fn wanted_rule(marks: Marks) -> (String, String) {
    (
        format!("{0:#x}/{0:#x}", marks.divert()),
        PREFERENCE.to_owned(),
    )
}

fn delete_rule(
    family: Family,
    (fwmark, preference): &(String, String),
) -> Result<(), CommandError> {
    ip(&words(&[
        family.flag(),
        "rule",
        "del",
        "pref",
        preference,
        "fwmark",
        fwmark,
        "lookup",
        ROUTE_TABLE,
        "protocol",
        PROTOCOL,
    ]))
}

fn ip(arguments: &[String]) -> Result<(), CommandError> {
    command::run(Program::Ip, arguments, "").map(drop)
}

/// What `ip -j` lists; nothing for a routing table that does not exist.
fn list(arguments: &[&str]) -> Result<Vec<Value>, CommandError> {
    let text = match command::run(Program::Ip, arguments, "") {
        Ok(text) => text,
        Err(CommandError::Refused { message, .. })
            if message.contains("FIB table does not exist") =>
        {
            return Ok(Vec::new());
        }
        // Without IPv6 in the kernel there is no such family to list.
        Err(CommandError::Refused { message, .. }) if message.contains("not supported") => {
            return Ok(Vec::new());
        }
        Err(error) => return Err(error),
    };
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_str(&text).map_err(|source| CommandError::Run {
        program: Program::Ip,
        source: source.into(),
    })
}

fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|word| (*word).to_owned()).collect()
}
