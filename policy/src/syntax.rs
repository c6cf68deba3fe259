//! The names that the API server accepts: label keys and values, port names, object names.
//!
//! Each function returns what is wrong, or nothing. After apimachinery's `util/validation`.

/// What is wrong with `key` as a label key: an optional DNS prefix and `/`, then 1 to 63
/// characters.
pub(crate) fn label_key_fault(key: &str) -> Option<String> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    if let Some(fault) = prefix.and_then(dns_subdomain_fault) {
        return Some(format!("the prefix of the label key {key:?} {fault}"));
    }
    if name.is_empty() {
        return Some(format!("the label key {key:?} has no name"));
    }
    if name.contains('/') {
        return Some(format!("the label key {key:?} has more than one slash"));
    }
    label_word_fault(name).map(|fault| format!("the label key {key:?} {fault}"))
}

/// What is wrong with `value` as a label value: empty, or up to 63 characters.
pub(crate) fn label_value_fault(value: &str) -> Option<String> {
    if value.is_empty() {
        return None;
    }
    label_word_fault(value).map(|fault| format!("the label value {value:?} {fault}"))
}

/// What is wrong with `name` as a container port's name (an IANA service name, RFC 6335).
pub(crate) fn port_name_fault(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("is empty")
    } else if name.len() > 15 {
        Some("is longer than 15 characters")
    } else if !name
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    {
        Some("has characters other than a-z, 0-9 and -")
    } else if !name.bytes().any(|b| b.is_ascii_lowercase()) {
        Some("has no letter")
    } else if name.contains("--") {
        Some("has two hyphens in a row")
    } else if name.starts_with('-') || name.ends_with('-') {
        Some("begins or ends with a hyphen")
    } else {
        None
    }
}

/// What is wrong with `name` as a DNS subdomain (RFC 1123): the name of most objects.
pub(crate) fn dns_subdomain_fault(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("is empty")
    } else if name.len() > 253 {
        Some("is longer than 253 characters")
    } else if !name.split('.').all(is_dns_word) {
        Some("is not a DNS subdomain (parts of a-z, 0-9 and -, joined by dots)")
    } else {
        None
    }
}

/// What is wrong with `name` as a DNS label (RFC 1123): the name of a namespace.
pub(crate) fn dns_label_fault(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("is empty")
    } else if name.len() > 63 {
        Some("is longer than 63 characters")
    } else if !is_dns_word(name) {
        Some("is not a DNS label (a-z, 0-9 and -, not at either end)")
    } else {
        None
    }
}

fn is_dns_word(word: &str) -> bool {
    !word.is_empty()
        && !word.starts_with('-')
        && !word.ends_with('-')
        && word
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

fn label_word_fault(word: &str) -> Option<&'static str> {
    if word.len() > 63 {
        return Some("is longer than 63 characters");
    }
    if !word
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    {
        return Some("has characters other than A-Z, a-z, 0-9, -, _ and .");
    }
    let ends_well = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_alphanumeric());
    if !ends_well(word.bytes().next()) || !ends_well(word.bytes().last()) {
        return Some("does not begin and end with a letter or digit");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_keys_are_qualified_names() {
        let long = "a".repeat(63);
        let prefix = format!("{}.b", "a".repeat(251));
        for good in ["a", "A_b.c-9", "kubernetes.io/metadata.name", "0/1", &long] {
            assert_eq!(label_key_fault(good), None, "{good}");
        }
        assert_eq!(
            label_key_fault(&format!("{prefix}/a")),
            None,
            "253 characters of prefix"
        );
        let (longer, longer_prefix) = (format!("{long}a"), format!("{prefix}c/a"));
        for (bad, why) in [
            ("", "empty"),
            ("a/", "no name"),
            ("/a", "empty prefix"),
            ("a/b/c", "two slashes"),
            ("-a", "begins with a hyphen"),
            ("a.", "ends with a dot"),
            ("a b", "space"),
            ("ä", "not ASCII"),
            ("A/b", "upper case in the prefix"),
            ("a_b/c", "underscore in the prefix"),
            ("a..b/c", "empty part of the prefix"),
            (&longer, "64 characters"),
            (&longer_prefix, "254 characters of prefix"),
        ] {
            assert!(label_key_fault(bad).is_some(), "{bad:?}: {why}");
        }
    }

    #[test]
    fn label_values_follow_the_api_syntax() {
        let long = "a".repeat(63);
        for good in ["", "a", "A_b.c-9", "0", &long] {
            assert_eq!(label_value_fault(good), None, "{good}");
        }
        let longer = format!("{long}a");
        for bad in ["-a", "a-", "_", "a/b", "a b", "a\n", "ä", &longer] {
            assert!(label_value_fault(bad).is_some(), "{bad:?}");
        }
    }

    #[test]
    fn port_names_are_iana_service_names() {
        for good in ["a", "http", "serve-80-tcp", "80a", "abcdefghijklmno"] {
            assert_eq!(port_name_fault(good), None, "{good}");
        }
        for bad in [
            "",
            "80",
            "HTTP",
            "a--b",
            "-a",
            "a-",
            "a_b",
            "abcdefghijklmnop",
            "a.b",
            "ä",
        ] {
            assert!(port_name_fault(bad).is_some(), "{bad:?}");
        }
    }

    #[test]
    fn object_names_are_dns_names() {
        for good in ["a", "deny-all", "v1.2", "0"] {
            assert_eq!(dns_subdomain_fault(good), None, "{good}");
        }
        for bad in [
            "",
            "A",
            "a_b",
            "-a",
            "a.",
            ".a",
            "a/b",
            "a\n",
            &"a".repeat(254),
        ] {
            assert!(dns_subdomain_fault(bad).is_some(), "{bad:?}");
        }
        for bad in ["", "a.b", "A", &"a".repeat(64)] {
            assert!(dns_label_fault(bad).is_some(), "{bad:?}");
        }
        assert_eq!(dns_label_fault("kube-system"), None);
    }
}
