//! YAML and JSON mean the same as to kubectl, and no input does harm.
use serde_json::json;

use super::*;

fn values(text: &str) -> Vec<Result<Value, String>> {
    documents(text)
        .into_iter()
        .map(|document| document.value.map_err(|problem| problem.problem))
        .collect()
}

#[test]
fn values_are_those_that_kubectl_reads() {
    for (text, expected, why) in [
        ("a: yes", json!({"a": true}), "YAML 1.1 booleans"),
        ("a: on", json!({"a": true}), "YAML 1.1 booleans"),
        ("a: \"yes\"", json!({"a": "yes"}), "quotes make a string"),
        ("a: 010", json!({"a": 8}), "a leading zero is octal"),
        ("a: 0x10", json!({"a": 16}), "hexadecimal"),
        (
            "a: 80.0",
            json!({"a": 80}),
            "a whole float is a whole number",
        ),
        (
            "a: 8e1",
            json!({"a": 80}),
            "a whole float is a whole number",
        ),
        ("a: 1.5", json!({"a": 1.5}), "other floats stay"),
        ("a: ~", json!({"a": null}), "null"),
        ("a:", json!({"a": null}), "null"),
        ("80: x", json!({"80": "x"}), "keys are strings"),
        (
            "a: 2024-01-01T00:00:00Z",
            json!({"a": "2024-01-01T00:00:00Z"}),
            "no dates",
        ),
        (
            "b: &x {c: 1}\na: *x",
            json!({"b": {"c": 1}, "a": {"c": 1}}),
            "aliases",
        ),
        (
            "b: &x {c: 1}\na: {<<: *x, d: 2}",
            json!({"b": {"c": 1}, "a": {"c": 1, "d": 2}}),
            "merge keys",
        ),
        (
            "\u{feff}a: 1",
            json!({"a": 1}),
            "a byte order mark is skipped",
        ),
        ("{\"a\": [1, 2.0]}", json!({"a": [1, 2]}), "JSON"),
        (
            "{a: [1, 2.0]}",
            json!({"a": [1, 2]}),
            "YAML that begins with a brace",
        ),
        (
            "a: |\n  x\n  --- y\n",
            json!({"a": "x\n--- y\n"}),
            "an indented marker is text",
        ),
        (
            "%YAML 1.2\n---\na: 1\n",
            json!({"a": 1}),
            "a directive is no document",
        ),
        ("a: 1\n...\n", json!({"a": 1}), "an end marker ends"),
        (
            "metadata: {managedFields: [{a: 1}]}",
            json!({"metadata": {"managedFields": null}}),
            "bulk is dropped",
        ),
        (
            "labels: {env: prod}",
            json!({"labels": {"env": "prod"}}),
            "a label is not bulk",
        ),
    ] {
        assert_eq!(values(text), [Ok(expected)], "{text:?}: {why}");
    }
}

#[test]
fn document_numbers_include_empty_documents() {
    let text = "# licence\n---\na: 1\n---\n# nothing\n--- {b: 2}\n---\nc: [\n---\nd: 4\n";
    let seen: Vec<_> = documents(text)
        .into_iter()
        .map(|document| (document.number, document.value.ok()))
        .collect();
    assert_eq!(
        seen,
        [
            (1, Some(json!({"a": 1}))),
            (3, Some(json!({"b": 2}))),
            (4, None),
            (5, Some(json!({"d": 4}))),
        ]
    );
}

#[test]
fn empty_texts_hold_no_document() {
    for text in [
        "",
        "\n\n",
        "# only a comment\n",
        "---\n",
        "---\n---\n",
        "null",
        "\u{feff}",
    ] {
        assert_eq!(values(text), [], "{text:?}");
    }
}

#[test]
fn a_key_given_twice_is_an_error() {
    for text in ["a: 1\na: 2", "{\"a\": 1, \"a\": 2}", "b: {a: 1, \"a\": 1}"] {
        let [Err(problem)] = &values(text)[..] else {
            panic!("{text:?} was accepted")
        };
        assert!(
            problem.to_lowercase().contains("duplicate") || problem.contains("twice"),
            "{problem}"
        );
    }
}

#[test]
fn fault_line_counts_from_start_of_file() {
    let [_, Err(problem)] = &values("a: 1\n---\nb:\n  - c\n d: 1\n")[..] else {
        panic!("accepted")
    };
    assert!(problem.contains("line 5"), "{problem}");
}

#[test]
fn alias_bomb_is_rejected() {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..12 {
        let previous = format!("*a{}, ", level - 1).repeat(10);
        bomb.push_str(&format!("a{level}: &a{level} [{previous}]\n"));
    }
    let [Err(_)] = &values(&bomb)[..] else {
        panic!("accepted")
    };
}

#[test]
fn parser_never_panics() {
    let deep = "[".repeat(100_000);
    let deep_map = "a: ".repeat(50_000);
    let indented: String = (0..2_000)
        .map(|level| format!("{}a:\n", " ".repeat(level)))
        .collect();
    let nested_json = "{\"a\":".repeat(10_000);
    let mut nasty: Vec<String> = [
        "\0",
        "\u{1b}[31m",
        "- - - -",
        ": : :",
        "!!binary x",
        "!<tag> y",
        "&a *a",
        "*a",
        "? ?",
        "%",
        "%YAML",
        "---\n%",
        "a: !!int x",
        "a: .nan",
        "a: .inf",
        "a: 99999999999999999999999999",
        "{",
        "{\"a\"",
        "\"",
        "'",
        "|\n\t",
        "\t",
        "a:\tb",
        "- \u{2028}",
        "<<: 1",
        "<<: *x",
        "&a [*a]",
        "&a {a: *a}",
        "{{}: 1}",
        "[1]: 2",
        "? [1]\n: 2",
        "@",
        "`",
        "...",
        "...\n...",
        "!!set {a, b}",
        "!!null",
        "--- >\n",
        "---\t",
        "----",
        "---x",
        "a: 1e999",
        "a: -0",
        "a: 0o7",
        "a: 08",
        "a: 1_000",
        "a: 1:30",
        "\u{85}",
        "\r",
        "a: b\r\n---\r\nc: d\r\n",
        "{\"a\": 1e400}",
    ]
    .map(str::to_owned)
    .into();
    nasty.extend([deep, deep_map, indented, nested_json]);
    // A simple generator, so that a failure can be repeated.
    let mut seed = 7_u64;
    let alphabet: Vec<char> = "{}[]:,-?&*!|>'\"%@` \n\t#ab01.~<\u{0}\u{ff}"
        .chars()
        .collect();
    for _ in 0..2_000 {
        let text: String = (0..40)
            .map(|_| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                alphabet[(seed >> 33) as usize % alphabet.len()]
            })
            .collect();
        nasty.push(text);
    }
    for text in nasty {
        for document in documents(&text) {
            let gave_up = document
                .value
                .is_err_and(|problem| problem.problem.contains("gave up"));
            assert!(!gave_up, "the parser panicked on {text:?}");
        }
    }
}
