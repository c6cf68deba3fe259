//! What is wrong with a file is said with its variable; good ones are tried in the lab, with a real collector.
use std::error::Error as _;
use std::fs;

use tempfile::TempDir;

use super::*;

#[test]
fn invalid_tls_file_names_its_variable() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("ca.pem");
    let files = Files {
        authorities: Some(File {
            variable: "CA",
            path: path.clone(),
        }),
        own: None,
    };
    let refused = |url| {
        let error = connector(url, &files, Transport::Grpc).err()?;
        let cause = error.source().map(ToString::to_string).unwrap_or_default();
        Some(format!("{error}: {cause}"))
    };
    let section = |label: &str| format!("-----BEGIN {label}-----\nAAAA\n-----END {label}-----\n");
    for (content, expected) in [
        (None, "no certificate"),
        (Some(String::new()), "no certificate"),
        (Some(section("PRIVATE KEY")), "no certificate"),
        (Some(section("CERTIFICATE")), "cannot be used"),
    ] {
        if let Some(content) = content {
            fs::write(&path, content).unwrap();
        }
        let said = refused("https://collector:4317").expect("refused");
        for part in ["CA names", "ca.pem", expected] {
            assert!(said.contains(part), "{part:?} in {said}");
        }
        assert_eq!(refused("http://collector:4317"), None);
    }
}
