//! The repository's own rules: every file has a `//!` line and a size limit, each crate has
//! its allowed dependencies, unsafe code is confined, every metric is documented.
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a file before its tests.
const FILE_BUDGET: usize = 400;
/// Lines of a file of tests or benches.
const TEST_BUDGET: usize = 500;

/// The files that may contain `unsafe`.
const UNSAFE: &[&str] = &["kernel/src/sys.rs"];

/// Which of our crates each crate may depend on, and all that the pure one may use.
const FENCES: &[(&str, &[&str])] = &[
    ("policy", &[]),
    ("controller", &["policy"]),
    ("kernel", &["policy"]),
    ("iptables-init", &["kernel"]),
    ("lab", &[]),
    ("testbed", &["lab"]),
    ("demo", &["policy", "controller", "lab"]),
    (
        "proxy",
        &["policy", "controller", "kernel", "iptables-init", "demo"],
    ),
    ("tidy", &[]),
];
const PURE: &[&str] = &["ipnet", "serde", "thiserror"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every file below `folder` with this ending, as path from the root and text.
fn files(folder: &str, ending: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in
            fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        {
            let path = entry.expect("a directory entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|found| found == ending) {
                let text = fs::read_to_string(&path).expect("readable text");
                let name = path
                    .strip_prefix(root())
                    .expect("below the root")
                    .display()
                    .to_string();
                found.push((name, text));
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<(String, String)> {
    let all: Vec<_> = FENCES
        .iter()
        .flat_map(|(member, _)| files(member, "rs"))
        .collect();
    assert!(all.len() > 40, "the walk found only {} files", all.len());
    all
}

/// Fails with every offender at once.
fn none(offenders: &[String], rule: &str) {
    assert!(
        offenders.is_empty(),
        "{rule}:\n  {}",
        offenders.join("\n  ")
    );
}

#[test]
fn every_file_opens_with_its_purpose() {
    let bare: Vec<_> = sources()
        .into_iter()
        .filter(|(_, text)| !text.starts_with("//! "))
        .map(|(name, _)| name)
        .collect();
    none(
        &bare,
        "a file opens with a `//!` line that says what it owns",
    );
}

#[test]
fn no_file_is_longer_than_its_budget() {
    let long: Vec<_> = sources()
        .into_iter()
        .filter_map(|(name, text)| {
            let is_source = name.contains("/src/") && !name.ends_with("/tests.rs");
            let counts = |line: &&str| !is_source || !line.starts_with("#[cfg(test)]");
            let lines = text.lines().take_while(counts).count();
            let budget = if is_source { FILE_BUDGET } else { TEST_BUDGET };
            (lines > budget).then(|| format!("{name}: {lines} lines"))
        })
        .collect();
    none(
        &long,
        "a file has at most 400 lines before its tests, a file of tests at most 500",
    );
}

#[test]
fn no_module_is_named_mod_rs() {
    let nameless: Vec<_> = sources()
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| name.ends_with("/mod.rs"))
        .collect();
    none(
        &nameless,
        "a module is `foo.rs` with `foo/`, never `mod.rs`",
    );
}

#[test]
fn unsafe_code_is_only_in_allowed_files() {
    let marked = |text: &str| {
        text.lines()
            .any(|line| !line.trim_start().starts_with("//") && line.contains("unsafe {"))
    };
    let strays: Vec<_> = sources()
        .into_iter()
        .filter(|(name, text)| {
            marked(text) && !UNSAFE.contains(&name.as_str()) && name != "tidy/tests/tidy.rs"
        })
        .map(|(name, _)| name)
        .collect();
    none(&strays, "unsafe code stands only in the files made for it");
}

#[test]
fn crates_have_only_their_allowed_dependencies() {
    let ours: Vec<_> = FENCES.iter().map(|(name, _)| *name).collect();
    let mut breaches = Vec::new();
    for (member, allowed) in FENCES {
        let manifest =
            fs::read_to_string(root().join(member).join("Cargo.toml")).expect("a manifest");
        let section = manifest
            .split("\n[")
            .find(|section| section.starts_with("dependencies]"))
            .unwrap_or_default();
        let named = section
            .lines()
            .skip(1)
            .filter_map(|line| line.split(['.', ' ', '=']).next())
            .filter(|name| !name.is_empty() && !name.starts_with('#'));
        for name in named {
            if ours.contains(&name) && !allowed.contains(&name) {
                breaches.push(format!("{member} must not depend on {name}"));
            }
            if *member == "policy" && !PURE.contains(&name) {
                breaches.push(format!("policy is pure and must not depend on {name}"));
            }
        }
    }
    none(&breaches, "crates keep their fences (ARCHITECTURE.md)");
}

/// Which modules at the top of `proxy/src` name which others, apart from their tests.
fn uses() -> BTreeMap<String, BTreeSet<String>> {
    const SOURCE: &str = "proxy/src/";
    let mut uses = BTreeMap::<_, BTreeSet<_>>::new();
    for (name, text) in files(SOURCE, "rs") {
        let inside = &name[SOURCE.len()..];
        let (module, _) = inside.split_once(['/', '.']).expect("an ending");
        if module == "main" || inside.ends_with("/tests.rs") {
            continue;
        }
        let text = text.split("mod tests").next().unwrap_or_default();
        let code = text.lines().filter(|line| !line.trim().starts_with("//"));
        let code: String = code.flat_map(|line| [line, "\n"]).collect();
        let used = uses.entry(module.to_owned()).or_default();
        for named in code.split("crate::").skip(1) {
            let (named, most) = match named.strip_prefix('{') {
                Some(list) => (list.split(';').next().unwrap_or_default(), usize::MAX),
                None => (named, 1),
            };
            let names = named.split(|c: char| !c.is_alphanumeric() && c != '_');
            used.extend(names.take(most).map(str::to_owned));
        }
    }
    let modules: BTreeSet<_> = uses.keys().cloned().collect();
    for (module, used) in &mut uses {
        used.retain(|name| name != module && modules.contains(name));
    }
    uses
}

#[test]
fn daemon_modules_have_no_cyclic_dependencies() {
    let mut uses = uses();
    assert!(uses.len() > 10, "found only {:?}", uses.keys());
    // Repeatedly removes what uses none of the remaining modules.
    while let Some((lowest, _)) = uses.iter().find(|(_, used)| used.is_empty()) {
        let lowest = lowest.clone();
        uses.remove(&lowest);
        uses.values_mut().for_each(|used| {
            used.remove(&lowest);
        });
    }
    let above = uses.iter();
    let circles: Vec<_> = above
        .map(|(it, used)| format!("{it} uses {used:?}"))
        .collect();
    none(
        &circles,
        "modules do not use each other in a circle, and among these is one: what both want goes below both",
    );
}

#[test]
fn every_metric_is_documented() {
    let source =
        fs::read_to_string(root().join("proxy/src/telemetry/metrics.rs")).expect("the metrics");
    let parts = files("proxy/src/telemetry/metrics", "rs").into_iter();
    let source = parts.fold(source, |all, (_, text)| all + &text);
    let page = fs::read_to_string(root().join("docs/metrics.md")).expect("docs/metrics.md");
    let registered: Vec<_> = source
        .split(".register")
        .skip(1)
        .filter_map(|call| call.split('"').nth(1))
        .filter(|name| {
            name.bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
        })
        .collect();
    assert!(registered.len() > 5, "found only {registered:?}");
    let unknown: Vec<_> = registered
        .iter()
        .filter(|name| !page.contains(&format!("portreeve_{name}")))
        .map(ToString::to_string)
        .collect();
    none(&unknown, "docs/metrics.md names every metric");
}

/// The documents for people, as path from the root and text.
fn pages() -> Vec<(String, String)> {
    let mut pages = files("docs", "md");
    pages.extend(
        ["README.md", "ARCHITECTURE.md", "deploy/README.md"].map(|name| {
            (
                name.to_owned(),
                fs::read_to_string(root().join(name)).expect(name),
            )
        }),
    );
    pages
}

/// Words in backticks that are sentences, as tests' names are. `a_{b,c}_d` stands for two, `a_b…` for one
/// that begins so.
fn tests_named_in(page: &str) -> Vec<String> {
    let is_name = |word: &&str| {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_{},…".contains(c);
        word.matches('_').count() >= 4 && word.chars().all(fits) && !word.starts_with("portreeve_")
    };
    let quoted = page.split('`').skip(1).step_by(2);
    let words = quoted
        .flat_map(|text| text.split([' ', ':']))
        .filter(is_name);
    words.flat_map(alternatives).collect()
}

fn alternatives(word: &str) -> Vec<String> {
    let parts = || {
        let (before, rest) = word.split_once('{')?;
        Some((before, rest.split_once('}')?))
    };
    match parts() {
        Some((before, (choice, after))) => choice
            .split(',')
            .map(|it| format!("{before}{it}{after}"))
            .collect(),
        None => vec![word.to_owned()],
    }
}

#[test]
fn tests_named_in_documents_exist() {
    let sources = sources();
    let exists = |name: &str| {
        let wanted = match name.strip_suffix('…') {
            Some(beginning) => format!("fn {beginning}"),
            None => format!("fn {name}("),
        };
        sources.iter().any(|(_, text)| text.contains(&wanted))
    };
    let (mut seen, mut missing) = (0, Vec::new());
    for (page, text) in pages() {
        for name in tests_named_in(&text) {
            seen += 1;
            let is_map = page == "ARCHITECTURE.md";
            if !is_map || !exists(&name) {
                missing.push(format!("{page}: {name}"));
            }
        }
    }
    none(
        &missing,
        "only ARCHITECTURE.md names tests, and they are there",
    );
    assert!(seen > 100, "ARCHITECTURE.md names only {seen} tests");
}

#[test]
fn test_names_have_at_most_eight_words() {
    const WORDS: usize = 8;
    let (mut seen, mut long) = (0, Vec::new());
    for (file, text) in sources() {
        for name in test_names(&text) {
            seen += 1;
            if name.split('_').count() > WORDS {
                long.push(format!("{file}: {name}"));
            }
        }
    }
    none(&long, "a test's name has at most eight words");
    assert!(seen > 600, "the walk found only {seen} tests");
}

/// The functions after a `test` attribute, and those in a list of the lab's tests.
fn test_names(source: &str) -> Vec<&str> {
    let marked = source
        .split("test]\n")
        .skip(1)
        .filter_map(|text| text.split_once("fn ")?.1.split_once('(').map(|it| it.0));
    let listed = source
        .split("testbed::tests![")
        .skip(1)
        .filter_map(|text| text.split_once(']'))
        .flat_map(|(list, _)| list.split(',').map(str::trim));
    let is_name = |name: &&str| {
        !name.is_empty() && name.chars().all(|c| c == '_' || c.is_ascii_alphanumeric())
    };
    marked.chain(listed).filter(is_name).collect()
}

#[test]
fn the_code_map_names_every_folder() {
    let map = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let folders = |within: &str| {
        let entries = fs::read_dir(root().join(within))
            .expect("a folder")
            .flatten();
        let folders = entries.filter(|entry| entry.path().is_dir());
        let names = folders.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names
            .filter(|name| !name.starts_with('.') && !["target", "src"].contains(&name.as_str()))
            .map(|name| format!("{within}{name}/"))
            .collect::<Vec<_>>()
    };
    let within = FENCES
        .iter()
        .flat_map(|(member, _)| folders(&format!("{member}/")));
    let mut unnamed = folders("");
    unnamed.extend(within);
    // By its name alone, where the map speaks of the crate that has it.
    let named = |folder: &str| {
        map.contains(&format!("`{folder}")) || map.contains(&format!("`{}/`", last(folder)))
    };
    unnamed.retain(|folder| !named(folder));
    none(&unnamed, "ARCHITECTURE.md says what each folder is for");
}

fn last(folder: &str) -> &str {
    folder
        .trim_end_matches('/')
        .rsplit('/')
        .next()
        .unwrap_or(folder)
}

#[test]
fn document_links_resolve() {
    let mut dead = Vec::new();
    for (page, text) in pages() {
        let folder = root().join(Path::new(&page).parent().unwrap_or_else(|| Path::new("")));
        for target in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split([')', '#']).next())
        {
            if !target.is_empty() && !target.contains("://") && !folder.join(target).exists() {
                dead.push(format!("{page}: {target}"));
            }
        }
    }
    none(&dead, "a link leads to a file that is there");
}
